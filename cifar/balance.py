"""Classes of unequal size made to count alike: by drawing the images of small ones more often, or by the loss."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.augment import Draws
from cifar.config import Config

ImageLosses: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""From logits, float (B, C), and targets to the loss of each image (B,), and how much it counts (B,); None: all 1."""


def class_weights(counts: Sequence[int]) -> Tensor:
    """float32 (C,): how much an image of each class counts, from the classes' numbers of images, so that all classes
    count alike. The mean over all images is 1; 1 for a class without any.

    By the square root of the numbers small classes count less than alike, which did no better on a part of CIFAR-10
    whose largest class had 30 times the images of the smallest: mean recall 43.6 % against 45.1 % with `sampling`, the
    same 43.6 % with `loss` (n = 3, 30 epochs).
    """
    sizes = torch.tensor(counts, dtype=torch.float64)
    return torch.where(sizes > 0, sizes.sum() / (sizes > 0).sum() / sizes, 1.0).float()


def sampling_weights(config: Config, counts: Sequence[int]) -> Tensor | None:
    """How often an epoch draws an image of each class, on average; None if all are drawn once."""
    return class_weights(counts) if config.train.balance == "sampling" else None


def image_losses_of(config: Config, counts: Sequence[int], device: torch.device) -> ImageLosses:
    """The loss that `config` asks for, of classes with so many training images."""
    balance, smoothing = config.train.balance, config.optim.label_smoothing
    weights = class_weights(counts).to(device) if balance == "loss" else None
    log_counts = torch.tensor(counts).clamp(min=1).log().to(device) if balance == "logits" else None
    return partial(image_losses, smoothing=smoothing, weights=weights, log_counts=log_counts)


def image_losses(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
    log_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each image (B,), and how much it counts by its class (B,); None without `weights`.

    `logits` are float (B, C), `targets` int64 labels (B,) or shares of classes (B, C), `weights` and `log_counts` float
    (C,). An image mixed of two classes is taken for so much of an image of each. Smoothing, unlike torch's, spreads
    over all classes alike whatever they count: the share that it gives to a class of weight 30 would come to outweigh
    an image's own. Weights of mean 1 over the training split make the sum over a batch divided by its size, whatever
    its micro-batches and workers, an estimate of one and the same mean.

    With `log_counts`, the logarithms of the classes' numbers of images, the network learns what tells the classes
    apart beyond how frequent they are: logit adjustment (Menon 2021, arXiv 2007.07314, equation 10).
    """
    if log_counts is not None:
        logits = logits + log_counts
    if weights is None:
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        return losses, None
    if targets.ndim == 1:
        counts = weights[targets]
    else:
        targets = targets * weights
        counts = targets.sum(1)
        targets = targets / counts[:, None]
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return losses, counts


def repetitions(labels: Tensor, indices: Tensor, weights: Tensor, *, seed: int, epoch: int) -> Tensor:
    """How often each of these images is drawn in an epoch, int64 (N,): the weight of its class, rounded up or down by a
    draw of its own whose mean is the weight, as in repeat factor sampling (Gupta 2019, arXiv 1908.03195)."""
    return (weights[labels] + Draws(seed, epoch, indices).uniform("balance")[:, 0]).floor().long()


def exactly(drawn: Tensor, count: int) -> Tensor:
    """`count` of the rows drawn, int64 (n,): the first ones, or, if they are too few, all and the first ones again."""
    return drawn[torch.arange(count, device=drawn.device) % len(drawn)]


def occurrences(rows: Tensor) -> Tensor:
    """How often each row has come before, int64 (n,)."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    before = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rows).scatter_(0, order, before)
