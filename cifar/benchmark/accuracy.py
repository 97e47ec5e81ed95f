"""Whole runs, one per seed: the accuracy that they reach, and the seconds that it takes."""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean
from typing import Any

from cifar.config import Config, RunConfig
from cifar.evaluate import evaluate
from cifar.predictor import Predictor
from cifar.run_dir import local_model
from cifar.statistics import statistics
from cifar.train import fit

logger = logging.getLogger(__name__)


def time_to_accuracy(config: Config, seeds: int, split: str, target: float, run: RunConfig) -> dict[str, Any]:
    """Train with seeds 0 to `seeds` - 1, one after the other, in `run`'s storage, which must be new.

    `seconds` is what the speed records count (Coleman 2017, DAWNBench; Jordan 2024): training and the final
    evaluation, while loading the data, starting and compiling come before. Training has here one validation and one
    checkpoint per epoch, which the records leave out. `evaluation_seconds` are those of reading the split and
    answering, with test-time augmentation. `wall_seconds` are those of fit(), all included.
    """
    runs = []
    for seed in range(seeds):
        logger.info("seed %d: run %d of %d", seed, seed + 1, seeds)
        seeded = replace(config, train=replace(config.train, seed=seed), run=replace(run, name=f"seed-{seed}"))
        started_at = time.perf_counter()
        trained = fit(seeded)
        wall_seconds = time.perf_counter() - started_at
        with local_model(trained.model) as model:
            evaluation = evaluate(Predictor(model), trained.prepared, split)
        evaluation_seconds = evaluation.count / evaluation.images_per_second
        runs.append(
            {
                "seed": seed,
                "accuracy": evaluation.accuracy,
                "count": evaluation.count,
                "epochs": len(trained.history),
                "train_seconds": trained.train_seconds,
                "evaluation_seconds": evaluation_seconds,
                "seconds": trained.train_seconds + evaluation_seconds,
                "wall_seconds": wall_seconds,
                "target_seconds": seconds_to(target, trained.history) if target else None,
            }
        )
    reached = [run["target_seconds"] for run in runs if run["target_seconds"] is not None]
    return {
        "split": split,
        "runs": runs,
        "accuracy": statistics(run["accuracy"] for run in runs),
        "train_seconds": statistics(run["train_seconds"] for run in runs),
        "seconds": statistics(run["seconds"] for run in runs),
        "target": target or None,
        "target_reached": len(reached) if target else None,
        # The mean over those that reached it would be of the lucky ones.
        "target_seconds": fmean(reached) if target and len(reached) == len(runs) else None,
    }


def seconds_to(target: float, history: Iterable[dict[str, Any]]) -> float | None:
    """Training seconds at the end of the first epoch whose val accuracy is at least `target`; None if there is none."""
    return next((row["train_seconds"] for row in history if row["val_accuracy"] >= target), None)
