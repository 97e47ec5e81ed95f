"""Plots of a comparison. `contenders` are those of compare.json that have a rank, best first."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cifar.report.figures import TRAIN, VAL, Draw, dot, legend_below, percent_axis, shorten

Contender = Mapping[str, Any]

WIDTH = 5.0
"""Inches of a figure that fits a phone."""
COLORS = (VAL, TRAIN, "#0f9474", "#c4549c", "#8a7a00", "#7d6be0")
"""Apart also for the colour-blind, and legible on white and on near-black; after these the lines are dashed."""
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)))
MARKERS = "osD^vP"
ROOM = 18
"""Letters of a name."""


class Style(NamedTuple):
    color: str
    dashes: Any
    marker: str


def style(rank: int) -> Style:
    """Of a contender by its rank, from 1 on: the same in all figures."""
    place = rank - 1
    turn = place // len(COLORS)
    return Style(COLORS[place % len(COLORS)], DASHES[turn % len(DASHES)], MARKERS[(place + turn) % len(MARKERS)])


def intervals(contenders: Sequence[Contender]) -> Draw:
    """A row a contender: its runs, their mean, and the interval of the mean with and without what seeds change."""

    def draw(axes: Axes) -> None:
        for place, one in enumerate(contenders):
            color = style(one["rank"]).color
            axes.plot(one["interval"], [place] * 2, color=color, linewidth=7, alpha=0.3, solid_capstyle="butt")
            axes.plot(one["sampling_interval"], [place] * 2, color=color, linewidth=1.6)
            runs = [run["accuracy"] for run in one["runs"] if run["accuracy"] is not None]
            axes.plot(runs, [place] * len(runs), "o", color=color, markersize=5, markerfacecolor="none")
            axes.plot([one["mean"]], [place], "o", color=color, markersize=7)
        axes.set_yticks(range(len(contenders)), [shorten(one["name"], ROOM) for one in contenders])
        axes.set(title="Test accuracy", ylim=(len(contenders) - 0.5, -0.5))
        percent_axis(axes.xaxis)
        ink = mpl.rcParams["text.color"]
        handles = [dot("o", ink, "none"), dot("o", ink, ink)]
        handles += [Line2D([], [], color=ink, linewidth=1.6), Line2D([], [], color=ink, linewidth=7, alpha=0.3)]
        names = ["a run", "mean", "95 %, other images", "95 %, other images and seeds"]
        legend_below(axes, handles, names, columns=2)

    return draw


def sources(contenders: Sequence[Contender]) -> Draw:
    """Of each that ran with several seeds, in points: what another seed changes, and what other images do."""

    def draw(axes: Axes) -> None:
        for place, one in enumerate(contenders):
            axes.plot([100 * one["seed_sd"]], [place], "o", color=TRAIN, markersize=8)
            axes.plot([100 * one["sampling_sd"]], [place], "s", color=VAL, markersize=7, markerfacecolor="none")
        axes.set_yticks(range(len(contenders)), [shorten(one["name"], ROOM) for one in contenders])
        axes.set(title="What moves the accuracy of one run", ylim=(len(contenders) - 0.5, -0.5))
        axes.set(xlabel="standard deviation, percentage points")
        axes.set_xlim(left=0, right=1.1 * max(axes.get_xlim()[1], 0.01))
        legend_below(axes, [dot("o", TRAIN, TRAIN), dot("s", VAL, "none")], ["another seed", "other test images"])

    return draw


class Curve(NamedTuple):
    """Of the runs of a contender that reached an epoch: median seconds, and mean accuracy with its range."""

    epochs: list[int]
    seconds: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def curve_of(contender: Contender) -> Curve:
    """Of runs that answered; empty where there are no epochs."""
    runs = [run["curve"] for run in contender["runs"] if run["accuracy"] is not None]
    epochs = sorted({row["epoch"] for rows in runs for row in rows if row["val_accuracy"] is not None})
    at = [[row for rows in runs for row in rows if row["epoch"] == epoch and _known(row)] for epoch in epochs]
    values = [[row["val_accuracy"] for row in rows] for rows in at]
    return Curve(
        epochs=epochs,
        seconds=[median(row["train_seconds"] for row in rows) for rows in at],
        mean=[fmean(found) for found in values],
        low=[min(found) for found in values],
        high=[max(found) for found in values],
    )


def _known(row: Mapping[str, Any]) -> bool:
    return row["val_accuracy"] is not None and row["train_seconds"] is not None


def curves(contenders: Sequence[Contender], over: str) -> Draw:
    """Val accuracy over `epochs` or `seconds` of training; a baseline has no epochs, and is a level or a point."""
    drawn = [(one, curve_of(one)) for one in contenders]
    drawn = [(one, curve) for one, curve in drawn if curve.epochs]

    def draw(axes: Axes) -> None:
        for one, curve in reversed(drawn):
            color, dashes, marker = style(one["rank"])
            if over == "epochs" and one["kind"] == "baseline":
                axes.axhline(curve.mean[-1], color=color, linestyle=(0, (1, 2)), linewidth=1.4)
                continue
            across = getattr(curve, over)
            size = 5 if len(across) <= 30 else 0
            axes.plot(across, curve.mean, color=color, linestyle=dashes, marker=marker, markersize=size, linewidth=1.8)
            if len(curve.epochs) > 1:
                axes.fill_between(across, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
            else:
                axes.plot(across * 2, [curve.low[0], curve.high[0]], color=color, linewidth=1.2)
        axes.set(title=f"Val accuracy over {'epochs' if over == 'epochs' else 'seconds of training'}")
        axes.set_xlabel("epoch" if over == "epochs" else "seconds")
        percent_axis(axes.yaxis)
        if over == "epochs":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif spread([curve.seconds[-1] for _, curve in drawn]) > 20:
            axes.set_xscale("log")
        label_ends(axes, [(one["name"], style(one["rank"]), curve.mean[-1]) for one, curve in drawn])

    return draw


def spread(values: Sequence[float]) -> float:
    return max(values) / max(min(values), 1e-9) if values else 1.0


def label_ends(axes: Axes, ends: Sequence[tuple[str, Style, float]]) -> None:
    """Names right of the plot at the heights where the lines end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None
    gap = 0.16 / (figure.get_figheight() - 1.0)
    order = sorted(ends, key=lambda end: end[2])
    heights = apart([(value - low) / (high - low) for _, _, value in order], gap)
    for (name, (color, _, marker), value), height in zip(order, heights, strict=True):
        line: Any = {"transform": axes.transAxes, "clip_on": False, "color": color}
        axes.plot([1.0, 1.04], [(value - low) / (high - low), height], linewidth=0.8, **line)
        axes.plot([1.06], [height], marker=marker, markersize=4, linestyle="", **line)
        axes.text(1.085, height, shorten(name, ROOM), va="center", transform=axes.transAxes, fontsize=9)


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending numbers, moved as little as it takes to be `gap` apart, in groups around their own mean."""
    groups: list[tuple[float, list[float]]] = []
    for height in heights:
        group = [height]
        while True:
            middle = fmean(group)
            below = groups[-1] if groups else None
            if below is None or below[0] + (len(below[1]) - 1) * gap / 2 + gap <= middle - (len(group) - 1) * gap / 2:
                break
            group = [*groups.pop()[1], *group]
        groups.append((fmean(group), group))
    return [middle + (place - (len(group) - 1) / 2) * gap for middle, group in groups for place in range(len(group))]
