"""Storage that fails now and then costs no data and no run; storage that stays away, or is full, one clear error."""

import errno
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from pyarrow import fs

from cifar.cli import run_job
from cifar.config import RunFailed
from cifar.data import remote
from cifar.data.prepared import filesystem, join, read_file, write_file
from cifar.data.remote import PersistentStore, StorageFailed, WholeFiles, persist
from cifar.probe import require_room
from jobs import models, predict, train
from tests.flags import TINY
from tests.flaky_s3 import FlakyS3
from tests.processes import wait_for

ROOT = Path(__file__).parent.parent
BUSY = "When uploading object with key 'x' in bucket 'b': AWS Error SLOW_DOWN during PutObject operation: slow"
AWAY = "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect to server; Details: x"


class Clock:
    """Time that passes only in waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.waits = 0.0, []
        monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def failing(*errors: str) -> Callable[[], str]:
    """A request that fails with these errors, one after the other, and then succeeds."""
    left = list(errors)

    def request() -> str:
        if left:
            raise OSError(left.pop(0))
        return "done"

    return request


@pytest.mark.parametrize(
    "error",
    [
        BUSY,
        AWAY,
        "AWS Error INTERNAL_FAILURE during UploadPart operation: We encountered an internal error",
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
        "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached",
        "AWS Error NO_SUCH_UPLOAD during CompleteMultipartUpload operation: The specified upload does not exist",
        "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of PerformWork())",
    ],
)
def test_what_passes_is_repeated_after_growing_waits(error: str, clock: Clock) -> None:
    assert persist("s3://b/x", failing(*[error] * 8)) == "done"
    assert len(clock.waits) == 8
    assert max(clock.waits) <= remote.LONGEST_WAIT_SECONDS
    assert sum(clock.waits[4:]) > 4 * sum(clock.waits[:4])


@pytest.mark.parametrize(
    "error",
    [
        "AWS Error ACCESS_DENIED during PutObject operation: no",
        "AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: The specified bucket does not exist",
        "AWS Error UNKNOWN (HTTP status 507) during PutObject operation: Storage full",
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 60, Peer certificate cannot be verified",
        "[Errno 28] No space left on device",
    ],
)
def test_what_stays_is_said_at_once(error: str, clock: Clock) -> None:
    with pytest.raises(OSError, match=re.escape(error)):
        persist("s3://b/x", failing(error))
    assert clock.waits == []


def test_a_storage_that_stays_away_is_one_error_after_two_minutes(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RunFailed, match=r"s3://b/x: the storage has not answered for 1\d\d s .*the same command again"):
        persist("s3://b/x", failing(*[AWAY] * 1000))
    assert 100 < clock.now <= remote.PATIENCE_SECONDS
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("storage s3://b/x does not answer, trying again (")


def test_short_trouble_is_not_talked_about(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    persist("s3://b/x", failing(AWAY, AWAY, BUSY))
    assert not caplog.records


def test_an_error_after_the_bound_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(StorageFailed("s3://b/x: away")))
    assert isinstance(error, OSError)
    assert isinstance(error, RunFailed)
    assert str(error) == "s3://b/x: away"


@pytest.mark.usefixtures("clock")
def test_a_deletion_of_which_the_answer_was_lost_is_done() -> None:
    """Repeated, it finds nothing; a file that was never there is still an error."""
    store = PersistentStore.__new__(PersistentStore)
    there = {"b/x"}

    def delete_file(path: str) -> None:
        if path not in there:
            raise FileNotFoundError(path)
        there.remove(path)
        raise OSError(AWAY)

    store._store, store._scheme = SimpleNamespace(delete_file=delete_file), "s3"
    store.delete_file("b/x")
    assert not there
    with pytest.raises(FileNotFoundError):
        store.delete_file("b/x")


def test_a_list_of_checkpoints_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = fs.PyFileSystem(pickle.loads(pickle.dumps(WholeFiles()))), tmp_path / "snapshot.json"
    with files.open_output_stream(str(path)) as stream:
        stream.write(b"old")

    class FullDisk(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "open", lambda path, *_, **__: FullDisk(path, "w"), raising=False)
    with pytest.raises(OSError, match="No space left"), files.open_output_stream(str(path)) as stream:
        stream.write(b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Flags:
        pass

    def job(flags: Flags) -> dict[str, object]:
        """Help."""
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/r/metrics.jsonl")

    assert run_job(job, Flags, []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: [Errno 28] No space left on device: '/runs/r/metrics.jsonl'; free some space")


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(bytes(3 << 20))
    require_room(str(tmp_path), tmp_path)
    monkeypatch.setattr("cifar.probe.shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(RunFailed, match=r"no space left for a checkpoint of 3\.0 MiB \(1\.0 MiB are free\); free some"):
        require_room(str(tmp_path), tmp_path)


@pytest.fixture
def flaky(s3_server: str) -> Iterator[FlakyS3]:
    server = FlakyS3(int(unquote(s3_server).partition("127.0.0.1:")[2].partition("&")[0]), share=0.05, seed=3)
    yield server
    server.close()


def behind(flaky: FlakyS3, path: str) -> str:
    return f"s3://bucket/{path}?endpoint_override=http%3A%2F%2F127.0.0.1%3A{flaky.port}&scheme=http"


@pytest.mark.slow
def test_objects_stay_whole_when_a_fifth_of_the_requests_fail(flaky: FlakyS3, tmp_path: Path) -> None:
    flaky.share = 0.2
    folder, draws = behind(flaky, tmp_path.name), random.Random(1)
    contents = {f"{number}": draws.randbytes(size) for number, size in enumerate((0, 1, 10_000, 3 << 20, 12 << 20))}
    for name, data in contents.items():
        write_file(join(folder, name), data)
        assert read_file(join(folder, name)) == data
    files, root = filesystem(folder)
    listed = {info.base_name: info.size for info in files.get_file_info(fs.FileSelector(root))}
    assert listed == {name: len(data) for name, data in contents.items()}
    files.delete_dir(root)
    assert files.get_file_info(fs.FileSelector(root, allow_not_found=True)) == []
    assert sum(flaky.counts[kind] for kind in ("busy", "reset", "lost answer", "half answer", "silence")) > 0


@pytest.mark.ray
@pytest.mark.slow
def test_faults_and_an_outage_cost_no_run_and_no_bit(
    flaky: FlakyS3, s3_server: str, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, killed and resumed, published, and used for predictions, all on an S3 that fails, and is away for 30 s
    while the run trains: the same bits as on a disk."""
    flags = ["--data", str(parquet), *TINY, "--epochs", "8", "--scales", "1", "--name", "run"]
    assert train.main([*flags, "--workers", "0", "--storage", str(tmp_path)]) == 0
    there, direct = behind(flaky, tmp_path.name), f"s3://bucket/{tmp_path.name}/run/metrics.jsonl{s3_server}"

    def epochs() -> int:
        return len((read_file(direct) or b"").splitlines())

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "jobs/train.py", *flags, "--workers", "1", "--storage", there]
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True)

    driver = start()
    wait_for(epochs, "the first epoch")
    flaky.go_down(30)
    before = epochs()
    wait_for(lambda: not flaky.is_down and epochs() > before, "an epoch after the outage")
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert start().wait(120) == 0
    assert epochs() == 8
    assert flaky.counts["down"] > 0
    weights = read_file(join(there, "run/model/model.safetensors"))
    assert weights == (tmp_path / "run/model/model.safetensors").read_bytes()

    store = join(there, "models")
    assert models.main(["publish", join(there, "run"), "--name", "d", "--store", store]) == 0
    assert models.main(["promote", "d", "--store", store]) == 0
    data = (parquet / "test-00000-of-00001.parquet").read_bytes()
    write_file(join(there, "in/test.parquet"), data)
    write_file(str(tmp_path / "in/test.parquet"), data)
    found = []
    for base in (there, str(tmp_path)):
        flags = ["--model", "d", "--store", store, "--input", join(base, "in"), "--output", join(base, "out"), "--json"]
        capsys.readouterr()
        assert predict.main(flags) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["parts"])
    assert found[0] == found[1]
    for part in found[0]:
        assert read_file(join(there, f"out/{part['name']}")) == (tmp_path / "out" / part["name"]).read_bytes()
