"""Optimizers, learning rate schedules and averaged weights.

All that a resumed run needs is in the `state_dict` of the optimizer and of the averager; schedules are functions of the
step. Gradients are taken to be those of the mean loss over the batch.
"""

# torch's own optimizers are built on torch._foreach_*, which its stubs do not export.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar.config import OptimConfig

# What Muon leaves to SGD learns at these rates per image of the batch: airbench's (Jordan 2024), which sums the loss
# over the batch. The head's is for logits scaled by 1/9, as `cnn` has them, where airbench has 1/256.
HEAD_LR_PER_IMAGE = 0.67 * (9 / 256) ** 2
VECTOR_LR_PER_IMAGE = 0.053
SGD_MOMENTUM = 0.85

# For --lr 0: the papers' and libraries' own for the adaptive ones; Muon's and SGD's chosen on CIFAR-10's val.
DEFAULT_LR = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "muon": 0.12}

PULL_STEPS = 5  # lookahead's k, as in Zhang 2019


def build_optimizer(
    model: nn.Module, config: OptimConfig, batch_size: int, rates: Mapping[int, float] | None = None
) -> Optimizer:
    """Optimizer over the trainable parameters of `model`; each group holds its peak learning rate as "peak_lr".

    Biases and norm parameters (those of fewer than two dimensions) have no weight decay. Muon takes the filters and
    hidden matrices; biases, norms and `model.head` go to SGD with Nesterov momentum. `batch_size` counts the images
    of one optimizer step over all workers. `rates` has, by their ids, the parameters whose rate is only a share of
    the peak; Muon knows none.
    """
    config = replace(config, lr=peak_lr(config))
    lr, momentum, decay = config.lr, config.momentum, config.weight_decay
    rates = rates or {}
    groups: list[dict[str, Any]] = []
    for share in sorted({rates.get(id(parameter), 1.0) for parameter in model.parameters()}, reverse=True):
        matrices, vectors = _split(p for p in model.parameters() if rates.get(id(p), 1.0) == share)
        common = {"lr": lr * share}
        groups += _groups(
            {"params": matrices, "weight_decay": decay} | common, {"params": vectors, "weight_decay": 0.0} | common
        )
    match config.optimizer:
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
        case "adam":
            optimizer = torch.optim.Adam(groups, lr=lr)
        case "adamw":
            optimizer = torch.optim.AdamW(groups, lr=lr)
        case "rmsprop":
            optimizer = torch.optim.RMSprop(groups, lr=lr)
        case "muon":
            optimizer = Muon(_muon_groups(model, config, batch_size))
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def peak_lr(config: OptimConfig) -> float:
    """Of the main parameter group: the config's, or what suits the optimizer where that is 0."""
    return config.lr or DEFAULT_LR[config.optimizer]


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal before the step (Jordan 2024, kellerjordan.github.io/posts/muon).

    Groups with `orthogonal` take parameters of two or more dimensions, convolution filters as (out, in * kH * kW), and
    decay weights apart from the gradient. `normalize` first sets each parameter's norm to the root of its first
    dimension (arXiv 2404.00498): for weights whose scale the network ignores, it fixes the angle that a step turns.
    Other groups are SGD with Nesterov momentum and L2 decay, as torch.optim.SGD. torch.optim.Muon takes matrices only
    and no other groups.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 0.01,
        momentum: float = SGD_MOMENTUM,
        weight_decay: float = 0.0,
        iterations: int = 3,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(groups, defaults | {"orthogonal": False, "normalize": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of the parameters; by torch's foreach operations, which take one launch each on a GPU."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if group["weight_decay"] and not group["orthogonal"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        velocities = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        velocities = torch._foreach_add(gradients, velocities, alpha=group["momentum"])
        for parameter, velocity in zip(parameters, velocities, strict=True):
            self.state[parameter]["momentum_buffer"] = velocity
        updates = torch._foreach_add(gradients, velocities, alpha=group["momentum"])
        if group["orthogonal"]:
            updates = orthogonalize_all(updates, group["iterations"], batched=updates[0].device.type != "cpu")
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        if group["normalize"]:
            scales = torch._foreach_reciprocal(torch._foreach_norm(parameters))
            torch._foreach_mul_(scales, [len(parameter) ** 0.5 for parameter in parameters])
            torch._foreach_mul_(parameters, scales)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def orthogonalize_all(tensors: Sequence[Tensor], iterations: int, batched: bool) -> list[Tensor]:
    """`orthogonalize` of each tensor of two or more dimensions as (first, all others), in its own shape.

    `batched`, those of one shape go together: on a GPU a launch costs more than such a product; on two cores a batch
    was slower than one after the other.
    """
    # The order of columns is nothing to it; that of memory spares copies.
    last = [tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors]
    in_order = [tensor.movedim(1, -1) if moved else tensor for tensor, moved in zip(tensors, last, strict=True)]
    matrices = [tensor.flatten(1) for tensor in in_order]
    batches = [[place] for place in range(len(tensors))]
    if batched:
        shapes = [matrix.shape for matrix in matrices]
        batches = [[place for place, other in enumerate(shapes) if other == shape] for shape in dict.fromkeys(shapes)]
    results = list(tensors)
    for places in batches:
        batch = torch.stack([matrices[place] for place in places]) if len(places) > 1 else matrices[places[0]][None]
        for place, result in zip(places, orthogonalize(batch, iterations), strict=True):
            result = result.view(in_order[place].shape)
            results[place] = result.movedim(-1, 1) if last[place] else result
    return results


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """(B, R, C) -> (B, R, C) of the same dtype: the singular vectors of each, with singular values near 1.

    Newton-Schulz iteration with Jordan's quintic, which rises steeply at 0 and settles between about 0.7 and 1.2. It is
    run on the Gram matrix, (R, R) where R is the shorter side, and its factors meet the matrix itself once: for 384
    filters of 384x3x3 on two cores 4 ms instead of 9, at 1 to 2 % of rounding in bfloat16 instead of 0.6 to 1 %.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16 if native_bf16(matrices.device) else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram, product = x @ x.mT, None
    for iteration in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration < iterations - 1:
            gram = factor @ gram @ factor  # they are polynomials of the same matrix, so they commute
    x = x if product is None else product @ x
    return (x.mT if tall else x).to(matrices.dtype)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(has is True and "bf16" in name for name, has in torch.cpu.get_capabilities().items())
    return False


def lr_scale(config: OptimConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate for `step` in 0 .. total_steps - 1.

    For the share `warmup` of all steps it rises in equal parts to 1, and from there, over the steps left: `constant`
    stays; `step` falls to a tenth at half way and to a hundredth at three quarters; `cosine` and `linear` fall towards
    0, which the step after the last would have. `onecycle` is one cycle over all steps (Smith 2018), as torch's
    OneCycleLR: a linear rise from 1/25 for the share `warmup` (0: 0.3), then a cosine down to 1/250,000.
    """
    if config.schedule == "onecycle":
        return _onecycle(step, total_steps, config.warmup or 0.3)
    warmup_steps = config.warmup * total_steps
    if step < warmup_steps:
        return min((step + 1) / warmup_steps, 1.0)
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    match config.schedule:
        case "constant":
            return 1.0
        case "step":
            return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return 1 - progress


def set_lr(optimizer: Optimizer, scale: float) -> None:
    """Set each group's learning rate to `scale` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale


class Averager:
    """A copy of the model with averaged weights, to be evaluated in its place: `averager.model`.

    `ema` averages after every step. `lookahead` (Zhang 2019) moves slow weights towards the model's every 5 steps and
    sets the model's to them. Buffers, such as BatchNorm's statistics, are averaged like the weights that they belong
    to; lookahead leaves the model's own as they are. Costs one model in memory.
    """

    def __init__(self, model: nn.Module, config: OptimConfig):
        self._average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(config.average_decay), use_buffers=True
        ).requires_grad_(False)
        self._lookahead = config.average == "lookahead"
        if self._lookahead:
            self._average.n_averaged += 1  # the first pull starts from the first weights; an EMA does not hold them

    @property
    def model(self) -> nn.Module:
        return self._average.module

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` (not a DDP wrapper) after optimizer step `step`, counted from 0."""
        if not self._lookahead:
            self._average.update_parameters(model)
        elif (step + 1) % PULL_STEPS == 0:
            self._average.update_parameters(model)
            for fast, slow in zip(model.parameters(), self.model.parameters(), strict=True):
                fast.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state)


def build_averager(model: nn.Module, config: OptimConfig) -> Averager | None:
    """Averager that starts from the weights `model` has now; None when the config has none."""
    return None if config.average == "none" else Averager(model, config)


def _muon_groups(model: nn.Module, config: OptimConfig, batch_size: int) -> list[dict[str, Any]]:
    head_module = getattr(model, "head", None)
    head, head_vectors = _split(head_module.parameters() if isinstance(head_module, nn.Module) else [])
    in_head = {id(parameter) for parameter in head + head_vectors}
    matrices, vectors = _split(parameter for parameter in model.parameters() if id(parameter) not in in_head)
    # By convention a convolution without bias has a norm after it, to which the scale of its filters is nothing.
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    scale_free = {id(m.weight) for m in model.modules() if isinstance(m, convolutions) and m.bias is None}
    decay = config.weight_decay
    muon = {"lr": config.lr, "momentum": config.momentum, "orthogonal": True}
    head_lr = config.head_lr or HEAD_LR_PER_IMAGE * batch_size
    return _groups(
        {"params": [matrix for matrix in matrices if id(matrix) in scale_free], "normalize": True} | muon,
        {"params": [matrix for matrix in matrices if id(matrix) not in scale_free], "weight_decay": decay} | muon,
        {"params": head, "lr": head_lr, "weight_decay": decay},
        {"params": head_vectors, "lr": head_lr},
        {"params": vectors, "lr": VECTOR_LR_PER_IMAGE * batch_size},
    )


def _split(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable ones: those of two and more dimensions; biases and norm parameters."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]


def _groups(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def _onecycle(step: int, total_steps: int, rise: float) -> float:
    low, end = 1 / 25, 1 / 250_000
    top = max(rise * total_steps - 1, 0.0)
    if step < top:
        return low + (1 - low) * step / top
    progress = (step - top) / max(total_steps - 1 - top, 1.0)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2
