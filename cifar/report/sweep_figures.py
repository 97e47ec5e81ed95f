"""Plots of a hyperparameter sweep. `trials` are those of sweep.json, best first where order shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cifar.report.figures import PAPER, TRAIN, VAL, Draw, dot, legend_below, percent_axis, shorten
from cifar.report.page import PERCENT, percent

Trial = Mapping[str, Any]

NEUTRAL, FAILED = "#8b95a3", "#c22f5f"
STATES = {"completed": VAL, "stopped": TRAIN, "failed": FAILED, "running": NEUTRAL}
"""Colours of what became of a trial; one that waits is not drawn."""
SHADES = LinearSegmentedColormap.from_list("shades", [NEUTRAL, VAL, "#a04fc0", TRAIN])
"""From the lowest to the best."""
WIDTH, FULL_WIDTH = 5.0, 9.6
"""Inches of a figure that fits a phone, and of one that fills the page."""
MOST_TICKS = 6


@dataclass(frozen=True)
class Scale:
    """Values of one parameter to 0..1 along an axis, logarithmic where the space is."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()
    """As `show` writes them; empty for numbers."""

    @property
    def fixed(self) -> bool:
        return len(self.choices) == 1 or (not self.choices and self.low == self.high)

    def place(self, value: Any) -> float:
        """NaN, which plots leave out, for a value that a trial lacks."""
        if self.choices:
            label = show(value)
            return (self.choices.index(label) + 0.5) / len(self.choices) if label in self.choices else math.nan
        if not isinstance(value, int | float):
            return math.nan
        if self.fixed:
            return 0.5
        low, high, at = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (at - low) / (high - low)

    def ticks(self, room: int) -> list[tuple[float, str]]:
        """Places and labels; choices that are alike in `room` letters by their number, as #1."""
        if self.choices:
            labels = [shorten(label, room) for label in self.choices]
            if len(set(labels)) < len(labels):
                labels = [f"#{number}" for number in range(1, 1 + len(labels))]
            return list(zip(map(self.place, self.choices), labels, strict=True))
        linear = MaxNLocator(MOST_TICKS - 1, integer=self.whole)
        found = self._decades() if self.log else linear.tick_values(self.low, self.high)
        inside = [float(value) for value in found if self.low <= value <= self.high]
        if len(inside) < 2:
            inside = sorted({self.low, self.high})
        return [(self.place(value), show(value)) for value in inside]

    def _decades(self) -> list[float]:
        """1, 2, 5, 10 and so on; 1, 10 or 1, 100 where these would be too many."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        fine = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
        fine = [value for value in fine if self.low <= value <= self.high]
        if len(fine) <= MOST_TICKS:
            return fine
        return [10.0**exponent for exponent in exponents[:: 1 + len(exponents) // MOST_TICKS]]


def scale(name: str, entry: Mapping[str, Any], trials: Sequence[Trial]) -> Scale:
    """Of a parameter of the space; wider than that where a mutation left it."""
    values = [trial["values"][name] for trial in trials if trial["values"].get(name) is not None]
    if entry["kind"] == "choice":
        labels = [show(value) for value in (*entry["choices"], *values)]
        return Scale(name, choices=tuple(dict.fromkeys(labels)))
    numbers = [value for value in (entry["low"], entry["high"], *values) if isinstance(value, int | float)]
    return Scale(name, min(numbers), max(numbers), bool(entry.get("log")), entry["kind"] == "int")


def show(value: Any) -> str:
    """A value as the page writes it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def floor(ranked: Sequence[Trial]) -> float:
    """Where the axis of the scores ends.

    Trials that are hopeless, or were stopped after an epoch, would squeeze the good ones together.
    """
    scores = [trial["score"] for trial in ranked]
    completed = [trial["score"] for trial in ranked if trial["state"] == "completed"]
    quartile = float(np.quantile(completed if len(completed) > 2 else scores, 0.25))
    return max(min(scores), max(scores) - max(2.5 * (max(scores) - quartile), 0.02))


def parallel(trials: Sequence[Trial], scales: Sequence[Scale], upright: bool) -> Draw:
    """One line a trial through its values to its score; axes upright side by side, or lying one below the other."""
    scores = [trial["score"] for trial in trials]
    bottom, top = floor(trials), max(scores)
    accuracy = Scale("val accuracy", 100 * bottom, 100 * top)
    every = [*scales, accuracy]

    def points(trial: Trial) -> list[float]:
        wobble = (trial["number"] * 0.618 % 1 - 0.5) * 0.5  # so that trials of the same choice lie beside each other
        own = [
            at.place(trial["values"].get(at.name)) + (wobble / len(at.choices) if at.choices else 0) for at in scales
        ]
        return [*own, max(accuracy.place(100 * trial["score"]), 0.0)]

    def along(axes: Axes, across: Sequence[float], at: Sequence[float], **style: Any) -> None:
        axes.plot(*((across, at) if upright else (at, across)), **style)

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        places = range(len(every))
        for place, (trial, color) in reversed(list(enumerate(zip(trials, _ranked(len(trials)), strict=True)))):
            # Of many trials the worse ones are fainter, else they hide the best.
            faint = 0.65 if len(trials) <= 40 else 0.7 - 0.5 * place / len(trials)
            style: Any = {"linewidth": 2.6} if place == 0 else {"linewidth": 1, "alpha": faint}
            along(axes, places, points(trial), color=color, **style)
        for place, at in enumerate(every):
            along(axes, [place, place], [0, 1], color=mpl.rcParams["text.color"], linewidth=1)
            _name(axes, at, place, len(every), upright)
            room = max(6, 100 // len(every)) if upright else max(4, 68 // max(len(at.choices), 3))
            ticks = at.ticks(room)
            if at is accuracy:
                ticks = [(tick, f"{label}{PERCENT}") for tick, label in ticks]
                if min(scores) < bottom:
                    ticks = [(0.0, f"≤ {percent(bottom)}"), *(tick for tick in ticks if tick[0] > 0.2)]
            for tick, label in ticks:
                _tick(axes, place, tick, label, upright)
        if upright:
            axes.set(xlim=(-0.25, len(every) - 0.65), ylim=(-0.05, 1.02))
        else:
            axes.set(xlim=(-0.06, 1.06), ylim=(len(every) - 0.6, -0.45))

    return draw


def _name(axes: Axes, at: Scale, place: int, count: int, upright: bool) -> None:
    note = f"{at.name} (log)" if at.log else at.name
    if upright:
        label = shorten(note, max(8, 100 // count))
        axes.text(place, 1.06, label, ha="center", va="bottom", fontweight="bold", fontsize=9.5)
    else:
        label = shorten(note, 50)
        axes.text(0, place - 0.14, label, ha="left", va="bottom", fontweight="bold", fontsize=10, bbox=_backed())


def _tick(axes: Axes, place: int, tick: float, label: str, upright: bool) -> None:
    style: Any = {"fontsize": 8.5, "bbox": _backed()}
    if upright:
        axes.text(place + 0.03, tick, label, ha="left", va="center", **style)
    else:
        side = "center" if 0.1 < tick < 0.9 else "left" if tick <= 0.1 else "right"
        axes.text(tick, place + 0.08, label, ha=side, va="top", **style)


def _backed() -> dict[str, Any]:
    return {"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 1}


def _ranked(count: int) -> list[str]:
    """Colours from the best to the last."""
    return [to_hex(SHADES(1 - place / max(count - 1, 1))) for place in range(count)]


def importances(shares: Mapping[str, float]) -> Draw:
    def draw(axes: Axes) -> None:
        names = [shorten(name, 20) for name in shares]
        axes.barh(range(len(names)), list(shares.values()), color=VAL, height=0.6)
        for place, share in enumerate(shares.values()):
            axes.text(share, place, f"\u00a0{100 * share:.0f}{PERCENT}", va="center", ha="left")
        axes.set_yticks(range(len(names)), names)
        axes.set(title="Importance", xlim=(0, max(shares.values()) * 1.15), xlabel="share of the explained variance")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0, symbol=PERCENT))
        axes.invert_yaxis()
        axes.grid(False, axis="y")

    return draw


def curves(trials: Sequence[Trial], rungs: Sequence[int], best: int | None) -> Draw:
    """Val accuracy by epoch; colour is the highest rung reached, or the rank where there are none."""
    colors = dict(zip([trial["number"] for trial in trials], _ranked(len(trials)), strict=True))
    if rungs:
        colors = {trial["number"]: to_hex(SHADES((trial["rung"] + 1) / len(rungs))) for trial in trials}

    def order(trial: Trial) -> tuple[bool, int, float]:
        return trial["number"] == best, trial["rung"], trial["score"] or 0.0

    def draw(axes: Axes) -> None:
        for trial in sorted(trials, key=order):
            thick = trial["number"] == best
            style: Any = {"marker": "o", "color": colors[trial["number"]], "alpha": 1 if thick else 0.7}
            style |= {"linewidth": 2.6 if thick else 1, "markersize": 4 if thick or len(trials) <= 30 else 2}
            for line in lines(trial["history"]):
                axes.plot(*zip(*line, strict=True), **style)
        for epoch in rungs:
            axes.axvline(epoch, color=mpl.rcParams["text.color"], linestyle=":", linewidth=1, alpha=0.5)
        axes.set(title="Val accuracy by epoch", xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent_axis(axes.yaxis)
        seen = {trial["rung"]: colors[trial["number"]] for trial in trials} if rungs else {}
        names = [f"rung at epoch {rungs[rung]}" if rung >= 0 else "no rung" for rung in sorted(seen)]
        handles = [Line2D([], [], color=seen[rung], marker="o", markersize=4) for rung in sorted(seen)]
        legend_below(axes, handles, names)

    return draw


def lines(history: Sequence[Mapping[str, Any]]) -> list[list[tuple[int, float]]]:
    """(epoch, val accuracy), cut where the epochs begin anew, as each fold's do."""
    found: list[list[tuple[int, float]]] = []
    for row in history:
        if row.get("val_accuracy") is None:
            continue
        if not found or row["epoch"] <= found[-1][-1][0]:
            found.append([])
        found[-1].append((row["epoch"], row["val_accuracy"]))
    return found


def timeline(trials: Sequence[Trial], now: float) -> Draw:
    """One bar a trial that has started; one that runs ends `now`, in seconds since the sweep's start."""

    def draw(axes: Axes) -> None:
        bars = [(trial, trial["started"], now if trial["ended"] is None else trial["ended"]) for trial in trials]
        unit, seconds = _unit(max(end for _, _, end in bars))
        for trial, start, end in bars:
            hatch = "////" if trial["state"] == "failed" and len(bars) <= 60 else None
            style: Any = {"color": STATES.get(trial["state"], NEUTRAL), "hatch": hatch, "edgecolor": PAPER}
            axes.barh(trial["number"], (end - start) / seconds, 0.8, start / seconds, linewidth=0, **style)
        axes.set(title="When each trial ran", xlabel=f"{unit} since the start", ylabel="trial")
        numbers = sorted(trial["number"] for trial in trials)
        axes.set_yticks(numbers[:: math.ceil(len(numbers) / 20)])
        axes.set_ylim(numbers[-1] + 0.6, numbers[0] - 0.6)
        states = [state for state in STATES if any(trial["state"] == state for trial in trials)]
        legend_below(axes, [Patch(color=STATES[state]) for state in states], states)

    return draw


def _unit(seconds: float) -> tuple[str, float]:
    """The largest of which there are three."""
    return next((unit for unit in (("hours", 3600), ("minutes", 60)) if seconds >= 3 * unit[1]), ("seconds", 1))


def slice_of(trials: Sequence[Trial], at: Scale) -> Draw:
    """Score against one parameter; what is below the `floor` is a triangle at the edge."""
    bottom = floor(trials)

    def draw(axes: Axes) -> None:
        for trial in reversed(trials):
            across = at.place(trial["values"].get(at.name))
            if at.choices:
                across += (trial["number"] * 0.618 % 1 - 0.5) * 0.4 / len(at.choices)
            low, color = trial["score"] < bottom, STATES.get(trial["state"], NEUTRAL)
            face = color if trial["state"] == "completed" else "none"
            style: Any = {"marker": "v" if low else "o", "markersize": 5, "markerfacecolor": face}
            axes.plot([across], [max(trial["score"], bottom)], color=color, linestyle="", **style)
        axes.set_xticks(*zip(*at.ticks(max(4, 48 // max(len(at.choices), 1))), strict=True))
        name = shorten(at.name, 40)
        axes.set(title=name, xlabel="logarithmic" if at.log else "", xlim=(-0.04, 1.04))
        percent_axis(axes.yaxis)

    return draw


class Spread(NamedTuple):
    """A row of `spreads`: values of one trial, their mean with its interval, and the score to compare them with."""

    label: str
    values: Sequence[float]
    mean: float
    interval: Sequence[float] | None = None
    search: float | None = None


def spreads(rows: Sequence[Spread], title: str, each: str) -> Draw:
    """Dots of `each` seed or fold, and their mean; a diamond where the search had put the trial."""

    def draw(axes: Axes) -> None:
        for place, row in enumerate(rows):
            if row.interval:
                axes.plot(row.interval, [place, place], color=VAL, linewidth=3, alpha=0.45, solid_capstyle="round")
            axes.plot(row.values, [place] * len(row.values), "o", color=VAL, markersize=5, markerfacecolor="none")
            axes.plot([row.mean], [place], "o", color=VAL, markersize=7)
            if row.search is not None:
                axes.plot([row.search], [place], "D", color=TRAIN, markersize=6)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set(title=title, xlabel="val accuracy", ylim=(len(rows) - 0.5, -0.5))
        percent_axis(axes.xaxis)
        handles = [dot("o", VAL, "none"), dot("o", VAL, VAL)]
        names = [each, "mean"]
        if any(row.interval for row in rows):
            handles.append(Line2D([], [], color=VAL, linewidth=3, alpha=0.45))
            names.append("95 % interval of the mean")
        if any(row.search is not None for row in rows):
            handles.append(dot("D", TRAIN, TRAIN))
            names.append("score in the search")
        legend_below(axes, handles, names, columns=2)

    return draw


def fold_rows(trials: Sequence[Trial]) -> list[Spread]:
    return [Spread(f"trial {trial['number']}", trial["folds"], mean(trial["folds"])) for trial in trials]


def schedule(trials: Sequence[Trial], at: Scale) -> Draw:
    """One parameter by epoch: level until a mutation, where the copied trial's values, changed, take over."""

    def draw(axes: Axes) -> None:
        for place, (trial, color) in reversed(list(enumerate(zip(trials, _ranked(len(trials)), strict=True)))):
            steps = [(0, trial["start"].get(at.name))]
            steps += [(row["epoch"], row["values"][at.name]) for row in trial["mutations"] if at.name in row["values"]]
            steps.append((max(trial["epochs"], steps[-1][0]), steps[-1][1]))
            epochs, values = zip(*((epoch, at.place(value)) for epoch, value in steps), strict=True)
            style: Any = {"linewidth": 2.6, "alpha": 1} if place == 0 else {"linewidth": 1.2, "alpha": 0.7}
            axes.step(epochs, values, where="post", color=color, marker="o", markersize=3, **style)
        axes.set_yticks(*zip(*at.ticks(12), strict=True))
        name = shorten(at.name, 40)
        axes.set(title=f"{name} by epoch", xlabel="epoch", ylabel="logarithmic" if at.log else "", ylim=(-0.04, 1.04))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw
