"""The page of a comparison: says what compare.json holds; opens offline; stands every comparison that can happen."""

import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cifar.report import write_comparison_report
from cifar.report.compare import count, matrix
from cifar.report.compare_figures import apart, curve_of, style
from tests.comparisons import SETTINGS, make_comparison
from tests.test_report import NASTY, Page

BASELINES = [f"{name}-{features}" for features in ("pixels", "hog") for name in ("logistic", "svm", "forest", "knn")]
TWELVE = [*list(SETTINGS)[:4], *BASELINES]


def written(folder: Path, comparison: dict[str, Any]) -> str:
    return write_comparison_report(folder, comparison, command="python jobs/compare.py --seeds 3").read_text()


def text_of(html: str) -> str:
    """Without tags, spaces made one."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html.split("<body>")[1])).split())


def assert_offline(page: Page) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(" not in page.text


@pytest.mark.parametrize("number", [2, 3, 7, 12])
def test_every_number_of_contenders_has_its_page(tmp_path: Path, number: int) -> None:
    levels = {name: 1.2 - 0.1 * place for place, name in enumerate(TWELVE[:number])}
    comparison = make_comparison(tmp_path, levels)
    html = written(tmp_path, comparison)
    page = Page(html)
    assert_offline(page)
    assert html.count("<svg") == 4
    for one in comparison["contenders"]:
        assert html.count(one["name"]) >= 5
        assert f"{100 * one['mean']:.2f}" in html
    assert len(comparison["pairs"]) == number * (number - 1) // 2
    for pair in comparison["pairs"]:
        assert pair["verdict"]["sentence"] in page.text
    assert ("All 1 pair," in text_of(html)) == (number == 2)


def test_one_seed_is_said_where_it_matters(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path, {"muon": 1.2, "adam": 0.6, "sgd": 1.2}, seeds=1, images=500, seed_sd=0.0)
    html = written(tmp_path, comparison)
    assert {pair["verdict"]["kind"] for pair in comparison["pairs"]} == {"these", "open"}
    text = text_of(html)
    assert "ran with one seed: how much another seed would change is unknown" in text
    assert "of these runs" in text
    assert 'id="sources"' not in html, "there is nothing to tell seeds from images by"
    assert text.count("unknown") >= 5


def test_runs_that_are_missing_are_listed_with_their_reasons(tmp_path: Path) -> None:
    lost = {("adam", 1): "the loss is not finite; lower --lr", **{("sgd", seed): "out of memory" for seed in range(3)}}
    comparison = make_comparison(tmp_path, {"muon": 1.2, "adam": 0.6, "sgd": 1.0}, lost=lost)
    assert [one["rank"] for one in comparison["contenders"]] == [1, 2, None]
    assert [one["n"] for one in comparison["contenders"]] == [3, 2, 0]
    text = text_of(written(tmp_path, comparison))
    assert "4 of 9 runs did not come to an end and count nowhere. Of sgd there is none at all." in text
    assert "the loss is not finite; lower --lr" in text
    assert text.count("out of memory") == 3


def test_a_comparison_without_any_run_still_says_why(tmp_path: Path) -> None:
    lost = {(name, seed): "out of memory" for name in ("muon", "adam") for seed in range(3)}
    html = written(tmp_path, make_comparison(tmp_path, {"muon": 1.2, "adam": 0.6}, lost=lost))
    assert "No run came to an end" in html
    assert html.count("out of memory") == 6
    assert "<svg" not in html


@pytest.mark.parametrize("nasty", NASTY)
def test_names_from_anywhere_are_text(tmp_path: Path, nasty: str) -> None:
    comparison = make_comparison(tmp_path, {"muon": 1.2, "adam": 0.6})
    old = comparison["contenders"][0]["name"]
    comparison["contenders"][0]["name"] = nasty
    comparison["data"] = nasty
    for pair in comparison["pairs"]:
        pair |= {end: nasty if pair[end] == old else pair[end] for end in ("first", "second")}
    for row in comparison["differing"].values():
        row[nasty] = row.pop(old)
    page = Page(written(tmp_path, comparison))
    assert_offline(page)
    assert nasty in page.text
    assert not page.all("script")
    assert not page.all("img")


def test_the_matrix_reads_both_ways(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path, {"muon": 1.2, "adam": 0.6, "sgd": 0.9})
    ranked = comparison["contenders"]
    rows = matrix(ranked, {(pair["first"], pair["second"]): pair for pair in comparison["pairs"]})
    for place, row in enumerate(rows):
        for other, cell in enumerate(row):
            if place == other:
                assert cell is None
                continue
            back = rows[other][place]
            assert cell is not None
            assert back is not None
            assert cell["difference"] == pytest.approx(ranked[place]["mean"] - ranked[other]["mean"])
            assert (cell["difference"], cell["kind"]) == (-back["difference"], back["kind"])


def test_a_curve_is_the_mean_of_the_runs_that_reached_the_epoch() -> None:
    def run(*values: float, accuracy: float | None = 0.5) -> dict[str, Any]:
        rows = [
            {"epoch": epoch, "val_accuracy": value, "train_seconds": 10.0 * epoch}
            for epoch, value in enumerate(values, 1)
        ]
        return {"curve": rows, "accuracy": accuracy}

    curve = curve_of({"runs": [run(0.2, 0.4, 0.6), run(0.4, 0.5), run(0.9, 0.9, accuracy=None)]})
    assert curve.epochs == [1, 2, 3]
    assert curve.mean == pytest.approx([0.3, 0.45, 0.6])
    assert (curve.low, curve.high) == ([0.2, 0.4, 0.6], [0.4, 0.5, 0.6])
    assert curve.seconds == [10.0, 20.0, 30.0]


def test_labels_keep_apart_and_near_their_lines() -> None:
    assert apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    heights = [0.1, 0.12, 0.14, 0.5, 0.51, 0.9]
    moved = apart(heights, 0.05)
    assert min(b - a for a, b in pairwise(moved)) >= 0.05 - 1e-9
    assert max(abs(a - b) for a, b in zip(moved, heights, strict=True)) <= 0.05
    assert apart([], 0.1) == []


def test_contenders_look_different_without_colour_too() -> None:
    styles = [style(rank) for rank in range(1, 19)]
    assert len(set(styles)) == 18
    assert len({(one.dashes, one.marker) if isinstance(one.dashes, str) else one[1:] for one in styles}) == 18


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, ""), (912, "912"), (1_899_320, "1.9\u00a0M"), (147_542_592, "148\u00a0M"), (2.5e9, "2.5\u00a0G")],
)
def test_large_numbers_are_short(value: float | None, shown: str) -> None:
    assert count(value) == shown
