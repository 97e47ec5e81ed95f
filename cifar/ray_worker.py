"""The training worker under Ray Train: its context, and its share of the data from the object store."""

import fcntl
import importlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.execution.context import get_train_context

from cifar.balance import sampling_weights
from cifar.cluster import node_cores
from cifar.config import ConfigError, RunFailed
from cifar.context import Context, Wish
from cifar.data.loader import EVALUATION_BATCH, Loader, ResidentLoader, StreamingLoader, in_batches
from cifar.data.prepared import MANIFEST, Arrays
from cifar.data.shares import share
from cifar.data.stream import ray_stream
from cifar.elastic import Leaving, checkpoint_wanted
from cifar.probe import require_room, require_seen
from cifar.progress import Mailbox
from cifar.ray_job import Job
from cifar.run_dir import RunDir
from cifar.waiting import Pulse
from cifar.worker import train_worker

GROUP_TIMEOUT = timedelta(minutes=5)
"""Within which all workers come to an exchange that one has come to. A worker that dies, and a node whose link is cut,
are noticed by Ray, and much sooner; this ends the wait for one that hangs, or that all but its peers can reach. Longer
than anything that one of them does alone: compiling, writing a checkpoint, waiting for data that are read anew."""
SIOCGIFADDR = 0x8915  # linux/sockios.h


class Notices(logging.Handler):
    """Takes what is logged here, where nobody reads it, to the driver's terminal."""

    def __init__(self, run: str):
        super().__init__(logging.WARNING)
        self._mailbox = Mailbox(run)

    def emit(self, record: logging.LogRecord) -> None:
        self._mailbox.put("notice", record.getMessage())


class RayContext:
    """`cifar.context.Context` on Ray Train."""

    def __init__(self, job: Job):
        # torch imports this (0.9 s) when the first optimizer is made; let it load while the data is copied.
        threading.Thread(target=importlib.import_module, args=("torch._dynamo",), daemon=True).start()
        require_seen(job.run_path, "config.json", "--storage")
        if job.train is None:
            require_seen(job.prepared.path, MANIFEST, "$CIFAR_CACHE")
        place = ray.train.get_context()
        self.rank, self.world_size = place.get_world_rank(), place.get_world_size()
        self._run_dir, self._mailbox = RunDir(job.run_path, owner=job.run_owner), Mailbox(job.run_path)
        put = partial(self._mailbox.put, f"beat-{self.rank}")
        self._pulse = Pulse(put, self.world_size, ray.util.get_node_ip_address())
        use_gpu = bool(ray.get_gpu_ids())
        if use_gpu and not torch.cuda.is_available():
            raise RunFailed(
                "Ray gave this worker a GPU that torch does not see; install a torch with CUDA on every node"
            )
        self.device = torch.device("cuda:0" if use_gpu else "cpu")
        torch.set_num_threads(max(node_cores() // place.get_local_world_size(), 1))
        if self.world_size > 1:
            self.doing("joining the other workers", waits=True)
            self._join("nccl" if use_gpu else "gloo")
        self.doing("loading data and checkpoint")
        found = ray.train.get_checkpoint()
        self.checkpoint = Path(found.to_directory(tempfile.mkdtemp(prefix="cifar-resume-"))) if found else None
        if self.checkpoint is not None:
            require_room(job.run_path, self.checkpoint)  # else each restart would train until the next one
        self._run_path = job.run_path
        logging.getLogger("cifar.data.remote").addHandler(Notices(job.run_path))
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def _join(self, backend: str) -> None:
        """Open the process group; rank 0's node is where the workers meet."""
        address = None
        own = ray.util.get_node_ip_address()
        if interface := interface_of(own):
            # gloo would look the host's name up, which many systems answer with a loopback address.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if self.rank == 0:
            with socket.socket() as probe:
                probe.bind(("", 0))
                address = f"tcp://{own}:{probe.getsockname()[1]}"
        address = broadcast_from_rank_zero(address)
        dist.init_process_group(
            backend, init_method=address, rank=self.rank, world_size=self.world_size, timeout=GROUP_TIMEOUT
        )

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        checkpoint_wanted.clear()
        if checkpoint is not None:
            require_room(self._run_path, checkpoint)
            self._run_dir.require_owned()
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(str(checkpoint)) if checkpoint else None,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def wish(self) -> Wish:
        # Ray's public get_preemption_info() is a barrier over all workers, through an actor: 2 ms each time.
        if get_train_context().preemption_context.preemption_info is not None:
            return Wish.LEAVE
        return Wish.CHECKPOINT if checkpoint_wanted.is_set() else Wish.NOTHING

    def leave(self) -> NoReturn:
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        raise Leaving("a node of this run is about to be taken away")

    def doing(self, what: str, waits: bool = False) -> None:
        self._pulse.doing(what, waits)

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
        self._pulse.close()
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        self.flush()


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address; None if there is none, or not on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, name.encode().ljust(256, b"\0"))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def make_loader(job: Job, context: Context) -> Loader:
    """This worker's training batches."""
    config, prepared = job.config, job.prepared
    common: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "rank": context.rank,
        "world_size": context.world_size,
        "device": context.device,
        "weights": sampling_weights(config, prepared.class_counts["train"]),
    }
    if job.train is None:
        stream = ray_stream(prepared, config.augment, config.train.seed)
        return StreamingLoader(prepared, stream, epochs=config.train.epochs, **common)
    total, micro_batches = prepared.counts["train"], config.optim.accumulate
    table = job.train.read(*share(total, context.rank, context.world_size, micro_batches))
    return ResidentLoader(table, total=total, micro_batches=micro_batches, **common)


def val_batches(job: Job, context: Context) -> Iterator[Arrays]:
    """This worker's share of val, every row once over all workers."""
    total, rank, world_size = job.prepared.counts["val"], context.rank, context.world_size
    if job.val is None:
        return job.prepared.batches("val", EVALUATION_BATCH, rank, world_size)
    return in_batches(job.val.read(total * rank // world_size, total * (rank + 1) // world_size))


def train_job(job: Job) -> dict[str, Any]:
    """One worker's run: its summary, or {"error": text} for a failure that a restart would only repeat."""
    context = None
    try:
        context = RayContext(job)
        return train_worker(
            job.config,
            job.prepared,
            context,
            partial(make_loader, job),
            partial(val_batches, job),
            augmented=job.config.augment.augment_on == "data",
        )
    except (ConfigError, RunFailed) as error:
        return {"error": str(error)}
    finally:
        if context is not None:
            context.close()
