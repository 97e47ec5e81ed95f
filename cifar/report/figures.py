"""Plots with matplotlib's object API. As SVG for the pages, where text follows the page's colours, and as PNG files."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from cifar.evaluate import Bin, Evaluation
from cifar.report.history import Row
from cifar.report.page import PERCENT

TRAIN, VAL = "#d9730d", "#2f7ed8"  # apart also for the colour-blind, and legible on white and on near-black
INK = "#010203"  # a stand-in that `svg` turns into the page's own text colour
PAPER = "#fefdfc"  # and one for the page's background; white enough for a PNG
MOST_ANNOTATED = 20
"""Classes up to which a confusion matrix shows its counts."""

Draw = Callable[[Axes], None]


def svg(draw: Draw, size: tuple[float, float], title: str) -> Markup:
    """One panel to put into a page; `title` is what a screen reader says."""
    with _style(INK):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        content = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None, "Creator": None})
    text = content.getvalue().decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # figure_1 and so on: the same in each picture of a page
    return Markup(text.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(title), 1))


def png(draws: Sequence[Draw], size: tuple[float, float]) -> bytes:
    """Panels side by side, black on white, 160 dots per inch."""
    with _style("black"):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        for axes, draw in zip(np.ravel(figure.subplots(1, len(draws))), draws, strict=True):
            draw(axes)
        content = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(content, format="png", dpi=160)
    return content.getvalue()


@contextmanager
def _style(ink: str) -> Iterator[None]:
    settings: Any = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.15,
        "figure.facecolor": "none",
        "legend.frameon": False,
        "svg.fonttype": "none",
        "text.parse_math": False,  # a class may be called $x$
    }
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    with mpl.rc_context(settings | dict.fromkeys(inked, ink)), warnings.catch_warnings():
        # A class name in a script that the font lacks shows as boxes in the PNG; the page has the name itself.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def curve(history: Sequence[Row], key: str) -> Draw:
    """`loss` or `accuracy` of train and val by epoch."""

    def draw(axes: Axes) -> None:
        epochs = [row["epoch"] for row in history]
        marker = "o" if len(history) <= 30 else ""
        for split, color in (("train", TRAIN), ("val", VAL)):
            values = [row[f"{split}_{key}"] for row in history]
            axes.plot(epochs, values, color=color, marker=marker, markersize=4, label=split)
        axes.set(title=key.capitalize(), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=PERCENT))
        axes.legend()

    return draw


def reliability(bins: Sequence[Bin], ece: float) -> Draw:
    """Accuracy over confidence, bars darker where more images are; the diagonal is perfect calibration."""

    def draw(axes: Axes) -> None:
        most = max(b.count for b in bins)
        for b in bins:
            strength = 0.25 + 0.7 * b.count / most
            axes.bar(b.low, b.accuracy, b.high - b.low, align="edge", color=VAL, alpha=strength, linewidth=0)
        axes.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color=TRAIN, label="perfect calibration")
        axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], "o", color=VAL, markersize=4)
        axes.set(title=f"Reliability (ECE {ece:.4f})", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.set_aspect("equal")
        axes.legend(loc="upper left")

    return draw


def coverage(points: Sequence[tuple[float, float]], accepted: tuple[float, float] | None) -> Draw:
    """Accuracy over the share of images that are accepted, surest first; a mark where the threshold accepts."""

    def draw(axes: Axes) -> None:
        axes.plot([share for share, _ in points], [accuracy for _, accuracy in points], color=VAL)
        if accepted:
            axes.plot(*accepted, "o", color=TRAIN, label="at the threshold")
            axes.legend(loc="lower left")
        axes.set(title="Accuracy of what is accepted", xlabel="share accepted", ylabel="accuracy", xlim=(0, 1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, symbol=PERCENT))

    return draw


def confusion(evaluation: Evaluation, normalized: bool) -> Draw:
    """Labels down, predictions across; normalised by row. Cells carry numbers where there is room for them."""
    matrix = evaluation.confusion_matrix
    shares = row_shares(matrix)
    size = len(matrix)

    def draw(axes: Axes) -> None:
        axes.grid(False)
        axes.imshow(shares, cmap=_fading(VAL), vmin=0, vmax=1, interpolation="nearest")
        axes.set(title="Share of the class" if normalized else "Images", xlabel="prediction", ylabel="label")
        axes.spines[:].set_visible(False)
        if size > MOST_ANNOTATED:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            return
        names = [shorten(name) for name in evaluation.classes]
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names)
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                text = f"{100 * shares[row, column]:.1f}" if normalized else f"{count}"
                color = "white" if shares[row, column] > 0.5 else mpl.rcParams["text.color"]
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7)

    return draw


def row_shares(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """(C,C) counts over their row's sum; a class without images is a row of zeros."""
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1)


def shorten(name: str, most: int = 16) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def percent_axis(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(PercentFormatter(1.0, symbol=PERCENT))


def dot(marker: str, color: str, face: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, markerfacecolor=face, linestyle="")


def legend_below(axes: Axes, handles: Sequence[Any], names: Sequence[str], columns: int = 3) -> None:
    """Below the plot, where it hides nothing."""
    if names:
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9)


def _fading(color: str) -> LinearSegmentedColormap:
    """From nothing to `color`, so that the page's background shows; quickly at first, since errors are rare."""
    steps = np.linspace(0, 1, 64)
    red, green, blue = to_rgb(color)
    return LinearSegmentedColormap.from_list("fading", [(red, green, blue, step**0.45) for step in steps])
