"""A small, fast network for small images, after the ideas of airbench (Jordan 2024, arXiv 2404.00498).

A frozen first layer whitens 2x2 patches, then come groups of 3x3 convolutions, and the maximum over what is left of the
plane feeds one linear layer. The first group works on the largest plane, so its width is what a slow processor pays
for; a third convolution in a later group, on its pooled plane, costs little. SiLU stands for airbench's GELU, as
accurate here (n=5) and cheaper: a step of `fast` takes 2 to 4 % less.
"""

import torch
from torch import Tensor, nn

from cifar.models.cpu import Conv3x3, max_pool

PATCH = 2


class Cnn(nn.Module):
    """Normalised float images (B, 3, H, W), H and W at least 8 -> logits (B, C)."""

    def __init__(self, num_classes: int, widths: tuple[int, ...], depths: tuple[int, ...], dropout: float):
        super().__init__()
        whitened = 2 * 3 * PATCH**2
        self.whiten = nn.Conv2d(3, whitened, PATCH)
        # The bias neither: a norm takes constants out again, so its gradient is rounding, which in bf16 drives it off
        # where images vary in few directions, as grey ones do.
        self.whiten.requires_grad_(False)
        self.groups = nn.Sequential(
            *map(ConvGroup, (whitened, *widths), widths, depths * len(widths) if len(depths) == 1 else depths)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        # Logits of a fresh network this small keep the first loss near log C at learning rates this high.
        self.head_scale = 1 / 9

    def init_whitening(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the first layer to whiten the patches of `images`, normalised floats (B, 3, H, W).

        Its filters are the eigenvectors of the patches' covariance over the root of their eigenvalues, and the
        negatives of these; `eps` is airbench's, and keeps rare directions from being blown up.
        """
        patches = nn.functional.unfold(images.double(), PATCH).transpose(1, 2).flatten(0, 1)  # (B*L, 12)
        values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).cpu())
        filters = (vectors / (values.clamp(min=0) + eps).sqrt()).T.flip(0).view(-1, 3, PATCH, PATCH)
        with torch.no_grad():
            self.whiten.weight.copy_(torch.cat([filters, -filters]))
            assert self.whiten.bias is not None
            self.whiten.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        # In float32: filters for directions in which images hardly vary, as in grey ones, blow up bf16's rounding.
        device = images.device.type
        with torch.autocast(device, enabled=False):
            whitened = self.whiten(images)
        if torch.is_autocast_enabled(device):
            whitened = whitened.to(torch.get_autocast_dtype(device))
        features = self.groups(nn.functional.silu(whitened))
        # Not amax: its gradient looks for the maximum, which a compiled bf16 network computes with another rounding.
        pooled = nn.functional.adaptive_max_pool2d(features, 1).flatten(1)
        return self.head(self.dropout(pooled)) * self.head_scale


class ConvGroup(nn.Module):
    """conv, pool, norm, SiLU, then conv, norm, SiLU again: (B, before, H, W) -> (B, after, H // 2, W // 2), at least 1.

    From a depth of 3 on, what the second convolution gets is added to what the last one's norm gives.
    """

    def __init__(self, before: int, after: int, depth: int):
        super().__init__()
        self.convs = nn.ModuleList(identity_conv(before if place == 0 else after, after) for place in range(depth))
        self.norms = nn.ModuleList(batch_norm(after) for _ in range(depth))

    def forward(self, features: Tensor) -> Tensor:
        features = self.convs[0](features)
        if min(features.shape[2:]) > 1:  # many groups use a small plane up
            features = max_pool(features)
        features = shortcut = nn.functional.silu(self.norms[0](features))
        for place in range(1, len(self.convs)):
            features = self.norms[place](self.convs[place](features))
            if place == len(self.convs) - 1 and place > 1:
                features = features + shortcut
            features = nn.functional.silu(features)
        return features


def identity_conv(before: int, after: int) -> Conv3x3:
    """Convolution whose first filters pass their input on, so that signal reaches depth from the first step."""
    conv = Conv3x3(before, after)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:before])
    return conv


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """As in airbench: the scale is fixed at 1, and running statistics forget the wild first steps soon."""
    norm = nn.BatchNorm2d(channels, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
