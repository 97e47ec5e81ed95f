"""How many trials train at a time, and what each of them holds, so that none waits for ever."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cifar.cluster import choose_loader, cpus_per_worker
from cifar.config import Config, ConfigError
from cifar.tune.settings import TuneConfig

TRIAL_BYTES = 1 << 30
"""What a trial's process takes of memory beside the shared images: torch 0.4 GB, a small network's activations."""
DRIVER_CPU = 0.01
"""Of a trial that waits for its own workers."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    at_once: int
    workers: int
    """Of each trial; 0: it trains in its own process."""
    cpus: float
    """Of each worker, or of the trial."""
    gpus: float
    resident: bool
    reason: str

    @property
    def threads(self) -> int:
        """Of a trial in its own process."""
        return max(int(self.cpus), 1)

    @property
    def resources(self) -> dict[str, float]:
        """What Tune has to set aside for a trial."""
        return {"CPU": DRIVER_CPU} if self.workers else {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def __str__(self) -> str:
        holds = f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        each = f"{self.workers} workers holding {holds} each" if self.workers else holds
        shared = "one copy of the images in memory for all" if self.resident else "images streamed from disk"
        times = "trial" if self.at_once == 1 else "trials"
        return f"plan: {self.at_once} {times} at a time, each with {each}; {shared} ({self.reason})"


def make_sweep_plan(
    config: Config, tune: TuneConfig, data_bytes: int, nodes: Sequence[Mapping[str, float]]
) -> SweepPlan:
    """A plan over `nodes`, each with CPU, GPU, memory and object_store_memory.

    All trials that run at a time fit at once, whole: with fewer resources than they could take together, some would
    hold theirs and wait for each other's. Images lie decoded in memory or are read by the trial itself, so that no task
    of Ray Data has to find a CPU. ConfigError for what can never run.
    """
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    if ":" in config.run.workers:
        raise ConfigError(f"--workers {config.run.workers}: trials are compared at equal size; use one count")
    workers = int(config.run.workers) if config.run.workers.isdigit() else 0
    workers = 0 if workers == 1 else workers
    store = min(node.get("object_store_memory", 0.0) for node in nodes)
    loader, why = choose_loader(config, data_bytes, store)
    resident = loader == "resident"
    if config.augment.augment_on == "data" and not workers:
        raise ConfigError("--augment-on data: a trial in one process augments by itself; use --augment-on device")
    if tune.folds and not resident:
        raise ConfigError(f"--folds {tune.folds}: needs the images in memory ({why}); use --folds 0")
    if tune.folds and workers:
        raise ConfigError(f"--folds {tune.folds}: trains in the trial's own process; use --workers 1")
    if tune.search == "pbt" and workers:
        raise ConfigError("--search pbt: trains in the trial's own process; use --workers 1")
    use_gpu = config.run.gpu or gpus >= max(workers, 1)
    if config.run.gpu and not gpus:
        raise ConfigError("--gpu: the cluster has no GPU; drop the flag")
    if workers:
        most = int(gpus if use_gpu else cpus) // workers
        if not most:
            what = "GPUs" if use_gpu else "CPUs"
            raise ConfigError(
                f"--workers {workers}: a trial needs {workers} {what}, the cluster has {int(gpus if use_gpu else cpus)}"
            )
    else:
        by_memory = sum(int(node.get("memory", 0.0) / TRIAL_BYTES) for node in nodes)
        most = int(gpus) if use_gpu else max(min(int(cpus), by_memory), 1)
    at_once = min(tune.at_once or most, max(tune.trials, 1))
    spare = 0.5 if resident or not workers else 1.0
    processes = at_once * max(workers, 1)
    per_gpu = 1.0
    if use_gpu and not workers:
        # A GPU is shared by as many trials as are asked for; Ray gives out hundredths.
        sharing = -(-at_once // int(gpus))
        per_gpu = int(100 / sharing) / 100
        if per_gpu < 0.01:
            raise ConfigError(f"--at-once {at_once}: at most 100 trials share a GPU, the cluster has {int(gpus)}")
        places = [{**node, "GPU": node.get("GPU", 0.0) * sharing} for node in nodes]
        each = cpus_per_worker(places, processes, True, spare=0.0)
    else:
        each = cpus_per_worker(nodes, processes, use_gpu, spare if workers else 0.0)
    if not each:
        raise ConfigError(f"--at-once {at_once}: {processes} processes do not fit on {cpus:g} CPUs and {gpus:g} GPUs")
    return SweepPlan(
        at_once=at_once,
        workers=workers,
        cpus=each,
        gpus=(1.0 if workers else per_gpu) if use_gpu else 0.0,
        resident=resident,
        reason=f"the cluster has {cpus:g} CPU and {gpus:g} GPU; {why}",
    )
