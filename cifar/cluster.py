"""Connect to Ray, and decide who gets which processor before anything starts."""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from cifar.config import Config, ConfigError

LOCAL_TRAIN_ENV = {
    # A report costs one poll of Ray Train's controller; the default of 2 s is longer than a fast epoch.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # A node that was lost is noticed by the failed start of the next group; the default is 60 s, and twice that.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
RESIDENT_SHARE = 0.4
"""Of the object store: train and val of the resident loader, which a worker copies once more, must fit below this."""


def start_ray(verbose: bool) -> None:
    """Join the cluster at $RAY_ADDRESS, or start one in this machine; ConfigError if it can't be reached."""
    if ray.is_initialized():
        return
    for name, value in LOCAL_TRAIN_ENV.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not verbose:
        # Before ray.init, which logs through it; a warning of Ray's own about its set-up is no news to our user.
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if not address:
        # There is one node, and it ends with this process: nothing to watch, nothing to preempt, no page to look at.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
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

    def __str__(self) -> str:
        count = f"{self.min_workers} to {self.max_workers}" if self.elastic else str(self.max_workers)
        holds = (
            f"{self.gpus_per_worker} GPU and {self.cpus_per_worker:g} CPU"
            if self.gpus_per_worker
            else (f"{self.cpus_per_worker:g} CPU")
        )
        plural = "s" if self.max_workers > 1 else ""
        return f"plan: {count} worker{plural} holding {holds} each, {self.loader} data ({self.reason})"


def make_plan(config: Config, data_bytes: int, resources: Mapping[str, float], store_bytes: float) -> Plan:
    """Plan a run over `data_bytes` of decoded train and val on a cluster's `resources` (CPU and GPU, whole cluster).

    `store_bytes` is the object store of the smallest node. Raises ConfigError for a plan that could never be scheduled,
    that would starve Ray Data, or whose batches don't divide among the workers.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    use_gpu = config.run.gpu or gpus >= 1
    low, high = _worker_range(config, int(gpus) if use_gpu else 0)
    loader, why = choose_loader(config, data_bytes, store_bytes)
    _require_divisible(config, low, high)
    if config.run.gpu and gpus < low:
        raise ConfigError(
            f"--workers {config.run.workers} --gpu: needs {low} GPUs, the cluster has {gpus:g}; "
            + (f"use --workers {int(gpus)}" if gpus >= 1 else "drop --gpu")
        )
    if use_gpu and gpus < low:
        use_gpu = False
    if not use_gpu and low > max(cpus, 1):
        raise ConfigError(
            f"--workers {config.run.workers}: needs {low} CPUs, the cluster has {cpus:g}; use --workers {int(cpus)}"
        )
    # A task of Ray Data takes a CPU; what workers hold whole, it could wait for for ever. Holding less costs nothing,
    # since a worker's threads use every core of its share of the node anyway.
    spare = 1.0 if loader == "streaming" else 0.5
    each = (cpus - spare) / high
    each = math.floor(each) if each >= 1 else math.floor(each * 100) / 100  # Ray takes fractions below one only
    if each <= 0:
        raise ConfigError(f"--workers {config.run.workers}: leaves no CPU for reading data, the cluster has {cpus:g}")
    return Plan(
        min_workers=low,
        max_workers=high,
        cpus_per_worker=each,
        gpus_per_worker=1 if use_gpu else 0,
        loader=loader,
        reason=f"the cluster has {cpus:g} CPU and {gpus:g} GPU; {why}",
    )


def choose_loader(config: Config, data_bytes: int, store_bytes: float) -> tuple[str, str]:
    """The loader, and why; ConfigError if the flags contradict each other."""
    if config.augment.augment_on == "data":
        if config.train.loader == "resident":
            raise ConfigError("--loader resident: --augment-on data streams; use --loader auto")
        return "streaming", "augmented by Ray Data"
    size = f"{data_bytes / 2**20:,.0f} MiB of images"
    if config.train.loader != "auto":
        return config.train.loader, f"{size}, as --loader says"
    if data_bytes <= RESIDENT_SHARE * store_bytes:
        return "resident", f"{size} fit in memory"
    return "streaming", f"{size} exceed {RESIDENT_SHARE:.0%} of {store_bytes / 2**20:,.0f} MiB"


def _worker_range(config: Config, gpus: int) -> tuple[int, int]:
    if config.run.workers == "auto":
        # One process per GPU; without any, one process whose threads use all cores beats several that exchange
        # gradients.
        count = max(gpus, 1)
        while config.train.batch_size % (count * config.optim.accumulate):
            count -= 1
        return count, count
    low, _, high = config.run.workers.partition(":")
    return int(low), int(high or low)


def _require_divisible(config: Config, low: int, high: int) -> None:
    for workers in range(low, high + 1):
        if config.train.batch_size % (workers * config.optim.accumulate):
            step = math.lcm(*range(low, high + 1)) * config.optim.accumulate
            nearest = max(round(config.train.batch_size / step), 1) * step
            raise ConfigError(
                f"--batch-size {config.train.batch_size}: does not divide among {workers} workers"
                f"{' times --accumulate' if config.optim.accumulate > 1 else ''}; use --batch-size {nearest}"
            )


def usable_cpus() -> int:
    """Cores that this process may use, which in a container or under taskset are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
