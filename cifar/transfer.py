"""Transfer learning: weights to start from, and which blocks train at which rate."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from cifar.config import Config, ConfigError, TransferConfig
from cifar.data.prepared import exists, join, read_file
from cifar.models import Classifier
from cifar.models.timm_zoo import PREFIX, load_timm

PREFIXES = ("", "network.", "network.body.")
"""Of a weight's name here, against that in a file: ours, our network by itself, or one of torchvision's."""
SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Start:
    """Weights to start from."""

    source: str
    tensors: Mapping[str, Tensor]
    mean: tuple[float, float, float] | None = None
    """Of the images that they were trained on, in 0..255; None: unknown, or among the tensors."""
    std: tuple[float, float, float] | None = None


def find_start(config: Config) -> Start | None:
    """What `--pretrained` or `--weights` names, read; None without them. ConfigError when it can't be had."""
    if config.transfer.pretrained:
        return _of_imagenet(config.model.model)
    return _of_file(config.transfer.weights) if config.transfer.weights else None


def _of_imagenet(name: str) -> Start:
    if name.startswith(PREFIX):
        tensors, mean, std = load_timm(name)
        return Start(source=f"timm's {name}", tensors=tensors, mean=_bytes(mean), std=_bytes(std))
    from torchvision import models

    try:
        weights: Any = models.get_model_weights(name).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError:
        raise ConfigError(f"--pretrained: torchvision has no weights for {name}; drop the flag") from None
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"--pretrained: {weights.url} cannot be fetched ({error}); put the file at {file}, or name one by --weights"
        ) from None
    transforms = weights.transforms()
    mean, std = _bytes(transforms.mean), _bytes(transforms.std)
    return Start(source=f"torchvision's {weights}", tensors=tensors, mean=mean, std=std)


def _bytes(values: Sequence[float]) -> tuple[float, float, float]:
    """Of three channels, from 0..1 to 0..255."""
    red, green, blue = (255 * value for value in values)
    return red, green, blue


def _of_file(path: str) -> Start:
    file = join(path, "model.safetensors") if exists(join(path, "model.safetensors")) else path
    data = read_file(file)
    if data is None:
        raise ConfigError(f"--weights {path}: not found; name a model folder, or a file of weights")
    try:
        tensors: Any = load_safetensors(data)
    except SafetensorError:
        try:
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # a stranger's file can raise anything
            raise ConfigError(
                f"--weights {path}: neither safetensors nor what torch.save writes of tensors alone "
                f"({str(error).splitlines()[0][:200]}); save the network's state_dict()"
            ) from None
    for key in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigError(f"--weights {path}: holds more than tensors by name; save the network's state_dict()")
    return Start(source=path, tensors={name.removeprefix("module."): value for name, value in tensors.items()})


def fitting(network: Classifier, start: Start) -> dict[str, Tensor]:
    """The start's tensors that the network takes, by its own names; ConfigError if they are another network's."""
    own = {name: value.shape for name, value in network.state_dict().items()}
    taken = {
        name: tensor
        for prefix in PREFIXES
        for found, tensor in start.tensors.items()
        if (name := prefix + found) in own and own[name] == tensor.shape
    }
    body = [name for name in own if name.startswith("network.") and not name.startswith("network.head")]
    if not set(body) & taken.keys():
        raise ConfigError(f"--weights {start.source}: none of its {len(start.tensors)} tensors fits; give its --model")
    return taken


def describe(network: Classifier, start: Start) -> str:
    """What of the start is taken, and what is not, for the terminal."""
    taken = fitting(network, start)
    anew = [name for name, _ in network.named_parameters() if name not in taken]
    text = f"weights: {len(taken)} tensors of {start.source}"
    if anew:
        more = f" and {len(anew) - SHOWN} more" if len(anew) > SHOWN else ""
        text += f"; {', '.join(anew[:SHOWN])}{more} begin anew"
    return text


def begin(network: Classifier, config: Config, load: bool) -> None:
    """Freeze what is not to train, and, if asked to `load`, put the weights to start from in place."""
    if load and (start := find_start(config)) is not None:
        network.load_state_dict(fitting(network, start), strict=False)
        for own, theirs in ((network.normalize.mean, start.mean), (network.normalize.std, start.std)):
            if theirs is not None:
                own.copy_(torch.tensor(theirs).view_as(own))
    if config.transfer.train_blocks >= 0:
        for parameter in network.freeze(config.transfer.train_blocks):
            parameter.requires_grad_(False)


def resting(network: Classifier, config: TransferConfig, epoch: int) -> list[torch.nn.Parameter]:
    """Freeze what does not train in this epoch; its parameters."""
    if config.train_blocks < 0 and not config.unfreeze_epochs:
        return []
    count = len(network.blocks) if config.train_blocks < 0 else config.train_blocks
    if config.unfreeze_epochs:
        count = min(count, epoch // config.unfreeze_epochs)
    return network.freeze(count)


def rates(network: Classifier, config: TransferConfig) -> dict[int, float]:
    """Each body parameter's share of the learning rate, by its id; those in no block are of the first."""
    if config.layer_decay == 1:
        return {}
    found = network.blocks
    head = {id(parameter) for parameter in network.head.parameters()}
    shares = {id(p): config.layer_decay ** len(found) for p in network.body.parameters() if id(p) not in head}
    for behind, block in enumerate(reversed(found), 1):
        shares |= {id(p): config.layer_decay**behind for module in block for p in module.parameters()}
    return shares
