"""A run in this process, without Ray: for debugging, and on machines that have no Ray cluster to spare."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cifar.cluster import choose_loader
from cifar.config import Config, ConfigError
from cifar.context import Context
from cifar.data.loader import EVALUATION_BATCH, Loader, ResidentLoader, StreamingLoader, in_batches, read_stream
from cifar.data.prepared import Arrays, Prepared
from cifar.progress import Display
from cifar.run_dir import RunDir
from cifar.worker import train_worker

logger = logging.getLogger(__name__)


def fit_in_process(config: Config, prepared: Prepared, run_dir: RunDir) -> dict[str, Any]:
    """Train here; the summary of `train_worker`, with the best model copied to the run's folder."""
    if config.run.gpu and not torch.cuda.is_available():
        raise ConfigError("--gpu: torch sees no GPU on this machine; drop the flag")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    loader, why = choose_loader(config, prepared.num_bytes("train") + prepared.num_bytes("val"), memory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logger.info("plan: this process trains on %s, %s data (%s)", device.type, loader, why)
    run_dir.open(config, prepared)
    val = prepared.table("val", ["image", "label", "index"]) if loader == "resident" else None

    def make_loader(context: Context) -> Loader:
        common = {"batch_size": config.train.batch_size, "seed": config.train.seed, "rank": 0, "world_size": 1}
        if loader == "streaming":
            return StreamingLoader(
                prepared, read_stream(prepared), epochs=config.train.epochs, device=context.device, **common
            )
        table = prepared.table("train", ["image", "label", "index"])
        return ResidentLoader(table, total=len(table), device=context.device, **common)

    def val_batches(context: Context) -> Iterator[Arrays]:
        return prepared.batches("val", EVALUATION_BATCH) if val is None else in_batches(val)

    with run_dir.lock(), Display() as display:
        context = LocalContext(run_dir, device, display)
        summary = train_worker(config, prepared, context, make_loader, val_batches)
    run_dir.copy_model(str(context.best()))
    return summary


class LocalContext:
    """`cifar.context.Context` of one worker without Ray; keeps the best checkpoint and the last."""

    rank, world_size = 0, 1

    def __init__(self, run_dir: RunDir, device: torch.device, display: Display):
        self._run_dir, self._display, self.device = run_dir, display, device
        self._folder = Path(run_dir.path) / "checkpoints"
        if (self._folder / "checkpoint_manager_snapshot.json").exists():
            raise ConfigError(f"{run_dir.path}: this run was begun by Ray; go on with --workers 1, or another --name")
        self.checkpoint = max(self._checkpoints(), default=None)

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        assert checkpoint is not None
        (checkpoint / "report.json").write_text(json.dumps(metrics))
        latest = max(self._checkpoints(), default=None)
        number = int(latest.name.rpartition("_")[2]) + 1 if latest else 0
        partial = self._folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.move(checkpoint, partial)  # between file systems this copies; the rename shows it whole
        os.rename(partial, self._folder / f"checkpoint_{number:06d}")
        keep = {self.best(), max(self._checkpoints())}
        for other in set(self._checkpoints()) - keep:
            os.rename(other, partial)  # at once out of sight: a half-deleted checkpoint must not be found
            shutil.rmtree(partial)

    def best(self) -> Path:
        """The checkpoint of the highest score; the earlier one of equals."""
        return max(
            sorted(self._checkpoints()), key=lambda path: json.loads((path / "report.json").read_text())["score"]
        )

    def preempted(self) -> bool:
        return False

    def progress(self, values: dict[str, Any]) -> None:
        self._display.progress(values)

    def history(self, rows: list[dict[str, Any]]) -> None:
        self._display.history(rows)
        self._run_dir.write_history(rows)

    def _checkpoints(self) -> list[Path]:
        return list(self._folder.glob("checkpoint_*"))
