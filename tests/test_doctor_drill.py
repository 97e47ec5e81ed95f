"""Drills: what they find, that they can fail, whom they may kill, and that nothing of them stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cifar.config import Config, RunConfig
from cifar.data.prepared import exists, join, write_file
from cifar.doctor import drill
from cifar.doctor.drill import judge, limited, run_drills, scratch, try_drill
from cifar.doctor.fault import Killer, Killers
from cifar.doctor.small_runs import Drill, Outcome, drills, repeats_bits, trained
from jobs import doctor
from tests.processes import alive, below, wait_for

ROOT = Path(__file__).parent.parent


def made_up(run: Any) -> Drill:
    return Drill(
        check="drill x",
        doing="doing x",
        victim="an x",
        actor="X",
        same="the same",
        run=run,
        middle=lambda name: True,
    )


def judged(outcome: Outcome, **fault: Any) -> tuple[str, str]:
    calm = Outcome({"weights": b"1", "metrics": [1.0]})
    facts: Any = SimpleNamespace(**({"killed": True, "struck": True, "error": ""} | fault))
    found = judge(made_up(None), calm, outcome, facts, [1.0, 2.0])
    return found.level, found.text


def test_only_a_run_that_was_struck_and_came_to_the_same_is_well() -> None:
    same = {"weights": b"1", "metrics": [1.0]}
    level, text = judged(Outcome(same))
    assert (level, text) == ("ok", "doing x: an x was killed, the results are the same (2 s, undisturbed 1 s)")
    level, text = judged(Outcome(same | {"weights": b"2"}))
    assert level == "problem"
    assert "other results after an x was killed: weights;" in text
    level, text = judged(Outcome({"weights": b"1"}), killed=False, struck=False)
    assert level == "problem"
    assert "other results though nothing was killed: metrics;" in text


@pytest.mark.parametrize(
    ("killed", "fault", "why"),
    [
        (Outcome({"weights": b"1", "metrics": [1.0]}), {"killed": False, "struck": False}, "the run ended before an x"),
        (Outcome({"weights": b"1", "metrics": [1.0]}), {"struck": False}, "the run ended before an x"),
        (Outcome({"weights": b"1", "metrics": [1.0]}, recovered=False), {}, "the run ended before an x"),
        (Outcome({"weights": b"1", "metrics": [1.0]}), {"struck": False, "error": "no answer"}, "no answer"),
    ],
)
def test_a_fault_that_came_too_late_is_not_tried(killed: Outcome, fault: dict[str, Any], why: str) -> None:
    level, text = judged(killed, **fault)
    assert level == "warning"
    assert text.startswith(f"not tried: {why}")


def test_a_run_that_does_not_end_is_a_problem_and_the_last_drill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(name: str) -> Outcome:
        while True:
            try:
                time.sleep(60)
            except Exception:  # as some loops do
                continue

    monkeypatch.setattr(drill, "RUN_SECONDS", 1)
    monkeypatch.setattr(drill, "Fault", lambda *_: nullcontext())
    monkeypatch.setattr(drill, "drills", lambda *_: [made_up(hang), made_up(hang)])
    found = list(run_drills(Config(run=RunConfig(storage=str(tmp_path)))))
    assert [finding.level for finding in found] == ["problem", "warning"]
    assert "doing x has not ended in 1 s" in found[0].text
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_undisturbed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "Fault", lambda *_: nullcontext())

    def fail(name: str) -> Outcome:
        raise OSError("disk on fire")

    found = try_drill(made_up(fail), Killers())
    assert (found.level, found.text) == ("problem", "doing x fails undisturbed: OSError: disk on fire")


def test_bits_are_compared_where_every_node_comes_to_the_same(tmp_path: Path) -> None:
    head = {"memory": 1.0}
    assert repeats_bits([head, {"CPU": 4.0}, {"CPU": 4.0}])
    assert not repeats_bits([head, {"CPU": 4.0}, {"CPU": 8.0}])
    assert not repeats_bits([{"CPU": 4.0, "GPU": 1.0}])
    rows = [{"epoch": 1, "val_count": 9, "val_loss": 0.1, "seconds": 1.0}]
    changed = [rows[0] | {"val_loss": 0.1000001, "seconds": 2.0}]
    assert trained(rows, str(tmp_path), exact=False) == trained(changed, str(tmp_path), exact=False)
    assert trained(rows, str(tmp_path), exact=True) != trained(changed, str(tmp_path), exact=True)
    assert trained(rows, str(tmp_path), exact=False) != trained(rows * 2, str(tmp_path), exact=False)


def test_only_processes_of_the_own_job_are_killed() -> None:
    def start(title: str, job: str) -> subprocess.Popen[bytes]:
        started = subprocess.Popen([title, "60"], executable="/bin/sleep", env={"RAY_JOB_ID": job})
        wait_for(lambda: Path(f"/proc/{started.pid}/cmdline").read_bytes().startswith(title.encode()), "its title")
        return started

    processes = [start("ray::Worker.run", "01"), start("ray::Worker.run", "02"), start("ray::Other", "01")]
    try:
        own, others, another = (Killer().kill(process.pid, "Worker", "01") for process in processes)
        assert (own, others, another) == (True, False, False)
        assert processes[0].wait(10) == -signal.SIGKILL
        assert [process.poll() for process in processes[1:]] == [None, None]
        assert not Killer().kill(processes[0].pid, "Worker", "01"), "of one that is gone"
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_drills_write_is_deleted_whatever_happens(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_CACHE", "/before")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").write_text("kept")

    def interrupted() -> None:
        with scratch(str(tmp_path / "runs")) as folder:
            assert os.environ["CIFAR_CACHE"] == f"{folder}/cache"
            write_file(join(folder, "a/b"), b"")
            raise error

    with pytest.raises(error):
        interrupted()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
    assert os.environ["CIFAR_CACHE"] == "/before"


def test_a_storage_that_was_not_there_is_not_there_again(tmp_path: Path) -> None:
    with scratch(str(tmp_path / "runs")) as folder:
        write_file(join(folder, "a"), b"")
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_left_as_it_was(s3_server: str) -> None:
    with scratch(f"s3://bucket/runs{s3_server}") as folder:
        write_file(join(folder, "a/b"), b"")
        assert exists(folder)
    assert not exists(folder)


def test_a_time_limit_leaves_no_alarm_behind() -> None:
    with limited("late"):
        pass
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.alarm(0) == 0


def test_workers_that_are_none_of_rays_cannot_be_drilled(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--drill", "--workers", "0"]) == 2
    assert "--drill: kills workers of Ray's, and --workers 0 has none; drop one" in capsys.readouterr().err


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Drill]]:
    """The drills on a local Ray, by what they do."""
    import ray

    from cifar.cluster import start_ray

    start_ray(verbose=False)
    with scratch(str(tmp_path_factory.mktemp("storage"))) as folder:
        yield {one.doing: one for one in drills(folder, False)}
    ray.shutdown()


@pytest.fixture(scope="module")
def killers(found: dict[str, Drill]) -> Iterator[Killers]:
    with closing(Killers()) as made:
        yield made


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "doing",
    [
        "training on 1 worker",
        "a sweep of 2 trials",
        "predicting 256 images",
    ],
)
def test_a_process_is_killed_and_the_results_are_the_same(
    found: dict[str, Drill], killers: Killers, doing: str
) -> None:
    finding = try_drill(found[doing], killers)
    assert finding.level == "ok", finding
    assert "was killed" in finding.text


@pytest.mark.ray
@pytest.mark.slow
def test_a_drill_fails_where_nothing_is_started_again(
    found: dict[str, Drill], killers: Killers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifar.train.MAX_FAILURES", 0)
    whole = found["training on 1 worker"]
    finding = try_drill(
        replace(
            whole,
            run=lambda name: Outcome({}) if name == "calm" else whole.run("killed-again"),
            middle=lambda name: whole.middle("killed-again"),
        ),
        killers,
    )
    assert finding.level == "problem"
    assert "training on 1 worker fails after the worker was killed: RunFailed" in finding.text


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_drill_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    command = [sys.executable, "jobs/doctor.py", "--drill", "--storage", str(tmp_path)]
    job = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    begun = ".drill-*/train-1-calm/metrics.jsonl"
    wait_for(lambda: list(tmp_path.glob(begun)) or job.poll() is not None, "an epoch")
    workers = below(job.pid, "ray::RayTrainWorker")
    job.send_signal(signal.SIGINT)
    assert job.wait(60) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    wait_for(lambda: not any(map(alive, workers)), "the end of its processes")
