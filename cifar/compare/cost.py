"""What a network takes to answer, without training it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cifar.config import Config
from cifar.models import build_model


def network_cost(config: Config, num_classes: int) -> tuple[int, int]:
    """Parameters, and FLOPs of one forward pass of one image at the size that the config names, on a CPU.

    FLOPs are those of matrix products and convolutions alone, a multiplication and an addition as two; of convolutions
    of tiny planes `cifar.models.cpu` computes only what lies inside. Holds the weights in memory while it counts.
    """
    network = build_model(config, num_classes, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).eval()
    size = config.data.image_size
    with torch.no_grad(), plain_attention(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    return sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops()


@contextmanager
def plain_attention() -> Iterator[None]:
    """As matrix products, which are counted; what fuses them is not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
