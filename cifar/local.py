"""A run in this process, without Ray: for debugging, on machines that have no Ray cluster to spare, and for a trial of
a sweep, which is in a process of its own already."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import torch

from cifar.balance import sampling_weights
from cifar.checkpoints import Checkpoints
from cifar.cluster import choose_loader
from cifar.config import Config, ConfigError
from cifar.context import Context, Wish
from cifar.data.loader import EVALUATION_BATCH, Loader, ResidentLoader, StreamingLoader, in_batches, read_stream
from cifar.data.prepared import Arrays, Prepared, exists, join
from cifar.progress import Display
from cifar.run_dir import RunDir
from cifar.worker import train_worker

logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """Images in memory."""

    table: pa.Table
    """With the columns `image`, `label` and `index`."""
    numbers: np.ndarray | None = None
    """Which of them, int64 (n,); None: all."""


def fit_in_process(config: Config, prepared: Prepared, run_dir: RunDir) -> dict[str, Any]:
    """Train here; the summary of `train_worker`, with the best model copied to the run's folder."""
    if config.run.gpu and not torch.cuda.is_available():
        raise ConfigError("--gpu: torch sees no GPU on this machine; drop the flag")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    loader, why = choose_loader(config, prepared.num_bytes("train") + prepared.num_bytes("val"), memory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logger.info("plan: this process trains on %s, %s data (%s)", device.type, loader, why)
    run_dir.open(config, prepared)
    train, val = None, None
    if loader == "resident":
        train, val = (Rows(prepared.table(split, ["image", "label", "index"])) for split in ("train", "val"))
    with run_dir.lock(), Display() as display:
        context = LocalContext(run_dir, device)
        context.display = display
        return train_here(config, prepared, context, train, val)


def train_here(
    config: Config, prepared: Prepared, context: Context, train: Rows | None, val: Rows | None
) -> dict[str, Any]:
    """Train in this process on these rows, or streaming where they are None."""

    def make_loader(context: Context) -> Loader:
        common: dict[str, Any] = {
            "batch_size": config.train.batch_size,
            "seed": config.train.seed,
            "rank": 0,
            "world_size": 1,
            "weights": sampling_weights(config, prepared.class_counts["train"]),
        }
        if train is None:
            return StreamingLoader(
                prepared, read_stream(prepared), epochs=config.train.epochs, device=context.device, **common
            )
        common |= {"total": prepared.counts["train"], "micro_batches": config.optim.accumulate}
        return ResidentLoader(train.table, rows=train.numbers, device=context.device, **common)

    def val_batches(context: Context) -> Iterator[Arrays]:
        return prepared.batches("val", EVALUATION_BATCH) if val is None else in_batches(*val)

    return train_worker(config, prepared, context, make_loader, val_batches)


class LocalContext:
    """`cifar.context.Context` of one worker without Ray Train."""

    rank, world_size = 0, 1
    display: Display | None = None

    def __init__(self, run_dir: RunDir, device: torch.device):
        self.run_dir, self.device = run_dir, device
        if exists(join(run_dir.path, "checkpoints/checkpoint_manager_snapshot.json")):
            raise ConfigError(f"{run_dir.path}: this run was begun by Ray; go on with --workers 1, or another --name")
        self.checkpoints = Checkpoints(join(run_dir.path, "checkpoints"), run_dir.require_owned)
        self.checkpoint = self.checkpoints.last()
        self._restarted = False
        self._copy_best()  # it may have been killed between the two

    def restart(self, checkpoint: Path) -> None:
        """Start from another run's checkpoint, a local folder. Those of before go when there is one of its own: until
        then, a run that is killed goes on as if nothing had been."""
        self.checkpoint, self._restarted = checkpoint, True

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        assert checkpoint is not None
        self.checkpoints.add(checkpoint, metrics, alone=self._restarted)
        self._restarted = False
        self._copy_best()

    def wish(self) -> Wish:
        return Wish.NOTHING

    def leave(self) -> NoReturn:
        raise NotImplementedError("nobody wishes it here")

    def doing(self, what: str, waits: bool = False) -> None:
        pass  # nobody waits for this worker

    def progress(self, values: dict[str, Any]) -> None:
        if self.display is not None:
            self.display.progress(values)

    def history(self, rows: list[dict[str, Any]]) -> None:
        if self.display is not None:
            self.display.history(rows)
        self.run_dir.write_history(rows)

    def _copy_best(self) -> None:
        """At each epoch, since a scheduler may end a trial after any; one in mid-epoch has no accuracy."""
        if self.checkpoints.best_is_last and self.checkpoints.best_score >= 0:
            self.run_dir.copy_model(self.checkpoints.best())
