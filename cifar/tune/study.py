"""The sweep as a study of Optuna: who proposes the next trial, and what optuna-dashboard shows."""

import contextlib
import datetime
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import LOCK_FILE_SUFFIX
from optuna.trial import TrialState, create_trial

from cifar.augment import derive_seed
from cifar.config import ConfigError
from cifar.tune.ledger import Trial
from cifar.tune.settings import Search
from cifar.tune.space import Choice, Domain, Int, Space, Value

STATES = {"completed": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}

_DASHBOARD = """
import os, threading, time
from optuna_dashboard._cli import main

def end_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)

threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
main()
"""


class Study:
    """A view of the ledger in a file, made anew from it whenever a sweep starts or goes on.

    Proposals depend on the sweep's seed and the trial's number alone, for TPE also on the results by then, so that a
    resumed sweep draws what an uninterrupted one would have drawn.
    """

    def __init__(self, path: Path, name: str, space: Space, search: Search, seed: int):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.unlink(missing_ok=True)
        # Of a driver that was killed while it wrote: Optuna would wait half a minute for it.
        Path(f"{path}{LOCK_FILE_SUFFIX}").unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(path)))
        self._study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study.set_metric_names(["val accuracy"])  # else the dashboard calls it "Objective 0"
        self._distributions = {name: distribution_of(domain) for name, domain in space.items()}
        self._search, self._seed = search, seed
        self._open: dict[int, optuna.Trial] = {}

    def add(self, trial: Trial) -> None:
        """A trial of before; all that are added or proposed have consecutive numbers from 0."""
        if trial.done:
            self._add(trial)
        else:
            self._study.enqueue_trial(dict(trial.values))
            self._open[trial.number] = self._study.ask(self._distributions)

    def propose(self, number: int) -> dict[str, Value]:
        """Values of a new trial."""
        seed = derive_seed(self._seed, "trial", number) % 2**32
        sampler: Any = optuna.samplers.RandomSampler(seed=seed)
        if self._search == "optuna":
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self._study.sampler = sampler
        asked = self._study.ask(self._distributions)
        assert asked.number == number
        self._open[number] = asked
        return dict(asked.params)

    def report(self, trial: Trial) -> None:
        """The latest epoch of a running trial."""
        asked = self._open.get(trial.number)
        score = trial.score
        if asked is not None and score is not None:
            step = len(trial.folds) or trial.epochs
            value = score if trial.folds else trial.history[-1]["val_accuracy"]
            # Optuna warns of a step that it knows, as it does when a trial goes on.
            if step not in asked.storage.get_trial(asked._trial_id).intermediate_values:
                asked.report(value, step)

    def end(self, trial: Trial) -> None:
        asked = self._open.pop(trial.number, None)
        if asked is None:
            return
        asked.set_user_attr("ended", trial.reason)
        score = trial.score
        if trial.state == "completed" and score is not None:
            self._study.tell(asked, score)
        elif trial.state == "stopped":
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            self._study.tell(asked, state=TrialState.FAIL)

    def _add(self, trial: Trial) -> None:
        score = trial.score
        state = STATES[trial.state]
        if state is TrialState.COMPLETE and score is None:
            state = TrialState.FAIL
        rows = dict(enumerate(trial.folds, 1)) or {row["epoch"]: row["val_accuracy"] for row in trial.history}
        finished = create_trial(
            state=state,
            params=dict(trial.values),
            distributions=self._distributions,
            value=score if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
            intermediate_values=rows,
            user_attrs={"ended": trial.reason},
        )
        # Of now otherwise, and the dashboard's timeline a heap.
        if trial.started is not None and trial.ended is not None:
            finished.datetime_start = datetime.datetime.fromtimestamp(trial.started)
            finished.datetime_complete = datetime.datetime.fromtimestamp(trial.ended)
        self._study.add_trial(finished)


def distribution_of(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.labels)
    if isinstance(domain, Int):
        return IntDistribution(domain.low, domain.high, log=domain.log)
    return FloatDistribution(float(domain.low), float(domain.high), log=domain.log)


def check_free(port: int) -> None:
    """ConfigError if somebody listens there."""
    with socket.socket() as probe:
        # Else connections of a dashboard that ended just now would count for a minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"--dashboard-port {port}: taken ({error}); use another") from error


@contextlib.contextmanager
def dashboard(study: Path, port: int) -> Iterator[str]:
    """optuna-dashboard on the loopback interface for as long as the block runs; its URL."""
    check_free(port)
    command = [sys.executable, "-c", _DASHBOARD, str(study)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
