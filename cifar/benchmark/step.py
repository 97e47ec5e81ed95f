"""A training step in its parts: timed, counted in FLOPs, and seen by the profiler."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from cifar.augment import augment, derive_seed, mix
from cifar.balance import ImageLosses
from cifar.benchmark.measure import synchronize
from cifar.config import Config
from cifar.data.loader import Batch
from cifar.loop import autocast, epoch_size, resize
from cifar.metrics import Totals
from cifar.optim import lr_scale, set_lr
from cifar.selection import epoch_batches
from cifar.training import Training

PARTS = ("augment", "resize", "forward", "backward", "optimizer")

Meter: TypeAlias = Callable[[str], AbstractContextManager[object]]
"""Given a part's name, a block around what belongs to it."""


class Stepper:
    """The steps of `cifar.loop.train_epoch` one at a time, in `PARTS`; a test holds the weights of both together.

    `forward` includes the teacher, the loss and the counting of hits, `optimizer` the clipping of gradients and
    averaged weights.
    """

    def __init__(
        self,
        config: Config,
        training: Training,
        num_classes: int,
        num_batches: int,
        device: torch.device,
        image_losses: ImageLosses,
    ):
        self.config, self.training, self.device = config, training, device
        self._num_classes, self._num_batches = num_classes, num_batches
        self._image_losses = image_losses
        self._parameters = [p for p in training.model.parameters() if p.requires_grad]
        self._totals = Totals.zeros(device)

    def step(self, batch: Batch, meter: Meter, *, size: int, epoch: int = 0, number: int = 0) -> None:
        """Step `number` of `epoch` on `batch`, at `size` pixels."""
        config, training = self.config, self.training
        seed = config.train.seed
        total_steps = config.train.epochs * self._num_batches
        step = (epoch * self._num_batches + number) % total_steps  # a measurement may take more of them than a run
        training.model.train()
        with meter("augment"):
            images, targets = batch.images, batch.labels
            images = augment(images, batch.draws, config.augment, seed=seed, epoch=epoch)
            if config.augment.mixup > 0 or config.augment.cutmix > 0:
                images, targets = mix(
                    images, targets, config.augment, self._num_classes, seed=seed, epoch=epoch, step=step
                )
        with meter("forward"):
            taught = targets if training.teacher is None else training.teacher.logits(images)
        with meter("resize"):
            images = resize(images, size)
        with meter("optimizer"):
            set_lr(training.optimizer, lr_scale(config.optim, step, total_steps))
            training.optimizer.zero_grad(set_to_none=True)
        if config.model.draws:
            torch.manual_seed(derive_seed(seed, step, 0, "dropout"))
        micro_batches = config.optim.accumulate
        chunks = (column.chunk(micro_batches) for column in (images, targets, taught))
        for some, wanted, answers in zip(*chunks, strict=True):
            if config.train.compile:
                torch.compiler.cudagraph_mark_step_begin()
            with meter("forward"):
                with autocast(config.train.precision, self.device):
                    logits = training.model(some)
                with record_function("loss"):
                    losses, counts = self._image_losses(logits.float(), wanted)
                    if training.teacher is not None:
                        losses = training.teacher.blend(losses, logits, answers)
                    loss = losses.sum() if counts is None else losses @ counts
                    self._totals.add(logits, wanted, loss)
            with meter("backward"):
                (loss / len(images)).backward()
        with meter("optimizer"):
            if config.optim.clip_norm:
                nn.utils.clip_grad_norm_(self._parameters, config.optim.clip_norm)
            training.optimizer.step()
            if training.averager is not None:
                training.averager.update(training.network, step)


class Stopwatch:
    """Seconds per part. Waits for the device around each, so a GPU's parts sum to more than steps in a row take."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        synchronize(self._device)
        started_at = time.perf_counter()
        yield
        synchronize(self._device)
        self.seconds[part] += time.perf_counter() - started_at


class FlopMeter:
    """FLOPs per part, of matrix products and convolutions alone, a multiplication and an addition as two."""

    def __init__(self) -> None:
        self.flops: Counter[str] = Counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops[part] += counter.get_total_flops()


def steps_by_size(config: Config, num_batches: int) -> dict[int, int]:
    """Training sizes in pixels, ascending, each with the steps of a run that train at it; a full epoch has
    `num_batches`."""
    steps: Counter[int] = Counter()
    for epoch, batches in enumerate(epoch_batches(num_batches, config.train.epochs, config.train.skip_easy)):
        steps[epoch_size(config.train, config.data.image_size, epoch)] += batches
    return dict(sorted(steps.items()))


OPERATORS = {
    "convolution": r"convolution|conv2d|thnn_conv|^_places",
    "batch norm": r"batch_?norm",
    "pooling": r"max_?(un)?pool|avg_?pool",
    "activation": r"silu|relu",
    "dropout": r"dropout",
    "linear": r"linear|^mmbackward|^addmmbackward|^tbackward",
    "loss": r"softmax|nll_?loss|cross_?entropy|^loss$",
    "copies and casts": r"copy|_to_|::to$|contiguous|clone|^tocopybackward",
}
"""Regular expressions on operator names in lower case: aten's (`aten::gelu`) and autograd's (`GeluBackward0`)."""
REGIONS = ("augment", "resize", "optimizer")


def operator_shares(run_step: Callable[[Meter], None], steps: int, device: torch.device) -> dict[str, float]:
    """Share of each kind of operator in the busy time of `steps` steps, from torch's profiler; they sum to 1.

    `run_step(meter)` makes a step. What happens in a region (augment, resize, optimizer) counts there, whatever it is;
    else an operator counts for the nearest one in which it runs that has a kind, so that a convolution's own copies are
    convolution. On a GPU the time is that of its kernels.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            run_step(record_function)
        synchronize(device)
    sums: Counter[str] = Counter()
    for event in profiler.events() or []:
        busy = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        # A kernel comes once more, as an event of the GPU; who started it has its time already.
        if event.device_type.name == "CPU" and busy > 0:
            sums[_kind(event)] += busy
    total = sum(sums.values())
    return {kind: value / total for kind, value in sums.most_common()}


def mean_shares(shares: Mapping[int, Mapping[str, float]], seconds: Mapping[int, float]) -> dict[str, float]:
    """The shares over several training sizes, each in proportion to the seconds spent at it; largest first."""
    sums: defaultdict[str, float] = defaultdict(float)
    for size, parts in shares.items():
        for kind, share in parts.items():
            sums[kind] += share * seconds[size] / sum(seconds.values())
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _kind(event: Any) -> str:
    lineage = []
    while event is not None:
        lineage.append(event.name.lower())
        event = event.cpu_parent
    for region in REGIONS:
        if region in lineage:
            return region
    for name in lineage:
        name = name.removeprefix("autograd::engine::evaluate_function: ")
        for kind, pattern in OPERATORS.items():
            if re.search(pattern, name):
                return kind
    return "other"
