"""The training worker under Ray Train: its context, and its share of the data from the object store."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero

from cifar.cluster import usable_cpus
from cifar.config import Config
from cifar.data.loader import EVALUATION_BATCH, Loader, ResidentLoader, StreamingLoader, in_batches, share
from cifar.data.prepared import Arrays, Prepared
from cifar.data.stream import ray_stream
from cifar.progress import Mailbox
from cifar.run_dir import RunDir
from cifar.worker import Context, NonFiniteLoss, train_worker


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A split in the object store: a materialized Ray Dataset as Arrow blocks in file order.

    Which rows a rank gets is arithmetic on row numbers. A streaming split would hand them out by demand, which no
    second run repeats, through an actor that takes 2.5 s to start.
    """

    refs: Sequence[Any]
    """References to the blocks."""
    rows: list[int]

    @classmethod
    def put(cls, prepared: Prepared, split: str) -> "Blocks":
        tables = [prepared.read(rows, ["image", "label", "index"]) for rows in prepared.row_groups(split)]
        dataset = ray.data.from_arrow(tables)
        return cls(refs=dataset.to_arrow_refs(), rows=[len(table) for table in tables])

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows start..stop; fetches the blocks that hold them and no others."""
        tables, first = [], 0
        for ref, rows in zip(self.refs, self.rows, strict=True):
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                table: Any = ray.get(ref)
                tables.append(table.slice(low, high - low))
            first += rows
        return pa.concat_tables(tables)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the driver hands to every worker."""

    config: Config
    prepared: Prepared
    run_path: str
    train: Blocks | None
    """None: streamed."""
    val: Blocks | None

    def loader(self, context: Context) -> Loader:
        config, prepared = self.config, self.prepared
        common: dict[str, Any] = {
            "batch_size": config.train.batch_size,
            "seed": config.train.seed,
            "rank": context.rank,
            "world_size": context.world_size,
            "device": context.device,
        }
        if self.train is None:
            stream = ray_stream(prepared, config.augment, config.train.seed)
            return StreamingLoader(prepared, stream, epochs=config.train.epochs, **common)
        total = prepared.counts["train"]
        return ResidentLoader(self.train.read(*share(total, context.rank, context.world_size)), total=total, **common)

    def val_batches(self, context: Context) -> Iterator[Arrays]:
        total, rank, world_size = self.prepared.counts["val"], context.rank, context.world_size
        if self.val is None:
            return self.prepared.batches("val", EVALUATION_BATCH, rank, world_size)
        return in_batches(self.val.read(total * rank // world_size, total * (rank + 1) // world_size))


class RayContext:
    """`cifar.worker.Context` on Ray Train."""

    def __init__(self, job: Job):
        place = ray.train.get_context()
        self.rank, self.world_size = place.get_world_rank(), place.get_world_size()
        use_gpu = torch.cuda.is_available() and bool(ray.get_gpu_ids())
        self.device = torch.device("cuda:0" if use_gpu else "cpu")
        torch.set_num_threads(max(usable_cpus() // place.get_local_world_size(), 1))
        if self.world_size > 1:
            self._join("nccl" if use_gpu else "gloo")
        found = ray.train.get_checkpoint()
        self.checkpoint = Path(found.to_directory(tempfile.mkdtemp(prefix="cifar-resume-"))) if found else None
        self._watches_preemption = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
        self._run_dir, self._mailbox = RunDir(job.run_path), Mailbox(job.run_path)
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def _join(self, backend: str) -> None:
        """Open the process group; rank 0's node is where the workers meet."""
        address = None
        if self.rank == 0:
            with socket.socket() as probe:
                probe.bind(("", 0))
                address = f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
        address = broadcast_from_rank_zero(address)
        dist.init_process_group(backend, init_method=address, rank=self.rank, world_size=self.world_size)

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(str(checkpoint)) if checkpoint else None,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def preempted(self) -> bool:
        return self._watches_preemption and ray.train.get_preemption_info() is not None

    def progress(self, values: dict[str, Any]) -> None:
        self._mailbox.put("progress", values)

    def history(self, rows: list[dict[str, Any]]) -> None:
        self._mailbox.put("history", rows)
        self.flush()
        # A remote folder takes its time; the next epoch does not wait for it.
        self._written = self._writer.submit(self._run_dir.write_history, [dict(row) for row in rows])

    def flush(self) -> None:
        """Wait for what is being written; raises what went wrong there."""
        if self._written is not None:
            self._written.result()

    def close(self) -> None:
        self.flush()
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
        if dist.is_initialized():
            dist.destroy_process_group()


def run_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry: the run's summary, or {"error": text} for a failure that a restart would only repeat."""
    job: Job = loop_config["job"]
    context = RayContext(job)
    augmented = job.config.augment.augment_on == "data"
    try:
        summary = train_worker(job.config, job.prepared, context, job.loader, job.val_batches, augmented)
        context.close()
        return summary
    except NonFiniteLoss as error:
        return {"error": str(error)}
