"""One trial, in a process that Ray Tune keeps for the next one: a run like any other, whose epochs Tune hears."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from cifar.cluster import Plan
from cifar.config import Config, ConfigError, RunFailed
from cifar.data.prepared import Prepared, join, parent
from cifar.data.remote import storage_failure
from cifar.data.shares import num_batches
from cifar.local import LocalContext, Rows, train_here
from cifar.machine import usable_cpus
from cifar.probe import require_seen
from cifar.ray_job import Blocks, Job
from cifar.run_dir import SWEEP_CONFIG, RunDir
from cifar.train import train_on_ray
from cifar.tune.folds import Fold, fit_fold
from cifar.tune.plan import SweepPlan
from cifar.tune.space import Space, apply


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """What all trials of a sweep share."""

    config: Config
    space: Space
    prepared: Prepared
    path: str
    """Folder of the trials' folders."""
    plan: SweepPlan
    train: Blocks | None
    """None: streamed."""
    val: Blocks | None
    """With folds, the same as `train`: all images but those of test."""
    folds: tuple[Fold, ...] = ()
    changing: tuple[str, ...] = ()
    """Under population based training the trials' keys, in order: there Tune copies one trial's setting to another."""

    def run(self, key: str, setting: Mapping[str, Any]) -> str:
        """Train the trial of this key and setting, which is that of `run_trial`; why it ended."""
        return self.fit(key, apply(self.config, self.space, setting["values"]), setting)

    def fit(self, key: str, config: Config, setting: Mapping[str, Any]) -> str:
        """Train `config` with the setting's seed in the folder of the key; why it ended."""
        if setting["seed"] is not None:
            config = replace(config, train=replace(config.train, seed=setting["seed"]))
        trial = TrialRun(self, key, config, setting["values"])
        if self.folds:
            return trial.fit_folds()
        return trial.fit_on_workers() if self.plan.workers else trial.fit()


def run_trial(config: dict[str, Any], job: SweepJob) -> None:
    """Ray Tune's entry. `config["trial"]` has the `key` of the trial's folder, its `values`, its `seed` (None: the
    sweep's), and of a trial that has ended the `rows` that it reported: they are repeated, so that schedulers know.

    A failure is reported, not raised: to repeat it would not help. What kills the process is for Tune to repeat, and
    the trial goes on from its last checkpoint. That the storage is away or full is no failure of the trial.
    """
    setting = config["trial"]
    for row in setting["rows"]:
        tune.report(row)
    if setting["rows"]:
        return
    key = setting["key"]
    if job.changing:
        key = job.changing[int(tune.get_context().get_trial_id().rpartition("_")[2])]
    try:
        require_seen(parent(job.path), SWEEP_CONFIG, "--storage")
        outcome = job.run(key, setting)
    except Exception as error:
        blamed = storage_failure(str(error))
        tune.report({"storage": blamed} if blamed else {"failed": explain(error)})
        return
    tune.report({"stopped": outcome})


def explain(error: Exception) -> str:
    """One line for the report."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: {text[:200]}"
    if isinstance(error, ConfigError | RunFailed):
        return text
    return f"{type(error).__name__}: {text[:300]}"


class TrialRun:
    """A trial's run, or one for each fold."""

    def __init__(self, job: SweepJob, key: str, config: Config, values: dict[str, Any]) -> None:
        self.job, self.key, self.path, self.values = job, key, join(job.path, key), values
        self.config = config.with_batch_size(job.prepared.counts["train"])
        torch.set_num_threads(min(job.plan.threads, usable_cpus()))
        # A GPU, where Ray gave this process a share of one; else torch sees none.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def fit(self) -> str:
        """Why the run ended."""
        job, prepared = self.job, self.job.prepared
        run_dir = self._open(self.path, prepared)
        train, val = (None if b is None else Rows(b.read(0, b.rows[0])) for b in (job.train, job.val))
        context = TrialContext(run_dir, self.device, self.key, self.values if job.changing else None)
        context.begin()
        return train_here(self.config, prepared, context, train, val)["stopped"]

    def fit_folds(self) -> str:
        """One run after the other, each in a folder of its own; Tune hears the mean of those that are finished."""
        job = self.job
        assert job.train is not None
        table = job.train.read(0, job.train.rows[0])
        histories: list[list[dict[str, Any]]] = []
        for number, fold in enumerate(job.folds, 1):
            run_dir = RunDir(join(self.path, f"fold-{number}"), hparams=self.values)
            summary = fit_fold(self.config, job.prepared, table, fold, run_dir, self.device)
            histories.append(summary["history"])
            best = [max(row["val_accuracy"] for row in history) for history in histories]
            row = {"epoch": number, "fold_accuracy": best[-1], "val_accuracy": float(np.mean(best))}
            tune.report(row | {"history": mean_history(histories)})
        return f"all {len(job.folds)} folds done"

    def fit_on_workers(self) -> str:
        """The run on Ray Train's workers, whose reports Tune hears; their metrics are sums over all of them."""
        from cifar.lean_trainer import release_workers_soon
        from cifar.tune.relay import Relay

        job, plan = self.job, self.job.plan
        run_dir = self._open(self.path, job.prepared)
        release_workers_soon(self.path)  # of this trial's process before, whose host was lost
        train_plan = Plan(
            min_workers=plan.workers,
            max_workers=plan.workers,
            cpus_per_worker=plan.cpus,
            gpus_per_worker=int(plan.gpus),
            loader="resident" if plan.resident else "streaming",
            reason=plan.reason,
        )
        run = Job(
            config=self.config,
            prepared=job.prepared,
            run_path=self.path,
            run_owner=run_dir.owner,
            train=job.train,
            val=job.val,
        )
        with Relay.started() as relay:
            return train_on_ray(run, train_plan, run_dir, [relay])["stopped"]

    def _open(self, path: str, prepared: Prepared) -> RunDir:
        num_batches(prepared.counts["train"], self.config.train.batch_size, max(self.job.plan.workers, 1))
        run_dir = RunDir(path, hparams=self.values)
        run_dir.open(self.config, prepared, changing=bool(self.job.changing))
        # Not locked: one that goes on elsewhere would wait for its process on a host that was cut off.
        run_dir.own()
        return run_dir


class TrialContext(LocalContext):
    """Tells Tune of each epoch after its checkpoint is safe: there Tune ends a trial, within the call."""

    def __init__(self, run_dir: RunDir, device: torch.device, key: str, changing: dict[str, Any] | None):
        """`changing`: the values that a trial trains with now, under population based training."""
        super().__init__(run_dir, device)
        self._key, self._changing = key, changing
        self._copied: dict[str, Any] = {}

    def begin(self) -> None:
        """Start from the checkpoint that Tune brings from another trial, or repeat what is known of this one."""
        if self._changing is not None:
            if given := tune.get_checkpoint():
                with given.as_directory() as folder:
                    self._adopt(Path(folder))
        elif self.checkpoint is not None:
            for row in json.loads((self.checkpoint / "position.json").read_text())["history"]:
                tune.report(row)

    def _adopt(self, folder: Path) -> None:
        """Go on from a copy of this checkpoint; in its own, which Tune brings after a pause, there is nothing new."""
        # Not told by the setting's key: Tune copies that too, so that it is of whom the copied one had copied.
        donor = json.loads((folder / "report.json").read_text())["trial"]
        if donor == self._key:
            return
        self._copied = {"from": int(donor), "values": self._changing}
        copy = Path(tempfile.mkdtemp(prefix="cifar-copied-"))
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        self.restart(copy)

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        super().report(metrics | {"trial": self._key}, checkpoint)
        if "val_accuracy" not in metrics:  # in mid-epoch
            return
        if self._changing is None:
            tune.report(metrics)
            return
        if self._copied:
            metrics, self._copied = metrics | {"copied": self._copied}, {}
        last = self.checkpoints.last()
        assert last is not None
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(last)))


def mean_history(histories: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean of each metric over the runs that reached the epoch."""
    longest = max(histories, key=len)
    rows = []
    for place, row in enumerate(longest):
        same = [history[place] for history in histories if len(history) > place]
        rows.append({name: float(np.mean([one[name] for one in same])) for name in row} | {"epoch": row["epoch"]})
    return rows
