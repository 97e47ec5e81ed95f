"""timm's networks, an extra: `timm/NAME`, fitted to the size of the images as torchvision's are."""

import difflib
from typing import Any

from torch import nn

from cifar.config import ConfigError

PREFIX = "timm/"


def import_timm(name: str) -> Any:
    """The package; ConfigError without it, or if it has no network of this name."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"--model {name}: {error.name or error} is missing; pip install 'cifar[timm]'") from error
    bare = name.removeprefix(PREFIX)
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare.partition(".")[0], timm.list_models(), 3)
        raise ConfigError(f"--model {name}: timm has no such network; {_advice(near)}")
    return timm


def build_timm(name: str, size: int, patch: int | None) -> tuple[nn.Module, int]:
    """A network for images of this side that ends with its features, and how many these are; `patch`: the side of the
    patches that it cuts, None for its own."""
    timm = import_timm(name)
    wanted = [{"img_size": size}, {}]  # transformers have to know, the others don't ask
    if patch is not None:
        wanted = [options | {"patch_size": patch} for options in wanted] + wanted
    for options in wanted[:-1]:
        try:
            body = timm.create_model(name.removeprefix(PREFIX), num_classes=0, **options)
            break
        except TypeError:
            continue
    else:
        body = timm.create_model(name.removeprefix(PREFIX), num_classes=0)
    return body, getattr(body, "head_hidden_size", body.num_features)


def load_timm(name: str) -> tuple[dict[str, Any], tuple[float, ...], tuple[float, ...]]:
    """timm's weights by their names, with the mean and standard deviation, in 0..1, of the images they were trained on;
    ConfigError if they cannot be had."""
    timm = import_timm(name)
    bare = name.removeprefix(PREFIX)
    try:
        body = timm.create_model(bare, pretrained=True)
    except Exception as error:  # whatever the hub's client raises
        text = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--pretrained: the weights of {name} cannot be fetched ({text}); fetch model.safetensors of the hub's "
            f"repository timm/{bare} where there is a network, and name the file by --weights"
        ) from None
    described = body.pretrained_cfg
    return body.state_dict(), tuple(described["mean"]), tuple(described["std"])


def _advice(near: list[str]) -> str:
    return f"use {', '.join(PREFIX + name for name in near)}" if near else "see timm.list_models()"
