"""What a comparison came to, as compare.json has it and cifar.report draws it."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from cifar.compare.answers import Answers, read_answers
from cifar.compare.contenders import Contender, remarks, settings_of
from cifar.compare.cost import network_cost
from cifar.compare.job import BASELINE
from cifar.compare.statistics import Difference, Sample, Score, compare, median_run
from cifar.compare.verdict import headline, verdict
from cifar.config import Config, ConfigError
from cifar.data import Prepared
from cifar.data.prepared import join, read_object
from cifar.optim import peak_lr
from cifar.tune.ledger import Ledger, Trial
from cifar.tune.plan import SweepPlan
from cifar.tune.space import label_of

FORMAT = 1
CURVE = ("epoch", "val_accuracy", "train_seconds")
"""What is kept of each epoch."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is compared, by which means, and where."""

    config: Config
    contenders: Sequence[Contender]
    prepared: Prepared
    plan: SweepPlan
    path: str
    recipe: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """The runs of one contender, in the order of their seeds."""

    contender: Contender
    trials: list[Trial]
    paths: list[str]
    answers: list[Answers | None]
    """None for a run that failed, or was not begun."""

    @property
    def answered(self) -> list[tuple[Trial, Answers]]:
        return [(trial, answers) for trial, answers in zip(self.trials, self.answers, strict=True) if answers]

    @property
    def sample(self) -> Sample:
        correct = np.stack([answers.correct for _, answers in self.answered])
        return Sample(correct=correct, varies=self.contender.varies)


def summarize(setup: Setup, ledger: Ledger) -> dict[str, Any]:
    """All of it, of the runs that have answered; ConfigError for answers that do not belong together."""
    found = [find_runs(setup, ledger, number) for number in range(len(setup.contenders))]
    images = check_same_images([answers for one in found for _, answers in one.answered], setup.path)
    found.sort(key=lambda one: -one.sample.mean if one.answered else 1.0)  # a stable sort: of equals in their order
    ranked = [one for one in found if one.answered]
    scores: list[Score] = []
    differences: list[Difference] = []
    if ranked:
        typical = [median_run([trial.score or 0.0 for trial, _ in one.answered]) for one in ranked]
        scores, differences = compare([one.sample for one in ranked], typical)
    contenders = [describe(setup, one) for one in found]
    for rank, (contender, score) in enumerate(zip(contenders, scores, strict=False), 1):
        contender |= dataclasses.asdict(score) | {"rank": rank}
    pairs = [
        dataclasses.asdict(difference)
        | {
            "first": contenders[difference.first]["name"],
            "second": contenders[difference.second]["name"],
            "verdict": verdict(difference, contenders, len(differences)),
        }
        for difference in differences
    ]
    trials = [trial for one in found for trial in one.trials]
    started = min((trial.started for trial in trials if trial.started is not None), default=0.0)
    summary = {
        "format": FORMAT,
        "name": setup.path.partition("?")[0].rsplit("/", 1)[-1],
        "data": setup.prepared.source,
        "fingerprint": setup.prepared.fingerprint,
        "recipe": setup.recipe,
        "split": "test",
        "images": images,
        "train_images": setup.prepared.counts["train"],
        "val_images": setup.prepared.counts["val"],
        "seeds": sorted({trial.seed for trial in trials if trial.seed is not None}),
        "plan": str(setup.plan),
        "at_once": setup.plan.at_once,
        "threads": setup.plan.threads,
        "workers": setup.plan.workers,
        "gpu": bool(setup.plan.gpus),
        "started_at": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        "train_seconds": sum(trial.train_seconds for trial in trials),
        "contenders": contenders,
        "pairs": pairs,
        "differing": differing(setup.contenders),
        "remarks": remarks(setup.contenders),
    }
    return summary | {"headline": headline(summary)}


def find_runs(setup: Setup, ledger: Ledger, number: int) -> Found:
    trials = [trial for trial in ledger.trials.values() if trial.number == number]
    trials.sort(key=lambda trial: trial.seed or 0)
    paths = [ledger.path_of(trial) for trial in trials]
    answers = [
        read_answers(path, setup.prepared.fingerprint) if trial.state == "completed" else None
        for trial, path in zip(trials, paths, strict=True)
    ]
    return Found(contender=setup.contenders[number], trials=trials, paths=paths, answers=answers)


def check_same_images(answers: Sequence[Answers], path: str) -> int:
    """How many; ConfigError if the runs were not asked about the same."""
    for other in answers[1:]:
        if not np.array_equal(other.indices, answers[0].indices) or not np.array_equal(other.labels, answers[0].labels):
            raise ConfigError(f"{path}: its runs answered different images; give another --name")
    return len(answers[0].indices) if answers else 0


def describe(setup: Setup, found: Found) -> dict[str, Any]:
    """A contender and its runs, before anything is said of its accuracy."""
    contender, answered = found.contender, found.answered
    runs = [run_of(*parts) for parts in zip(found.trials, found.paths, found.answers, strict=True)]
    parameters, flops, chosen = None, None, None
    if contender.config is not None:
        parameters, flops = network_cost(contender.config, len(setup.prepared.classes))
    elif answered:
        path = next(path for path, answers in zip(found.paths, found.answers, strict=True) if answers)
        chosen = read_object(join(path, BASELINE), "delete its folder, and it is fitted anew") or {}
        parameters = chosen.get("parameters")
    return {
        "name": contender.name,
        "kind": "baseline" if contender.config is None else "network",
        "varies": contender.varies,
        "rank": None,
        "n": len(answered),
        "runs": runs,
        "parameters": parameters,
        "flops": flops,
        "train_seconds": median(trial.train_seconds for trial, _ in answered) if answered else None,
        "images_per_second": median(len(a.labels) / a.seconds for _, a in answered) if answered else None,
        "chosen": chosen,
        "command": contender.command(),
    }


def run_of(trial: Trial, path: str, answers: Answers | None) -> dict[str, Any]:
    return {
        "seed": trial.seed,
        "state": trial.state,
        "reason": trial.reason,
        "accuracy": float(answers.correct.mean()) if answers else None,
        "val_accuracy": trial.score,
        "epochs": trial.epochs,
        "train_seconds": trial.train_seconds,
        "curve": [{name: row.get(name) for name in CURVE} for row in trial.history],
        "path": path,
    }


def differing(contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """Settings in which the networks differ, each with every network's value; learning rates as they are used."""
    values: dict[str, Mapping[str, Any]] = {
        one.name: settings_of(one.config) | {"lr": peak_lr(one.config.optim)} for one in contenders if one.config
    }
    names = next(iter(values.values()), {})
    table = {name: {one: label_of(own[name]) for one, own in values.items()} for name in names}
    return {name: row for name, row in table.items() if len(set(row.values())) > 1}
