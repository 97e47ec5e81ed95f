"""Drills: does what the README promises of a killed process hold here? A small run by itself, the same one with a
process killed in its middle, and the two compared.

Serving is left out: a cluster has one Serve for all, which a drill would have to start, or would disturb.
"""

import logging
import os
import signal
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

import ray

from cifar.config import Config
from cifar.data.prepared import absolute, exists, filesystem, join
from cifar.doctor.fault import Fault, Killers
from cifar.doctor.finding import Finding, ok, problem, warning
from cifar.doctor.small_runs import Drill, Outcome, drills

RUN_SECONDS = 600
"""Of one run; where the cluster has no nodes yet, they have to come first."""
PAUSES = (0.0, 0.3, 1.0, 3.0)
"""Before each attempt at deleting what a process that is being ended may still write to."""

logger = logging.getLogger(__name__)


class Overdue(BaseException):
    """A run takes too long. Not an Exception, which loops of Ray's would catch and go on."""


def run_drills(config: Config) -> Generator[Finding, None, None]:
    """A finding for each drill as it ends, on the cluster that Ray is connected to.

    What they write is in a folder of their own in `--storage`, which is deleted at the end, and when they are
    interrupted; then Ray is shut down as well. To be closed.
    """
    with scratch(config.run.storage) as folder, closing(Killers()) as killers:
        left = drills(folder, config.run.verbose)
        while left:
            drill = left.pop(0)
            try:
                yield try_drill(drill, killers)
            except Overdue as overdue:
                yield problem(drill.check, f"{overdue}; look at `ray status` and Ray's logs")
                yield from (warning(other.check, "not tried: the drill before it has not ended") for other in left)
                ray.shutdown()
                return


def try_drill(drill: Drill, killers: Killers) -> Finding:
    logger.info("%s: %s", drill.check, drill.doing)
    started = time.monotonic()
    prepared = Fault(killers, drill.actor, lambda: False)  # kills nobody, but has killers started where its victims are
    try:
        with limited(f"{drill.doing} has not ended in {RUN_SECONDS} s"), prepared:
            calm = drill.run("calm")
    except Exception as error:
        return problem(drill.check, f"{drill.doing} fails undisturbed: {told(error)}")
    logger.info("%s: the same, and %s is killed, as Ray is going to tell", drill.check, drill.victim)
    between = time.monotonic()
    fault = Fault(killers, drill.actor, partial(drill.middle, "killed"))
    try:
        with limited(f"{drill.doing}, with {drill.victim} to be killed, has not ended in {RUN_SECONDS} s"), fault:
            killed = drill.run("killed")
    except Exception as error:
        when = f"after {drill.victim} was killed" if fault.killed else f"before {drill.victim} was killed"
        return problem(drill.check, f"{drill.doing} fails {when}: {told(error)}")
    return judge(drill, calm, killed, fault, [between - started, time.monotonic() - between])


def judge(drill: Drill, calm: Outcome, killed: Outcome, fault: Fault, seconds: list[float]) -> Finding:
    """`seconds` took each of the two."""
    names = calm.results.keys() | killed.results.keys()
    differing = sorted(name for name in names if calm.results.get(name) != killed.results.get(name))
    if differing:
        why = f"after {drill.victim} was killed" if fault.killed else "though nothing was killed"
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        return problem(
            drill.check,
            f"{drill.doing} came to other results {why}: {', '.join(differing[:3])}{more}; "
            "nodes with processors of other kinds round differently, anything else is a bug",
        )
    if not fault.struck or not killed.recovered:
        why = fault.error or f"the run ended before {drill.victim} could be killed in its middle"
        return warning(drill.check, f"not tried: {why}")
    return ok(
        drill.check,
        f"{drill.doing}: {drill.victim} was killed, the results are {drill.same} "
        f"({seconds[1]:.0f} s, undisturbed {seconds[0]:.0f} s)",
    )


def told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else 'no reason given'}"


@contextmanager
def limited(late: str) -> Iterator[None]:
    """End the block with Overdue, of this text, after RUN_SECONDS; in the main thread."""

    def end(number: int, frame: object) -> None:
        raise Overdue(late)

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(RUN_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def scratch(storage: str) -> Iterator[str]:
    """A new folder in a folder or URI, which holds the cache too for as long as the block runs."""
    storage = absolute(storage)
    made = "://" not in storage and not os.path.exists(storage)
    folder = join(storage, f".drill-{uuid.uuid4().hex}")
    cache = os.environ.get("CIFAR_CACHE")
    os.environ["CIFAR_CACHE"] = join(folder, "cache")
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            delete(folder)  # at once: who stops a job does not wait for long
        ray.shutdown()  # ends those that write there
        raise
    finally:
        if cache is None:
            del os.environ["CIFAR_CACHE"]
        else:
            os.environ["CIFAR_CACHE"] = cache
        remove(folder)
        if made:
            with suppress(OSError):
                os.rmdir(storage)


def remove(folder: str) -> None:
    """Delete a folder or URI so that it stays away."""
    for pause in PAUSES:
        time.sleep(pause)
        if exists(folder):
            with suppress(OSError):
                delete(folder)
        elif pause:
            return
    logger.warning("%s: cannot be deleted; delete it when no process of the drill is left", folder)


def delete(folder: str) -> None:
    files, root = filesystem(folder)
    files.delete_dir(root)
