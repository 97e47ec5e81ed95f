"""What several runs say together."""

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t


def statistics(values: Iterable[float]) -> dict[str, Any]:
    """`mean`, `n`, and from two values on `sd`, `standard_error` and `ci95`, Student's t interval of the mean."""
    sample: Sequence[float] = list(values)
    n, mean = len(sample), fmean(sample)
    if n == 1:
        return {"mean": mean, "n": 1, "sd": None, "standard_error": None, "ci95": None}
    sd = stdev(sample)
    standard_error = sd / n**0.5
    half = float(t.ppf(0.975, n - 1)) * standard_error
    return {"mean": mean, "n": n, "sd": sd, "standard_error": standard_error, "ci95": [mean - half, mean + half]}
