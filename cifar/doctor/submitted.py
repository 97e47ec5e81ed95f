"""The doctor's own job, submitted to a cluster like any other: what it finds there, from the inside."""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar.doctor.finding import Finding, problem

SECONDS = 300


def check_inside(address: str, folder: Path, argv: Sequence[str]) -> list[Finding]:
    """Run `jobs/doctor.py` with these flags on the cluster at the address, from `folder`; its findings there."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    command = shlex.join(["python", "jobs/doctor.py", *argv, "--json"])
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(folder)})
    except (RuntimeError, ConnectionError, ValueError) as error:
        return [problem("submission", f"{address}: {' '.join(str(error).split())[:300]}")]
    status, log = wait(client, job)
    found = findings_of(log)
    if found is not None:
        return found
    if status in (JobStatus.PENDING, JobStatus.RUNNING):
        client.stop_job(job)
        return [problem("submission", f"{job} has not ended in {SECONDS} s; look at it with `ray job logs {job}`")]
    lines = [line for line in log.splitlines() if line.strip()]
    return [problem("submission", f"{job} ended without findings: {lines[-1] if lines else status}")]


def wait(client: Any, job: str) -> tuple[Any, str]:
    """The job's status and log, once it has ended or SECONDS are over."""
    end = time.monotonic() + SECONDS
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < end:
        time.sleep(1.0)
    return status, client.get_job_logs(job)


def findings_of(log: str) -> list[Finding] | None:
    """Those in the last JSON object of a log; None if there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith('{"findings"'):
            return [Finding(**values) for values in json.loads(line)["findings"]]
    return None
