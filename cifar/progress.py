"""Where a run is, shown in the terminal that started it."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cifar.waiting import LOOK_SECONDS, WAITING_SECONDS

POLL_SECONDS = 0.5


class Terminal:
    """stderr: lines that stay, and below them, if it is a terminal, what changes."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()


class Display(Terminal):
    """One line per finished epoch, and below it one for the epoch that runs."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = 0

    def history(self, rows: list[dict[str, Any]]) -> None:
        """Print the epochs that are not on the screen yet."""
        for row in rows[self._shown :]:
            self._console.print(
                f"epoch {row['epoch']:>3}  train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.4f}  "
                f"val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.4f}  "
                + (f"over classes {row['val_balanced_accuracy']:.4f}  " if "val_balanced_accuracy" in row else "")
                + f"{row['images_per_second']:,.0f} images/s  {row['train_seconds']:.1f} s"
            )
        self._shown = max(self._shown, len(rows))

    def notice(self, text: str) -> None:
        """Print a line of a worker's."""
        self._console.print(text, markup=False)

    def progress(self, values: dict[str, Any]) -> None:
        """Redraw the line of the running epoch."""
        if self._live is None:
            return
        done = (values["epoch"] - 1 + values["step"] / values["steps"]) / values["epochs"]
        left = values["train_seconds"] * (1 - done) / done
        line = Table.grid(padding=(0, 2))
        line.add_row(
            f"epoch {values['epoch']}/{values['epochs']}",
            f"step {values['step']}/{values['steps']}",
            f"loss {values['train_loss']:.4f}",
            f"accuracy {values['train_accuracy']:.4f}",
            f"{values['images_per_second']:,.0f} images/s",
            f"about {left:.0f} s left",
        )
        self._live.update(line, refresh=True)


class Mailbox:
    """Latest progress and history of a run, from a worker anywhere in the cluster to the driver.

    A key in the cluster's own key-value store: an actor for it would cost every run the start of another process.
    """

    def __init__(self, run: str):
        self._key = f"cifar-progress-{run}".encode()

    def put(self, kind: str, values: Any) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(self._key + kind.encode(), json.dumps(values).encode(), overwrite=True)

    def get(self, kind: str) -> Any:
        from ray.experimental import internal_kv

        values = internal_kv._internal_kv_get(self._key + kind.encode())
        return None if values is None else json.loads(values)

    def beats(self) -> dict[int, Any]:
        """The workers' last signs of life by rank, put as `beat-RANK`."""
        from ray.experimental import internal_kv

        prefix = f"{self._key.decode()}beat-"
        ranks = [int(key.decode().removeprefix(prefix)) for key in internal_kv._internal_kv_list(prefix)]
        beats = {rank: self.get(f"beat-{rank}") for rank in sorted(ranks)}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def clear(self) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_del(self._key, del_by_prefix=True)


@contextmanager
def watch(mailbox: Mailbox, explain: Callable[[], str | None]) -> Iterator[None]:
    """Show what arrives in the mailbox until the block ends, and what `explain()` says when nothing new comes."""
    mailbox.clear()
    done = threading.Event()
    last: Any = None
    noticed = ""
    moved_at = looked_at = time.monotonic()

    def show(display: Display) -> None:
        nonlocal last, moved_at, looked_at, noticed
        progress, history, notice = (mailbox.get(kind) for kind in ("progress", "history", "notice"))
        if notice and notice != noticed:
            noticed = notice
            display.notice(notice)
        if history:
            display.history(history)
        if progress:
            display.progress(progress)
        now = time.monotonic()
        if (progress, len(history or ())) != last:
            last, moved_at = (progress, len(history or ())), now
        elif now - moved_at >= WAITING_SECONDS / 2 and now - looked_at >= LOOK_SECONDS:
            looked_at = now
            if text := explain():
                print(text, file=sys.stderr, flush=True)

    def poll() -> None:
        while not done.wait(POLL_SECONDS):
            show(display)

    with Display() as display:
        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            show(display)
            mailbox.clear()
