"""A network's blocks, from the images to the head: what is frozen, set free or slowed down together.

MobileNetV2 has 19, of which the last three are what Keras counts as its last 20 layers.
"""

from collections.abc import Iterator

from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


def blocks(network: nn.Module, head: nn.Module) -> list[list[nn.Module]]:
    """The modules of each block that has weights, in order, the head left out; a norm that stands by itself belongs to
    what comes before it."""
    found: list[list[nn.Module]] = []
    for module in _parts(network, head):
        if isinstance(module, NORMS) and found:
            found[-1].append(module)
        else:
            found.append([module])
    return found


def _parts(module: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    from torchvision.models.vision_transformer import Encoder  # 1.5 s, which runs without transfer need not pay
    from torchvision.ops.misc import ConvNormActivation

    chains = (nn.Sequential, nn.ModuleList, nn.ModuleDict, Encoder)
    for child in module.children():
        if child is head or not any(True for _ in child.parameters()):
            continue
        if isinstance(child, chains) and not isinstance(child, ConvNormActivation):
            yield from _parts(child, head)
        else:
            yield child
