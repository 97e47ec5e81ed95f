"""What is known of a sweep's trials: a small file for each, which outlives the driver.

Ray Tune's own snapshots are not needed to go on. What a trial is, and how it ended, is in its `trial.json`; how far it
came is in its checkpoints, as in any run's folder.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pyarrow import fs

from cifar.config import ConfigError
from cifar.data.prepared import absolute, filesystem, join, read_file, write_file
from cifar.tune.space import Value

State = Literal["waiting", "running", "completed", "stopped", "failed"]
BUDGET = "time budget of the sweep spent"
FILE = "trial.json"


@dataclass(kw_only=True)
class Trial:
    """One configuration with one seed."""

    number: int
    values: dict[str, Value]
    seed: int | None = None
    """Of a run that confirms the trial of this number; None: the sweep's own."""
    epochs_planned: int = 0
    """Of each fold."""
    state: State = "waiting"
    reason: str = ""
    """How it ended, in one sentence."""
    attempts: int = 0
    started: float | None = None
    """Unix time, of the last attempt."""
    ended: float | None = None
    folds: list[float] = field(default_factory=list)
    """Val accuracy of each finished fold."""
    mutations: list[dict[str, Any]] = field(default_factory=list)
    """Under population based training: `epoch`, the number of the trial copied `from`, and the new `values`."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of its epochs, from the run's own file; the mean over the finished folds."""

    @property
    def key(self) -> str:
        """Name of its folder."""
        return f"{self.number:05d}" if self.seed is None else f"{self.number:05d}-seed{self.seed}"

    @property
    def current(self) -> dict[str, Value]:
        """The values that it has come to."""
        return self.values | (self.mutations[-1]["values"] if self.mutations else {})

    @property
    def done(self) -> bool:
        return self.state in ("completed", "stopped", "failed")

    @property
    def epochs(self) -> int:
        """How far it came; the history of one that copied another is shorter."""
        return self.history[-1]["epoch"] if self.history else 0

    @property
    def train_seconds(self) -> float:
        """Wall time of training and validation, over all folds."""
        return sum(row["train_seconds"] for row in self.history[-1:]) * max(len(self.folds), 1)

    @property
    def score(self) -> float | None:
        """Val accuracy: of the best epoch, whose model is kept; with folds their mean. None if there is none, or of a
        failed trial."""
        if self.state == "failed":
            return None
        if self.folds:
            return float(np.mean(self.folds))
        return max((row["val_accuracy"] for row in self.history), default=None)


class Ledger:
    """The trials of a folder, one folder each."""

    def __init__(self, path: str, changed: Callable[[Trial], None] = lambda trial: None):
        """`changed` is called with each trial that changed."""
        self.path = absolute(path)
        self.trials = {trial.key: trial for trial in read_trials(self.path)}
        for trial in self.trials.values():
            if trial.state == "running":  # by a driver that was killed
                trial.state = "waiting"
        self.changed = changed

    def __getitem__(self, key: str) -> Trial:
        return self.trials[key]

    def path_of(self, trial: Trial) -> str:
        return join(self.path, trial.key)

    def add(self, trial: Trial) -> Trial:
        """A new one, or the one that is there under its key; one of other values makes room for it."""
        known = self.trials.get(trial.key)
        if known is not None and known.values == trial.values:
            return known
        if known is not None:
            files, root = filesystem(self.path_of(known))
            files.delete_dir(root)
        self.trials[trial.key] = trial
        self._save(trial)
        return trial

    def started(self, trial: Trial) -> None:
        trial.state, trial.reason = "running", ""
        trial.started, trial.ended = time.time(), None
        trial.attempts += 1
        self._save(trial)

    def progressed(self, trial: Trial, row: dict[str, Any]) -> None:
        """Metrics of an epoch; or of a fold, `fold_accuracy`, with the `history` so far. Known ones are ignored."""
        if trial.done:
            return
        if "fold_accuracy" in row:
            if row["epoch"] <= len(trial.folds):
                return
            trial.folds.append(row["fold_accuracy"])
            trial.history = row["history"]
        else:
            if copied := row.get("copied"):
                trial.mutations.append({"epoch": row["epoch"], **copied})
                trial.history = []
            known = [one for one in trial.history if one["epoch"] < row["epoch"]]
            if len(trial.history) > len(known) and not copied:
                return
            trial.history = [*known, row]
        self._save(trial)

    def ended(self, trial: Trial, state: State, reason: str) -> None:
        trial.state, trial.reason, trial.ended = state, reason, time.time()
        self._save(trial)

    def _save(self, trial: Trial) -> None:
        values = dataclasses.asdict(trial)
        if not trial.folds and not trial.mutations:
            del values["history"]  # the run's metrics.jsonl has it
        write_file(join(self.path_of(trial), FILE), json.dumps(values).encode())
        self.changed(trial)


def read_trials(path: str) -> list[Trial]:
    """All trials of a folder or URI by number; ConfigError for a damaged file."""
    files, root = filesystem(path)
    found = files.get_file_info(fs.FileSelector(root, allow_not_found=True))
    trials = []
    for name in sorted(info.base_name for info in found if info.type == fs.FileType.Directory):
        folder = join(path, name)
        file = join(folder, FILE)
        data = read_file(file)
        if data is None:
            continue
        try:
            values = json.loads(data)
            history = values.pop("history", None)
            trial = Trial(**values)
            if history is None:
                file = join(folder, "metrics.jsonl")
                history = [{**json.loads(line)} for line in (read_file(file) or b"").splitlines()]
            trial.history = history
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file}: damaged ({error}); delete this trial's folder, and it is trained anew"
            ) from error
        if trial.state == "running":
            trial.state = "waiting"  # it was, when the driver was killed
        trials.append(trial)
    return trials
