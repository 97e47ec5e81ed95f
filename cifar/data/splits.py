"""Stratified cuts of train into val and test."""

from collections.abc import Sequence

import numpy as np

from cifar.config import ConfigError, DataConfig

TRAIN, VAL, TEST = 0, 1, 2
_NAMED_CLASSES = 5


def cut_missing(splits: np.ndarray, labels: np.ndarray, config: DataConfig, classes: Sequence[str]) -> np.ndarray:
    """`splits` (codes, int8 (N,)) with val and test cut from train where the source has none.

    Only rows with a label (>= 0), a place in `classes`, move. Test is cut first; val is a share of what is left. Each
    gets an image of each class that train has; ConfigError if a class is too small for that.
    """
    splits = splits.copy()
    cuts = ((TEST, "test", config.test_fraction), (VAL, "val", config.val_fraction))
    cuts = [cut for cut in cuts if not (splits == cut[0]).any()]
    counts = np.bincount(labels[(splits == TRAIN) & (labels >= 0)])
    _check_sizes(counts, [name for _, name, _ in reversed(cuts)], config, classes)
    for number, (code, _, fraction) in enumerate(cuts, 1):
        rows = np.flatnonzero((splits == TRAIN) & (labels >= 0))
        # An image of each class for train and for each cut that is still to come.
        stay = 1 + len(cuts) - number
        splits[rows[stratified(labels[rows], fraction, seed=(config.split_seed, code), stay=stay)]] = code
    return splits


def _check_sizes(counts: np.ndarray, cuts: list[str], config: DataConfig, classes: Sequence[str]) -> None:
    needed = 1 + len(cuts)
    small = np.flatnonzero((counts > 0) & (counts < needed))
    if not len(small):
        return
    named = ", ".join(f"{classes[label]} ({counts[label]})" for label in small[:_NAMED_CLASSES])
    more = f" and {len(small) - _NAMED_CLASSES} more" if len(small) > _NAMED_CLASSES else ""
    raise ConfigError(
        f"--data {config.data}: classes of too few images: {named}{more}; each needs {needed} that can be read, one "
        f"for each of {', '.join(['train', *cuts])}; add images, leave the class out, or bring a "
        f"{' and a '.join(cuts)} split"
    )


def stratified(labels: np.ndarray, fraction: float, seed: tuple[int, ...], stay: int = 1) -> np.ndarray:
    """Boolean mask (N,) of round(N * fraction) rows, each class in proportion (largest remainder).

    At least one row of each class is chosen and at least `stay` are not, so that more or fewer are chosen where most
    classes are tiny; a class that has not enough for both keeps its rows.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels)
    shares = counts * fraction
    room = np.maximum(counts - stay, 0)
    take = np.clip(np.floor(shares).astype(np.int64), np.minimum(1, room), room)
    missing = round(len(labels) * fraction) - int(take.sum())
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
