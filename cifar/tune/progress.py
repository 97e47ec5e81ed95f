"""A sweep in the terminal: a line for each trial that ends, and below a short table of the best."""

import time

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cifar.progress import Terminal
from cifar.tune.ledger import Trial

BEST = 5
REDRAW_SECONDS = 0.25


class SweepDisplay(Terminal):
    def __init__(self, trials: int, at_once: int, deadline: float | None):
        """`trials` to come to, so many `at_once`; `deadline` by `time.monotonic`, if there is one."""
        super().__init__()
        self._trials, self._at_once, self._deadline = trials, at_once, deadline
        self._known: dict[str, Trial] = {}
        self._ended: set[str] = set()
        self._seconds: list[float] = []
        self._drawn_at = 0.0

    def known(self, trials: list[Trial]) -> None:
        """Those that ended before: counted, not printed."""
        self._known |= {trial.key: trial for trial in trials}
        self._ended |= {trial.key for trial in trials if trial.done}

    def changed(self, trial: Trial) -> None:
        self._known[trial.key] = trial
        if trial.done and trial.key not in self._ended:
            self._ended.add(trial.key)
            self._seconds.append(trial.train_seconds)
            score = "" if trial.score is None else f"val accuracy {trial.score:.4f}  "
            epochs = f"{trial.epochs}/{trial.epochs_planned} epochs"
            values = "  ".join(f"{name} {short(value)}" for name, value in trial.current.items())
            self._console.print(
                f"trial {trial.key}  {score}{epochs} in {trial.train_seconds:.1f} s  {trial.state}: {trial.reason}"
                f"  [{values}]",
                markup=False,
            )
        if self._live is not None and time.monotonic() - self._drawn_at > REDRAW_SECONDS:
            self._drawn_at = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Group:
        trials = [trial for trial in self._known.values() if trial.score is not None]
        best = sorted(trials, key=lambda trial: -(trial.score or 0.0))[:BEST]
        # A column for each trial: a space has more settings than a terminal has room beside each other.
        table = Table("best", *(trial.key for trial in best), box=None, padding=(0, 2, 0, 0))
        table.add_row("val accuracy", *(f"{trial.score:.4f}" for trial in best))
        table.add_row("epochs", *(f"{trial.epochs}/{trial.epochs_planned}" for trial in best))
        table.add_row("state", *(trial.state for trial in best))
        for name in best[0].values if best else ():
            table.add_row(name, *(short(trial.current[name]) for trial in best))
        running = sum(trial.state == "running" for trial in self._known.values())
        failed = sum(trial.state == "failed" for trial in self._known.values())
        line = f"{len(self._ended)} of {self._trials} trials ended, {running} running, {failed} failed{self._left()}"
        return Group(table, Text(line))

    def _left(self) -> str:
        """By the mean of the trials that ended in this call."""
        if not self._seconds:
            return ""
        each = sum(self._seconds) / len(self._seconds)
        left = each * (self._trials - len(self._ended)) / self._at_once
        if self._deadline is not None:
            left = min(left, max(self._deadline - time.monotonic(), 0.0))
        return f", about {left:.0f} s left"


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
