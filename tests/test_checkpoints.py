"""Checkpoints without Ray Train: the best and the last are kept, and only whole ones are found."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cifar.checkpoints import Checkpoints, move
from cifar.config import Config, RunFailed
from cifar.data.prepared import filesystem, join, read_file
from cifar.local import LocalContext
from cifar.run_dir import RunDir
from cifar.train import fit


def make(folder: Path, text: str) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "state.pt").write_text(text)
    (folder / "model/config.json").write_text(text)
    return folder


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        (tmp_path / "checkpoints").mkdir()
        return str(tmp_path / "checkpoints")
    return f"s3://bucket/{tmp_path.name}/checkpoints{request.getfixturevalue('s3_server')}"


def names(path: str) -> list[str]:
    files, root = filesystem(path)
    from pyarrow import fs

    return sorted(info.base_name for info in files.get_file_info(fs.FileSelector(root, allow_not_found=True)))


def test_the_best_and_the_last_are_kept(path: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(path)
    assert checkpoints.last() is None
    assert checkpoints.best_score == -1
    for number, score in enumerate((0.5, 0.7, -1.0, 0.7, 0.6)):
        checkpoints.add(make(tmp_path / f"new{number}", str(number)), {"score": score})
    assert names(path) == ["checkpoint_000001", "checkpoint_000004"], "of equals the earlier one is the best"
    again = Checkpoints(path)
    last = again.last()
    assert last is not None
    assert (last / "state.pt").read_text() == (last / "model/config.json").read_text() == "4"
    assert again.best() == join(path, "checkpoint_000001")
    assert not again.best_is_last
    assert read_file(join(again.best(), "model/config.json")) == b"1"


def test_who_was_taken_over_adds_none(path: str, tmp_path: Path) -> None:
    """It was on a host that was cut off, say, and trains on though the run goes on elsewhere."""
    before, after = RunDir(path), RunDir(path)
    before.own()
    old = Checkpoints(path, before.require_owned)
    old.add(make(tmp_path / "first", "0"), {"score": 0.5})
    after.own()
    new = Checkpoints(path, after.require_owned)
    with pytest.raises(RunFailed, match="another process has taken this run over"):
        old.add(make(tmp_path / "old", "old"), {"score": 0.9})
    new.add(make(tmp_path / "new", "new"), {"score": 0.6})
    assert read_file(join(new.best(), "state.pt")) == b"new"
    assert Checkpoints(path).best() == new.best() == join(path, "checkpoint_000001")


def test_a_full_disk_is_told_by_its_errno(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the checkpoint comes from another file system, and is moved file by file."""

    def elsewhere(*paths: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    with monkeypatch.context() as patch:
        patch.setattr("cifar.checkpoints.os.rename", elsewhere)
        move(make(tmp_path / "moved", "text"), tmp_path / "there")
        assert (tmp_path / "there/model/config.json").read_text() == "text"
        assert not (tmp_path / "moved").exists()
        patch.setattr("cifar.checkpoints.shutil.copyfile", full)
        with pytest.raises(OSError, match="No space left") as failed:
            checkpoints.add(make(tmp_path / "new", "0"), {"score": 0.5})
    assert failed.value.errno == errno.ENOSPC
    assert names(str(tmp_path / "checkpoints")) == [".partial"], "which is no checkpoint"
    checkpoints.add(tmp_path / "new", {"score": 0.5})
    assert names(str(tmp_path / "checkpoints")) == ["checkpoint_000000"]


def test_one_that_begins_anew_is_alone(path: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(path)
    for number, score in enumerate((0.9, 0.7)):
        checkpoints.add(make(tmp_path / f"new{number}", str(number)), {"score": score})
    checkpoints.add(make(tmp_path / "new", "2"), {"score": 0.1}, alone=True)
    assert names(path) == ["checkpoint_000002"]
    assert checkpoints.best_is_last


def test_one_that_was_cut_off_is_none(path: str, tmp_path: Path) -> None:
    """Its report is written last; the next one takes its place."""
    checkpoints = Checkpoints(path)
    checkpoints.add(make(tmp_path / "first", "1"), {"score": 0.1})
    files, root = filesystem(join(path, "checkpoint_000001"))
    files.create_dir(root)
    with files.open_output_stream(f"{root}/state.pt") as stream:
        stream.write(b"half")
    again = Checkpoints(path)
    assert again.best_number == 0
    assert again.best_is_last
    if "://" not in path:
        shutil.rmtree(Path(path) / "checkpoint_000001")  # locally a rename shows a checkpoint, so that none is half
    again.add(make(tmp_path / "second", "2"), {"score": 0.2})
    last = Checkpoints(path).last()
    assert last is not None
    assert (last / "state.pt").read_text() == "2"


@pytest.mark.slow
def test_a_run_in_this_process_resumes_from_a_bucket(
    here: Config, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"s3://bucket/{tmp_path.name}{s3_server}"
    config = replace(here, run=replace(here.run, storage=storage, name="r"))
    report = LocalContext.report

    def report_and_die(self: LocalContext, metrics: dict[str, object], checkpoint: Path | None) -> None:
        report(self, metrics, checkpoint)
        if metrics["epoch"] == 2:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(LocalContext, "report", report_and_die)
        with pytest.raises(InterruptedError):
            fit(config)
    resumed = fit(config)
    whole = fit(here)
    weights = read_file(join(resumed.model, "model.safetensors"))
    assert weights == (Path(whole.model) / "model.safetensors").read_bytes()
    lines = (read_file(join(resumed.path, "metrics.jsonl")) or b"").splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
