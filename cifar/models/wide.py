"""Wide residual networks for small images (Zagoruyko and Komodakis 2016, arXiv 1605.07146), which torchvision lacks:
its wide_resnet50_2 is a wider bottleneck network for photographs."""

import itertools
import re

from torch import Tensor, nn

NAME = re.compile(r"wrn_(\d{1,3})_(\d{1,2})")
GROUPS = 3


class WideResNet(nn.Module):
    """Normalised float images (B, 3, H, W), H and W at least 4 -> features (B, 64 * width)."""

    def __init__(self, depth: int, width: int):
        super().__init__()
        blocks = (depth - 4) // (2 * GROUPS)
        channels = [16, *(16 * width * 2**group for group in range(GROUPS))]
        self.conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.groups = nn.Sequential(
            *(
                WideBlock(before if place == 0 else after, after, stride=2 if place == 0 and group > 0 else 1)
                for group, (before, after) in enumerate(itertools.pairwise(channels))
                for place in range(blocks)
            )
        )
        self.norm = nn.BatchNorm2d(channels[-1])
        self.features = channels[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        planes = nn.functional.relu(self.norm(self.groups(self.conv(images))))
        return planes.mean((2, 3))


class WideBlock(nn.Module):
    """norm, ReLU, conv, twice, around which the input goes: (B, before, H, W) -> (B, after, H / stride, W / stride)."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else None

    def forward(self, planes: Tensor) -> Tensor:
        activated = nn.functional.relu(self.norm1(planes))
        kept = planes if self.shortcut is None else self.shortcut(activated)
        changed = self.conv2(nn.functional.relu(self.norm2(self.conv1(activated))))
        return changed + kept


def wide_resnet(name: str) -> WideResNet | None:
    """The one that a name such as wrn_16_8 means, depth and width; None if it means none."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    depth, width = map(int, found.groups())
    return WideResNet(depth, width) if depth >= 10 and (depth - 4) % (2 * GROUPS) == 0 and 1 <= width <= 20 else None
