"""Stratified cuts of train into val and test."""

import numpy as np

from cifar.config import ConfigError, DataConfig

TRAIN, VAL, TEST = 0, 1, 2


def cut_missing(splits: np.ndarray, labels: np.ndarray, config: DataConfig) -> np.ndarray:
    """`splits` (codes, int8 (N,)) with val and test cut from train where the source has none.

    Only rows with a label (>= 0) move. Test is cut first; val is a share of what is left.
    """
    splits = splits.copy()
    for code, name, fraction in ((TEST, "test", config.test_fraction), (VAL, "val", config.val_fraction)):
        if (splits == code).any():
            continue
        rows = np.flatnonzero((splits == TRAIN) & (labels >= 0))
        chosen = rows[stratified(labels[rows], fraction, seed=(config.split_seed, code))]
        if not len(chosen):
            raise ConfigError(
                f"--data {config.data}: {len(rows)} train images are too few to cut {name} from; "
                f"give two images of a class at least, or a {name} split"
            )
        splits[chosen] = code
    return splits


def stratified(labels: np.ndarray, fraction: float, seed: tuple[int, ...]) -> np.ndarray:
    """Boolean mask (N,) of round(N * fraction) rows, at least one, each class in proportion (largest remainder).

    One row of each class always stays out, so that fewer are chosen where most classes are tiny.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels)
    shares = counts * fraction
    take = np.floor(shares).astype(np.int64)
    room = np.maximum(counts - 1, 0)
    missing = max(1, round(len(labels) * fraction)) - int(take.sum())
    # Ties between equal remainders are drawn, or the first classes would always win.
    by_remainder = np.lexsort((rng.random(len(counts)), -(shares - take)))
    while missing > 0 and (take < room).any():
        best = by_remainder[(take < room)[by_remainder]][:missing]
        take[best] += 1
        missing -= len(best)
    shuffled = rng.permutation(len(labels))
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    place_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    mask = np.zeros(len(labels), dtype=bool)
    mask[grouped] = place_in_class < np.repeat(take, counts)
    return mask
