"""The statistics of a comparison, against references, enumeration, and worlds whose truth is known."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from cifar.compare.statistics import (
    Sample,
    bootstrap,
    compare,
    holm,
    mcnemar,
    median_run,
    score,
    seeds_needed,
)


def world(
    generator: np.random.Generator, levels: Sequence[float], runs: int, images: int, seed_sd: float, image_sd: float
) -> list[Sample]:
    """Contenders that are right where level + seed + image + noise > 0, all normal, the images the same for all."""
    shared = generator.normal(0, image_sd, images)
    samples = []
    for level in levels:
        seeds = generator.normal(0, seed_sd, (runs, 1))
        samples.append(Sample(correct=level + seeds + shared + generator.normal(0, 1, (runs, images)) > 0))
    return samples


def truth(level: float, seed_sd: float, image_sd: float) -> float:
    """Accuracy over endless seeds and images."""
    return float(stats.norm.cdf(level / np.sqrt(1 + seed_sd**2 + image_sd**2)))


def sample(*rows: Sequence[int], varies: bool = True) -> Sample:
    return Sample(correct=np.array(rows, bool), varies=varies)


def test_variance_over_seeds_is_what_the_images_do_not_explain() -> None:
    """With many seeds and images it comes out; of seeds that change nothing, only noise is left."""
    generator = np.random.default_rng(0)
    (one,) = world(generator, [0.5], 200, 2000, seed_sd=0.2, image_sd=1.0)
    by_seed = stats.norm.cdf((0.5 + generator.normal(0, 0.2, 100_000)) / np.sqrt(2))
    assert one.seed_variance == pytest.approx(by_seed.var(), rel=0.15)
    (same,) = world(generator, [0.5], 200, 2000, seed_sd=0.0, image_sd=1.0)
    assert same.s2_runs == pytest.approx(same.s2_rest / 2000, rel=0.3)
    assert same.seed_variance < 0.05 * one.seed_variance


def test_the_table_adds_up() -> None:
    """s2_rest is the residual mean square of a two-way analysis of variance without replication."""
    table = sample([1, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 1]).correct.astype(float)
    total = ((table - table.mean()) ** 2).sum()
    rows = 4 * ((table.mean(1) - table.mean()) ** 2).sum()
    columns = 3 * ((table.mean(0) - table.mean()) ** 2).sum()
    one = Sample(correct=table.astype(bool))
    assert one.s2_rest == pytest.approx((total - rows - columns) / (2 * 3))


def test_the_bootstrap_has_the_variance_of_the_analysis() -> None:
    generator = np.random.default_rng(1)
    first, second = world(generator, [0.6, 0.8], 3, 500, seed_sd=0.1, image_sd=1.5)
    means = bootstrap([first, second], 20_000)
    for place, one in enumerate((first, second)):
        expected = one.by_image.var(ddof=0) / one.images + one.seed_variance / one.runs
        assert means[:, place].var() == pytest.approx(expected, rel=0.04)
        assert means[:, place].mean() == pytest.approx(one.mean, abs=4 * np.sqrt(expected / 20_000))
    paired = (first.by_image - second.by_image).var() / 500 + (first.seed_variance + second.seed_variance) / 3
    assert (means[:, 0] - means[:, 1]).var() == pytest.approx(paired, rel=0.04), "on the same images"


def test_the_same_seed_gives_the_same_numbers() -> None:
    samples = world(np.random.default_rng(2), [0.6, 0.8, 0.7], 3, 100, 0.1, 1.0)
    assert compare(samples, [0, 1, 2], 200) == compare(samples, [0, 1, 2], 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "seed_sd", "image_sd"), [(3, 0.0, 2.0), (3, 0.05, 2.0), (3, 0.3, 1.0), (5, 0.3, 1.0), (1, 0.0, 2.0)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(runs: int, seed_sd: float, image_sd: float) -> None:
    """Whether images or seeds dominate; with few seeds they are rather too wide. 92 % of 300 is 2.4 errors below 95."""
    generator, worlds = np.random.default_rng(3), 300
    levels = (1.0, 1.1)
    true = [truth(level, seed_sd, image_sd) for level in levels]
    alone = together = by_images = 0
    for number in range(worlds):
        samples = world(generator, levels, runs, 300, seed_sd, image_sd)
        scores, (difference,) = compare(samples, [0, 0], 200, number)
        alone += scores[0].interval[0] <= true[0] <= scores[0].interval[1]
        together += difference.interval[0] <= true[0] - true[1] <= difference.interval[1]
        by_images += scores[0].sampling_interval[0] <= true[0] <= scores[0].sampling_interval[1]
    assert together / worlds >= 0.92
    assert alone / worlds >= (0.92 if seed_sd < 0.3 else 0.89)
    if seed_sd == 0.3:
        assert by_images / worlds < 0.8, "images alone are not the whole of it"


@pytest.mark.slow
@pytest.mark.parametrize(("seed_sd", "image_sd"), [(0.0, 2.0), (0.3, 1.0)])
def test_equal_contenders_are_seldom_told_apart(seed_sd: float, image_sd: float) -> None:
    """Any false verdict among ten pairs in about 5 % of the worlds at most; without Holm's correction in far more."""
    generator, worlds, found, uncorrected = np.random.default_rng(4), 150, 0, 0
    for number in range(worlds):
        _, differences = compare(world(generator, [1.0] * 5, 3, 300, seed_sd, image_sd), [0] * 5, 200, number)
        found += any(difference.holds for difference in differences)
        uncorrected += any(difference.p < 0.05 for difference in differences)
    assert found / worlds <= 0.09
    assert uncorrected > found


def test_a_clear_difference_holds_and_is_the_same_the_other_way_round() -> None:
    samples = world(np.random.default_rng(5), [0.2, 1.2], 3, 1000, 0.05, 1.0)
    scores, (there,) = compare(samples, [0, 0])
    _, (back,) = compare(samples[::-1], [0, 0])
    assert there.holds
    assert back.holds
    assert there.difference == -back.difference
    assert there.wins == 0.0
    assert back.wins == 1.0
    assert [one.first for one in scores] == [0.0, 1.0]
    assert there.seeds_needed is None


def test_the_same_answers_are_no_difference() -> None:
    """Not even an interval of no width, which would say that nobody can ever tell."""
    rows = [1, 0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0, 1, 1]
    scores, (difference,) = compare([sample(*rows), sample(*rows)], [0, 0])
    assert difference.difference == 0
    assert difference.same
    assert not difference.holds
    assert difference.interval[0] < 0 < difference.interval[1]
    assert difference.mcnemar.exact == difference.mcnemar.mid == 1
    assert difference.wins == 0.5
    assert scores[0].first == scores[1].first == 0.5


def test_all_answers_right_leave_room_for_wrong_ones() -> None:
    (one,), _ = compare([sample([1] * 50, [1] * 50, [1] * 50)], [0])
    low, high = one.interval
    assert (one.mean, high, one.sd, one.seed_sd) == (1.0, pytest.approx(1.0), 0.0, 0.0)
    assert 0.85 < low < 0.97
    assert one.sampling_interval == pytest.approx(
        tuple(stats.binomtest(50, 50).proportion_ci(method="wilson")), abs=1e-6
    )


@pytest.mark.parametrize("right", [3, 20, 57])
def test_the_interval_of_one_run_is_wilsons(right: int) -> None:
    (one,), _ = compare([sample([1] * right + [0] * (60 - right))], [0])
    reference = stats.binomtest(right, 60).proportion_ci(method="wilson")
    assert one.sampling_interval == pytest.approx((reference.low, reference.high), abs=2e-3)
    assert one.sampling_sd == pytest.approx(np.sqrt(right / 60 * (1 - right / 60) / 60))


def test_the_interval_over_seeds_is_students() -> None:
    (one,) = world(np.random.default_rng(6), [0.7], 4, 200, 0.2, 1.0)
    reference = stats.ttest_1samp(one.accuracies, 0).confidence_interval(0.95)
    found = score(one, 0.01, 1.0)
    assert found.seed_interval == pytest.approx((reference.low, reference.high))
    assert found.sd == pytest.approx(one.accuracies.std(ddof=1))


def test_one_seed_tells_nothing_of_seeds_and_a_method_without_chance_needs_no_more() -> None:
    generator = np.random.default_rng(7)
    first, second = world(generator, [0.2, 1.2], 1, 2000, 0.0, 1.0)
    scores, (difference,) = compare([first, second], [0, 0])
    assert difference.holds
    assert not difference.seeds_known
    assert not scores[0].seeds_known
    assert (scores[0].sd, scores[0].seed_sd, scores[0].seed_interval, difference.seeds_needed) == (None,) * 4
    fixed = [Sample(correct=one.correct, varies=False) for one in (first, second)]
    scores, (difference,) = compare(fixed, [0, 0])
    assert difference.holds
    assert difference.seeds_known
    assert scores[0].seed_sd == 0.0


def test_few_seeds_have_few_degrees_of_freedom() -> None:
    """Where seeds make the variance, three of each have about four; where images make it, there are hundreds."""
    generator = np.random.default_rng(8)
    _, (seeds,) = compare(world(generator, [1.0, 1.0], 3, 1000, 0.5, 0.5), [0, 0])
    assert 2 <= seeds.degrees <= 4.5
    generator = np.random.default_rng(8)
    first, second = world(generator, [1.0, 1.0], 1, 1000, 0.0, 1.0)
    _, (images,) = compare([first, second], [0, 0])
    assert images.degrees > 900


@pytest.mark.parametrize(("first", "second"), [(5, 15), (15, 5), (0, 7), (8, 8), (0, 0), (31, 52)])
def test_mcnemar_is_the_binomial_test_of_those_that_differ(first: int, second: int) -> None:
    right = np.array([True] * (first + 10) + [False] * (second + 10))
    other = np.array([False] * first + [True] * (10 + second) + [False] * 10)
    found = mcnemar(right, other, (1, 2))
    assert (found.only_first, found.only_second, found.runs) == (first, second, (1, 2))
    total = first + second
    reference = stats.binomtest(first, total).pvalue if total else 1.0
    assert found.exact == pytest.approx(reference)
    # By definition: outcomes further from the half count whole, those as far by a half.
    weights = stats.binom.pmf(np.arange(total + 1), total, 0.5)
    far, own = np.abs(np.arange(total + 1) - total / 2), abs(first - total / 2)
    assert found.mid == pytest.approx(weights[far > own].sum() + weights[far == own].sum() / 2 if total else 1.0)


def closed_testing(p_values: Sequence[float]) -> list[float]:
    """A hypothesis is rejected if every set that it is in is, by Bonferroni: what Holm's steps are a short cut for."""
    numbers = range(len(p_values))
    sets = [chosen for size in range(1, len(p_values) + 1) for chosen in combinations(numbers, size)]
    local = {chosen: min(len(chosen) * min(p_values[one] for one in chosen), 1.0) for chosen in sets}
    return [max(p for chosen, p in local.items() if number in chosen) for number in numbers]


def test_holm_is_closed_testing() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    generator = np.random.default_rng(9)
    for count in (1, 2, 5, 8):
        p_values = generator.beta(0.5, 2, count).tolist()
        assert holm(p_values) == pytest.approx(closed_testing(p_values))
    assert holm([0.2, 0.2, 0.0]) == pytest.approx([0.4, 0.4, 0.0])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("values", "place"), [([0.9], 0), ([0.9, 0.8], 1), ([0.7, 0.9, 0.8], 2), ([0.8, 0.8, 0.8], 1), ([4, 3, 2, 1], 2)]
)
def test_the_typical_run_is_the_median(values: list[float], place: int) -> None:
    assert median_run(values) == place


@pytest.mark.slow
def test_as_many_seeds_are_advised_as_it_takes() -> None:
    """With so many a difference is found several times as often as with the three that gave the advice."""
    generator = np.random.default_rng(10)
    levels, seed_sd, image_sd, images = (0.5, 0.7), 0.2, 1.0, 1000

    def worlds(runs: int) -> list[list[Sample]]:
        return [world(generator, levels, runs, images, seed_sd, image_sd) for _ in range(300)]

    def found(runs: int) -> float:
        return float(np.mean([compare(samples, [0, 0], 200)[1][0].holds for samples in worlds(runs)]))

    advice = [advised for first, second in worlds(3) if (advised := seeds_needed(first, second))]
    usual = int(np.median(advice))
    assert 5 <= usual <= 12
    few, advised_many, twice = found(3), found(usual), found(2 * usual)
    assert few < 0.2
    assert max(2 * few, 0.2) < advised_many < 0.7
    assert twice > max(advised_many + 0.1, 0.5)


def test_more_seeds_are_not_advised_where_images_are_missing() -> None:
    generator = np.random.default_rng(11)
    first, second = world(generator, [0.5, 0.52], 3, 200, 0.0, 0.0)
    identical = Sample(correct=first.correct.copy())
    assert seeds_needed(first, identical) is None
    ours, theirs = (Sample(correct=one.correct[:1], varies=False) for one in (first, second))
    assert seeds_needed(ours, theirs) is None
