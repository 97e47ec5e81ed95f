"""What runs that answered the same images say of their contenders, and which differences hold. NumPy and SciPy alone.

A contender has k runs, which differ in their seed, and each run is right or wrong on each of N test images. Its
accuracy would be another one with other seeds and with other images, so that there are two sources of variance
(Bouthillier 2021, arXiv 2103.03098; Dietterich 1998), which a table (k,N) of right and wrong tells apart, as a two-way
analysis of variance does (Searle, Casella and McCulloch 1992, Variance Components):

    a_r   accuracy of run r             s2_runs    variance of the a_r
    m_j   share of right runs, image j  s2_images  variance of the m_j
                                        s2_rest    variance of right - a_r - m_j + mean, over (k - 1)(N - 1)

    variance of the mean = s2_images / N  +  max(s2_runs - s2_rest / N, 0) / k

The second term is what seeds add: s2_runs alone has a part that comes from the finite set of images, s2_rest / N, which
the first term holds already.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from cifar.statistics import statistics

RESAMPLES = 4000
"""Of the bootstrap; a standard error from so many is known to 1.1 %."""
LEVEL = 0.95
MOST_SEEDS = 100
"""Beyond which a number of seeds is no advice."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One contender's answers."""

    correct: NDArray[np.bool_]
    """(k,N): whether run r is right on image j; of every contender the same images in the same order."""
    varies: bool = True
    """Whether another seed may give another run; False for a deterministic one, whose one run stands for all."""

    @property
    def runs(self) -> int:
        return self.correct.shape[0]

    @property
    def images(self) -> int:
        return self.correct.shape[1]

    @property
    def seeds_known(self) -> bool:
        """Whether the variance over seeds is known: from two runs on, or because there is none."""
        return self.runs > 1 or not self.varies

    @cached_property
    def accuracies(self) -> NDArray[np.float64]:
        """(k,)."""
        return self.correct.mean(1)

    @cached_property
    def by_image(self) -> NDArray[np.float64]:
        """(N,): the share of runs that are right."""
        return self.correct.mean(0)

    @cached_property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @cached_property
    def s2_runs(self) -> float:
        """Of the accuracies, 0 for one run."""
        return float(self.accuracies.var(ddof=1)) if self.runs > 1 else 0.0

    @cached_property
    def s2_rest(self) -> float:
        """Of a single answer, beside what its run and its image explain; 0 for one run."""
        if self.runs == 1:
            return 0.0
        rest = self.correct - self.accuracies[:, None] - self.by_image + self.mean
        return float((rest**2).sum() / ((self.runs - 1) * (self.images - 1)))

    @cached_property
    def seed_variance(self) -> float:
        """Of a run's accuracy over seeds, were there endless images: not below 0."""
        return max(self.s2_runs - self.s2_rest / self.images, 0.0)

    @cached_property
    def seed_effects(self) -> NDArray[np.float64]:
        """(k,): deviations of the runs, scaled so that the mean of k of them, drawn anew, has variance
        `seed_variance` / k.

        As they are, they would have a share (k - 1) / k of s2_runs (Rao and Wu 1988), in which images have their part
        (Davison and Hinkley 1997, section 3.8).
        """
        if self.runs == 1 or not self.s2_runs:
            return np.zeros(self.runs)
        scale = math.sqrt(self.seed_variance / self.s2_runs * self.runs / (self.runs - 1))
        return scale * (self.accuracies - self.mean)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One contender's accuracy, all shares in 0..1; what needs two runs is None of one."""

    mean: float
    """Over the runs."""
    n: int
    """Runs."""
    seeds_known: bool
    sd: float | None
    """Standard deviation over the runs, as observed on these images."""
    seed_interval: Interval | None
    """Of the mean over endless seeds on these very images: Student's t over the runs."""
    sampling_interval: Interval
    """Of the mean of these very runs over endless images: Wilson's."""
    interval: Interval
    """Of the mean over endless seeds and images; of the images alone where `seeds_known` is False."""
    seed_sd: float | None
    """What another seed changes: the root of the variance over seeds that is not explained by the finite images."""
    sampling_sd: float
    """What other images of the same number change for one run: binomial, sqrt(p (1 - p) / N)."""
    first: float
    """Share of the bootstrap's resamples in which this contender has the highest mean; ties are divided."""


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Two runs on the same images, by those that one of them alone has right (McNemar 1947)."""

    runs: tuple[int, int]
    """Which run of each contender."""
    only_first: int
    only_second: int
    exact: float
    """Two-sided binomial p."""
    mid: float
    """The same by mid-p, which Fagerland 2013 recommends: the exact test is conservative."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first contender's mean accuracy less the second's."""

    first: int
    second: int
    difference: float
    standard_error: float
    degrees: float
    """Of freedom, by Satterthwaite."""
    interval: Interval
    """95 %, of this pair by itself."""
    p: float
    p_holm: float
    """Corrected for the number of pairs."""
    same: bool
    """Whether all their runs are right on the very same images."""
    seeds_known: bool
    holds: bool
    """p_holm is below 5 %."""
    wins: float
    """Share of all pairs of one run of each in which the first's run is more accurate; a tie is half a win."""
    mcnemar: McNemar
    seeds_needed: int | None
    """Seeds of each with which a difference that does not hold would, if it and the variances stay as they are; None
    if it holds, if seeds alone would not do, or if their variance is unknown."""


def compare(
    samples: Sequence[Sample], typical: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[list[Score], list[Difference]]:
    """Every contender, and every pair of them in their order. `typical` is the run of each that McNemar's test takes.

    It tests two trained networks, not what trained them (Dietterich 1998), and its runs should be chosen without a look
    at the test images: `median_run` of the accuracies on val.
    """
    means = bootstrap(samples, resamples, seed)
    highest = means == means.max(1, keepdims=True)
    firsts = (highest / highest.sum(1, keepdims=True)).mean(0)
    errors = means.std(0, ddof=1)
    scores = [score(one, float(e), float(f)) for one, e, f in zip(samples, errors, firsts, strict=True)]
    pairs = list(combinations(range(len(samples)), 2))
    tested = [_test(samples[i], samples[j], float((means[:, i] - means[:, j]).std(ddof=1))) for i, j in pairs]
    corrected = holm([test[-1] for test in tested])
    differences = []
    for (i, j), (error, degrees, p), p_holm in zip(pairs, tested, corrected, strict=True):
        first, second = samples[i], samples[j]
        difference = first.mean - second.mean
        half = _t(degrees) * error
        known, holds = first.seeds_known and second.seeds_known, p_holm < 1 - LEVEL
        level = 1 - (1 - LEVEL) * (p / p_holm if p_holm else 1.0)
        needed = seeds_needed(first, second, level) if known and not holds else None
        differences.append(
            Difference(
                first=i,
                second=j,
                difference=difference,
                standard_error=error,
                degrees=degrees,
                interval=(max(difference - half, -1.0), min(difference + half, 1.0)),
                p=p,
                p_holm=p_holm,
                same=np.array_equal(first.correct, second.correct),
                seeds_known=known,
                holds=holds,
                wins=float(_wins(first, second)),
                mcnemar=mcnemar(first.correct[typical[i]], second.correct[typical[j]], (typical[i], typical[j])),
                seeds_needed=needed,
            )
        )
    return scores, differences


def bootstrap(samples: Sequence[Sample], resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """(resamples, contenders): means, had there been other images, for all contenders the same, and other seeds.

    Images are drawn anew, with all answers to each (Efron 1979); seeds by their `seed_effects`. To draw runs and images
    of the table themselves would count s2_rest three times (Owen 2007, the pigeonhole bootstrap).
    """
    generator = np.random.default_rng(seed)
    # Images on which all contenders do the same are one kind: to draw images is to draw how many there are of each.
    kinds, counts = np.unique(np.stack([sample.by_image for sample in samples], 1), axis=0, return_counts=True)
    total = counts.sum()
    means = generator.multinomial(total, counts / total, resamples) @ kinds / total
    for place, sample in enumerate(samples):
        drawn = generator.integers(sample.runs, size=(resamples, sample.runs))
        means[:, place] += sample.seed_effects[drawn].mean(1)
    return means


def score(sample: Sample, error: float, first: float) -> Score:
    """`error` is the standard error of the mean over seeds and images."""
    over_runs = statistics(sample.accuracies)
    p, n = sample.mean, sample.images
    sampling_error = math.sqrt(float(sample.by_image.var(ddof=1)) / n)
    seeds = over_runs["ci95"]
    return Score(
        mean=p,
        n=sample.runs,
        seeds_known=sample.seeds_known,
        sd=over_runs["sd"],
        seed_interval=seeds and (max(seeds[0], 0.0), min(seeds[1], 1.0)),
        sampling_interval=_wilson(sample, sampling_error, float(stats.norm.ppf((1 + LEVEL) / 2))),
        interval=_wilson(sample, error, _t(_degrees(error**2, [sample]))),
        seed_sd=math.sqrt(sample.seed_variance) if sample.runs > 1 else None if sample.varies else 0.0,
        sampling_sd=math.sqrt(p * (1 - p) / n),
        first=first,
    )


def median_run(accuracies: ArrayLike) -> int:
    """Place of the median, the lower one of an even number; the earliest of equals."""
    values = np.asarray(accuracies)
    return int(np.argsort(values, kind="stable")[(len(values) - 1) // 2])


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_], runs: tuple[int, int] = (0, 0)) -> McNemar:
    """Of right and wrong (N,) on the same images."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    fewer, all_of_one = min(only_first, only_second), only_first + only_second
    if not all_of_one:
        return McNemar(runs=runs, only_first=0, only_second=0, exact=1.0, mid=1.0)
    tail = float(stats.binom.cdf(fewer, all_of_one, 0.5))
    here = float(stats.binom.pmf(fewer, all_of_one, 0.5))
    as_far = here if only_first == only_second else 2 * here
    exact = min(2 * tail, 1.0)
    return McNemar(runs=runs, only_first=only_first, only_second=only_second, exact=exact, mid=exact - as_far / 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): those below a level are rejected with at most that chance of any false one."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = np.empty(len(p_values)), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min((len(order) - rank) * p_values[place], 1.0))
        adjusted[place] = highest
    return adjusted.tolist()


def seeds_needed(first: Sample, second: Sample, level: float = LEVEL) -> int | None:
    """Fewest runs of each, of those that vary, with which the difference would just be beyond its interval."""
    both, n = (first, second), first.images
    difference = abs(first.mean - second.mean)
    of_images = float((first.by_image - second.by_image).var(ddof=1))
    shared = max(of_images - sum(one.s2_rest / one.runs for one in both), 0.0) / n
    by_run = sum(one.seed_variance + one.s2_rest / n for one in both if one.varies)
    fewest = max(one.runs for one in both) + 1
    for runs in range(fewest, MOST_SEEDS + 1):
        degrees = (runs - 1) * sum(one.varies for one in both)
        if not degrees:
            return None
        if difference > stats.t.ppf((1 + level) / 2, degrees) * math.sqrt(shared + by_run / runs):
            return runs
    return None


def _test(first: Sample, second: Sample, error: float) -> tuple[float, float, float]:
    """Standard error of the difference, its degrees of freedom, and the two-sided p of no difference.

    Half an image more that the first alone has right, half a one that the second alone has, and one on which they agree
    keep the error from 0 where they agree on all (Agresti and Min 2005).
    """
    error = math.hypot(error, 1 / (first.images + 2))
    degrees = _degrees(error**2, [first, second])
    return error, degrees, float(2 * stats.t.sf(abs(first.mean - second.mean) / error, degrees))


def _degrees(variance: float, samples: Sequence[Sample]) -> float:
    """Satterthwaite's (1946) degrees of freedom of a variance of a mean or of a difference of two.

    With few seeds they are few: percentiles of the bootstrap, which are a normal distribution's, would be too narrow.
    """
    parts = [((one.s2_runs / one.runs) ** 2, one.runs - 1) for one in samples if one.runs > 1]
    of_images = max(variance - sum(one.seed_variance / one.runs for one in samples), 0.0)
    parts.append((of_images**2, samples[0].images - 1))
    total = sum(square / degrees for square, degrees in parts)
    return max(variance**2 / total, 1.0) if total else float(samples[0].images - 1)


def _t(degrees: float) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, degrees))


def _wilson(sample: Sample, error: float, z: float) -> Interval:
    """Wilson's interval (1927) of as many images as would give this standard error, as surveys have it (Korn and
    Graubard 1998). Unlike mean and error it stays within 0..1, and is no point where every answer is right."""
    p, n = sample.mean, float(sample.images)
    if 0 < p < 1:
        n = min(p * (1 - p) / error**2, n * sample.runs) if error else n * sample.runs
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _wins(first: Sample, second: Sample) -> float:
    ours, theirs = first.accuracies[:, None], second.accuracies
    return ((ours > theirs) + 0.5 * (ours == theirs)).mean()
