"""Networks. Each takes uint8 images (B, 3, H, W), or floats in 0..255, and returns float32 logits (B, C).

Normalisation is the network's first layer, so that training, batch jobs and the service cannot disagree about it.
"""

from typing import Self

import torch
from torch import Tensor, nn

from cifar.config import Config
from cifar.models.blocks import blocks
from cifar.models.cnn import Cnn
from cifar.models.notebook import NotebookCnn
from cifar.models.zoo import ZooNetwork, build_zoo

__all__ = ["Normalize", "build_model"]


class Normalize(nn.Module):
    """(B, 3, H, W) in 0..255 of any dtype -> float32 with the training data's mean 0 and standard deviation 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        # A channel that never varies would divide by zero.
        self.register_buffer("std", torch.tensor(std).clamp(min=1.0).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std


class Classifier(nn.Module):
    """`Normalize` and a network; `head` is the last linear layer, which some optimizers treat apart."""

    def __init__(self, normalize: Normalize, network: Cnn | NotebookCnn | ZooNetwork):
        super().__init__()
        self.normalize = normalize
        self.network = network
        self._frozen: list[nn.Module] = []

    @property
    def head(self) -> nn.Linear:
        return self.network.head

    @property
    def blocks(self) -> list[list[nn.Module]]:
        """The modules of each, from the images to the head, which is none of them."""
        return blocks(self.body, self.head)

    @property
    def body(self) -> nn.Module:
        """What may hold the head, but nothing that belongs to the head."""
        return self.network.body if isinstance(self.network, ZooNetwork) else self.network

    def freeze(self, trained: int) -> list[nn.Parameter]:
        """Let all but so many blocks before the head keep batch norm's statistics; returns the parameters of these."""
        found = self.blocks
        count = max(len(found) - trained, 0)
        self._frozen = [module for block in found[:count] for module in block]
        self.train(self.training)
        if not count:
            return []
        free = [self.head, *(module for block in found[count:] for module in block)]
        trains = {id(parameter) for module in free for parameter in module.parameters()}
        return [parameter for parameter in self.body.parameters() if id(parameter) not in trains]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def init_from(self, images: Tensor) -> None:
        """Set what is computed from a sample of training images, uint8 (B, 3, H, W), before the first step."""
        if isinstance(self.network, Cnn):
            self.network.init_whitening(self.normalize(images))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(self.normalize(images).contiguous(memory_format=torch.channels_last))
        return logits.float()


def build_model(
    config: Config, num_classes: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Classifier:
    """Build the network that `config.model` names, with random weights from the global generator.

    `mean` and `std` are the training data's, per channel, in 0..255.
    """
    model, size = config.model, config.data.image_size
    match model.model:
        case "cnn":
            network = Cnn(num_classes, model.widths, model.depths, model.dropout)
        case "notebook":
            network = NotebookCnn(num_classes, model.widths, model.dropout, size)
        case _:
            network = build_zoo(config, num_classes)
    return Classifier(Normalize(mean, std), network).to(memory_format=torch.channels_last)  # pyright: ignore
