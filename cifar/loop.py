"""Train an epoch, evaluate a split: torch only. A run reads as five verbs: load, train, evaluate, report, repeat."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cifar.augment import augment, derive_seed, mix
from cifar.balance import ImageLosses
from cifar.config import Config, Precision, TrainConfig
from cifar.data.loader import Batch
from cifar.data.prepared import Arrays
from cifar.metrics import ClassTotals, Totals
from cifar.optim import Averager, lr_scale, native_bf16, set_lr
from cifar.selection import Selection
from cifar.transfer import resting


class Teaching(Protocol):
    """A network that training learns from, as `cifar.distill` has it."""

    def logits(self, images: Tensor) -> Tensor: ...

    def blend(self, losses: Tensor, logits: Tensor, taught: Tensor) -> Tensor: ...


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averager: Averager | None,
    batches: Iterable[Batch],
    config: Config,
    *,
    epoch: int,
    start: int,
    first_step: int,
    total_steps: int,
    num_classes: int,
    rank: int,
    totals: Totals,
    selection: Selection | None,
    teacher: Teaching | None,
    image_losses: ImageLosses,
    augmented: bool,
    after_step: Callable[[int], bool],
) -> None:
    """Run the optimizer steps of one epoch from batch `start` on, adding what it counts to `totals`.

    `model` is the network or its compiled or distributed wrapper. `batches` are this worker's, `augmented` if they come
    with random changes applied. `first_step`, of the `total_steps` of the run, is that of the epoch's batch 0. The loss
    of each image, by `image_losses` with `teacher`'s share where there is one, goes to `selection`; minimized is the
    mean of what counts of it. After each step `after_step(steps done in this epoch)` may end the epoch early by
    returning True.
    """
    at_rest = resting(unwrapped(model), config.transfer, epoch)  # pyright: ignore[reportArgumentType]
    model.train()
    device = totals.sums.device
    size = epoch_size(config.train, config.data.image_size, epoch)
    seed, parameters = config.train.seed, [p for p in model.parameters() if p.requires_grad]
    mixing = config.augment.mixup > 0 or config.augment.cutmix > 0
    micro_batches = config.optim.accumulate
    for number, batch in enumerate(batches, start):
        step = first_step + number
        set_lr(optimizer, lr_scale(config.optim, step, total_steps))
        images, targets = batch.images, batch.labels
        if not augmented:
            images = augment(images, batch.draws, config.augment, seed=seed, epoch=epoch)
        if mixing:
            images, targets = mix(images, targets, config.augment, num_classes, seed=seed, epoch=epoch, step=step)
        taught = targets if teacher is None else teacher.logits(images)
        images = resize(images, size)
        if config.model.draws:
            torch.manual_seed(derive_seed(seed, step, rank, "dropout"))
        optimizer.zero_grad(set_to_none=True)
        chunks = (column.chunk(micro_batches) for column in (images, targets, taught, batch.indices))
        for part, (some, wanted, answers, indices) in enumerate(zip(*chunks, strict=True)):
            if config.train.compile:
                torch.compiler.cudagraph_mark_step_begin()  # what the last call returned may be overwritten
            with synchronized_only_if(part == micro_batches - 1, model):
                with autocast(config.train.precision, device):
                    logits = model(some)
                losses, counts = image_losses(logits.float(), wanted)
                if teacher is not None:
                    losses = teacher.blend(losses, logits, answers)
                loss = losses.sum() if counts is None else losses @ counts
                (loss / len(images)).backward()
            totals.add(logits, wanted, loss)
            if selection is not None:
                selection.add(indices, losses)
        for parameter in at_rest:
            parameter.grad = None
        if config.optim.clip_norm:
            nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
        optimizer.step()
        if averager is not None:
            averager.update(unwrapped(model), step)
        if after_step(number + 1):
            break


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Arrays],
    config: TrainConfig,
    device: torch.device,
    by_class: ClassTotals | None = None,
) -> Totals:
    """Plain cross-entropy and accuracy over all rows of `batches`, summed over this worker alone; `by_class` gets the
    same of each class."""
    model.eval()
    totals = Totals.zeros(device)
    for batch in batches:
        # Copies: blocks of the object store are read-only, which torch does not know.
        images, labels = (torch.tensor(column, device=device) for column in (batch.images, batch.labels))
        with autocast(config.precision, device):
            logits = model(images.permute(0, 3, 1, 2))
        totals.add(logits, labels)
        if by_class is not None:
            by_class.add(logits, labels)
    return totals


def epoch_size(config: TrainConfig, image_size: int, epoch: int) -> int:
    """Side in pixels at which this epoch trains: `scales` hold for equal parts of the epochs; at least 8."""
    scale = config.scales[epoch * len(config.scales) // config.epochs]
    return max(round(image_size * scale), 8)


def resize(images: Tensor, size: int) -> Tensor:
    """(B, 3, S, S) in 0..255 -> (B, 3, size, size), float when anything was to do; area-averaged going down."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast if `precision` asks for it, or leaves the choice and the processor computes it natively."""
    wanted = precision == "bf16" or (precision == "auto" and native_bf16(device))
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()  # pyright: ignore[reportReturnType]


def synchronized_only_if(last: bool, model: nn.Module) -> AbstractContextManager[None]:
    """Gradients are summed over the workers once per step, with the last micro-batch."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and torch.compile, whose parameter names carry no prefix."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)
