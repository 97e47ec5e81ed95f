"""Repeated measurements, and the machine that they hold for."""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch

from cifar.machine import cpu_model, usable_cpus

LEAST, MOST = 3, 10_000
"""Repetitions of a measurement."""
PATIENCE = 5
"""Budgets after which a measurement ends with fewer repetitions than `LEAST`, be it with one."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage's cost per repetition: a batch, a step, a save, whatever its name says."""

    stage: str
    variant: str = ""
    seconds: float
    """Median over the repetitions."""
    low: float
    high: float
    n: int
    images: int = 0
    """Of one repetition; 0 where images are not what it is about."""
    flops: int = 0
    """Floating point operations of one repetition's matrix products and convolutions; 0 where they are not counted."""

    @classmethod
    def of(cls, stage: str, variant: str, seconds: Sequence[float], images: int = 0, flops: int = 0) -> "Stage":
        return cls(
            stage=stage,
            variant=variant,
            seconds=median(seconds),
            low=min(seconds),
            high=max(seconds),
            n=len(seconds),
            images=images,
            flops=flops,
        )

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.seconds if self.images else None

    @property
    def flops_per_second(self) -> float | None:
        return self.flops / self.seconds if self.flops else None

    def to_dict(self, ceiling: float) -> dict[str, Any]:
        """JSON types; `ceiling` in FLOP/s is what `ceiling_share` is a share of."""
        rate = self.flops_per_second
        return asdict(self) | {
            "images_per_second": self.images_per_second,
            "flops_per_second": rate,
            "ceiling_share": rate / ceiling if rate else None,
        }


def weighted_mean(stages: Sequence[Stage], weights: Sequence[int], variant: str) -> Stage:
    """The mean over stages of one name, each as often as its weight; its spread is the mean of theirs."""

    def mean(field: str) -> float:
        values = [getattr(stage, field) for stage in stages]
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    return Stage(
        stage=stages[0].stage,
        variant=variant,
        seconds=mean("seconds"),
        low=mean("low"),
        high=mean("high"),
        n=sum(stage.n for stage in stages),
        images=stages[0].images,
        flops=round(mean("flops")),
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def more_wanted(seconds: Sequence[float], budget: float) -> bool:
    """Whether to repeat what took `seconds` so far: until they sum to the budget and there are `LEAST`."""
    spent = sum(seconds)
    return not seconds or (len(seconds) < MOST and spent < (budget if len(seconds) >= LEAST else PATIENCE * budget))


def repeat(work: Callable[[], object], budget: float, device: torch.device) -> list[float]:
    """Seconds of each repetition, as many as `more_wanted` says; once before that unmeasured."""
    work()
    synchronize(device)
    seconds: list[float] = []
    while more_wanted(seconds, budget):
        started_at = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started_at)
    return seconds


def matrix_product_rates(dtype: torch.dtype, device: torch.device, budget: float) -> list[float]:
    """FLOP/s of each of several large matrix products: what the processor gives to code that asks nothing else."""
    side = ceiling_side(device)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with _precision_of_convolutions():
        return [2 * side**3 / seconds for seconds in repeat(lambda: a @ b, budget, device)]


def ceiling_side(device: torch.device) -> int:
    """Of square matrices so large that to read them costs nothing beside their product."""
    return 2048 if device.type == "cpu" else 8192


@contextmanager
def _precision_of_convolutions() -> Iterator[None]:
    """On GPUs cuDNN may round float32 to TF32, which torch's matrix products do not by default."""
    before = torch.get_float32_matmul_precision()
    if torch.cuda.is_available() and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def all_cores() -> Iterator[None]:
    """As many threads as a single worker of a run gets."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cpus())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """`load_average` is that of the last minute before: what others do on this machine spoils a measurement."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        # Two threads that share a core with others can be many times slower in oneDNN's backward convolutions, which
        # wait for each other by spinning.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
