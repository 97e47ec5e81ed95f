"""The page of a comparison: compare.html, from what compare.json holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar.report import compare_figures as plots
from cifar.report import figures, page
from cifar.report.page import duration, number

Contender = Mapping[str, Any]


def write_comparison_report(folder: Path, comparison: dict[str, Any], command: str = "") -> Path:
    """Write compare.html into `folder` and return its path. `comparison` is what compare.json holds.

    `command` is what a reader types to get the comparison again.
    """
    contenders = comparison["contenders"]
    ranked = [one for one in contenders if one["rank"]]
    pairs = {(pair["first"], pair["second"]): pair for pair in comparison["pairs"]}
    html = page.render(
        "compare.html",
        comparison=comparison,
        ranked=ranked,
        pairs=comparison["pairs"],
        matrix=matrix(ranked, pairs),
        lost=[(one, run) for one in contenders for run in one["runs"] if run["accuracy"] is None],
        once=[one for one in ranked if not one["seeds_known"]],
        networks=[one for one in contenders if one["kind"] == "network"],
        baselines=[one for one in contenders if one["kind"] == "baseline" and one["chosen"]],
        figures=_figures(ranked),
        command=command,
        versions=page.versions(),
        count=count,
        seconds_of=seconds_of,
        points=points,
        probability=probability,
    )
    return page.write(Path(folder) / "compare.html", html)


def matrix(ranked: Sequence[Contender], pairs: Mapping[tuple[str, str], Any]) -> list[list[dict[str, Any] | None]]:
    """How far the contender of the row is ahead of that of the column; None on the diagonal."""
    rows: list[list[dict[str, Any] | None]] = []
    for row in ranked:
        cells: list[dict[str, Any] | None] = []
        for column in ranked:
            if row is column:
                cells.append(None)
                continue
            ahead = (row["name"], column["name"]) in pairs
            pair = pairs[(row["name"], column["name"]) if ahead else (column["name"], row["name"])]
            difference = pair["difference"] if ahead else -pair["difference"]
            cells.append({"difference": difference, "kind": pair["verdict"]["kind"], "p": pair["p_holm"]})
        rows.append(cells)
    return rows


def _figures(ranked: Sequence[Contender]) -> dict[str, Any]:
    """SVG by name, with nothing where there is nothing to draw."""
    found: dict[str, Any] = {}
    if not ranked:
        return found
    rows = len(ranked)
    found["intervals"] = figures.svg(
        plots.intervals(ranked), (plots.WIDTH, 1.7 + 0.34 * rows), f"Test accuracy of {rows} contenders"
    )
    known = [one for one in ranked if one["varies"] and one["seed_sd"] is not None]
    if known:
        found["sources"] = figures.svg(
            plots.sources(known), (plots.WIDTH, 1.6 + 0.34 * len(known)), "What moves the accuracy of one run"
        )
    if any(plots.curve_of(one).epochs for one in ranked):
        height = max(3.4, 1.2 + 0.24 * rows)
        for over in ("epochs", "seconds"):
            title = f"Val accuracy over {over} of {rows} contenders"
            found[over] = figures.svg(plots.curves(ranked, over), (plots.WIDTH, height), title)
    return found


def seconds_of(one: Contender) -> str:
    """From the shortest run to the longest."""
    seconds = [run["train_seconds"] for run in one["runs"] if run["accuracy"] is not None]
    return f"{duration(min(seconds))} to {duration(max(seconds))}" if len(seconds) > 1 else ""


def count(value: float | None) -> str:
    """A large number in three digits: 1.90 M."""
    if value is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}\u00a0{unit}"
    return number(value)


def points(value: float) -> str:
    text = f"{100 * value:+.2f}".replace("-", "\u2212")
    return "0.00" if text[1:] == "0.00" else text


def probability(p: float) -> str:
    return "<\u00a00.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
