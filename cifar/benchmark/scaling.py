"""Images per second of several workers: measured where they can be had, predicted where not.

The prediction for w workers that share a batch of B images, each with a processor like the one measured:

    T(w) = fixed + per_image * B / w + 2 (w - 1) * latency + 2 (w - 1) / w * gradient bytes / bandwidth

The first two terms are a worker's own step, fitted to steps of several batch sizes. The others are a ring all-reduce
(Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"), each of whose
2 (w - 1) rounds sends a w-th of the gradients. DistributedDataParallel sends while it still computes, which is left out
here, as are stragglers, so the one errs to the slow and the other to the fast side.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from cifar.benchmark.stages import Bench, time_steps
from cifar.config import Config, ConfigError, RunConfig, RunFailed
from cifar.data.loader import Batch
from cifar.data.shares import num_batches
from cifar.loop import epoch_size
from cifar.train import fit

EPOCHS = 4
"""Of a measured run; the first one warms up and does not count."""
PREDICTED = (1, 2, 4, 8, 16, 32)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between any two neighbours of the ring."""

    latency: float
    """Seconds per message."""
    bytes_per_second: float
    source: str = "flags"

    def all_reduce_seconds(self, gradient_bytes: int, workers: int) -> float:
        return 2 * (workers - 1) * self.latency + all_reduce_bytes(gradient_bytes, workers) / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """What a step takes: the `T(w)` above."""

    fixed: float
    """Seconds of a step that do not depend on its images, such as Muon's."""
    per_image: float
    """Seconds per image, loading included."""
    gradient_bytes: int
    link: Link

    def compute_seconds(self, images: float) -> float:
        return self.fixed + self.per_image * images

    def seconds(self, batch_size: int, workers: int) -> float:
        all_reduce = self.link.all_reduce_seconds(self.gradient_bytes, workers)
        return self.compute_seconds(batch_size / workers) + all_reduce


def scaling(bench: Bench, counts: Sequence[int], load_per_image: float, link: Link, run: RunConfig) -> dict[str, Any]:
    """Measure `counts` of workers through Ray, in `run`'s storage, and predict `PREDICTED` besides. Ray is up.

    All train at the size in pixels that most of the config's epochs have, and share the config's batch, or the most of
    it that divides among all counts.
    `load_per_image` are the loader's seconds, which come to those of a step.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    scale = usual_scale(bench.config)
    config = replace(bench.config, train=replace(bench.config.train, scales=(scale,), epochs=EPOCHS, patience=0))
    batch_size = shared_batch_size(config, counts)
    config = replace(config, train=replace(config.train, max_minutes=0.0, checkpoint_steps=0, batch_size=batch_size))
    size = epoch_size(config.train, config.data.image_size, 0)
    points = step_points(bench, batch_size, size)
    measured = [measure(config, count, replace(run, gpu=gpus > 0)) for count in counts]
    add_efficiency(measured)
    fixed, per_image = fit_compute([(p["images"], p["seconds"]) for p in points])
    per_image += load_per_image
    model = StepModel(fixed=fixed, per_image=per_image, gradient_bytes=bench.gradient_bytes, link=link)
    # Workers that share a node's cores are slower for another reason than the link.
    apart = [m for m in measured if "error" not in m and m["workers"] <= max(gpus, len(nodes))]
    model = replace(model, link=fit_link(model, batch_size, {m["workers"]: m["step_seconds"] for m in apart}))
    return {
        "image_size": size,
        "batch_size": batch_size,
        "nodes": len(nodes),
        "cpus": sum(node.get("CPU", 0) for node in nodes),
        "gpus": gpus,
        "measured": measured,
        "model": asdict(model) | {"load_per_image": load_per_image, "points": points},
        "predicted": predict(
            model,
            batch_size,
            num_batches(bench.prepared.counts["train"], batch_size, 1),
            sorted({*PREDICTED, *counts}),
        ),
    }


def shared_batch_size(config: Config, counts: Sequence[int]) -> int:
    """The config's rounded down to what divides among all counts; its own where no such batch is as small."""
    shares = math.lcm(*counts) * config.optim.accumulate
    return config.train.batch_size // shares * shares or config.train.batch_size


def usual_scale(config: Config) -> float:
    """The scale that most epochs train at; of equals the larger."""
    train = config.train
    scales = Counter(train.scales[epoch * len(train.scales) // train.epochs] for epoch in range(train.epochs))
    return max(scales, key=lambda scale: (scales[scale], scale))


def measure(config: Config, workers: int, run: RunConfig) -> dict[str, Any]:
    """Images/s of an epoch by so many workers: the median over all but the first, or the reason why there is none."""
    logger.info("%d worker%s: %d epochs", workers, "s" * (workers > 1), EPOCHS)
    try:
        run = replace(run, workers=str(workers), name=f"workers-{workers}")
        trained = fit(replace(config, run=run))
    except (ConfigError, RunFailed) as error:
        return {"workers": workers, "error": str(error)}
    rates = [row["images_per_second"] for row in trained.history[1:]]
    return {
        "workers": workers,
        "images_per_second": median(rates),
        "low": min(rates),
        "high": max(rates),
        "n": len(rates),
        "step_seconds": config.train.batch_size / median(rates),
    }


def add_efficiency(measured: list[dict[str, Any]]) -> None:
    """`speedup` over the smallest count that was measured, and `efficiency`: that per worker."""
    rates = {m["workers"]: m["images_per_second"] for m in measured if "error" not in m}
    for m in measured:
        if "error" not in m:
            smallest = min(rates)
            m["speedup"] = m["images_per_second"] / rates[smallest]
            m["efficiency"] = m["speedup"] * smallest / m["workers"]


def step_points(bench: Bench, batch_size: int, size: int) -> list[dict[str, Any]]:
    """Median seconds of a step in this process, without loading: on `batch_size` images, a half, ... to a 32nd."""
    points = []
    micro_batches = bench.config.optim.accumulate
    for divisor in PREDICTED:
        images = batch_size // divisor
        if images < max(micro_batches, 2):  # batch norm needs two
            break
        batches = cycle(Batch(*(column[:images] for column in batch)) for batch in bench.batches)
        seconds = time_steps(bench.stepper(), batches, size, bench.budget / 2)["step"]
        points.append({"images": images, "seconds": median(seconds), "n": len(seconds)})
    return points


def fit_compute(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares of (images, seconds) as fixed + per_image * images, neither below zero; errors count as shares."""
    images, seconds = np.array(points, dtype=float).T
    (fixed, per_image), _ = nnls(np.stack([1 / seconds, images / seconds], axis=1), np.ones(len(seconds)))
    return float(fixed), float(per_image)


def all_reduce_bytes(gradient_bytes: int, workers: int) -> float:
    """What each worker sends, and receives, in a ring all-reduce (Patarasuk and Yuan 2009)."""
    return 2 * (workers - 1) / workers * gradient_bytes


def fit_link(model: StepModel, batch_size: int, step_seconds: dict[int, float]) -> Link:
    """The link that explains what steps of several workers took beyond a worker's own step.

    With one count its bandwidth, at the model's latency; with more counts both. The model's own link where there is no
    such count, or nothing left to explain.
    """
    counts = sorted(workers for workers in step_seconds if workers > 1)
    if not counts:
        return model.link
    beyond = np.array([step_seconds[w] - model.compute_seconds(batch_size / w) for w in counts])
    messages = np.array([2.0 * (w - 1) for w in counts])
    sent = np.array([all_reduce_bytes(model.gradient_bytes, w) for w in counts])
    latency = model.link.latency
    if len(counts) == 1:
        per_byte = float((beyond - messages * latency)[0] / sent[0])
    else:
        scale = sent.max()  # the columns must be of one order
        (latency, per_byte), _ = nnls(np.stack([messages, sent / scale], axis=1), beyond)
        latency, per_byte = float(latency), float(per_byte / scale)
    if per_byte <= 0:
        return model.link
    named = ", ".join(map(str, counts))
    return Link(latency=latency, bytes_per_second=1 / per_byte, source=f"fitted to {named} workers")


def predict(model: StepModel, batch_size: int, steps: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    """For each count of workers that have an image each; an epoch has `steps`; efficiency is against one worker."""
    alone = model.seconds(batch_size, 1)
    predicted = []
    for workers in (count for count in counts if count <= batch_size):
        seconds = model.seconds(batch_size, workers)
        predicted.append(
            {
                "workers": workers,
                "step_seconds": seconds,
                "compute_seconds": model.compute_seconds(batch_size / workers),
                "all_reduce_seconds": model.link.all_reduce_seconds(model.gradient_bytes, workers),
                "images_per_second": batch_size / seconds,
                "efficiency": alone / seconds / workers,
                "epoch_seconds": steps * seconds,
            }
        )
    return predicted
