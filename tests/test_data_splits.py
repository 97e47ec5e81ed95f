"""Stratified cuts are exact, deterministic, in proportion, and leave every class in train."""

from dataclasses import replace

import numpy as np
import pytest

from cifar.config import ConfigError, DataConfig
from cifar.data.splits import TEST, TRAIN, VAL, cut_missing, stratified

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
LABELS = np.random.default_rng(0).choice(5, size=1003, p=[0.5, 0.3, 0.1, 0.09, 0.01])


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.9])
def test_exact_size_and_proportion(fraction: float):
    chosen = stratified(LABELS, fraction, (0,))
    assert chosen.sum() == round(1003 * fraction)
    shares = np.bincount(LABELS[chosen], minlength=5) - np.bincount(LABELS) * fraction
    assert np.abs(shares).max() < 1


def test_no_class_is_left_without_a_row():
    """Though the share of all is one row."""
    assert np.bincount(LABELS[stratified(LABELS, 0.001, (0,))]).tolist() == [1] * 5


def test_deterministic_by_seed():
    one, again, other = (stratified(LABELS, 0.1, (seed,)) for seed in (3, 3, 4))
    assert (one == again).all()
    assert (one != other).any()


def test_every_row_can_be_chosen():
    chosen = sum(stratified(LABELS, 0.5, (seed,)).astype(int) for seed in range(40))
    assert np.all(chosen > 0)


def test_remainders_of_equal_classes_are_drawn():
    """100 classes of 15 rows at 10 %: 50 classes give a second row, and not always the first ones."""
    labels = np.repeat(np.arange(100), 15)
    taken = np.bincount(labels[stratified(labels, 0.1, (0,))])
    assert sorted(taken) == [1] * 50 + [2] * 50
    assert np.flatnonzero(taken == 2).max() > 60


def test_so_many_of_each_class_stay():
    labels = np.array([0, 1, 1, 2, 2, 2, 4])
    chosen = stratified(labels, 0.9, (0,))
    assert np.bincount(labels[~chosen]).tolist() == [1, 1, 1, 0, 1]
    chosen = stratified(labels, 0.9, (0,), stay=2)
    assert np.bincount(labels[~chosen]).tolist() == [1, 2, 2, 0, 1]


def test_cut_is_complete_and_moves_labelled_train_rows_only():
    labels = np.array([0, 1] * 50 + [-1] * 10)
    given = np.zeros(110, np.int8)
    splits = cut_missing(given, labels, DataConfig(test_fraction=0.2, val_fraction=0.25), NAMES)
    assert [(splits == code).sum() for code in (TRAIN, VAL, TEST)] == [70, 20, 20]
    assert (splits[100:] == TRAIN).all()
    assert (given == 0).all()


def test_given_splits_stay():
    labels, given = np.array([0, 1] * 50), np.zeros(100, np.int8)
    given[:30], given[30:60] = VAL, TEST
    np.testing.assert_array_equal(cut_missing(given, labels, DataConfig(), NAMES), given)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_every_class_of_three_rows_and_more_is_in_every_split(fraction: float):
    counts = [400, 120, 10, 4, 3]
    labels = np.repeat(np.arange(5), counts)
    config = DataConfig(test_fraction=fraction, val_fraction=fraction)
    for seed in range(5):
        splits = cut_missing(np.zeros(len(labels), np.int8), labels, replace(config, split_seed=seed), NAMES)
        of_each = np.array([np.bincount(labels[splits == code], minlength=5) for code in (TRAIN, VAL, TEST)])
        assert of_each.min() >= 1
        assert of_each[:, 4].tolist() == [1, 1, 1]
        assert of_each[2, 0] == pytest.approx(400 * fraction, abs=5)


@pytest.mark.parametrize(
    ("counts", "given", "named"),
    [
        (
            [20, 2, 1],
            [],
            r"beta \(2\), gamma \(1\); each needs 3 .*, one for each of train, val, test;.*a val and a test split",
        ),
        ([20, 3, 1], [TEST], r": gamma \(1\); each needs 2 .*, one for each of train, val;.* bring a val split"),
        ([1] * 8, [], r"epsilon \(1\) and 3 more;"),
    ],
)
def test_a_class_too_small_for_the_cuts_is_named_with_the_remedy(counts: list[int], given: list[int], named: str):
    labels = np.repeat(np.arange(len(counts)), counts)
    splits = np.zeros(len(labels) + len(given), np.int8)
    splits[len(labels) :] = given
    with pytest.raises(ConfigError, match=named):
        cut_missing(splits, np.append(labels, np.zeros(len(given), int)), DataConfig(), NAMES)


def test_a_class_too_small_for_cuts_does_where_nothing_is_cut():
    labels = np.array([0, 0, 0, 1, 0, 1, 0])
    given = np.array([0, 0, 0, 0, VAL, VAL, TEST], np.int8)
    np.testing.assert_array_equal(cut_missing(given, labels, DataConfig(), NAMES), given)
