"""Sweeps on a local Ray cluster: every trial once, whatever fails or is killed."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar.config import Config
from cifar.data import Prepared
from cifar.model_dir import load_model
from cifar.ray_job import Blocks
from cifar.store import Store
from cifar.train import fit
from jobs import tune
from tests.processes import alive, below, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
SPACE = """
from cifar.tune import Choice, Float
SPACE = {"lr": Float(0.002, 0.05, log=True), "widths": Choice((4, 8), (8, 16)), "label_smoothing": Float(0.0, 0.2)}
"""
FIXED = ["--image-size", "16", "--depths", "2", "--scales", "1", "--optimizer", "adam"]
Search = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    from cifar.cluster import start_ray

    start_ray(verbose=False)
    yield
    ray.shutdown()


def flags_for(parquet: Path, folder: Path, space: str, *more: str) -> list[str]:
    (folder / "space.py").write_text(space)
    where = ["--storage", str(folder), "--name", "sweep", "--store", str(folder / "models")]
    return ["--data", str(parquet), "--space", str(folder / "space.py"), *FIXED, *where, "--json", *more]


@pytest.fixture
def search(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Search:
    """Run jobs/tune.py here; the sweep's sweep.json, with what the job printed as `printed`."""

    def run(*more: str, space: str = SPACE) -> dict[str, Any]:
        code = tune.main(flags_for(parquet, tmp_path, space, *more))
        shown = capsys.readouterr()
        assert code == 0, shown.err
        summary = json.loads((tmp_path / "sweep/sweep.json").read_text())
        return summary | {"printed": json.loads(shown.out.splitlines()[-1]), "said": shown.err}

    return run


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_ends_with_a_confirmed_published_winner(search: Search, tmp_path: Path, config: Config) -> None:
    """And every trial is a run like any other: the same bits as the same settings trained by themselves."""
    summary = search("--trials", "6", "--epochs", "4", "--confirm", "2,2", "--promote")
    trials = summary["trials"]
    assert [trial["number"] for trial in trials] == list(range(6))
    assert {trial["state"] for trial in trials} <= {"completed", "stopped"}
    assert summary["state"] == "finished"
    for trial in trials:
        folder = Path(trial["path"])
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == list(range(1, trial["epochs"] + 1))
        assert max(row["val_accuracy"] for row in rows) == trial["score"]
        assert load_model(folder / "model").metrics["val_accuracy"] == trial["score"]
        assert list((folder / "tensorboard").iterdir())
        assert (
            trial["epochs"] == 4 if trial["state"] == "completed" else trial["reason"].startswith("asha, after epoch")
        )
    confirmed = summary["confirmed"]
    assert [one["seeds"] for one in confirmed] == [[101, 102]] * 2
    assert confirmed[0]["mean"] == pytest.approx(sum(confirmed[0]["scores"]) / 2)
    assert confirmed[0]["mean"] >= confirmed[1]["mean"]
    best = max(trials, key=lambda trial: (trial["score"], -trial["number"]))
    assert summary["luck"]["search_score"] == best["score"]
    assert summary["winner"]["path"] == confirmed[0]["path"]
    assert (
        json.loads((Path(confirmed[0]["path"]) / "report.json").read_text())["accuracy"] == summary["test"]["accuracy"]
    )
    assert str(Store(str(tmp_path / "models")).resolve("parquet0@champion")) == summary["published"]
    assert "asha" in (tmp_path / "sweep/sweep.html").read_text()
    first = load_model(Path(trials[0]["path"]) / "model").info.config
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of two trials at a time has
    try:
        alone = fit(replace(first, run=replace(config.run, storage=str(tmp_path / "alone"))))
    finally:
        torch.set_num_threads(threads)
    epochs = trials[0]["epochs"]
    assert [row["val_loss"] for row in alone.history[:epochs]] == [row["val_loss"] for row in trials[0]["history"]]
    # The same command again trains nothing, reads test no more and publishes nothing.
    again = search("--trials", "6", "--epochs", "4", "--confirm", "2,2", "--promote")
    assert again["published"] == summary["published"]
    assert [trial["ended"] is None for trial in again["trials"]] == [False] * 6
    assert again["train_seconds"] == summary["train_seconds"]
    assert "all 6 trials were done before" in again["said"]


@pytest.mark.usefixtures("ray_cluster")
def test_trials_that_fail_are_listed_and_the_others_go_on(search: Search) -> None:
    space = """
from cifar.tune import Choice
SPACE = {"lr": Choice(0.01, 0.02, 1e30), "batch_size": Choice(44, 66, 500), "flip": Choice("random", "none")}
"""
    flags = ("--trials", "12", "--epochs", "2", "--widths", "8", "16", "--confirm", "1,1", "--publish", "none")
    summary = search(*flags, space=space)
    reasons = set()
    for trial in summary["trials"]:
        values = trial["values"]
        bad = values["lr"] > 1 or values["batch_size"] == 500 or values["flip"] == "none"
        assert (trial["state"] == "failed") == bad, trial
        if bad:
            assert trial["score"] is None
            reasons.add(trial["reason"].split(";")[0].split(" after")[0].split(":")[0])
    assert len(summary["trials"]) == 12
    assert reasons == {"the loss is not finite", "--batch-size 500", "--tta shift"}
    assert summary["winner"]["confirmed"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_of_failures_says_why(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = "from cifar.tune import Choice\nSPACE = {'lr': Choice(1e30, 2e30)}"
    assert tune.main(flags_for(parquet, tmp_path, space, "--trials", "2", "--epochs", "2")) == 1
    shown = capsys.readouterr()
    assert "no trial came to a model; the loss is not finite" in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.usefixtures("ray_cluster")
def test_cross_validation_scores_by_the_mean_and_retrains_the_best(search: Search) -> None:
    summary = search("--trials", "3", "--epochs", "2", "--folds", "3", "--confirm", "0", "--scheduler", "none")
    for trial in summary["trials"]:
        assert len(trial["folds"]) == 3
        assert trial["score"] == pytest.approx(sum(trial["folds"]) / 3)
        for number in (1, 2, 3):
            rows = (Path(trial["path"]) / f"fold-{number}/metrics.jsonl").read_text().splitlines()
            assert json.loads(rows[-1])["val_count"] in (146, 147), "a third of train and val"
    best = max(summary["trials"], key=lambda trial: (trial["score"], -trial["number"]))
    assert summary["winner"]["number"] == best["number"]
    assert summary["winner"]["path"].endswith(f"confirm/{best['number']:05d}-seed101"), (
        "no fold's model is of all the data"
    )
    assert summary["test"]["count"] == 60


@pytest.mark.usefixtures("ray_cluster")
def test_a_population_copies_its_best_and_goes_on_changed(search: Search) -> None:
    space = """
from cifar.tune import Float
SPACE = {"lr": Float(1e-6, 0.05, log=True), "label_smoothing": Float(0.0, 0.2)}
"""
    flags = ("--trials", "4", "--epochs", "6", "--search", "pbt", "--widths", "8", "16", "--confirm", "0")
    summary = search(*flags, space=space)
    assert [trial["state"] for trial in summary["trials"]] == ["completed"] * 4
    changed = [trial for trial in summary["trials"] if trial["mutations"]]
    assert changed
    for trial in changed:
        last = trial["mutations"][-1]
        assert last["from"] != trial["number"]
        assert 1e-6 <= last["values"]["lr"] <= 0.05
        model = load_model(Path(trial["path"]) / "model")
        assert model.info.config.optim.lr == last["values"]["lr"], "not of before, nor the copied one's"
        assert model.metrics["val_accuracy"] == trial["score"]
        epochs = [row["epoch"] for row in trial["history"]]
        assert epochs == sorted(set(epochs))
        assert epochs[-1] == trial["epochs"] == 6


@pytest.mark.usefixtures("ray_cluster")
def test_trials_of_two_workers_are_stopped_too(search: Search) -> None:
    flags = (
        "--trials",
        "3",
        "--epochs",
        "3",
        "--workers",
        "2",
        "--confirm",
        "0",
        "--publish",
        "none",
        "--at-once",
        "1",
    )
    summary = search(*flags)
    assert "each with 2 workers" in summary["plan"]
    assert all(trial["state"] in ("completed", "stopped") for trial in summary["trials"])
    for trial in summary["trials"]:
        assert trial["history"][-1]["val_count"] == 22, "over both workers"
        assert trial["epochs"] == 3 if trial["state"] == "completed" else trial["epochs"] < 3
        load_model(Path(trial["path"]) / "model")


def test_a_killed_sweep_goes_on_from_its_checkpoints(parquet: Path, tmp_path: Path) -> None:
    """The driver is killed twice; what a trial had in a checkpoint stays as it was, seconds and all."""
    flags = flags_for(
        parquet, tmp_path, SPACE, "--trials", "6", "--epochs", "12", "--confirm", "1,1", "--publish", "none"
    )
    command = [sys.executable, "jobs/tune.py", *flags, "--scheduler", "none"]
    before: dict[str, list[str]] = {}
    for wanted in (1, 4):

        def begun(wanted: int = wanted) -> bool:
            """So many trials are beyond their fourth epoch, and one of them is in its middle."""
            rows = [len(read_lines(path)) for path in tmp_path.glob("sweep/trials/*/metrics.jsonl")]
            return sum(count >= 4 for count in rows) >= wanted and any(4 <= count < 10 for count in rows)

        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(begun, "trials under way")
        children = below(driver.pid, "ray::ImplicitFunc")
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        wait_for(lambda gone=children: not any(map(alive, gone)), "the trials' processes to end")
        for path in tmp_path.glob("sweep/trials/*/checkpoints"):
            last = max(path.glob("checkpoint_*"), default=None)
            if last is not None:
                history = json.loads((last / "position.json").read_text())["history"]
                before[path.parent.name] = [json.dumps(row) for row in history]
    assert before
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [(trial["number"], trial["state"], trial["epochs"]) for trial in summary["trials"]] == [
        (number, "completed", 12) for number in range(6)
    ]
    assert any(trial["resumed"] for trial in summary["trials"])
    for name, rows in before.items():
        assert read_lines(tmp_path / "sweep/trials" / name / "metrics.jsonl")[: len(rows)] == rows, name


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


@pytest.mark.usefixtures("ray_cluster")
def test_trials_map_one_copy_of_the_images(prepared: Prepared) -> None:
    blocks = Blocks.of(prepared.table("train", ["image", "label", "index"]))
    table = blocks.read(0, prepared.counts["train"])
    address = table.column("image").chunk(0).buffers()[1].address
    (place,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if address in addresses(line)]
    assert "/dev/shm" in place or "plasma" in place


def addresses(line: str) -> range:
    """Of a line of /proc/PID/maps."""
    start, _, end = line.split(" ", 1)[0].partition("-")
    return range(int(start, 16), int(end, 16))
