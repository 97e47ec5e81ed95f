"""The page of a hyperparameter sweep: sweep.html, from what sweep.json holds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cifar.report import figures, page
from cifar.report import sweep_figures as plots
from cifar.report.page import duration, number, percent
from cifar.report.sweep_figures import Scale, Trial, show

FEWEST_FOR_IMPORTANCE = 8
MOST_COMMANDS = 5
MOST_ROWS = 20
"""Trials that the figures of folds show."""
STATES = ("completed", "stopped", "failed", "running", "waiting")


def write_sweep_report(folder: Path, sweep: dict[str, Any], command: str = "") -> Path:
    """Write sweep.html into `folder` and return its path. `sweep` is what sweep.json holds; numbers of it may be null.

    A trial's `values` are those it began with; what its `mutations` made of them is what the page shows as its values.
    `command` is what a reader types to get the sweep again.
    """
    sweep = _finite(sweep)
    sweep |= {name: sweep.get(name) for name in ("winner", "luck", "test")}
    sweep["confirmed"] = [row for row in sweep.get("confirmed", []) if row["mean"] is not None]
    trials = [trial | {"start": trial["values"], "values": last_values(trial)} for trial in sweep["trials"]]
    trials.sort(key=lambda trial: (not _ranks(trial), -(trial["score"] or 0), trial["number"]))
    ranked = [trial for trial in trials if _ranks(trial)]
    scales = [plots.scale(name, entry, trials) for name, entry in sweep["space"].items()]
    varied = [at for at in scales if not at.fixed]
    shares, method = importances(ranked, varied)
    best = best_number(sweep)
    drawn = _figures(sweep, trials, ranked, varied, shares, best)
    html = page.render(
        "sweep.html",
        sweep=sweep | {"trials": trials},
        headline=headline(sweep),
        ranked=ranked,
        best=next((trial for trial in trials if trial["number"] == best), None),
        winner=confirmation(sweep, best),
        endings=_endings(trials),
        fixed=[at.name for at in scales if at.fixed],
        method=method,
        floor=_floor(ranked),
        commands=_commands(sweep, ranked),
        figures=drawn,
        numbered=any(">#1</text>" in picture for picture in (drawn.get("parallel_tall", ""), *drawn["slices"])),
        command=command,
        versions=page.versions(),
        show=show,
        most_rows=MOST_ROWS,
    )
    return page.write(Path(folder) / "sweep.html", html)


def headline(sweep: Mapping[str, Any]) -> list[str]:
    """What came out, how much of it was luck, and what it cost: a paragraph each."""
    return [" ".join(sentences) for sentences in (_best(sweep), _luck(sweep), _cost(sweep)) if sentences]


def _best(sweep: Mapping[str, Any]) -> list[str]:
    ranked = [trial for trial in sweep["trials"] if _ranks(trial)]
    now = ["The sweep is still running; this is how it stands."] if sweep["state"] == "running" else []
    if not ranked:
        return [*now, f"No trial has a score{' yet' if now else ''}, so there is no best configuration."]
    best = best_number(sweep)
    found = confirmation(sweep, best)
    score = next(trial["score"] for trial in sweep["trials"] if trial["number"] == best)
    if found:
        seeds = f"{len(found['seeds'])} fresh {'seed' if len(found['seeds']) == 1 else 'seeds'}"
        interval = (
            f", 95 % interval {_between(found['interval'])}" if found["interval"] else ", too few for an interval"
        )
        text = (
            f"Trial {best} is the best: trained again with {seeds} it reaches {percent(found['mean'], 2)} val accuracy"
        )
        sentences = [f"{text} (mean{interval})."]
    else:
        over = ", the mean over its folds" if sweep["folds"] else ""
        sentences = [f"Trial {best} has the best val accuracy of the search, {_score(score)}{over}."]
        if len(ranked) > 1:
            sentences.append(
                "It has not been confirmed with fresh seeds: "
                f"the highest of {len(ranked)} noisy numbers is too high by construction."
            )
        else:
            sentences.append("It is the only one with a score, and has not been confirmed with fresh seeds.")
    test = sweep["test"]
    if test:
        sentences.append(
            f"It classifies {percent(test['accuracy'], 2)} of {number(test['count'])} test images correctly "
            f"(95 % interval {_between(test['accuracy_ci95'])})."
        )
    else:
        sentences.append("It has not been tried on the test images.")
    return now + sentences


def _luck(sweep: Mapping[str, Any]) -> list[str]:
    luck = sweep["luck"]
    if not luck:
        return []
    text = (
        f"The trial that led the search had {percent(luck['search_score'], 2)} there, "
        f"and {percent(luck['confirmed_mean'], 2)} with fresh seeds: "
    )
    if luck["luck"] <= 0:
        return [text + "no luck is to be seen in its score."]
    points = f"{100 * luck['luck']:.2f} points"
    if luck["gain"] <= 0 or luck["share"] is None:
        return [text + f"{points} of its score were luck."]
    gain = f"{100 * luck['gain']:.2f} points by which it led the median trial"
    if luck["share"] >= 1:
        return [text + f"the {points} between them are more than the {gain}, so its lead was nothing but luck."]
    return [text + f"{points}, or {percent(luck['share'], 0)} of the {gain}, were luck."]


def _cost(sweep: Mapping[str, Any]) -> list[str]:
    trials, wanted = sweep["trials"], sweep["trials_wanted"]
    counts = {state: sum(trial["state"] == state for trial in trials) for state in STATES}
    parts = [f"{count} {'stopped early' if state == 'stopped' else state}" for state, count in counts.items() if count]
    missing = wanted - len(trials)
    if missing > 0:
        parts.append(f"{missing} not begun{': the budget was spent' if sweep['state'] == 'budget spent' else ''}")
    text = f"{_count(wanted, 'trial')}: {', '.join(parts)}." if parts else "No trial was wanted."
    if not trials:
        return [text]
    cost = "It" if len(trials) == 1 else "They"
    cost += f" took {duration(sweep['train_seconds'])} of training in {duration(sweep['wall_seconds'])}"
    if len(trials) > 1:
        cost += f", up to {sweep['at_once']} at once" if sweep["at_once"] > 1 else ", one after the other"
    cost += "."
    stopped = [trial for trial in trials if trial["state"] == "stopped"]
    planned = sum(trial["epochs_planned"] for trial in stopped)
    saved = planned - sum(trial["epochs"] for trial in stopped)
    if saved > 0:
        cost += f" Stopping early saved {number(saved)} of the {number(planned)} epochs planned for the stopped trials."
    return [text, cost]


def best_number(sweep: Mapping[str, Any]) -> int | None:
    """The winner, or while there is none the trial of the highest score."""
    if sweep["winner"]:
        return sweep["winner"]["number"]
    ranked = [trial for trial in sweep["trials"] if _ranks(trial)]
    return max(ranked, key=lambda trial: trial["score"])["number"] if ranked else None


def confirmation(sweep: Mapping[str, Any], trial: int | None) -> dict[str, Any] | None:
    """What a trial's fresh seeds reached."""
    return next((row for row in sweep["confirmed"] if row["number"] == trial), None)


def last_values(trial: Trial) -> dict[str, Any]:
    """What the trial was trained with at its end: its values as its mutations changed them."""
    values = dict(trial["values"])
    for mutation in trial["mutations"]:
        values |= mutation["values"]
    return values


def importances(ranked: Sequence[Trial], varied: Sequence[Scale]) -> tuple[dict[str, float], str]:
    """Share of the score's variance that each parameter explains, highest first; {} where it cannot be said.

    The second value says by which method and from how many trials, or why not. Trials that still run don't count.
    """
    trials = [trial for trial in ranked if trial["state"] != "running"]
    trials = [trial for trial in trials if not any(math.isnan(at.place(trial["values"].get(at.name))) for at in varied)]
    differing = [at for at in varied if len({at.place(trial["values"][at.name]) for trial in trials}) > 1]
    if len(trials) < FEWEST_FOR_IMPORTANCE:
        return {}, f"It takes {FEWEST_FOR_IMPORTANCE} trials with a score to tell them; there are {len(trials)}."
    if not differing:
        return {}, "No parameter took more than one value."
    if len({trial["score"] for trial in trials}) == 1:
        return {}, "All trials have the same score."
    method = (
        f"By fANOVA (Hutter 2014), a random forest fitted to the scores of {len(trials)} trials: how much of the "
        "variance that it explains goes back to each parameter alone"
    )
    return _fanova(trials, differing), method


def _fanova(trials: Sequence[Trial], scales: Sequence[Scale]) -> dict[str, float]:
    import optuna  # takes 0.4 s, which the reports of runs don't need

    distributions: dict[str, Any] = {
        at.name: optuna.distributions.CategoricalDistribution(range(len(at.choices)))
        if at.choices
        else optuna.distributions.FloatDistribution(0, 1)
        for at in scales
    }
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
        for trial in trials:
            shown = {at.name: trial["values"][at.name] for at in scales}
            places = {
                at.name: at.choices.index(show(shown[at.name]))
                if at.choices
                else min(max(at.place(shown[at.name]), 0), 1)
                for at in scales
            }
            study.add_trial(optuna.trial.create_trial(value=trial["score"], params=places, distributions=distributions))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(level)
    return {name: float(share) for name, share in found.items()}


def _figures(
    sweep: Mapping[str, Any],
    trials: Sequence[Trial],
    ranked: Sequence[Trial],
    varied: Sequence[Scale],
    shares: Mapping[str, float],
    best: int | None,
) -> dict[str, Any]:
    """SVG by name, with nothing where there is nothing to draw."""
    found: dict[str, Any] = {"slices": []}

    def add(name: str, draw: figures.Draw, height: float, title: str, width: float = plots.WIDTH) -> None:
        found[name] = figures.svg(draw, (width, height), title)

    if sweep["confirmed"]:
        rows = [_confirmed_row(row) for row in sweep["confirmed"]]
        draw = plots.spreads(rows, "Fresh seeds and the search", "a fresh seed")
        add(
            "confirmed",
            draw,
            _height(len(rows), 0.4),
            "Val accuracy of each fresh seed, their mean, and the search's score",
        )
    if ranked and varied:
        title = f"Parallel coordinates of {len(ranked)} trials"
        add("parallel_wide", plots.parallel(ranked, varied, True), 4.4, title, plots.FULL_WIDTH)
        add("parallel_tall", plots.parallel(ranked, varied, False), 0.85 * (len(varied) + 1), title)
        found["slices"] = [
            figures.svg(plots.slice_of(ranked, at), (plots.WIDTH, 3.4), f"Val accuracy against {at.name}")
            for at in varied
        ]
    if shares:
        add("importances", plots.importances(shares), _height(len(shares), 0.3), "Importance of each parameter")
    learned = [trial for trial in trials if plots.lines(trial["history"])]
    if learned:
        draw = plots.curves(learned, sweep["rungs"], best)
        add("curves", draw, 4.2, f"Val accuracy by epoch of {len(learned)} trials")
    begun = [trial for trial in trials if trial["started"] is not None]
    if begun:
        ends = [trial["started"] if trial["ended"] is None else trial["ended"] for trial in begun]
        draw = plots.timeline(begun, max(sweep["wall_seconds"], *ends, 1.0))
        add("timeline", draw, min(_height(len(begun), 0.2), 7.5), f"When each of {len(begun)} trials ran")
    folded = [trial for trial in ranked if trial["folds"]][:MOST_ROWS]
    if folded:
        draw = plots.spreads(plots.fold_rows(folded), "Accuracy of each fold", "a fold")
        add("folds", draw, _height(len(folded), 0.26), "Val accuracy of each fold, by trial")
    mutated = {name for trial in trials for row in trial["mutations"] for name in row["values"]}
    found["schedules"] = [
        figures.svg(plots.schedule(ranked or trials, at), (plots.WIDTH, 3.4), f"{at.name} by epoch")
        for at in varied
        if at.name in mutated
    ]
    return found


def _height(rows: int, each: float) -> float:
    """Inches of a figure of so many rows, with room for its title, axis and legend."""
    return 1.6 + each * rows


def _confirmed_row(row: Mapping[str, Any]) -> plots.Spread:
    return plots.Spread(f"trial {row['number']}", row["scores"], row["mean"], row["interval"], row["search_score"])


def _commands(sweep: Mapping[str, Any], ranked: Sequence[Trial]) -> list[dict[str, Any]]:
    """The best configurations with their shell commands: those confirmed by their mean, then by the search's score."""
    confirmed = [
        {"number": row["number"], "said": f"{percent(row['mean'], 2)} with fresh seeds", "command": row["command"]}
        for row in sweep["confirmed"]
    ]
    taken = {row["number"] for row in confirmed}
    others = [
        {
            "number": trial["number"],
            "said": f"{_score(trial['score'])} in the search{_shortened(trial)}",
            "command": trial["command"],
        }
        for trial in ranked
        if trial["number"] not in taken
    ]
    return [*confirmed, *others][: max(MOST_COMMANDS, len(confirmed))]


def _endings(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What the trials of each state cost."""
    groups = {state: [trial for trial in trials if trial["state"] == state] for state in STATES}
    return [
        {
            "state": state,
            "count": len(group),
            "epochs": sum(trial["epochs"] for trial in group),
            "planned": sum(trial["epochs_planned"] for trial in group),
            "seconds": sum(trial["train_seconds"] or 0 for trial in group),
            "median": median(trial["train_seconds"] or 0 for trial in group),
        }
        for state, group in groups.items()
        if group
    ]


def _floor(ranked: Sequence[Trial]) -> dict[str, Any] | None:
    """Where the figures cut the scores off, and how many are below."""
    if not ranked:
        return None
    bottom = plots.floor(ranked)
    return {"score": bottom, "below": sum(trial["score"] < bottom for trial in ranked)}


def _shortened(trial: Trial) -> str:
    if trial["state"] == "completed":
        return ""
    return f", {trial['state']} {'at' if trial['state'] == 'running' else 'after'} epoch {trial['epochs']}"


def _ranks(trial: Trial) -> bool:
    return trial["score"] is not None and trial["state"] != "failed"


def _score(score: float | None) -> str:
    return "none" if score is None else percent(score, 2)


def _between(interval: Sequence[float]) -> str:
    return f"{percent(interval[0], 2)} to {percent(interval[1], 2)}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which a diverged trial leaves: null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
