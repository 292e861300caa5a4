"""Statistics of few numbers: means with intervals, and whether a difference is more than noise.

Pure Python; the tests check every function against SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Confidence of every interval; a difference is called real where p < 1 - LEVEL."""
ALPHA = 1 - LEVEL

_TINY = 1e-300
_PRECISION = 1e-15
_MAX_TERMS = 100_000  # about sqrt(max(a, b)) are needed


@dataclass(frozen=True)
class Sample:
    """What is known of a mean from n measured values.

    Attributes:
        n: number of values.
        mean: their mean.
        std: standard deviation with n - 1 in the denominator; None for one value.
        low, high: 95 % interval of the mean; None for one value.
        best: the best value.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None
    best: float


@dataclass(frozen=True)
class MeanTest:
    """A t-test of two means.

    Attributes:
        method: "paired t-test" or "Welch's t-test".
        difference: mean of the first sample minus that of the second.
        low, high: 95 % interval of the difference.
        t, degrees: statistic and degrees of freedom.
        p_value: two-sided.
    """

    method: str
    difference: float
    low: float
    high: float
    t: float
    degrees: float
    p_value: float


def describe_sample(values: Sequence[float], *, lower_is_better: bool = False) -> Sample:
    """Mean, standard deviation and 95 % interval of the mean.

    Args:
        values: at least one number.
        lower_is_better: whether the best value is the smallest one.

    Source: Student 1908; the interval is mean ± t(0.975, n - 1) · std / sqrt(n).
    """
    n, mean = len(values), math.fsum(values) / len(values)
    best = min(values) if lower_is_better else max(values)
    if n < 2:
        return Sample(n, mean, None, None, None, best)
    std = math.sqrt(_variance(values))
    half = t_quantile(0.5 + LEVEL / 2, n - 1) * std / math.sqrt(n)
    return Sample(n, mean, std, mean - half, mean + half, best)


def welch_test(first: Sequence[float], second: Sequence[float]) -> MeanTest | None:
    """Whether two independent samples have different means; their spreads may differ.

    Returns:
        The test, or None where it says nothing: fewer than two values, or no spread at all.

    Source: Welch 1947, with the degrees of freedom of Satterthwaite 1946.
    """
    if min(len(first), len(second)) < 2:
        return None
    shares = [_variance(values) / len(values) for values in (first, second)]
    squared_error = math.fsum(shares)
    difference = math.fsum(first) / len(first) - math.fsum(second) / len(second)
    if _no_spread(squared_error, (*first, *second)):
        return None
    bottom = sum(s**2 / (len(v) - 1) for s, v in zip(shares, (first, second), strict=True))
    degrees = squared_error**2 / bottom
    return _mean_test("Welch's t-test", difference, math.sqrt(squared_error), degrees)


def paired_test(first: Sequence[float], second: Sequence[float]) -> MeanTest | None:
    """Whether the differences of pairs have a mean other than zero.

    Args:
        first: N values.
        second: N values; those at one position belong together.

    Returns:
        The test, or None where it says nothing: fewer than two pairs, or equal differences.

    Source: Student 1908.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    if n < 2:
        return None
    squared_error = _variance(differences) / n
    if _no_spread(squared_error, (*first, *second)):
        return None
    mean = math.fsum(differences) / n
    return _mean_test("paired t-test", mean, math.sqrt(squared_error), n - 1)


def mcnemar_test(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test on two classifiers' answers to the same images.

    Args:
        only_first: images that only the first one got right.
        only_second: images that only the second one got right.

    Returns:
        The probability of a split at least as uneven if both were equally good.

    Source: McNemar 1947; Dietterich 1998, "Approximate Statistical Tests for Comparing Supervised
        Classification Learning Algorithms". Exact: a two-sided binomial test with probability 1/2.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    if 2 * k == n:
        return 1.0
    # P(X <= k) of a binomial variable, as an incomplete beta function (DLMF 8.17.5).
    return min(1.0, 2 * incomplete_beta(n - k, k + 1, 0.5))


def explained_variance(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Share of the variance of values that their groups explain, corrected for chance.

    Args:
        values: N numbers.
        groups: the group of each.

    Returns:
        Epsilon squared, cut off at 0; 1 where the group tells the value.

    Source: Kelley 1935, "An Unbiased Correlation Ratio Measure".
    """
    n, members = len(values), _gather(values, groups)
    degrees = n - len(members)
    total = _variance(values) if n > 1 else 0.0
    if degrees < 1 or len(members) < 2 or _no_spread(total, values):
        return 0.0
    within = math.fsum(_variance(m) * (len(m) - 1) for m in members if len(m) > 1) / degrees
    return max(0.0, 1 - within / total)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation in [-1, 1]; 0 where one of the two does not vary.

    Source: Spearman 1904; equal values share their mean rank.
    """
    ranks = _ranks(first), _ranks(second)
    middle = (len(first) + 1) / 2
    products = [
        math.fsum((a - middle) * (b - middle) for a, b in zip(x, y, strict=True))
        for x, y in (ranks, (ranks[0], ranks[0]), (ranks[1], ranks[1]))
    ]
    bottom = math.sqrt(products[1] * products[2])
    return products[0] / bottom if bottom else 0.0


# ── distributions ────────────────────────────────────────────────────────────────────────────


def t_two_sided(t: float, degrees: float) -> float:
    """Probability that Student's t is at least as far from zero as `t`.

    Source: DLMF 8.17; p = I(degrees / (degrees + t²); degrees / 2, 1/2).
    """
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def t_quantile(probability: float, degrees: float) -> float:
    """The value that Student's t stays below with a probability in (0.5, 1); by bisection."""
    tail = 2 * (1 - probability)
    low, high = 0.0, 1.0
    while t_two_sided(high, degrees) > tail:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if t_two_sided(middle, degrees) > tail:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I(x; a, b), for a, b > 0 and x in [0, 1].

    Source: continued fraction DLMF 8.17.22, evaluated as in Lentz 1976.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - incomplete_beta(b, a, 1 - x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a
    value, c, d = 1.0, 1.0, 0.0
    for term in range(_MAX_TERMS):
        half = term // 2
        if term == 0:
            numerator = 1.0
        elif term % 2 == 0:
            numerator = half * (b - half) * x / ((a + term - 1) * (a + term))
        else:
            numerator = -(a + half) * (a + b + half) * x / ((a + term - 1) * (a + term))
        d = 1 / _away_from_zero(1 + numerator * d)
        c = _away_from_zero(1 + numerator / c)
        value *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
    return front * (value - 1)


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


# ── small parts ──────────────────────────────────────────────────────────────────────────────


def _mean_test(method: str, difference: float, error: float, degrees: float) -> MeanTest:
    half = t_quantile(0.5 + LEVEL / 2, degrees) * error
    t = difference / error
    low, high = difference - half, difference + half
    return MeanTest(method, difference, low, high, t, degrees, t_two_sided(t, degrees))


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _no_spread(variance: float, values: Sequence[float]) -> bool:
    """Whether a variance is nothing but rounding."""
    return variance <= (1e-12 * max(map(abs, values), default=0.0)) ** 2


def _gather(values: Sequence[float], groups: Sequence[Hashable]) -> list[list[float]]:
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    return list(members.values())


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(values)
    first: dict[float, int] = {}
    last: dict[float, int] = {}
    for rank, value in enumerate(order, start=1):
        first.setdefault(value, rank)
        last[value] = rank
    return [(first[value] + last[value]) / 2 for value in values]
