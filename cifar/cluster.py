"""Connect to Ray, and decide who gets which processor before anything starts."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from cifar.config import Config, ConfigError
from cifar.machine import usable_cpus

TRAIN_ENV = {
    # A report waits for the one before to be fetched, at the controller's next poll: every 2 s by default, which is
    # longer than a fast epoch. Polling at 0.1 s took 3 % of a core from the training of a small machine.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Workers die with their node some seconds before the head takes it for dead. A group that was to start on it waits
    # for this long, and is then planned anew; the default is 60 s. Only for its place: where there is one, it is given
    # at once, and where nodes are being added, the request for them stands meanwhile.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    # How often a node's notice that it will be taken away is looked for; the default, 5 s, is a third of some notices.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
RESIDENT_SHARE = 0.4
"""Of the object store: train and val of the resident loader, which a worker copies once more, must fit below this."""


def start_ray(verbose: bool) -> None:
    """Join the cluster at $RAY_ADDRESS, or start one in this machine; ConfigError if it can't be reached."""
    if ray.is_initialized():
        return
    for name, value in TRAIN_ENV.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address}: that is where jobs are submitted; run `ray job submit --working-dir . -- python "
            f"jobs/...`, or unset it to stay on this machine"
        )
    if not verbose:
        # Before ray.init, which logs through it; a warning of Ray's own about its set-up is no news to our user.
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    if not address:
        # There is one node, and it ends with this process: nothing to watch, nothing to preempt, no page to look at.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        # Ray lets its workers yield to everything else (nice 15); here they are what the user waits for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray trains in a thread of its own, for which glibc keeps a heap apart that at times gives activations' pages
        # back at each step: 28,000 page faults a second instead of 3,000, and 12 % of the time of a step.
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
        # Looks for new log files ten times a second otherwise, for 0.6 % of a core.
        os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
    try:
        ray.init(
            address=address,
            num_cpus=None if address else max(usable_cpus(), 2),  # one for a worker, one for its data
            include_dashboard=None if address or verbose else False,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except ConnectionError as error:
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers there; start one or unset it") from error


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who computes what; printed before the run."""

    min_workers: int
    max_workers: int
    cpus_per_worker: float
    gpus_per_worker: int
    loader: str
    """resident or streaming."""
    reason: str

    @property
    def elastic(self) -> bool:
        return self.min_workers != self.max_workers

    @property
    def resources(self) -> dict[str, float]:
        """Of one worker, by Ray's names."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1.0} if self.gpus_per_worker else {})

    @property
    def workers(self) -> str:
        count = f"{self.min_workers} to {self.max_workers}" if self.elastic else str(self.max_workers)
        holds = (
            f"{self.gpus_per_worker} GPU and {self.cpus_per_worker:g} CPU"
            if self.gpus_per_worker
            else (f"{self.cpus_per_worker:g} CPU")
        )
        plural = "s" if self.max_workers > 1 else ""
        return f"{count} worker{plural} holding {holds} each"

    def __str__(self) -> str:
        return f"plan: {self.workers}, {self.loader} data ({self.reason})"


def make_plan(
    config: Config,
    data_bytes: int,
    there: Sequence[Mapping[str, float]],
    coming: Sequence[Mapping[str, float]] = (),
) -> Plan:
    """Plan a run over `data_bytes` of decoded train and val on the nodes that are there and those that an autoscaler
    may add, each with its CPU, GPU and object_store_memory.

    Raises ConfigError for a plan that could never be scheduled, or that would starve Ray Data.
    """
    nodes = [*there, *coming]
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    has = "may grow to" if coming else "has"
    # Nodes cost: unasked, a run takes the GPUs that are there, and of those that may come one.
    gpus_there = int(sum(node.get("GPU", 0.0) for node in there))
    counts = config.worker_counts or [auto_workers(config, gpus_there or min(gpus, 1))]
    low, high = counts[0], counts[-1]
    loader, why = choose_loader(config, data_bytes, min(node.get("object_store_memory", math.inf) for node in nodes))
    use_gpu = config.run.gpu or gpus >= low
    if use_gpu and gpus < low:
        raise ConfigError(
            f"--workers {config.run.workers} --gpu: needs {low} GPUs, the cluster {has} {gpus}; "
            + (f"use --workers {gpus}" if gpus else "drop --gpu")
        )
    if not use_gpu and low > max(cpus, 1):
        raise ConfigError(
            f"--workers {config.run.workers}: needs {low} CPUs, the cluster {has} {cpus:g}; use --workers {int(cpus)}"
        )
    # A task of Ray Data takes a CPU; what workers hold whole, it could wait for for ever. Holding less costs nothing,
    # since a worker's threads use every core of its share of the node anyway.
    spare = 1.0 if loader == "streaming" else 0.5
    each = cpus_per_worker(nodes, high, use_gpu, spare) or cpus_per_worker(nodes, low, use_gpu, spare)
    if not each:
        raise ConfigError(f"--workers {config.run.workers}: leaves no CPU for reading data, the cluster {has} {cpus:g}")
    return Plan(
        min_workers=low,
        max_workers=high,
        cpus_per_worker=each,
        gpus_per_worker=1 if use_gpu else 0,
        loader=loader,
        reason=f"the cluster {has} {cpus:g} CPU and {gpus} GPU; {why}",
    )


def cpus_per_worker(nodes: Sequence[Mapping[str, float]], workers: int, use_gpu: bool, spare: float) -> float:
    """The most CPUs that each of so many workers can hold where they fit, with `spare` left on every node; else 0."""
    # Ray takes fractions below one only.
    for each in [*range(int(max(node.get("CPU", 0.0) for node in nodes)), 0, -1), 0.5, 0.25, 0.1, 0.05, 0.01]:
        fitting = 0
        for node in nodes:
            by_cpu = int((node.get("CPU", 0.0) - spare) / each + 1e-6)
            fitting += max(min(by_cpu, int(node.get("GPU", 0.0))) if use_gpu else by_cpu, 0)
        if fitting >= workers:
            return each
    return 0


def auto_workers(config: Config, gpus: int) -> int:
    """One process per GPU; without any, one whose threads use all cores beats several that exchange gradients."""
    count = max(gpus, 1)
    while config.train.batch_size % (count * config.optim.accumulate):
        count -= 1
    return count


def choose_loader(config: Config, data_bytes: int, store_bytes: float) -> tuple[str, str]:
    """The loader, and why."""
    if config.augment.augment_on == "data":
        return "streaming", "augmented by Ray Data"
    size = f"{data_bytes / 2**20:,.0f} MiB of images"
    if config.train.loader != "auto":
        return config.train.loader, f"{size}, as --loader says"
    if data_bytes <= RESIDENT_SHARE * store_bytes:
        return "resident", f"{size} fit in memory"
    return "streaming", f"{size} exceed {RESIDENT_SHARE:.0%} of {store_bytes / 2**20:,.0f} MiB"


def node_cores() -> int:
    """Cores that a process on this node may use: a node may have been started with fewer CPUs than its machine has."""
    here = ray.get_runtime_context().get_node_id()
    counted = next((node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["NodeID"] == here), 1.0)
    return max(min(usable_cpus(), int(counted)), 1)
