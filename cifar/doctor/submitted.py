"""The doctor's own job, submitted to a cluster like any other: what it finds there, from the inside."""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar.doctor.finding import Finding, problem

SECONDS = 300
DRILL_SECONDS = 3600
"""With drills, most of which would be those that wait for nodes."""
STOP_SECONDS = 30
"""For a job that is stopped, to delete what it wrote; Ray's default is 3."""


def check_inside(address: str, folder: Path, argv: Sequence[str], seconds: float = SECONDS) -> list[Finding]:
    """Run `jobs/doctor.py` with these flags on the cluster at the address, from `folder`, for so long at most; its
    findings there."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    command = shlex.join(["python", "jobs/doctor.py", *argv, "--json"])
    try:
        client = JobSubmissionClient(address)
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        environment = {"working_dir": str(folder), "env_vars": variables}
        job = client.submit_job(entrypoint=command, runtime_env=environment)
    except (RuntimeError, ConnectionError, ValueError) as error:
        return [problem("submission", f"{address}: {' '.join(str(error).split())[:300]}")]
    try:
        status, log = wait(client, job, seconds)
    except BaseException:
        client.stop_job(job)
        raise
    found = findings_of(log)
    if found is not None:
        return found
    if status in (JobStatus.PENDING, JobStatus.RUNNING):
        client.stop_job(job)
        return [problem("submission", f"{job} has not ended in {seconds:.0f} s; look at it with `ray job logs {job}`")]
    lines = [line for line in log.splitlines() if line.strip()]
    return [problem("submission", f"{job} ended without findings: {lines[-1] if lines else status}")]


def wait(client: Any, job: str, seconds: float) -> tuple[Any, str]:
    """The job's status and log, once it has ended or so much time is over."""
    end = time.monotonic() + seconds
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < end:
        time.sleep(1.0)
    return status, client.get_job_logs(job)


def findings_of(log: str) -> list[Finding] | None:
    """Those in the last JSON object of a log; None if there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith('{"findings"'):
            return [Finding(**values) for values in json.loads(line)["findings"]]
    return None
