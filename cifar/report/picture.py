"""One image with what is said of it."""

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from cifar.report import figures

_WIDTH, _TALLEST = 4.0, 3.0
"""Inches, and the largest ratio of height to width."""


def captioned(image: NDArray[np.uint8], caption: str) -> bytes:
    """PNG of an image (H,W,3) of any size below its caption; a small one is enlarged, its pixels squares."""

    def draw(axes: Axes) -> None:
        axes.imshow(image, interpolation="nearest" if max(image.shape) < 160 * _WIDTH else "antialiased")
        axes.set_title(caption, parse_math=False)  # a dollar in a class's name is a dollar
        axes.set_axis_off()

    height, width = image.shape[:2]
    return figures.png([draw], (_WIDTH, _WIDTH * min(height / width, _TALLEST) + 0.5))
