"""Comparisons on a local Ray cluster: every run once, whatever fails or is killed, with the numbers of its model."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar.compare.answers import FILE, read_answers
from cifar.data import Prepared
from cifar.evaluate import evaluate
from cifar.predictor import Predictor
from cifar.tune.ledger import read_trials
from jobs import compare
from tests.flags import TINY
from tests.processes import alive, below, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
Compare = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    from cifar.cluster import start_ray

    start_ray(verbose=False)
    yield
    ray.shutdown()


def flags_for(parquet: Path, folder: Path, *more: str) -> list[str]:
    where = ["--storage", str(folder), "--name", "comparison", "--json"]
    return ["--data", str(parquet), *TINY, "--scales", "1", "--epochs", "2", *where, *more]


@pytest.fixture
def run(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Run jobs/compare.py here; what is in compare.json, with what the job said and printed as `said`, `printed`."""

    def run(*more: str, code: int = 0) -> dict[str, Any]:
        found = compare.main(flags_for(parquet, tmp_path, *more))
        shown = capsys.readouterr()
        assert found == code, shown.err
        summary = json.loads((tmp_path / "comparison/compare.json").read_text())
        return summary | {"said": shown.err, "printed": shown.out}

    return run


def ended(folder: Path) -> set[str]:
    """Names of the runs that the driver has noted as ended."""
    return {trial.key for trial in read_trials(str(folder / "comparison/runs")) if trial.done}


def changed_at(folder: Path, name: str) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob(f"comparison/runs/*/{name}")}


@pytest.mark.usefixtures("ray_cluster")
def test_a_comparison_goes_on_with_more_seeds_and_asks_again_what_it_lost(
    run: Compare, tmp_path: Path, prepared: Prepared, parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--optimizers", "adam,muon", "--baselines", "knn,forest", "--features", "pixels")
    summary = run(*flags, "--seeds", "2")
    contenders = {one["name"]: one for one in summary["contenders"]}
    assert [contenders[name]["n"] for name in ("adam", "muon", "knn-pixels", "forest-pixels")] == [2, 2, 1, 2]
    for name in ("adam", "muon"):
        for one in contenders[name]["runs"]:
            assert one["accuracy"] == evaluate(Predictor(f"{one['path']}/model"), prepared).accuracy
            assert [row["epoch"] for row in one["curve"]] == [1, 2]
            assert one["val_accuracy"] == max(row["val_accuracy"] for row in one["curve"])
    assert contenders["knn-pixels"]["mean"] > 0.9, "its classes are colours"
    result = json.loads(summary["printed"].splitlines()[-1])
    assert [one["name"] for one in result["contenders"]] == [one["name"] for one in summary["contenders"]]
    html = unescape((tmp_path / "comparison/compare.html").read_text())
    assert all(pair["verdict"]["sentence"] in html for pair in summary["pairs"])

    before = changed_at(tmp_path, FILE)
    assert len(before) == 7
    again = run(*flags, "--seeds", "2")
    assert "all 7 runs were done before" in again["said"]
    assert again["contenders"] == summary["contenders"]
    assert changed_at(tmp_path, FILE) == before

    more = run(*flags, "--seeds", "3")
    assert {key: changed_at(tmp_path, FILE)[key] for key in before} == before
    assert [one["n"] for one in more["contenders"] if one["varies"]] == [3, 3, 3]

    trained = changed_at(tmp_path, "model/config.json"), changed_at(tmp_path, "metrics.jsonl")
    lost = tmp_path / "comparison/runs/00001-seed1" / FILE
    old = read_answers(str(lost.parent), summary["fingerprint"])
    lost.unlink()
    once_more = run(*flags, "--seeds", "3")
    new = read_answers(str(lost.parent), summary["fingerprint"])
    assert old is not None
    assert new is not None
    assert np.array_equal(old.predictions, new.predictions)
    assert changed_at(tmp_path, "model/config.json") == trained[0], "nothing is trained anew"
    assert [one["mean"] for one in once_more["contenders"]] == [one["mean"] for one in more["contenders"]]

    other = flags_for(parquet, tmp_path, "--optimizers", "adam,sgd")
    assert compare.main(other) == 2
    assert "holds a comparison with another contenders" in capsys.readouterr().err


@pytest.mark.usefixtures("ray_cluster")
def test_a_contender_that_fails_is_listed_and_the_others_are_ranked(run: Compare, tmp_path: Path) -> None:
    flags = ("--variants", "base", "small: widths=4,8", "wild: lr=1e30", "--seeds", "2")
    summary = run(*flags, code=1)
    assert [one["n"] for one in summary["contenders"]] == [2, 2, 0]
    wild = summary["contenders"][2]
    assert (wild["name"], wild["rank"]) == ("wild", None)
    assert all("the loss is not finite" in one["reason"] for one in wild["runs"])
    assert len(summary["pairs"]) == 1
    assert "failed: no run of wild came to an end" in summary["said"]
    assert "Traceback" not in summary["said"]
    assert json.loads(summary["printed"].splitlines()[-1])["contenders"][2]["rank"] is None
    assert "the loss is not finite" in (tmp_path / "comparison/compare.html").read_text()


def test_a_killed_comparison_ends_as_an_undisturbed_one(parquet: Path, tmp_path: Path) -> None:
    """The driver is killed once some runs are done and one is in its middle; the answers are the same, bit by bit."""
    flags = ("--optimizers", "adam,muon", "--baselines", "forest", "--features", "hog", "--seeds", "2")

    def command(folder: Path) -> list[str]:
        return [sys.executable, "jobs/compare.py", *flags_for(parquet, folder, *flags, "--epochs", "8")]

    def under_way() -> bool:
        done = ended(tmp_path / "killed")
        begun = {file.parent.name for file in (tmp_path / "killed").glob("comparison/runs/*/metrics.jsonl")}
        return bool(done) and bool(begun - done)

    driver = subprocess.Popen(command(tmp_path / "killed"), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(under_way, "runs under way")
    written, done_before = changed_at(tmp_path / "killed", FILE), ended(tmp_path / "killed")
    before = {key: written[key] for key in done_before}
    children = below(driver.pid, "ray::ImplicitFunc")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not any(map(alive, children)), "the runs' processes to end")
    assert not (tmp_path / "killed/comparison/compare.json").exists()
    for folder in ("killed", "calm"):
        done = subprocess.run(command(tmp_path / folder), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    after = changed_at(tmp_path / "killed", FILE)
    assert {key: after[key] for key in before} == before, "what was done is not done again"
    assert len(after) == 6
    killed, calm = (
        json.loads((tmp_path / name / "comparison/compare.json").read_text()) for name in ("killed", "calm")
    )
    for key in after:
        ours, theirs = (
            read_answers(str(tmp_path / name / "comparison/runs" / key), killed["fingerprint"])
            for name in ("killed", "calm")
        )
        assert ours is not None
        assert theirs is not None
        assert np.array_equal(ours.predictions, theirs.predictions), key
    assert [one["interval"] for one in killed["contenders"]] == [one["interval"] for one in calm["contenders"]]
