"""How far a batch prediction is: a line that changes in a terminal, else one every ten seconds."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS = 10.0

logger = logging.getLogger(__name__)


class Progress:
    """Counts images, and tells how long starting took from how fast it went then."""

    def __init__(self, total: int, done: int):
        self._total, self._before, self._done = total, done, done
        self._started_at = self._last_said = self._last = time.perf_counter()
        self._first: float | None = None
        console = Console(file=sys.stderr)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=total, completed=done, rate="starting")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, rows: int, seconds: float) -> None:
        """A part of so many rows is finished, which took so many seconds after it had been decoded."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last - seconds
        self._done += rows
        rate = f"{self.rate:,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif self._last - self._last_said > SECONDS:
            self._last_said = self._last
            left = (self._total - self._done) / self.rate
            logger.info("%s of %s images, %s, about %.0f s left", f"{self._done:,}", f"{self._total:,}", rate, left)

    @property
    def startup(self) -> float:
        """Seconds until the first part was predicted."""
        return (self._last if self._first is None else self._first) - self._started_at

    @property
    def rate(self) -> float:
        """Images per second since then, reading and writing included."""
        return 0.0 if self._first is None else (self._done - self._before) / (self._last - self._first)
