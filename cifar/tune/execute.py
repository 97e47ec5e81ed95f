"""Trials through Ray Tune: it starts their processes, asks the scheduler after each epoch, and repeats what was killed.

Which trials there are, and what became of them, is the ledger's to know; Tune's own records of the experiment are
thrown away.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from ray import tune
from ray.exceptions import OutOfMemoryError
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from cifar.config import RunFailed
from cifar.data.prepared import filesystem, join, parent
from cifar.data.remote import StorageFailed, storage_failure
from cifar.lean_trainer import get_or_create_autoscaling_coordinator, release_workers, release_workers_soon
from cifar.run_dir import RunDir
from cifar.tune.ledger import BUDGET, Ledger, Trial
from cifar.tune.settings import TuneConfig
from cifar.tune.space import MUTABLE, Choice, Int, Space
from cifar.tune.trial import SweepJob, run_trial
from cifar.waiting import Request, explained, unplaced_group

METRIC = "val_accuracy"
REMEDY = "stop this command, which goes on from here when it is given again"
MAX_DEATHS = 3
"""Of a trial's process, after each of which the trial goes on from its checkpoint."""
ROW = (
    *("epoch", "step", "train_loss", "train_accuracy", "val_loss", METRIC, "val_count", "lr", "images_per_second"),
    *("seconds", "train_seconds", "fold_accuracy", "history", "copied"),
)
"""What a trial reports; Tune adds its own."""
ENVIRONMENT = {
    # Tune would write parameters and results of each trial three times more.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The last report of a trial says how it ended, and has no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Ctrl-C is the job's; the ledger needs no farewell of Tune's.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # What trials do is shown by us.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
}


def execute(
    job: SweepJob,
    ledger: Ledger,
    scheduler: TrialScheduler,
    next_trial: Callable[[], Trial | None],
    trials: int,
    seconds: float | None,
    explain_stop: Callable[[Trial], str],
) -> None:
    """Run what `next_trial` gives, up to `trials`, until it gives None, for at most so many seconds.

    Under population based training all that are not finished are needed at once. `explain_stop` says why the scheduler
    ended a trial.
    """
    searching: dict[str, Any] = {"search_alg": Proposals(next_trial)}
    space: dict[str, Any] | None = None
    if job.changing:
        left = list(iter(next_trial, None))
        job = SweepJob(**{**vars(job), "changing": tuple(trial.key for trial in left)})
        space = tune.grid_search([setting_of(trial) for trial in left])
        searching = {}
    recorder = Recorder(ledger, explain_stop, release=bool(job.plan.workers))
    if job.plan.workers:
        # Ray Train asks for it, and would start it for good where the first trial happens to be: on a node that an
        # autoscaler could then never take away.
        get_or_create_autoscaling_coordinator()
    trainable = tune.with_resources(tune.with_parameters(run_trial, job=job), job.plan.resources)
    plan = job.plan
    each = {"CPU": plan.cpus} | ({"GPU": plan.gpus} if plan.gpus else {})
    request = Request(name="workers" if plan.workers else "trial", count=max(plan.workers, 1), each=each, remedy=REMEDY)
    with (
        scratch(job) as scratched,
        environment(job.config.run.verbose),
        explained(partial(unplaced_group, request)) as recorder.moved,
    ):
        files, storage = filesystem(scratched)
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": space} if space else None,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                scheduler=scheduler,
                num_samples=1 if space else trials,
                max_concurrent_trials=None if space else job.plan.at_once,
                time_budget_s=seconds,
                # A new process takes seconds to import torch. Ray Train's workers end with the trial's process.
                reuse_actors=not job.plan.workers,
                **searching,
            ),
            run_config=tune.RunConfig(
                storage_path=storage,
                storage_filesystem=files if "://" in scratched else None,
                name="tune",
                verbose=0,
                callbacks=[recorder],
                failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4 if space else None),
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError as error:
            # Of what a callback raises, Tune leaves the traceback's text.
            *_, last = str(error).strip().splitlines()
            if blamed := storage_failure(last.partition(": ")[2]):
                raise StorageFailed(blamed) from None
            raise
        except RuntimeError as error:
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            # After any other death of a process Tune starts it again.
            raise RunFailed(
                f"{parent(job.path)}: a node had no memory left for {plan.at_once} trials at a time; "
                f"with --at-once {max(plan.at_once - 1, 1)} the same command goes on"
            ) from error
        recorder.finish()
    for trial in ledger.trials.values():
        if trial.state == "running":  # Tune ends what runs without a word when time is up
            ledger.ended(trial, "stopped", BUDGET)


@contextmanager
def scratch(job: SweepJob) -> Iterator[str]:
    """Where Tune keeps its records; the checkpoints that trials copy from each other must be seen by all nodes."""
    if job.changing:
        storage = join(parent(job.path), "tune")
        remove(storage)  # of a driver that was killed
        yield storage
        remove(storage)
        return
    with tempfile.TemporaryDirectory(prefix="cifar-tune-", ignore_cleanup_errors=True) as folder:
        yield folder


def remove(path: str) -> None:
    files, root = filesystem(path)
    with suppress(FileNotFoundError):
        files.delete_dir(root)


@contextmanager
def environment(verbose: bool) -> Iterator[None]:
    """With Tune's ways for as long as the block runs; unless `verbose`, without a traceback for each process that dies,
    of which the ledger's sentence tells."""
    log = logging.getLogger("ray.tune")
    level = log.level
    if not verbose:
        log.setLevel(logging.CRITICAL)
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def setting_of(trial: Trial) -> dict[str, Any]:
    """What `run_trial` gets."""
    repeated: list[dict[str, Any]] = []
    if trial.done:
        repeated = [{"epoch": row["epoch"], METRIC: row[METRIC]} for row in trial.history]
        if trial.folds:
            means = [sum(trial.folds[:count]) / count for count in range(1, len(trial.folds) + 1)]
            repeated = [{"epoch": count, METRIC: mean} for count, mean in enumerate(means, 1)]
    return {"key": trial.key, "values": trial.current, "seed": trial.seed, "rows": repeated}


class Proposals(Searcher):
    """Gives Tune the trials one by one."""

    def __init__(self, next_trial: Callable[[], Trial | None]):
        super().__init__(metric=METRIC, mode="max")
        self._next_trial = next_trial

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # pyright: ignore[reportIncompatibleMethodOverride]
        trial = self._next_trial()
        return Searcher.FINISHED if trial is None else {"trial": setting_of(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it would restore from; a sweep goes on from its ledger."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class Recorder(tune.Callback):
    """Writes into the ledger what Tune hears."""

    def __init__(self, ledger: Ledger, explain_stop: Callable[[Trial], str], release: bool):
        """`release`: trials have workers of their own, which outlive them."""
        self._ledger, self._explain_stop, self._release = ledger, explain_stop, release
        self.moved: Callable[[], None] = lambda: None
        """Called at each start and result of a trial."""
        self._keys: dict[str, str] = {}
        """Of the ledger, by Tune's; under population based training Tune changes a trial's setting."""
        self._outcomes: dict[str, tuple[str, str]] = {}
        self._to_release: list[str] = []
        """Runs of ended trials, whose controllers may live a little longer."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def _of(self, trial: Any) -> Trial:
        return self._ledger[self._keys.setdefault(trial.trial_id, trial.config["trial"]["key"])]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.moved()
        known = self._of(trial)
        if not known.done and known.state != "running":
            self._ledger.started(known)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        known = self._of(trial)
        if not known.done:
            self._ledger.started(known)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.moved()
        known = self._of(trial)
        if "storage" in result:
            raise StorageFailed(result["storage"])  # the others would come to the same
        if "failed" in result:
            self._outcomes[known.key] = ("failed", result["failed"])
        elif "stopped" in result:
            self._outcomes[known.key] = ("completed", result["stopped"])
        elif METRIC in result:
            self._ledger.progressed(known, {name: result[name] for name in ROW if name in result})

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for path in [path for path in self._to_release if release_workers(path)]:
            self._to_release.remove(path)
            RunDir(path).copy_best_model()

    def finish(self) -> None:
        """What ended trials of several workers left to do."""
        for path in self._to_release:
            release_workers_soon(path)
            RunDir(path).copy_best_model()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        known = self._of(trial)
        if self._release:
            self._to_release.append(self._ledger.path_of(known))
        if known.done:
            return
        state, reason = self._outcomes.pop(known.key, (None, ""))
        if state == "failed":
            self._ledger.ended(known, "failed", reason)
        elif state == "completed":
            self._ledger.ended(known, "completed", reason)
        elif known.epochs >= known.epochs_planned and not known.folds:
            self._ledger.ended(known, "completed", "all epochs done")  # ended at the report of its last epoch
        else:
            self._ledger.ended(known, "stopped", self._explain_stop(known))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        known = self._of(trial)
        if self._release:
            self._to_release.append(self._ledger.path_of(known))
        if not known.done:
            error = trial.get_error()
            text = f": {' '.join(str(error).split())[:300]}" if error else ""
            self._ledger.ended(known, "failed", f"its process died {MAX_DEATHS + 1} times{text}")


def make_scheduler(tune_config: TuneConfig, space: Space, max_epochs: int) -> TrialScheduler:
    """Of a sweep whose trials have at most so many epochs; with folds, epochs are folds."""
    if tune_config.search == "pbt":
        return PopulationBasedTraining(
            time_attr="epoch",
            perturbation_interval=tune_config.first_rung(max_epochs),
            hyperparam_mutations={"trial": {"values": {name: mutation_of(domain) for name, domain in space.items()}}},
            custom_explore_fn=lambda setting: {"trial": clipped(setting["trial"], space)},
            require_attrs=False,
            log_config=False,
        )
    if milestones := rungs(tune_config, max_epochs):
        return AsyncHyperBandScheduler(
            time_attr="epoch",
            grace_period=milestones[0],
            # The last rung: a trial is not ended after its last epoch. A half more, since Tune counts rungs by
            # logarithms, which for 243 epochs are a hair too small.
            max_t=milestones[-1] + 0.5,  # pyright: ignore[reportArgumentType]
            reduction_factor=tune_config.reduction,
            stop_last_trials=False,
        )
    if tune_config.scheduler == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=tune_config.first_rung(max_epochs))
    return FIFOScheduler()


def mutation_of(domain: Any) -> Any:
    if isinstance(domain, Choice):
        return domain.labels
    if isinstance(domain, Int):
        return tune.randint(domain.low, domain.high + 1)
    return tune.loguniform(domain.low, domain.high) if domain.log else tune.uniform(domain.low, domain.high)


def clipped(setting: dict[str, Any], space: Space) -> dict[str, Any]:
    """Tune multiplies numbers by 0.8 or 1.2, whatever their range."""
    values = {}
    for name, value in setting["values"].items():
        domain = space[name]
        values[name] = value if isinstance(domain, Choice) else min(max(value, domain.low), domain.high)
    return {**setting, "values": values}


def unchangeable(space: Space) -> list[str]:
    """Settings that a run cannot change while it trains."""
    return sorted(space.keys() - MUTABLE)


def rungs(tune_config: TuneConfig, max_epochs: int) -> list[int]:
    """Epochs after which asha compares trials, the last epoch left out."""
    if tune_config.scheduler != "asha" or tune_config.search == "pbt":
        return []
    found, epoch = [], tune_config.first_rung(max_epochs)
    while epoch < max_epochs:
        found.append(epoch)
        epoch *= tune_config.reduction
    return found
