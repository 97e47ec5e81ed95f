"""Cross-validation: train and val together, cut into parts of which each is val once."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from sklearn.model_selection import StratifiedKFold

from cifar.config import Config, ConfigError
from cifar.data.prepared import Prepared
from cifar.data.shares import num_batches
from cifar.local import LocalContext, Rows, train_here
from cifar.run_dir import RunDir

SPLITS = ("train", "val")
"""What is cut, in the order of the table's rows."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Rows of the table of all images, int64."""

    train: np.ndarray
    val: np.ndarray


def make_folds(prepared: Prepared, count: int, seed: int, flag: str = "--folds") -> tuple[pa.Table, tuple[Fold, ...]]:
    """The images of train and val, `image`, `label`, `index`, and which of their rows each fold trains on.

    Stratified by class. The network's normalisation stays that of train: six numbers over all images. ConfigError,
    which names the `flag`, for more folds than a class has images.
    """
    table = pa.concat_tables(prepared.table(split, ["image", "label", "index"]) for split in SPLITS)
    labels = table.column("label").to_numpy()
    fewest = int(np.bincount(labels).min())
    if fewest < count:
        raise ConfigError(f"{flag} {count}: a class has {fewest} images only; use {flag} {max(fewest, 2)} or fewer")
    cuts = StratifiedKFold(count, shuffle=True, random_state=seed).split(labels, labels)
    return table, tuple(Fold(train=train.astype(np.int64), val=val.astype(np.int64)) for train, val in cuts)


def fit_fold(
    config: Config,
    prepared: Prepared,
    table: pa.Table,
    fold: Fold,
    run_dir: RunDir,
    device: torch.device,
    most_val: int = 0,
) -> dict[str, Any]:
    """Train on the fold's rows in this process, or go on with it; the run's summary, as `train_worker` gives it.

    Each epoch is validated on the fold's val, or, with `most_val`, on up to so many of its rows, evenly spread.
    """
    prepared = replace(prepared, counts=prepared.counts | {"train": len(fold.train), "val": len(fold.val)})
    num_batches(len(fold.train), config.train.batch_size, world_size=1)  # refuses what has no batch
    run_dir.open(config, prepared)
    # Not locked: one that goes on elsewhere would wait for its process on a host that was cut off.
    run_dir.own()
    val = fold.val[:: -(-len(fold.val) // most_val)] if most_val else fold.val
    return train_here(config, prepared, LocalContext(run_dir, device), Rows(table, fold.train), Rows(table, val))
