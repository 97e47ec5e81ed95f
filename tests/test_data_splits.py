"""Stratified cuts are exact, deterministic, in proportion, and leave every class in train."""

import numpy as np
import pytest

from cifar.config import ConfigError, DataConfig
from cifar.data.splits import TEST, TRAIN, VAL, cut_missing, stratified

LABELS = np.random.default_rng(0).choice(5, size=1003, p=[0.5, 0.3, 0.1, 0.09, 0.01])


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.2, 0.5, 0.9])
def test_exact_size_and_proportion(fraction: float):
    chosen = stratified(LABELS, fraction, (0,))
    assert chosen.sum() == max(1, round(1003 * fraction))
    shares = np.bincount(LABELS[chosen], minlength=5) - np.bincount(LABELS) * fraction
    assert np.abs(shares).max() < 1


def test_deterministic_by_seed():
    one, again, other = (stratified(LABELS, 0.1, (seed,)) for seed in (3, 3, 4))
    assert (one == again).all()
    assert (one != other).any()


def test_every_row_can_be_chosen():
    chosen = sum(stratified(LABELS, 0.5, (seed,)).astype(int) for seed in range(40))
    assert np.all(chosen > 0)


def test_remainders_of_equal_classes_are_drawn():
    """100 classes of 5 rows at 10 %: 50 classes give one row each, and not always the first ones."""
    labels = np.repeat(np.arange(100), 5)
    chosen = labels[stratified(labels, 0.1, (0,))]
    assert len(chosen) == len(set(chosen)) == 50
    assert chosen.max() > 60


def test_train_keeps_one_of_each_class():
    labels = np.array([0, 1, 1, 2, 2, 2, 4])
    chosen = stratified(labels, 0.9, (0,))
    assert np.bincount(labels[~chosen]).tolist() == [1, 1, 1, 0, 1]


def test_cut_is_complete_and_moves_labelled_train_rows_only():
    labels = np.array([0, 1] * 50 + [-1] * 10)
    given = np.zeros(110, np.int8)
    splits = cut_missing(given, labels, DataConfig(test_fraction=0.2, val_fraction=0.25))
    assert [(splits == code).sum() for code in (TRAIN, VAL, TEST)] == [70, 20, 20]
    assert (splits[100:] == TRAIN).all()
    assert (given == 0).all()


def test_given_splits_stay():
    labels, given = np.array([0, 1] * 50), np.zeros(100, np.int8)
    given[:30], given[30:60] = VAL, TEST
    np.testing.assert_array_equal(cut_missing(given, labels, DataConfig()), given)


def test_too_few_rows_are_an_error():
    with pytest.raises(ConfigError, match="too few to cut test"):
        cut_missing(np.zeros(2, np.int8), np.array([0, 1]), DataConfig())
