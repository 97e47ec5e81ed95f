"""`benchmark(settings)`: all that the flags ask for, as one dict of JSON types."""

import logging
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cifar.benchmark.accuracy import time_to_accuracy
from cifar.benchmark.measure import Stage, all_cores, machine_facts
from cifar.benchmark.scaling import Link, scaling
from cifar.benchmark.settings import Benchmark
from cifar.benchmark.stages import Bench, folder_bytes
from cifar.config import RunConfig
from cifar.data import prepare
from cifar.data.prepared import absolute, join

logger = logging.getLogger(__name__)


def benchmark(settings: Benchmark) -> dict[str, Any]:
    """Measure, in the order of what disturbs what: this process alone, then through Ray, then whole runs.

    Keys: `machine`, `config`, `data`, `counts`, `batch_size`, `loader`, `gradient_bytes`, `checkpoint_bytes`,
    `ceiling`, `stages`, `operators`, `seeds` and `scaling` (None where the flags skip them), `benchmark_seconds`.
    """
    started_at = time.perf_counter()
    prepared = prepare(settings.data)
    config = settings.config().with_batch_size(prepared.counts["train"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with new_folder(settings.storage) as storage, tempfile.TemporaryDirectory() as scratch, all_cores():
        bench = Bench(config, prepared, device, settings.budget)
        machine = machine_facts(device)
        before = bench.ceiling()
        stages: list[Stage] = []
        for name, work in (("decoding", bench.decoding), ("loading", bench.loading)):
            logger.info("measuring: %s", name)
            stages += work()
        logger.info("measuring: training steps")
        steps, operators = bench.steps()
        logger.info("measuring: checkpoints and evaluation")
        saved = Path(scratch) / "checkpoint"
        stages += [*steps, *bench.checkpoints(saved), *bench.evaluation(saved / "model")]
        checkpoint_bytes = folder_bytes(saved)
        ceiling = bench.ceiling_facts(before, bench.ceiling())
        logger.info("measuring: start-up")
        stages += [*bench.start_up(storage), *bench.sharding()]
        scaled = seeds = None
        run = RunConfig(storage=storage)
        if settings.worker_counts:
            link = Link(latency=settings.link_latency_us * 1e-6, bytes_per_second=settings.link_gbps * 1e9 / 8)
            load = next(stage for stage in stages if (stage.stage, stage.variant) == ("load", bench.loader_kind))
            scaled = scaling(bench, settings.worker_counts, load.seconds / load.images, link, run)
        loader, gradient_bytes = bench.loader_kind, bench.gradient_bytes
        del bench  # the runs that follow want the memory
        if settings.seeds:
            seeds = time_to_accuracy(config, settings.seeds, settings.split, settings.target, run)
    return {
        "machine": machine,
        "config": config.to_dict(),
        "data": prepared.source,
        "counts": prepared.counts,
        "batch_size": config.train.batch_size,
        "loader": loader,
        "gradient_bytes": gradient_bytes,
        "checkpoint_bytes": checkpoint_bytes,
        "ceiling": ceiling,
        "stages": [stage.to_dict(ceiling["flops_per_second"]) for stage in stages],
        "operators": operators,
        "seeds": seeds,
        "scaling": scaled,
        "benchmark_seconds": time.perf_counter() - started_at,
    }


@contextmanager
def new_folder(storage: str) -> Iterator[str]:
    """A folder that holds no runs yet, so that none is resumed: in `storage`, or a temporary one."""
    if storage:
        yield join(absolute(storage), f"benchmark-{uuid.uuid4().hex[:8]}")
        return
    with tempfile.TemporaryDirectory(prefix="cifar-benchmark-") as folder:
        yield folder
