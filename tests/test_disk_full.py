"""Jobs on a disk that fills up while they run: one error, and once there is room the same command goes on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.flags import TINY
from tests.images import png, write_parquet
from tests.isolated import Isolated, isolated
from tests.processes import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow]


class Disk:
    """A file system of 64 MiB that only the place sees at its path."""

    def __init__(self, place: Isolated, folder: Path):
        self._place, self.path = place, folder
        folder.mkdir()
        place.run(f"mount -t tmpfs -o size=64m none {folder}")
        self.seen = Path(f"/proc/{place.leader}/root{folder}")
        """The same from outside."""

    def fill(self) -> None:
        self._place.run(f"head --bytes 100M /dev/zero > {self.path}/filler", code=1)

    def free(self) -> None:
        (self.seen / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Isolated, Disk]]:
    with isolated(tmp_path) as place:
        yield place, Disk(place, tmp_path / "disk")


def fill_while(place: Isolated, disk: Disk, command: str, at_work: Callable[[], bool]) -> None:
    """The command, which must fail on the full disk, and then end well."""
    log = place.folder / "log"
    job = place.start(command, log)
    wait_for(lambda: at_work() or job.poll() is not None, "the job at work")
    disk.fill()
    assert job.wait(180) == 1, log.read_text()
    *_, last = log.read_text().splitlines()
    assert last.startswith("failed: "), log.read_text()
    assert "No space left" in last or "MiB are free" in last
    assert "free some space and give the same command again" in last
    disk.free()
    place.run(command, 240)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_training_goes_on_with_the_same_bits(
    disk: tuple[Isolated, Disk], parquet: Path, tmp_path: Path, workers: str
) -> None:
    place, full = disk
    flags = f"--data {parquet} {' '.join(TINY)} --epochs 60 --workers {workers} --name run"
    place.run(f"python jobs/train.py {flags} --storage {tmp_path}/calm", 240)
    metrics = full.seen / "run/metrics.jsonl"
    fill_while(
        place,
        full,
        f"python jobs/train.py {flags} --storage {full.path}",
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5,
    )
    assert len(metrics.read_text().splitlines()) == 60
    calm, filled = (load_file(path / "run/model/model.safetensors") for path in (tmp_path / "calm", full.seen))
    assert all(torch.equal(tensor, filled[name]) for name, tensor in calm.items())


def test_predictions_go_on_with_the_same_bytes(disk: tuple[Isolated, Disk], tmp_path: Path) -> None:
    place, full = disk
    given = tmp_path / "given/test-00000-of-00001.parquet"
    write_parquet(given, [png(seed, 32) for seed in range(4000)], list(np.arange(4000) % 10))
    command = f"python jobs/predict.py --input {given.parent} --output"
    place.run(f"{command} {tmp_path}/calm", 240)
    fill_while(place, full, f"{command} {full.path}/out", lambda: any(full.seen.glob("out/.parts/*.npz")))
    calm, filled = (path / "predictions" for path in (tmp_path / "calm", full.seen / "out"))
    names = [path.name for path in calm.iterdir()]
    assert names == [path.name for path in filled.iterdir()] == ["part-00000.parquet"]
    assert [(filled / name).read_bytes() for name in names] == [(calm / name).read_bytes() for name in names]


def test_a_sweep_goes_on_and_has_no_trial_that_failed_for_want_of_room(
    disk: tuple[Isolated, Disk], parquet: Path, tmp_path: Path
) -> None:
    place, full = disk
    flags = f"--data {parquet} {' '.join(TINY)} --epochs 60 --trials 3 --space augment --scheduler none"
    command = f"python jobs/tune.py {flags} --confirm 0 --publish none --name sweep --storage"
    place.run(f"{command} {tmp_path}/calm", 240)
    begun = [full.seen / f"sweep/trials/{number:05d}/metrics.jsonl" for number in range(3)]
    fill_while(
        place,
        full,
        f"{command} {full.path}",
        lambda: any(path.exists() and len(path.read_text().splitlines()) >= 5 for path in begun),
    )
    calm, filled = (json.loads((path / "sweep/sweep.json").read_text()) for path in (tmp_path / "calm", full.seen))
    for one, other in zip(calm["trials"], filled["trials"], strict=True):
        assert (one["state"], one["values"]) == (other["state"], other["values"])
        assert [row["val_loss"] for row in one["history"]] == [row["val_loss"] for row in other["history"]]
