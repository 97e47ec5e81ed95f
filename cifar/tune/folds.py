"""Cross-validation: train and val together, cut into parts of which each is val once."""

import numpy as np
import pyarrow as pa
from sklearn.model_selection import StratifiedKFold

from cifar.config import ConfigError
from cifar.data.prepared import Prepared
from cifar.tune.trial import Fold


def make_folds(prepared: Prepared, count: int, seed: int) -> tuple[pa.Table, tuple[Fold, ...]]:
    """The images of train and val, `image`, `label`, `index`, and which of their rows each fold trains on.

    Stratified by class. The network's normalisation stays that of train: six numbers over all images.
    """
    table = pa.concat_tables(prepared.table(split, ["image", "label", "index"]) for split in ("train", "val"))
    labels = table.column("label").to_numpy()
    fewest = int(np.bincount(labels).min())
    if fewest < count:
        raise ConfigError(f"--folds {count}: a class has {fewest} images only; use --folds {max(fewest, 2)} or fewer")
    cuts = StratifiedKFold(count, shuffle=True, random_state=seed).split(labels, labels)
    return table, tuple(Fold(train=train.astype(np.int64), val=val.astype(np.int64)) for train, val in cuts)
