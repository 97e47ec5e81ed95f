"""What networks say of images that they were not trained on: one network for each part of train and val.

It trains and it predicts, as a job does, in tasks of Ray. A fold is a run like any other, in a folder of its own, so
that the same call goes on after it was killed.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError

from cifar.autoscaler import cluster_nodes
from cifar.config import Config, ConfigError, RunFailed
from cifar.data.loader import in_batches
from cifar.data.prepared import Prepared, absolute, join, read_file, write_file
from cifar.data.remote import StorageFailed, storage_failure
from cifar.evaluate.label_errors import LabelReview, review
from cifar.machine import usable_cpus
from cifar.predictor import Predictor
from cifar.probe import other_nodes, probe, require_seen
from cifar.ray_job import Blocks
from cifar.run_dir import RunDir, local_model, locked
from cifar.train import default_name, settle_network
from cifar.tune.folds import SPLITS, Fold, fit_fold, make_folds
from cifar.tune.plan import SweepPlan, make_sweep_plan
from cifar.tune.settings import TuneConfig
from cifar.tune.trial import explain
from cifar.waiting import Request, explained, unplaced_actors

FLAG = "--label-errors"
FOLDS = "folds.json"
"""Says what a folder of folds is of."""
MAX_DEATHS = 3
"""Of a fold's process, after each of which the fold goes on from its checkpoint."""
VAL_IMAGES = 2500
"""Of the part left out, by which the epoch of a fold's model is chosen: all would cost as much as the training."""
POLL_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FoldJob:
    """What all folds share."""

    config: Config
    prepared: Prepared
    path: str
    threads: int
    images: Blocks
    folds: tuple[Fold, ...]


def review_labels(config: Config, prepared: Prepared, count: int, storage: str) -> LabelReview:
    """Look for wrong labels in train and val of `prepared` by `count` trainings of `config`, each on all but one part.

    Ray must be up. The trainings are kept in a folder of `storage`, named by what decides them. ConfigError for what
    the user can mend, RunFailed when a training broke off. Weights to start from, if the config names some, should not
    have been trained on these labels; and of an image that the set has twice a fold may know the other one's label.
    """
    path, table, probabilities = out_of_fold(config, prepared, count, storage)
    return review(prepared, table, probabilities, SPLITS, folds=count, path=path)


def out_of_fold(
    config: Config, prepared: Prepared, count: int, storage: str
) -> tuple[str, pa.Table, NDArray[np.float32]]:
    """Folder of the trainings, the images of train and val, and probabilities (N,C) for them by the network of the fold
    that left them out."""
    probe(storage, "--storage")
    # Where pixels are changed and how they are read make no difference to them; a fold is in memory.
    config = replace(
        config,
        augment=replace(config.augment, augment_on="device"),
        train=replace(config.train, loader="auto"),
    ).with_batch_size(prepared.counts["train"])
    config = settle_network(config, prepared)
    there, coming = cluster_nodes()
    data_bytes = sum(prepared.num_bytes(split) for split in SPLITS)
    plan = make_sweep_plan(config, TuneConfig(trials=count), data_bytes, [*there, *coming])
    logger.info("%s", plan)
    if not plan.resident:
        raise ConfigError(f"{FLAG} {count}: needs the images in memory; give Ray a larger object store")
    table, folds = make_folds(prepared, count, config.data.split_seed, FLAG)
    fewest = min(len(fold.train) for fold in folds)
    if fewest < config.train.batch_size:
        raise ConfigError(
            f"{FLAG} {count}: leaves {fewest} images to train on, and the model takes {config.train.batch_size} at a "
            f"time; use {FLAG} {count + 1} or more"
        )
    path = join(absolute(storage), f"{default_name(config, prepared)}-{count}-folds")
    about = {"folds": count, "source": prepared.source, "fingerprint": prepared.fingerprint, "config": config.to_dict()}
    write_file(join(path, FOLDS), (json.dumps(about, indent=1) + "\n").encode())
    if others := other_nodes():
        probe(storage, "--storage", others)
    logger.info("folds: %s", path)
    job = FoldJob(
        config=config, prepared=prepared, path=path, threads=plan.threads, images=Blocks.of(table), folds=folds
    )
    with locked(path, "another process trains these folds; wait, or give another --storage"):
        try:
            answers = run_folds(job, plan)
        except KeyboardInterrupt:
            logger.info("%s: keeps what was trained; the same command goes on", path)
            raise
    probabilities = np.empty((len(table), len(prepared.classes)), np.float32)
    for fold, answer in zip(folds, answers, strict=True):
        probabilities[fold.val] = answer
    return path, table, probabilities


def run_folds(job: FoldJob, plan: SweepPlan) -> list[NDArray[np.float32]]:
    """Probabilities for the rows that each fold leaves out, in order."""
    task = ray.remote(answer_fold).options(num_cpus=plan.cpus, num_gpus=plan.gpus, max_retries=MAX_DEATHS)
    shared = ray.put(job)
    waiting = list(range(len(job.folds)))
    running: dict[Any, int] = {}
    answers: dict[int, NDArray[np.float32]] = {}
    told = Told(job)
    each = {"CPU": plan.cpus} | ({"GPU": plan.gpus} if plan.gpus else {})
    request = Request(name="fold", count=1, each=each, remedy="stop this command, which goes on from here")
    try:
        with explained(partial(unplaced_actors, request)) as moved:
            while waiting or running:
                # No more than fit: what Ray has in its queue is what it has no room for, and that is worth a word.
                while waiting and len(running) < plan.at_once:
                    number = waiting.pop(0)
                    running[task.remote(shared, number)] = number
                done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
                if told.look(running.values()) or done:
                    moved()
                for ref in done:
                    answers[running.pop(ref)] = answer_of(ref)
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
    return [answers[number] for number in range(len(job.folds))]


def answer_of(ref: Any) -> NDArray[np.float32]:
    try:
        answer: Any = ray.get(ref)
    except RayError as error:
        cause = " ".join(str(error).split())[:300]
        raise RunFailed(f"a fold's process died {MAX_DEATHS + 1} times: {cause}") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def answer_fold(job: FoldJob, number: int) -> NDArray[np.float32] | Exception:
    """Ray's entry: train the fold or go on with it, then predict what it leaves out; an error as a value, which crosses
    process boundaries unwrapped."""
    try:
        require_seen(job.path, FOLDS, "--storage")
        torch.set_num_threads(min(job.threads, usable_cpus()))
        # A GPU, where Ray gave this process a share of one; else torch sees none.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        table = job.images.read(0, job.images.rows[0])
        fold = job.folds[number]
        run_dir = RunDir(fold_path(job, number))
        fit_fold(job.config, job.prepared, table, fold, run_dir, device, VAL_IMAGES)
        with local_model(join(run_dir.path, "model")) as folder:
            predictor = Predictor(folder, device.type)
        return np.concatenate([predictor.predict(batch.images) for batch in in_batches(table, fold.val)])
    except ConfigError as error:
        return error
    except Exception as error:
        blamed = storage_failure(str(error))
        return StorageFailed(blamed) if blamed else RunFailed(f"{fold_path(job, number)}: {explain(error)}")


def fold_path(job: FoldJob, number: int) -> str:
    return join(job.path, f"fold-{number + 1}")


class Told:
    """Says each epoch of a fold once, by what its run writes."""

    def __init__(self, job: FoldJob):
        self._job = job
        self._shown = [len(self._rows(number)) for number in range(len(job.folds))]
        for number, epochs in enumerate(self._shown):
            if epochs:
                logger.info("fold %d: %d of %d epochs were trained before", number + 1, epochs, job.config.train.epochs)

    def look(self, folds: Sequence[int] | Any) -> bool:
        """Whether there was something to say of these."""
        moved = False
        for number in folds:
            rows = self._rows(number)
            for row in rows[self._shown[number] :]:
                logger.info(
                    "fold %d  epoch %3d  train loss %.4f  val accuracy %.4f  %.1f s",
                    *(number + 1, row["epoch"], row["train_loss"], row["val_accuracy"], row["train_seconds"]),
                )
            moved |= len(rows) > self._shown[number]
            self._shown[number] = max(len(rows), self._shown[number])
        return moved

    def _rows(self, number: int) -> list[dict[str, Any]]:
        data = read_file(join(fold_path(self._job, number), "metrics.jsonl")) or b""
        return [json.loads(line) for line in data.splitlines()]
