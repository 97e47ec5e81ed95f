"""What differs between the places where a training worker runs: Ray Train, a Tune trial, this process."""

from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch


class Wish(Enum):
    """What the cluster wants of a run."""

    NOTHING = 0
    CHECKPOINT = 1
    LEAVE = 2
    """A node will be taken away: write a checkpoint and end, to go on elsewhere."""


class Context(Protocol):
    rank: int
    world_size: int
    device: torch.device
    checkpoint: Path | None
    """Local folder of the checkpoint to start from."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Hand over a report; all workers call it equally often. The checkpoint's folder is then the receiver's."""
        ...

    def wish(self) -> Wish:
        """Cheap. May reach one worker before the others; a checkpoint fulfils it."""
        ...

    def leave(self) -> NoReturn:
        """Wait until what was reported is safe, and end this worker by an exception; all workers do."""
        ...

    def doing(self, what: str, waits: bool = False) -> None:
        """Note where this worker is, for whoever asks why nothing moves; cheap. `waits`: for the other workers."""
        ...

    def progress(self, values: dict[str, Any]) -> None:
        """Show where the run is; rank 0 only, cheap, may be dropped."""
        ...

    def history(self, rows: list[dict[str, Any]]) -> None:
        """Show and keep the finished epochs' metrics; rank 0 only."""
        ...
