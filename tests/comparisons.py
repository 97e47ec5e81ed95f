"""Comparisons whose runs were never trained, of worlds whose truth is known; all that is made of them is real."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar.compare.answers import Answers, write_answers
from cifar.compare.contenders import Contender, changed
from cifar.compare.job import BASELINE
from cifar.compare.summary import Setup, summarize
from cifar.config import Config
from cifar.data import Prepared
from cifar.recipes import fast
from cifar.tune.ledger import Ledger, Trial
from cifar.tune.plan import SweepPlan

FINGERPRINT = "0123abcd"
PLAN = SweepPlan(at_once=2, workers=0, cpus=1, gpus=0, resident=True, reason="the cluster has 2 CPU and 0 GPU; tiny")
EPOCHS = 5
SETTINGS: dict[str, Mapping[str, Any]] = {
    "muon": {},
    "adam": {"optimizer": "adam", "lr": 0.0},
    "sgd": {"optimizer": "sgd", "lr": 0.0},
    "wide": {"widths": (96, 192, 384)},
    "lr=0.1 cutout=8": {"lr": 0.1, "cutout": 8},
    "resnet18": {"model": "resnet18"},
}


def contender(name: str) -> Contender:
    """A network of SETTINGS, or a baseline such as svm-hog."""
    if name in SETTINGS:
        return Contender(name=name, config=changed(fast(), SETTINGS[name]), recipe="fast")
    estimator, _, features = name.partition("-")
    return Contender(name=name, estimator=estimator, features=features)


def prepared(images: int) -> Prepared:
    none: Any = {}
    return Prepared(
        path="/nowhere",
        fingerprint=FINGERPRINT,
        classes=tuple(f"class {number}" for number in range(10)),
        image_size=32,
        counts={"train": 47_500, "val": 2_500, "test": images},
        class_counts=none,
        mean=(120.0, 120.0, 120.0),
        std=(60.0, 60.0, 60.0),
        quarantined=0,
        source="cifar10",
        parts=none,
        group_rows=1000,
        duplicates=none,
        source_stats=none,
    )


def make_setup(folder: Path, names: Sequence[str], images: int, config: Config | None = None) -> Setup:
    return Setup(
        config=config or fast(),
        contenders=[contender(name) for name in names],
        prepared=prepared(images),
        plan=PLAN,
        path=str(folder / "comparison"),
        recipe="fast",
    )


def make_comparison(
    folder: Path,
    levels: Mapping[str, float],
    seeds: int = 3,
    images: int = 2000,
    seed_sd: float = 0.03,
    lost: Mapping[tuple[str, int], str] | None = None,
) -> dict[str, Any]:
    """compare.json of contenders that are right where level + seed + image + noise > 0, all normal; `lost` has the
    reasons of runs, by contender and seed, that failed after an epoch."""
    setup = make_setup(folder, list(levels), images)
    ledger = Ledger(f"{setup.path}/runs")
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 1, images)
    labels = generator.integers(0, 10, images)
    for number, one in enumerate(setup.contenders):
        for seed in range(seeds if one.varies else 1):
            level = levels[one.name] + generator.normal(0, seed_sd if one.varies else 0)
            correct = level + shared + generator.normal(0, 0.5, images) > 0
            trial = Trial(number=number, values={"contender": one.name}, seed=seed, epochs_planned=EPOCHS)
            ledger.started(ledger.add(trial))
            reason = (lost or {}).get((one.name, seed))
            epochs = 1 if reason or one.config is None else EPOCHS
            for epoch in range(1, epochs + 1):
                accuracy = float(correct.mean()) - 0.3 / epoch**2 + generator.normal(0, 0.004)
                seconds = (12.5 + number) * epoch
                ledger.progressed(trial, {"epoch": epoch, "val_accuracy": accuracy, "train_seconds": seconds})
            if reason:
                ledger.ended(trial, "failed", reason)
                continue
            answers = Answers(
                indices=np.arange(images) + 50_000,
                labels=labels,
                predictions=np.where(correct, labels, (labels + 1) % 10),
                fingerprint=FINGERPRINT,
                seconds=0.8,
            )
            path = Path(ledger.path_of(trial))
            write_answers(str(path), answers)
            if one.config is None:
                chosen = {"estimator": one.estimator, "features": one.features, "chosen": "C=0.01"}
                chosen |= {"tried": {"C=0.001": 0.41, "C=0.01": 0.42}, "images": 47_500, "parameters": 123_456}
                chosen |= {"seconds": 42.0, "method": "linear support vector machine on principal components"}
                (path / BASELINE).write_text(json.dumps(chosen))
            ledger.ended(trial, "completed", "all epochs done")
    return json.loads(json.dumps(summarize(setup, ledger)))
