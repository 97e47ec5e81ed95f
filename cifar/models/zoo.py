"""torchvision's and timm's classification networks by their names, fitted to the data: head, input size, first layers.

The first layers of networks for photographs leave a quarter of the side or less, and of an image of 32 pixels nothing
for the layers behind. The small stem is that of CIFAR's ResNets (He 2016, arXiv 1512.03385, section 4.2): one 3x3
convolution at full size, and no pooling after it. Networks that cut the image into patches cut smaller ones.
"""

import difflib
import itertools
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cifar.config import Config, ConfigError, ModelConfig
from cifar.models.empty import EmptyParameters
from cifar.models.timm_zoo import PREFIX, build_timm
from cifar.models.wide import wide_resnet

SMALL_IMAGE = 64
"""Up to this side `--stem auto` takes the small stem: of 64 pixels ResNet's own leaves 2x2 for its last stage."""
BETWEEN = (nn.BatchNorm2d, nn.ReLU, nn.SiLU, nn.Hardswish, nn.Identity)
"""What may stand between the first convolution and the pooling that goes with it."""


class ZooNetwork(nn.Module):
    """Normalised float images (B, 3, S, S) -> logits (B, C): a network up to its features, and a new head."""

    def __init__(self, body: nn.Module, features: int, num_classes: int, config: ModelConfig):
        super().__init__()
        self.body = body
        self.norm = nn.BatchNorm1d(features) if config.head_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.body(images))))


def zoo_names() -> list[str]:
    from torchvision import models  # 1.5 s, which the others need not pay

    return models.list_models(module=models)


def build_zoo(config: Config, num_classes: int) -> ZooNetwork:
    """The network that `config.model.model` names, with random weights from the global generator.

    ConfigError if there is none of this name, or if it cannot take images of this size.
    """
    from torchvision import models

    name, size, stem = config.model.model, config.data.image_size, config.model.stem
    if wide := wide_resnet(name):
        return ZooNetwork(wide, wide.features, num_classes, config.model)
    small = size <= SMALL_IMAGE if stem == "auto" else stem == "small"
    if name.startswith(PREFIX):
        return ZooNetwork(*timm_body(name, size, small), num_classes, config.model)
    if name not in (known := zoo_names()):
        near = difflib.get_close_matches(name, [*known, "wrn_16_8", "wrn_28_10"], 3) or ["resnet18", "convnext_tiny"]
        raise ConfigError(f"--model {name}: no such network; use {', '.join(near)} or another of torchvision's names")
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}  # their own takes minutes
    elif name.startswith("maxvit"):
        side = 2 * size if small else size  # of what its own stem would make planes of this size from
        options = {"input_size": (side, side)}
    elif name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        # As many patches of its own size as there will be smaller ones.
        options = {"image_size": size // smaller_patch(patch, size) * patch if small else size}
    try:
        body = models.get_model(name, weights=None, **options)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"--image-size {size}: {name} cannot take it ({told(error)}); use --image-size 224") from None
    if small:
        shrink_stem(body, size)
        if isinstance(body, models.VisionTransformer):
            body.image_size, body.patch_size = size, body.conv_proj.kernel_size[0]  # pyright: ignore
    return ZooNetwork(body, cut_head(body), num_classes, config.model)


def timm_body(name: str, size: int, small: bool) -> tuple[nn.Module, int]:
    body, features = build_timm(name, size, None)
    if small:
        (side, _), (stride, _) = (getattr(first_convolution(body)[1], name) for name in ("kernel_size", "stride"))
        if side == stride:
            return build_timm(name, size, smaller_patch(side, size))
        shrink_stem(body, size)
    return body, features


def check_zoo(config: Config, num_classes: int, sizes: Iterable[int]) -> str:
    """What the network is, for the terminal; ConfigError if it cannot take images of one of these sides in pixels.

    Allocates no weights and computes nothing.
    """
    name, own_size = config.model.model, config.data.image_size
    with EmptyParameters():
        network = build_zoo(config, num_classes)
    weights = sum(parameter.numel() for parameter in network.parameters())
    first = first_convolution(network.body)[1]
    (side, _), (stride, _) = first.kernel_size, first.stride
    network.to("meta").eval()
    for size in sorted(sizes):
        try:
            with torch.no_grad():
                network(torch.empty(2, 3, size, size, device="meta"))
        except (RuntimeError, AssertionError, ValueError) as error:
            why = f"{name} cannot take it ({told(error)})"
            if size == own_size:
                raise ConfigError(f"--image-size {size}: {why}; use --image-size 224") from None
            raise ConfigError(f"--scales: images of {size} pixels: {why}; use --scales 1") from None
    return f"{name}: {weights / 1e6:.1f} million weights, first layer {side}x{side} with stride {stride}"


def told(error: Exception) -> str:
    """The first sentence, on one line."""
    return re.split(r"[.!]\s", " ".join(str(error).split()))[0].rstrip(".!")


def shrink_stem(network: nn.Module, size: int) -> None:
    """Let the first layers keep the plane of images of this side; those that keep it already stay as they are."""
    name, conv = first_convolution(network)
    (side, _), (stride, _) = conv.kernel_size, conv.stride
    if stride == 1:
        return
    if side == stride:
        patch = smaller_patch(side, size)
        replaced = nn.Conv2d(3, conv.out_channels, patch, patch, bias=conv.bias is not None)
    else:
        replaced = nn.Conv2d(3, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
        nn.init.kaiming_normal_(replaced.weight, mode="fan_out", nonlinearity="relu")
    set_module(network, name, replaced)
    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    after = itertools.dropwhile(lambda leaf: leaf[1] is not replaced, leaves)
    name, module = next(leaf for leaf in itertools.islice(after, 1, None) if not isinstance(leaf[1], BETWEEN))
    if isinstance(module, nn.MaxPool2d):
        set_module(network, name, nn.Identity())


def smaller_patch(patch: int, size: int) -> int:
    """A quarter of the patch's side, but at least 2 pixels, as far as it divides the image's side."""
    return next(side for side in range(max(patch // 4, 2), 0, -1) if size % side == 0)


def cut_head(network: nn.Module) -> int:
    """Let the network end with the features that its last layer gets; how many these are."""
    linears = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linears:  # SqueezeNet classifies each place of the plane, and takes the mean
        convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        set_module(network, "classifier", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        return convs[-1].in_channels
    name, last = linears[-1]
    set_module(network, name, nn.Identity())
    return last.in_features


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def set_module(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
