"""What a sweep came to, as sweep.json has it and cifar.report draws it."""

import datetime
import shlex
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cifar.config import Config, ConfigError
from cifar.data import Prepared
from cifar.statistics import statistics
from cifar.tune.execute import rungs
from cifar.tune.ledger import Ledger, Trial
from cifar.tune.plan import SweepPlan
from cifar.tune.settings import TuneConfig
from cifar.tune.space import Choice, Space, apply, describe, flags_of

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a sweep searches, by which means, and where."""

    config: Config
    """The recipe but for what flags fixed."""
    tune: TuneConfig
    recipe_name: str
    recipe: Config
    source: str
    """Name or file of the space."""
    space: Space
    prepared: Prepared
    plan: SweepPlan
    path: str

    @property
    def name(self) -> str:
        return self.path.partition("?")[0].rsplit("/", 1)[-1]

    @property
    def max_epochs(self) -> int:
        """What a scheduler counts up to: epochs, with folds folds."""
        return self.tune.folds or max_epochs(self.config, self.space)

    @property
    def rungs(self) -> list[int]:
        return rungs(self.tune, self.max_epochs)

    def command(self, trial: Trial) -> str:
        """What trains the trial's configuration by itself; empty for one that cannot be."""
        try:
            config = apply(self.config, self.space, trial.current)
        except ConfigError:
            return ""
        if trial.seed is not None:
            config = replace(config, train=replace(config.train, seed=trial.seed))
        flags = flags_of(config, self.recipe)
        return shlex.join(["python", "jobs/train.py", "--recipe", self.recipe_name, *flags])


def max_epochs(config: Config, space: Space) -> int:
    """Of any trial."""
    domain = space.get("epochs")
    if domain is None:
        return config.train.epochs
    return int(max(domain.options) if isinstance(domain, Choice) else domain.high)


def ranked(trials: Ledger) -> list[Trial]:
    """Trials that have a score, best first; the earlier one of equals."""
    scored = [trial for trial in trials.trials.values() if trial.score is not None]
    return sorted(scored, key=lambda trial: (-(trial.score or 0.0), trial.number))


def summarize(
    setup: Setup, trials: Ledger, confirmed: Ledger, *, state: str, since: float, wall_seconds: float
) -> dict[str, Any]:
    """All of it but for what became of the winner; `since`, Unix time, is when this call began."""
    tune, known = setup.tune, sorted(trials.trials.values(), key=lambda trial: trial.number)
    # Not of this call: the trials of those before would begin below zero.
    start = min([since, *(trial.started for trial in known if trial.started is not None)])
    again = _confirmed(setup, trials, confirmed)
    return {
        "format": FORMAT,
        "name": setup.name,
        "data": setup.prepared.source,
        "recipe": setup.recipe_name,
        "space_name": setup.source,
        "search": tune.search,
        "scheduler": "none" if tune.search == "pbt" else tune.scheduler,
        "folds": tune.folds,
        "seed": setup.config.train.seed,
        "trials_wanted": max(tune.trials, len(known)),
        "at_once": setup.plan.at_once,
        "plan": str(setup.plan),
        "metric": "val_accuracy",
        "state": state,
        "started_at": datetime.datetime.fromtimestamp(start, datetime.UTC).isoformat(timespec="seconds"),
        "wall_seconds": wall_seconds,
        "train_seconds": sum(trial.train_seconds for trial in known),
        "rungs": setup.rungs,
        "space": describe(setup.space),
        "trials": [_described(setup, trial, trials.path_of(trial), start) for trial in known],
        "confirmed": again,
        "confirm_seconds": sum(trial.train_seconds for trial in confirmed.trials.values()),
        "winner": _winner(setup, trials, again),
        "luck": _luck(trials, again),
    }


def _described(setup: Setup, trial: Trial, path: str, start: float) -> dict[str, Any]:
    """For the report; times in seconds since the sweep's start."""
    done = len(trial.folds) or trial.epochs
    since = [None if when is None else when - start for when in (trial.started, trial.ended)]
    return {
        "number": trial.number,
        "values": trial.values,
        "state": trial.state,
        "reason": trial.reason,
        "score": trial.score,
        "epochs": trial.epochs,
        "epochs_planned": trial.epochs_planned,
        "rung": sum(rung <= done for rung in setup.rungs) - 1,
        "train_seconds": trial.train_seconds,
        "started": since[0],
        "ended": since[1],
        "resumed": max(trial.attempts - 1, 0),
        "history": trial.history,
        "folds": trial.folds,
        "mutations": trial.mutations,
        "command": setup.command(trial),
        "path": path,
    }


def _confirmed(setup: Setup, trials: Ledger, confirmed: Ledger) -> list[dict[str, Any]]:
    """The configurations that were trained anew, the best mean first."""
    found = []
    for number in sorted({trial.number for trial in confirmed.trials.values()}):
        runs = [t for t in confirmed.trials.values() if t.number == number and t.score is not None and t.done]
        searched = trials.trials.get(f"{number:05d}")
        if not runs or searched is None:
            continue
        runs.sort(key=lambda trial: trial.seed or 0)
        values = statistics(trial.score for trial in runs if trial.score is not None)
        best = max(runs, key=lambda trial: trial.score or 0.0)
        interval = values["ci95"]
        found.append(
            {
                "number": number,
                "values": best.values,
                "seeds": [trial.seed for trial in runs],
                "scores": [trial.score for trial in runs],
                "mean": values["mean"],
                "interval": interval and [max(interval[0], 0.0), min(interval[1], 1.0)],
                "search_score": searched.score,
                "command": setup.command(best),
                "path": confirmed.path_of(best),
            }
        )
    return sorted(found, key=lambda values: (-values["mean"], values["number"]))


def _winner(setup: Setup, trials: Ledger, confirmed: list[dict[str, Any]]) -> dict[str, Any] | None:
    if confirmed:
        first = confirmed[0]
        values = {name: first[name] for name in ("number", "command", "path")}
        return values | {"confirmed": True, "score": max(first["scores"])}
    if setup.tune.folds or not (order := ranked(trials)):
        return None
    best = order[0]
    return {
        "number": best.number,
        "command": setup.command(best),
        "path": trials.path_of(best),
        "confirmed": False,
        "score": best.score,
    }


def _luck(trials: Ledger, confirmed: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How much of the best trial's lead over the median trial its fresh seeds do not repeat."""
    order = ranked(trials)
    again = next((one for one in confirmed if order and one["number"] == order[0].number), None)
    if again is None:
        return None
    scores = [trial.score for trial in order if trial.score is not None]
    gain, luck = scores[0] - float(np.median(scores)), scores[0] - again["mean"]
    return {
        "search_score": scores[0],
        "confirmed_mean": again["mean"],
        "luck": luck,
        "gain": gain,
        "share": luck / gain if gain > 0 else None,
    }
