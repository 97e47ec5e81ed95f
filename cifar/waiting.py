"""Why nothing happens: resources that a job waits for, and the worker of a run that keeps the others waiting."""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

WAITING_SECONDS = 10.0
"""After so long without a sign of life the terminal says what is missing."""
STALLED_SECONDS = 60.0
"""After so long in one and the same place on all ranks the terminal says which of them is behind."""
LOOK_SECONDS = 2.0
AGAIN_SECONDS = 300.0
"""What was said is said again if it still holds."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Processes that Ray is to place."""

    name: str
    """What they are, such as "workers"."""
    count: int
    each: Mapping[str, float]
    """Resources of one, by Ray's names: CPU, GPU."""
    remedy: str
    """What the user may ask for instead."""


def unplaced_group(request: Request) -> str | None:
    """What this job's placement group waits for, and what would satisfy it; None when it is placed or has room."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    for identifier, group in placement_group_table().items():
        # The id of a placement group ends with that of the job that made it.
        if identifier.endswith(job) and group["state"] == "CREATED" and len(group["bundles"]) >= request.count:
            return None
    return lacking(request)


def unplaced_actors(request: Request) -> str | None:
    """The same for actors by themselves: None unless Ray has such actors in its queue."""
    status = cluster_status()
    queued = status.resource_demands.ray_task_actor_demand if status else []
    shapes = [kind.bundle for demand in queued for kind in demand.bundles_by_count]
    return lacking(request) if dict(request.each) in shapes else None


def lacking(request: Request) -> str | None:
    import ray
    from ray._private.state import available_resources_per_node

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return missing(request, nodes, list(available_resources_per_node().values()), launches())


def missing(
    request: Request, nodes: Sequence[Mapping[str, float]], free: Sequence[Mapping[str, float]], launches: str
) -> str | None:
    """`nodes` have these resources in all, of which some are `free`; `launches` tells of more nodes."""
    room = sum(fitting(request.each, node) for node in free)
    if room >= request.count:
        return None
    holds = " and ".join(f"{value:g} {name}" for name, value in request.each.items())
    has = " and ".join(f"{total(free, name):g} of {total(nodes, name):g} {name}" for name in request.each)
    more = request.count - room
    plural = "s" if len(nodes) != 1 else ""
    if launches:
        remedy = launches
    elif sum(fitting(request.each, node) for node in nodes) >= request.count:
        remedy = f"they start when other jobs end, or {request.remedy}"
    else:
        remedy = f"add nodes with room for {more} more, or {request.remedy}"
    return f"waiting for {request.count} {request.name} of {holds}: {has} free on {len(nodes)} node{plural}; {remedy}"


def fitting(each: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How many of these fit in one node."""
    return int(min(node.get(name, 0.0) / value + 1e-6 for name, value in each.items()))


def total(nodes: Sequence[Mapping[str, float]], name: str) -> float:
    return round(sum(node.get(name, 0.0) for node in nodes), 4)


def launches() -> str:
    """What the autoscaler does about it; empty where there is none, or where it does nothing."""
    status = cluster_status()
    if status is None:
        return ""
    coming = sum(launch.count for launch in status.pending_launches) + len(status.pending_nodes)
    if coming:
        return f"{coming} node{'s are' if coming > 1 else ' is'} being started"
    if status.failed_launches:
        last = max(status.failed_launches, key=lambda launch: launch.failed_ts_s or 0.0)
        reason = " ".join((last.details or "no reason given").split())
        return f"the last start of a node of type {last.ray_node_type_name} failed: {reason}"
    return ""


def cluster_status() -> Any:
    """Ray's own summary; None where it cannot be had just now."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        return get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # the control store is away: what is explained is only shorter
        return None


class Watchdog:
    """Asked while a run shows no progress: says what is missing, or which worker is behind."""

    def __init__(
        self,
        beats: Callable[[], Mapping[int, dict[str, Any]]],
        missing: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ):
        """`beats()` are the latest by rank, as `Pulse` makes them; `missing()` is asked when none comes."""
        self._beats, self._missing, self._clock = beats, missing, clock
        self._heard: dict[int, tuple[tuple[int, int], float]] = {}
        """By rank the process and number of its last beat, and when that was seen."""
        self._alive_at = self._looked_at = clock()
        self._said: dict[str, float] = {}

    def look(self) -> str | None:
        """What is to be said now, if anything; asked every few seconds."""
        now, beats = self._clock(), self._beats()
        if now - self._looked_at >= WAITING_SECONDS:
            self._alive_at = now  # nobody has asked since, because the run went on
        self._looked_at = now
        world_size = beats[0]["world_size"] if 0 in beats else len(beats)
        beats = {rank: beat for rank, beat in beats.items() if rank < world_size}  # others were before a shrinking
        for rank, beat in beats.items():
            latest = beat["pid"], beat["number"]
            if rank in self._heard and self._heard[rank][0] != latest:
                self._alive_at = now
            if rank not in self._heard or self._heard[rank][0] != latest:
                self._heard[rank] = latest, now
        if now - self._alive_at >= WAITING_SECONDS:
            return self._nobody(now)
        silent = {rank for rank in beats if now - self._heard[rank][1] >= WAITING_SECONDS}
        moving = (beat["seconds"] < STALLED_SECONDS for rank, beat in beats.items() if rank not in silent)
        if not beats or any(moving):
            return None
        behind = [rank for rank, beat in beats.items() if rank in silent or not beat["waits"]]
        if not behind:
            nodes = ", ".join(sorted({beat["node"] for beat in beats.values()}))
            return self._once(f"nothing moves: all workers wait for each other; check the network between {nodes}", now)
        told = "; ".join(self._tell(rank, beats[rank], rank in silent) for rank in behind[:4])
        more = f"; and {len(behind) - 4} more" if len(behind) > 4 else ""
        waiting = len(beats) - len(behind)
        others = f"; {waiting} other{'s wait' if waiting > 1 else ' waits'}" if waiting else ""
        return self._once(f"nothing moves: {told}{more}{others}", now)

    def _nobody(self, now: float) -> str | None:
        if text := self._missing():
            return self._once(text, now)
        if now - self._alive_at >= STALLED_SECONDS:
            return self._once("no worker gives a sign of life, though there is room for them; see Ray's logs", now)
        return None

    def _tell(self, rank: int, beat: Mapping[str, Any], silent: bool) -> str:
        where = f"worker {rank} on {beat['node']} (process {beat['pid']})"
        return f"{where} gives no sign of life; last: {beat['doing']}" if silent else f"{where}: {beat['doing']}"

    def _once(self, text: str, now: float) -> str | None:
        if now - self._said.get(text, -AGAIN_SECONDS) < AGAIN_SECONDS:
            return None
        self._said[text] = now
        return text


class Pulse:
    """A worker's sign of life, from a thread: what it does, and since when."""

    SECONDS = 2.0

    def __init__(self, put: Callable[[dict[str, Any]], None], world_size: int, node: str):
        self._put, self._fixed = put, {"world_size": world_size, "node": node, "pid": os.getpid()}
        self._place = "starting", False, time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def doing(self, what: str, waits: bool = False) -> None:
        """`waits`: for the other workers."""
        self._place = what, waits, time.monotonic()

    def _beat(self) -> None:
        for number in itertools.count():
            what, waits, since = self._place
            beat = {"number": number, "doing": what, "waits": waits, "seconds": time.monotonic() - since}
            with suppress(Exception):  # the control store is away: one of the next may reach it
                self._put(self._fixed | beat)
            if self._done.wait(self.SECONDS):
                return

    def close(self) -> None:
        self._done.set()


@contextmanager
def explained(missing: Callable[[], str | None]) -> Iterator[Callable[[], None]]:
    """Say what is missing when nothing moves for a while; the block calls what it gets at each sign of progress."""
    moved, done = time.monotonic(), threading.Event()

    def move() -> None:
        nonlocal moved
        moved = time.monotonic()

    def watch() -> None:
        said = None
        while not done.wait(LOOK_SECONDS):
            if time.monotonic() - moved >= WAITING_SECONDS and (text := missing()) and text != said:
                said = text
                print(text, file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield move
    finally:
        done.set()
        thread.join()
