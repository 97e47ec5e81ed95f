"""`fit(config)`: the one driver, for a run and for a trial; data in, the run's folder with its best model out."""

import hashlib
import importlib
import json
import logging
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from cifar.autoscaler import cluster_nodes
from cifar.cluster import Plan, make_plan, start_ray
from cifar.config import Config, RunFailed
from cifar.data import Prepared, prepare
from cifar.data.prepared import absolute, filesystem, join
from cifar.data.remote import WholeFiles, storage_failure
from cifar.data.shares import num_batches
from cifar.probe import other_nodes, probe, probe_source
from cifar.progress import Mailbox, watch
from cifar.run_dir import RunDir
from cifar.waiting import Request, Watchdog, unplaced_group

if TYPE_CHECKING:
    from cifar.ray_job import Job

MAX_FAILURES = 5
"""Deaths of workers without a checkpoint in between that a run survives; a node that gave notice does not count."""
RESIZE_SECONDS = 20
"""How often an elastic run looks for room for more workers; each time that it grows, it starts again for some 10 s."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `fit` leaves behind."""

    path: str
    model: str
    """Model folder of the best epoch by val accuracy."""
    prepared: Prepared
    history: list[dict[str, Any]]
    train_seconds: float
    stopped: str
    """Why training ended."""


def fit(config: Config) -> Run:
    """Prepare the data, train by `config`, and return the finished run; the same config and name resume.

    Ray is started, or joined at $RAY_ADDRESS, unless `--workers 0`. Raises ConfigError for what the user can mend,
    before anything is trained, and RunFailed.
    """
    probe(config.run.storage, "--storage")
    in_process = config.run.workers == "0"
    prepared = prepare(config.data) if in_process else prepare_while_ray_starts(config)
    config = config.with_batch_size(prepared.counts["train"])
    num_batches(prepared.counts["train"], config.train.batch_size, world_size=1)  # refuses what has no batch
    config = settle_network(config, prepared)
    if config.train.balance == "none" and prepared.imbalance_advice:
        logger.info("%s", prepared.imbalance_advice)
    run_dir = RunDir(join(absolute(config.run.storage), config.run.name or default_name(config, prepared)))
    if in_process:
        from cifar.local import fit_in_process

        summary = fit_in_process(config, prepared, run_dir)
    else:
        summary = fit_on_ray(config, prepared, run_dir)
    return Run(
        path=run_dir.path,
        model=join(run_dir.path, "model"),
        prepared=prepared,
        history=summary["history"],
        train_seconds=summary["train_seconds"],
        stopped=summary["stopped"],
    )


def settle_network(config: Config, prepared: Prepared) -> Config:
    """With the teacher's very version. Logs another library's network, the weights to start from and the teacher;
    ConfigError if they won't do."""
    if config.distill.teacher:
        from cifar.distill import settle_teacher

        config = settle_teacher(config)
    if config.model.from_zoo or config.transfer.starts or config.distill.teacher:
        from cifar.training import check_network  # needs torch, which this process does without otherwise

        for line in check_network(config, prepared):
            logger.info("%s", line)
    return config


def probe_teacher(config: Config, nodes: Sequence[str]) -> None:
    """ConfigError if one of Ray's `nodes` cannot read the teacher."""
    from cifar.store import model_path

    if teacher := config.distill.teacher:
        if path := model_path(teacher):
            probe_source(path, "--teacher", nodes)
        else:
            probe_source(config.distill.teacher_store, "--teacher-store", nodes)


def prepare_while_ray_starts(config: Config) -> Prepared:
    """Both take seconds. Ray starts in this thread, because its processes die with the thread that starts them
    (PR_SET_PDEATHSIG)."""
    ray_is_up = threading.Event()

    def prepare_and_import() -> Prepared:
        prepared = prepare(config.data, ray_is_up.wait)
        importlib.import_module("cifar.lean_trainer")  # half a second that would come after
        return prepared

    with ThreadPoolExecutor(1) as background:
        being_prepared = background.submit(prepare_and_import)
        try:
            start_ray(config.run.verbose)
        finally:
            ray_is_up.set()
        return being_prepared.result()


def fit_on_ray(config: Config, prepared: Prepared, run_dir: RunDir) -> dict[str, Any]:
    """Train on Ray Train's workers; the driver holds the decoded blocks, so that a restarted worker finds them."""
    from cifar.ray_job import Blocks, Job

    plan = make_plan(config, prepared.num_bytes("train") + prepared.num_bytes("val"), *cluster_nodes())
    logger.info("%s", plan)
    resident = plan.loader == "resident"
    if others := other_nodes():
        probe(config.run.storage, "--storage", others)
        if not resident:
            probe_source(prepared.path, "$CIFAR_CACHE", others)
        probe_teacher(config, others)
    run_dir.open(config, prepared)
    job = Job(
        config=config,
        prepared=prepared,
        run_path=run_dir.path,
        run_owner=run_dir.owner,
        train=Blocks.put(prepared, "train") if resident else None,
        val=Blocks.put(prepared, "val") if resident else None,
    )
    mailbox = Mailbox(run_dir.path)
    watchdog = Watchdog(mailbox.beats, partial(unplaced_group, request_of(plan)))
    with run_dir.lock(), watch(mailbox, watchdog.look):
        return train_on_ray(job, plan, run_dir)


def train_on_ray(job: "Job", plan: Plan, run_dir: RunDir, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """The summary of the workers, with the best model copied to the run's folder.

    `callbacks` are Ray Train's. Who gives some may end this process in the middle, as Tune does, and then has to call
    `release_workers` with the run's path.
    """
    from ray.train import (
        BackendConfig,
        CheckpointConfig,
        FailureConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
        WorkerGroupError,
    )

    from cifar.lean_trainer import LeanTrainer
    from cifar.ray_job import run_worker

    files, root = filesystem(run_dir.path)
    trainer = LeanTrainer(
        run_worker,
        train_loop_config={"job": job},
        backend_config=BackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=(plan.min_workers, plan.max_workers) if plan.elastic else plan.max_workers,
            use_gpu=bool(plan.gpus_per_worker),
            resources_per_worker=plan.resources,
            # Without GPUs workers share a node's cores: they had better not pack.
            placement_strategy="PACK" if plan.gpus_per_worker else "SPREAD",
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            storage_path=root,
            storage_filesystem=fs.PyFileSystem(WholeFiles()) if isinstance(files, fs.LocalFileSystem) else files,
            name="checkpoints",
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),
            callbacks=list(callbacks),
        ),
    )
    trainer.noted_as = run_dir.path if callbacks else ""
    trainer.worker_counts = job.config.worker_counts
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        often = (
            f", {MAX_FAILURES + 1} times without a checkpoint in between" if isinstance(error, WorkerGroupError) else ""
        )
        cause = f"{first_cause(error)}{often}"
        raise RunFailed(f"{run_dir.path}: {storage_failure(cause) or cause}") from error
    summary: dict[str, Any] = result.return_value or {}
    if "error" in summary:
        raise RunFailed(f"{run_dir.path}: {summary['error']}")
    best = result.get_best_checkpoint("score", "max")
    assert best is not None
    run_dir.copy_model(best.path, best.filesystem)
    return summary


def request_of(plan: Plan) -> Request:
    fewer = f"--workers {plan.min_workers - 1}" if plan.min_workers > 1 else "--workers 0, which needs none of Ray's"
    return Request(name="workers", count=plan.min_workers, each=plan.resources, remedy=fewer)


def first_cause(error: BaseException) -> str:
    """The last line of the innermost error of the first worker that failed."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = next(iter(failures.items()))
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"worker {rank} failed: {lines[-1].strip() if lines else cause!r}"


def default_name(config: Config, prepared: Prepared) -> str:
    """The same flags on the same data give the same name, so that the same command resumes."""
    identity = json.dumps([config.identity(), prepared.fingerprint], sort_keys=True).encode()
    digest = hashlib.blake2b(identity, digest_size=4).hexdigest()
    data = re.sub(r"[^\w.\-]+", "-", prepared.source.rstrip("/").rsplit("/", 1)[-1]) or "data"
    return f"{data}-{config.model.model.replace('/', '-')}-{digest}"
