"""Runs on a local Ray cluster: the same bits as in this process, whatever is killed on the way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cifar.config import Config, ConfigError, RunFailed
from cifar.train import fit
from tests.flags import TINY
from tests.processes import below, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    from cifar.cluster import start_ray

    start_ray(verbose=False)
    yield
    ray.shutdown()


def named(config: Config, name: str, workers: str, **train: Any) -> Config:
    return replace(config, run=replace(config.run, name=name, workers=workers), train=replace(config.train, **train))


def assert_same_weights(one: Path | str, other: Path | str) -> None:
    first, second = (load_file(f"{path}/model/model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.usefixtures("ray_cluster")
def test_one_worker_trains_as_this_process_does(here: Config) -> None:
    bare, on_ray = fit(named(here, "bare", "0")), fit(named(here, "ray", "1"))
    assert_same_weights(bare.path, on_ray.path)
    timeless = [[{k: v for k, v in row.items() if "second" not in k} for row in run.history] for run in (bare, on_ray)]
    assert timeless[0] == timeless[1]
    folder = Path(on_ray.path)
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == on_ray.history
    assert list((folder / "tensorboard").iterdir())


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_evaluate_every_row_once_and_repeat_exactly(here: Config) -> None:
    runs = [fit(named(here, name, "2")) for name in ("first", "second")]
    assert [row["val_count"] for row in runs[0].history] == [44] * 3
    assert runs[0].history[-1]["val_accuracy"] > 0.9
    assert_same_weights(runs[0].path, runs[1].path)


@pytest.mark.usefixtures("ray_cluster")
def test_streaming_on_ray_equals_streaming_here_wherever_augmentation_runs(here: Config) -> None:
    """The pixels and their order are the same, so the weights are."""
    augment = replace(here.augment, rotate=10.0, cutout=4)
    bare = fit(replace(named(here, "bare", "0", loader="streaming"), augment=augment))
    on_ray = fit(replace(named(here, "ray", "1", loader="streaming"), augment=augment))
    by_data = fit(replace(named(here, "data", "1"), augment=replace(augment, augment_on="data")))
    assert_same_weights(bare.path, on_ray.path)
    assert_same_weights(bare.path, by_data.path)


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_restart_cannot_mend_fails_once_with_its_reason(here: Config) -> None:
    config = replace(named(here, "broken", "1"), optim=replace(here.optim, optimizer="sgd", lr=1e20))
    with pytest.raises(RunFailed, match=r"loss is not finite.*--lr"):
        fit(config)


@pytest.mark.usefixtures("ray_cluster")
def test_impossible_plans_are_refused_before_the_run_folder_exists(here: Config) -> None:
    with pytest.raises(ConfigError, match=r"--workers 44: needs 44 CPUs"):
        fit(named(here, "vast", "44"))
    assert not Path(here.run.storage).exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_uri_holds_the_run(here: Config, tmp_path: Path) -> None:
    config = replace(here, run=replace(here.run, storage=f"file://{tmp_path}/far", name="r", workers="1"))
    run = fit(config)
    assert run.path == f"file://{tmp_path}/far/r"
    assert (tmp_path / "far/r/model/model.safetensors").exists()
    assert (tmp_path / "far/r/metrics.jsonl").exists()


class Job:
    """`jobs/train.py` in a process of its own, long enough to be killed in the middle."""

    def __init__(self, config: Config, name: str, workers: int = 1):
        self.folder = Path(config.run.storage) / name
        self._command = [
            *(sys.executable, "jobs/train.py", "--data", config.data.data, *TINY),
            *("--epochs", "40", "--scales", "1", "--checkpoint-steps", "5", "--average", "ema"),
            *("--skip-easy", "0.3"),
            *("--workers", str(workers), "--storage", config.run.storage, "--name", name),
        ]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=ROOT, start_new_session=True)

    def epochs(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("undisturbed")
    job = Job(replace(config, run=replace(config.run, storage=str(storage))), "run")
    assert job.start().wait(240) == 0
    assert job.epochs() == 40
    return job.folder


def test_a_worker_killed_twice_changes_no_bit(here: Config, undisturbed: Path) -> None:
    job = Job(here, "run")
    driver = job.start()
    for after in (5, 15):
        wait_for(lambda after=after: job.epochs() >= after, f"epoch {after}")
        for pid in wait_for(lambda: below(driver.pid, "ray::RayTrainWorker"), "a worker"):
            os.kill(pid, signal.SIGKILL)
    assert driver.wait(240) == 0
    assert job.epochs() == 40
    assert_same_weights(job.folder, undisturbed)


def test_a_driver_killed_twice_changes_no_bit(here: Config, undisturbed: Path) -> None:
    job = Job(here, "run")
    for after in (5, 15):
        driver = job.start()
        wait_for(lambda after=after: job.epochs() >= after, f"epoch {after}")
        driver.kill()
        driver.wait()
    assert job.start().wait(240) == 0
    assert job.epochs() == 40
    assert_same_weights(job.folder, undisturbed)


def test_one_of_two_workers_killed_changes_no_bit(here: Config) -> None:
    """The other one waits for its gradients, and must be started again as well."""
    calm, killed = Job(here, "calm", workers=2), Job(here, "killed", workers=2)
    assert calm.start().wait(240) == 0
    driver = killed.start()
    wait_for(lambda: killed.epochs() >= 5, "epoch 5")
    os.kill(wait_for(lambda: below(driver.pid, "ray::RayTrainWorker"), "a worker")[0], signal.SIGKILL)
    assert driver.wait(240) == 0
    assert killed.epochs() == 40
    assert_same_weights(killed.folder, calm.folder)
