"""What jobs promise when something happens to a host of the cluster, tried on hosts of this machine."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifar.config import Config
from cifar.model_dir import load_model
from cifar.train import fit
from tests.hosts import ROOT, Hosts, why_not
from tests.images import png, write_parquet
from tests.processes import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow]
# On one core a second for an epoch, which has a hundred steps to be disturbed at.
SLOW = ["--image-size", "16", "--widths", "16", "32", "--depths", "2", "--scales", "1", "--batch-size", "4"]
SMALL_PARTS = """
import sys
from cifar.batch import execute, source
source._PART_ROWS = 16
execute.HERE_PIXEL_BYTES = {here}
from jobs import predict
sys.exit(predict.main(sys.argv[1:]))
"""
SPACE = "from cifar.tune import Float\nSPACE = {'lr': Float(0.002, 0.05, log=True)}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(workers=2, cpus=3) as hosts:  # room for one worker of a run on each
        yield hosts


@pytest.fixture
def hosts(cluster: Hosts) -> Hosts:
    cluster.mend()
    return cluster


class Training:
    """`jobs/train.py` on the head, for as long as a test looks at it."""

    def __init__(self, hosts: Hosts, parquet: Path, folder: Path, workers: str):
        self._log, self._run = folder / "log", folder / "run"
        flags = ["--data", str(parquet), *SLOW, "--epochs", "100000", "--workers", workers]
        command = [sys.executable, "jobs/train.py", *flags, "--storage", str(folder), "--name", "run"]
        with self._log.open("wb") as log:
            self._driver = hosts.run(command, log)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *error: object) -> None:
        self._driver.kill()
        self._driver.wait(60)

    def epochs(self) -> list[int]:
        """By how many workers each was ended."""
        return [json.loads(line)["workers"] for line in read_lines(self._run / "metrics.jsonl")]

    def wait_for_epoch(self, workers: int) -> None:
        """One that is not done yet."""
        before = len(self.epochs())
        self.wait_for(lambda: workers in self.epochs()[before:], f"an epoch by {workers} workers")

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        wait_for(lambda: condition() or self._driver.poll() is not None, what, 180)
        assert self._driver.poll() is None, self._log.read_text()

    def reported(self) -> list[dict[str, Any]]:
        """With the checkpoints that are kept, the last one first."""
        (text,) = read_files(self._run / "checkpoints/checkpoint_manager_snapshot.json") or ["{}"]
        return [result["metrics"] for result in json.loads(text).get("checkpoint_results", [])]


def read_files(*paths: Path) -> list[str]:
    return [path.read_text() for path in paths if path.exists()]


def read_lines(path: Path) -> list[str]:
    return "".join(read_files(path)).splitlines()


def test_elastic_training_shrinks_when_a_host_is_killed_and_grows_when_it_is_back(
    hosts: Hosts, parquet: Path, tmp_path: Path
) -> None:
    with Training(hosts, parquet, tmp_path, workers="1:2") as training:
        training.wait_for_epoch(2)
        hosts.kill("w2")
        training.wait_for_epoch(1)
        hosts.start("w2")
        training.wait_for_epoch(2)
        epochs = [json.loads(line)["epoch"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
        assert epochs == list(range(1, len(epochs) + 1))


def test_training_of_two_workers_waits_for_a_host_whose_link_was_cut(
    hosts: Hosts, parquet: Path, tmp_path: Path
) -> None:
    """Neither side hears of the end of the other's connections; the host's supervisor joins it to the cluster anew."""
    with Training(hosts, parquet, tmp_path, workers="2") as training:
        training.wait_for_epoch(2)
        joined = hosts.joined("w2")
        hosts.cut("w2")
        wait_for(lambda: not hosts.processes("w1", "ray::RayTrainWorker"), "the end of the other worker")
        hosts.heal("w2")
        hosts.wait_until_joined("w2", joined)
        training.wait_for_epoch(2)


def test_training_leaves_a_host_that_gives_notice_with_a_checkpoint_of_that_step(
    hosts: Hosts, parquet: Path, tmp_path: Path
) -> None:
    with Training(hosts, parquet, tmp_path, workers="1:2") as training:
        training.wait_for_epoch(2)
        # A notice finds Ray's watcher, which starts beside the workers, at work.
        watched = [(name, "ray::PreemptionWatcher") for name in hosts.names]
        training.wait_for(lambda: any(hosts.processes(*at) for at in watched), "the watcher")
        hosts.drain("w2", 600)
        training.wait_for(lambda: any(row["score"] < 0 for row in training.reported()), "a checkpoint in mid-epoch")
        training.wait_for_epoch(1)
        assert not hosts.processes("w2", "ray::RayTrainWorker"), "long before it is taken away"


def test_training_goes_on_by_the_same_command_when_the_head_was_lost(
    hosts: Hosts, parquet: Path, tmp_path: Path
) -> None:
    """With the head goes the driver, and then what its workers run."""
    with Training(hosts, parquet, tmp_path, workers="2") as training:
        training.wait_for_epoch(2)
        hosts.kill("head")
        joined = {name: hosts.joined(name) for name in ("w1", "w2")}
        hosts.start("head")
        for name, before in joined.items():
            hosts.wait_until_joined(name, before)
    done = len(training.epochs())
    with Training(hosts, parquet, tmp_path, workers="2") as training:
        training.wait_for(lambda: len(training.epochs()) > done, "an epoch more")
        epochs = [json.loads(line)["epoch"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
        assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.parametrize("lose", [Hosts.kill, Hosts.cut], ids=["killed", "cut"])
def test_predictions_lose_a_host_and_change_no_byte(
    hosts: Hosts, tmp_path: Path, lose: Callable[[Hosts, str], None]
) -> None:
    given = tmp_path / "given/test-00000-of-00001.parquet"
    write_parquet(given, [png(seed, 16) for seed in range(1200)], list(np.arange(1200) % 10))

    def command(output: str, here: int) -> list[str]:
        flags = ["--input", str(given.parent), "--output", str(tmp_path / output)]
        return [sys.executable, "-c", SMALL_PARTS.format(here=here), *flags]

    subprocess.run(["taskset", "-c", "0", *command("calm", 1 << 40)], check=True, cwd=ROOT)
    driver = hosts.run(command("out", 0))
    wait_for(lambda: len(list(tmp_path.glob("out/.parts/*.npz"))) >= 10, "some parts")
    assert hosts.processes("w2", "ray::MapWorker")
    lose(hosts, "w2")
    assert driver.poll() is None
    assert driver.wait(300) == 0
    assert predictions(tmp_path / "out") == predictions(tmp_path / "calm")


def predictions(folder: Path) -> dict[str, bytes]:
    """What does not say when it was made."""
    kept = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in kept.items() if not name.startswith(("report", "figures", ".lock"))}


class Sweep:
    """`jobs/tune.py` on the head, which loses a host once a trial is in its middle."""

    def __init__(self, hosts: Hosts, parquet: Path, folder: Path, *flags: str):
        (folder / "space.py").write_text(SPACE)
        self._log, self._path = folder / "log", folder / "sweep"
        self._hosts = hosts
        command = [sys.executable, "jobs/tune.py", "--data", str(parquet), *SLOW[:-1], "22", "--epochs", "12"]
        command += ["--space", str(folder / "space.py"), "--scheduler", "none", "--storage", str(folder)]
        command += ["--name", "sweep", "--confirm", "0", "--publish", "none", *flags]
        with self._log.open("wb") as log:
            self._driver = hosts.run(command, log)

    def wait_for_trial(self, title: str) -> str:
        """The host of a process of this title, when a trial is in its middle."""

        def in_the_middle() -> bool:
            begun = self._path.glob("trials/*/metrics.jsonl")
            return any(3 <= len(read_lines(path)) < 9 for path in begun) or self._driver.poll() is not None

        wait_for(in_the_middle, "a trial")
        return next(name for name in ("w1", "w2") if self._hosts.processes(name, title))

    def trials(self, count: int) -> list[dict[str, Any]]:
        """All trials at the sweep's end: each has done its epochs, one of them in more than one go."""
        assert self._driver.wait(300) == 0, self._log.read_text()
        trials = json.loads((self._path / "sweep.json").read_text())["trials"]
        ended = [(trial["number"], trial["state"], trial["epochs"]) for trial in trials]
        assert ended == [(number, "completed", 12) for number in range(count)]
        assert any(trial["resumed"] for trial in trials)
        return trials


@pytest.mark.parametrize("lose", [Hosts.kill, Hosts.cut], ids=["killed", "cut"])
def test_a_sweep_loses_a_host_and_no_trial(
    hosts: Hosts, config: Config, parquet: Path, tmp_path: Path, lose: Callable[[Hosts, str], None]
) -> None:
    """Those that ran on it go on elsewhere from their checkpoints; all end as they do by themselves."""
    sweep = Sweep(hosts, parquet, tmp_path, "--trials", "6", "--workers", "1")
    lose(hosts, sweep.wait_for_trial("ray::ImplicitFunc"))
    trials = sweep.trials(6)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for trial in trials:
            same = load_model(Path(trial["path"]) / "model").info.config
            alone = fit(replace(same, run=replace(config.run, storage=str(tmp_path / f"{trial['number']}"))))
            assert [row["val_loss"] for row in alone.history] == [row["val_loss"] for row in trial["history"]]
    finally:
        torch.set_num_threads(threads)


def test_trials_of_two_workers_wait_for_a_host_that_comes_back(hosts: Hosts, parquet: Path, tmp_path: Path) -> None:
    sweep = Sweep(hosts, parquet, tmp_path, "--trials", "2", "--workers", "2", "--at-once", "1")
    lost = sweep.wait_for_trial("ray::ImplicitFunc")  # with it goes the controller of the workers
    hosts.kill(lost)
    hosts.start(lost)
    sweep.trials(2)
