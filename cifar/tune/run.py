"""A sweep from its flags to its winner: search, then the best trained anew with other seeds; the same call resumes."""

import json
import logging
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cifar.autoscaler import cluster_nodes
from cifar.config import Config, ConfigError, RunFailed
from cifar.data import Prepared
from cifar.data.prepared import IMBALANCED, absolute, join, read_object, write_file
from cifar.probe import other_nodes, probe, probe_source
from cifar.ray_job import Blocks
from cifar.run_dir import locked
from cifar.train import prepare_while_ray_starts, probe_teacher, settle_network
from cifar.tune.execute import execute, make_scheduler, unchangeable
from cifar.tune.folder import claim_folder, name_folder
from cifar.tune.folds import make_folds
from cifar.tune.ledger import BUDGET, Ledger, Trial
from cifar.tune.plan import make_sweep_plan
from cifar.tune.progress import SweepDisplay
from cifar.tune.settings import TuneConfig
from cifar.tune.space import Space, apply, check_space, describe, lines, load_space, without_fixed
from cifar.tune.spaces import SPACES, space_for
from cifar.tune.study import Study, dashboard
from cifar.tune.summary import Setup, ranked, summarize
from cifar.tune.trial import SweepJob

FORMAT = 1
SUMMARY = "sweep.json"
FIRST_SEED = 101
"""Of those that confirm, added to the sweep's own."""
WRITE_SECONDS = 5.0
"""Between two writings of sweep.json."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `sweep` leaves behind."""

    path: str
    winner: str
    """Run folder of the winner."""
    prepared: Prepared
    summary: dict[str, Any]
    """What is in sweep.json, which cifar.report draws."""


def sweep(config: Config, tune: TuneConfig, recipe_name: str, recipe: Config, given: Collection[str]) -> Sweep:
    """Search around `config`, which is `recipe` but for what flags fixed: the settings `given`, by name. ConfigError
    for what the user can mend, RunFailed when all trials failed."""
    source = space_for(config.model.model) if tune.space == "auto" else tune.space
    space, fixed = without_fixed(load_space(source, SPACES), given)
    check_space(space, source, config)
    if not space:
        raise ConfigError(f"--space {source}: every setting in it is fixed by a flag; leave one to search")
    if tune.search == "pbt" and (cannot := unchangeable(space)):
        raise ConfigError(
            f"--search pbt: {', '.join(cannot)} cannot change while a network trains; "
            "fix them by flags, or use --space augment"
        )
    logger.info("space %s:", source)
    for line in lines(space):
        logger.info("  %s", line)
    for name in fixed:
        logger.info("  %s is not searched, since a flag gives it", name)
    probe(config.run.storage, "--storage")
    if tune.publish != "none":
        probe(tune.store, "--store")
    prepared = prepare_while_ray_starts(config)
    minutes, config = config.train.max_minutes, replace(config, train=replace(config.train, max_minutes=0.0))
    config = config if "batch_size" in space else config.with_batch_size(prepared.counts["train"])
    config = settle_network(config, prepared)
    if prepared.imbalance >= IMBALANCED:
        logger.warning("imbalanced: val accuracy, by which trials are ranked, weighs large classes more than others")
    there, coming = cluster_nodes()
    data_bytes = prepared.num_bytes("train") + prepared.num_bytes("val")
    plan = make_sweep_plan(config, tune, data_bytes, [*there, *coming])
    logger.info("%s", plan)
    path = join(absolute(config.run.storage), config.run.name or default_name(config, tune, source, space, prepared))
    if others := other_nodes():
        probe(config.run.storage, "--storage", others)
        if not plan.resident:
            probe_source(prepared.path, "$CIFAR_CACHE", others)
        probe_teacher(config, others)
    claim(path, config, tune, space, prepared)
    logger.info("sweep: %s", path)
    with locked_sweep(path):
        setup = Setup(
            config=config,
            tune=tune,
            recipe_name=recipe_name,
            recipe=recipe,
            source=source,
            space=space,
            prepared=prepared,
            plan=plan,
            path=path,
        )
        searching = Searching(setup, minutes)
        searching.search()
        searching.confirm()
        summary = searching.finish()
    if summary["winner"] is None:
        reasons = {trial.reason for trial in searching.trials.trials.values() if trial.state == "failed"}
        raise RunFailed(f"{path}: no trial came to a model; {'; '.join(sorted(reasons)[:3]) or 'none was run'}")
    return Sweep(path=path, winner=summary["winner"]["path"], prepared=prepared, summary=summary)


@contextmanager
def locked_sweep(path: str) -> Iterator[None]:
    with locked(path, "another process works on this sweep; wait, or give another --name"):
        try:
            yield
        except KeyboardInterrupt:
            logger.info("%s: keeps what was trained; the same command goes on", path)
            raise


def claim(path: str, config: Config, tune: TuneConfig, space: Space, prepared: Prepared) -> None:
    """The folder is this sweep's; ConfigError if it is another one's, or a run's."""
    whole = {name: value for name, value in config.to_dict().items() if name != "run"}
    what = identify(config, tune) | whole | {"space": describe(space), "fingerprint": prepared.fingerprint}
    claim_folder(path, "sweep", what)


def default_name(config: Config, tune: TuneConfig, source: str, space: Space, prepared: Prepared) -> str:
    """The same flags give the same name, so that the same command resumes; more trials or minutes go on with it."""
    return name_folder(prepared, "sweep", [identify(config, tune), source, sorted(space), prepared.fingerprint])


def identify(config: Config, tune: TuneConfig) -> dict[str, Any]:
    """What a trial and its fate depend on."""
    names = ("search", "scheduler", "grace_epochs", "reduction", "folds")
    return config.identity() | {name: getattr(tune, name) for name in names}


class Searching:
    """The work of one call of `sweep`."""

    def __init__(self, setup: Setup, minutes: float):
        """`minutes` bound the search over all calls; 0: nothing does."""
        self.setup, self.tune, self.minutes = setup, setup.tune, minutes
        self.trials = Ledger(join(setup.path, "trials"))
        self.confirmed = Ledger(join(setup.path, "confirm"))
        remedy = "delete it: the trials are kept, test is read again and the winner published again"
        before = read_object(join(setup.path, SUMMARY), remedy) or {}
        self._seconds_before = before.get("wall_seconds", 0.0)
        self._kept = {name: before.get(name) for name in ("test", "published", "published_to", "promoted")}
        self._winner_before = before.get("winner")
        self._started = time.time()
        self._written_at = 0.0

    def search(self) -> None:
        """Run the trials that are left."""
        by_number = {trial.number: trial for trial in self.trials.trials.values()}
        for trial in by_number.values():
            if trial.state == "stopped" and trial.reason == BUDGET:
                trial.state = "waiting"  # there is time again, or it will end for the same reason
        count = max(self.tune.trials, max(by_number, default=-1) + 1)
        if len(by_number) == count and all(trial.done for trial in by_number.values()):
            logger.info("all %d trials were done before", count)
            return
        seconds = None
        if self.minutes:
            seconds = max(60 * self.minutes - self._seconds_before, 1.0)
        deadline = None if seconds is None else time.monotonic() + seconds
        with ExitStack() as stack:
            folder = (
                self.setup.path if "://" not in self.setup.path else stack.enter_context(tempfile.TemporaryDirectory())
            )
            file = Path(folder) / "study.log"
            study = Study(file, self.setup.name, self.setup.space, self.tune.search, self.setup.config.train.seed)
            known = self._known(study, by_number)
            if self.tune.dashboard:
                url = stack.enter_context(dashboard(file, self.tune.dashboard_port))
                logger.info("dashboard: %s", url)
            display = stack.enter_context(SweepDisplay(count, self.setup.plan.at_once, deadline))
            display.known(known)

            def changed(trial: Trial) -> None:
                study.end(trial) if trial.done else study.report(trial)
                display.changed(trial)
                self.write_summary("running")

            self.trials.changed = changed
            execute(
                self._job(self.trials.path),
                self.trials,
                make_scheduler(self.tune, self.setup.space, self.setup.max_epochs),
                self._next(known, study, count),
                count,
                seconds,
                self._why_stopped,
            )
            self.trials.changed = lambda trial: None

    def _known(self, study: Study, by_number: dict[int, Trial]) -> list[Trial]:
        """The trials so far, in order, told to the study; one whose folder was deleted is begun anew."""
        known = []
        for number in range(max(by_number, default=-1) + 1):
            if trial := by_number.get(number):
                study.add(trial)
            else:
                trial = self.trials.add(self._planned(Trial(number=number, values=study.propose(number))))
            known.append(trial)
        return known

    def _next(self, known: list[Trial], study: Study, count: int) -> Any:
        """What gives one trial after the other: those that were begun, in their order, then new ones.

        Those that ended come too where a scheduler has to hear of them.
        """
        again = [t for t in known if not t.done or (self.tune.stops_early and t.state != "failed" and t.history)]
        numbers = iter(range(len(known), count))

        def next_trial() -> Trial | None:
            if again:
                return again.pop(0)
            number = next(numbers, None)
            if number is None:
                return None
            return self.trials.add(self._planned(Trial(number=number, values=study.propose(number))))

        return next_trial

    def _planned(self, trial: Trial) -> Trial:
        try:
            trial.epochs_planned = apply(self.setup.config, self.setup.space, trial.values).train.epochs
        except ConfigError:  # the trial will fail, and say so
            trial.epochs_planned = self.setup.config.train.epochs
        return trial

    def confirm(self) -> None:
        """Train the best configurations anew, with seeds that the search has not seen."""
        configs, seeds = self.tune.confirm_counts
        best = ranked(self.trials)[:configs]
        if not best or not seeds:
            return
        planned = [
            Trial(
                number=trial.number,
                values=trial.current,
                seed=self.setup.config.train.seed + FIRST_SEED + place,
                epochs_planned=trial.epochs_planned,
            )
            for trial in best
            for place in range(seeds)
        ]
        todo = [trial for trial in map(self.confirmed.add, planned) if not trial.done]
        if not todo:
            return
        logger.info("confirming: the best %d, each with %d new seeds", len(best), seeds)
        with SweepDisplay(len(planned), self.setup.plan.at_once, None) as display:
            display.known(list(self.confirmed.trials.values()))

            def changed(trial: Trial) -> None:
                display.changed(trial)
                self.write_summary("running")

            self.confirmed.changed = changed
            waiting = iter(todo)
            job = self._job(self.confirmed.path, confirming=True)
            none = replace(self.tune, search="random", scheduler="none", folds=0)
            scheduler = make_scheduler(none, self.setup.space, self.setup.max_epochs)
            execute(
                job,
                self.confirmed,
                scheduler,
                lambda: next(waiting, None),
                len(todo),
                None,
                lambda trial: BUDGET,
            )
            self.confirmed.changed = lambda trial: None

    def _job(self, path: str, confirming: bool = False) -> SweepJob:
        """With the images put into the object store once, for all trials."""
        train, val, folds = None, None, ()
        if self.tune.folds and not confirming:
            whole, folds = make_folds(self.setup.prepared, self.tune.folds, self.setup.config.data.split_seed)
            train = val = Blocks.of(whole)
        elif self.setup.plan.resident:
            columns = ["image", "label", "index"]
            train, val = (Blocks.of(self.setup.prepared.table(split, columns)) for split in ("train", "val"))
        return SweepJob(
            config=self.setup.config,
            space=self.setup.space,
            prepared=self.setup.prepared,
            path=path,
            plan=self.setup.plan,
            train=train,
            val=val,
            folds=folds,
            changing=("",) if self.tune.search == "pbt" and not confirming else (),
        )

    def _why_stopped(self, trial: Trial) -> str:
        done = len(trial.folds) or trial.epochs
        unit = "fold" if self.tune.folds else "epoch"
        if self.tune.search == "pbt" or self.tune.scheduler == "none":
            return BUDGET
        if self.tune.scheduler == "median":
            return f"median, after {unit} {done}: below the median of the others' means"
        rung = max((rung for rung in self.setup.rungs if rung <= done), default=done)
        others = [value for other in self.trials.trials.values() if (value := self._at(other, rung)) is not None]
        cutoff = float(np.percentile(others, 100 * (1 - 1 / self.tune.reduction)))
        mine = self._at(trial, rung)
        told = "" if mine is None else f": {mine:.4f}, the cut is about {cutoff:.4f}"
        return f"asha, after {unit} {rung}{told}"

    def _at(self, trial: Trial, rung: int) -> float | None:
        if trial.folds:
            return float(np.mean(trial.folds[:rung])) if len(trial.folds) >= rung else None
        return next((row["val_accuracy"] for row in trial.history if row["epoch"] == rung), None)

    def write_summary(self, state: str, everything: bool = False) -> dict[str, Any] | None:
        """sweep.json, at most every few seconds while the sweep runs."""
        if not everything and time.monotonic() - self._written_at < WRITE_SECONDS:
            return None
        self._written_at = time.monotonic()
        summary = summarize(
            self.setup,
            self.trials,
            self.confirmed,
            state=state,
            since=self._started,
            wall_seconds=self._seconds_before + time.time() - self._started,
        )
        # Of another winner they would say nothing.
        same = summary["winner"] and summary["winner"] == self._winner_before
        summary |= self._kept if same else dict.fromkeys(self._kept)
        write_file(join(self.setup.path, SUMMARY), (json.dumps(summary) + "\n").encode())
        return summary

    def finish(self) -> dict[str, Any]:
        spent = any(trial.reason == BUDGET for trial in self.trials.trials.values())
        few = len(self.trials.trials) < self.tune.trials or not all(t.done for t in self.trials.trials.values())
        summary = self.write_summary("budget spent" if spent or few else "finished", everything=True)
        assert summary is not None
        return summary


def keep(path: str, **found: Any) -> dict[str, Any]:
    """Add to sweep.json what became of the winner: `test`, `published`."""
    file = join(path, SUMMARY)
    summary = (read_object(file, "run the same command again") or {}) | found
    write_file(file, (json.dumps(summary) + "\n").encode())
    return summary
