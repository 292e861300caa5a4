"""Every formula against SciPy, and the cases in which nothing can be said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from mnist_wandb.significance import (
    describe_sample,
    explained_variance,
    incomplete_beta,
    mcnemar_test,
    paired_test,
    rank_correlation,
    t_quantile,
    t_two_sided,
    welch_test,
)

POSITIVE = st.floats(0.05, 5000)
SCORES = st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(lambda v: len(set(v)) > 1)


@given(POSITIVE, POSITIVE, st.floats(0, 1))
def test_incomplete_beta_is_that_of_scipy(a: float, b: float, x: float) -> None:
    assert incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), abs=1e-10)


@pytest.mark.parametrize("degrees", [1, 2, 3.7, 10, 200, 1e5])
def test_student_t_is_that_of_scipy(degrees: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)
    for t in (0.0, 0.3, 2.0, 50.0):
        expected = 2 * stats.t.sf(t, degrees)
        assert t_two_sided(t, degrees) == pytest.approx(expected, rel=1e-8, abs=1e-300)
        assert t_two_sided(-t, degrees) == t_two_sided(t, degrees)


@given(SCORES)
def test_describe_sample_is_that_of_scipy(values: list[int]) -> None:
    sample = describe_sample(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert sample.std == pytest.approx(np.std(values, ddof=1))
    assert (sample.low, sample.high) == (pytest.approx(low), pytest.approx(high))
    assert (sample.n, sample.best) == (len(values), max(values))
    assert describe_sample(values, lower_is_better=True).best == min(values)


def test_one_value_has_no_interval() -> None:
    sample = describe_sample([0.5])
    assert (sample.n, sample.mean, sample.std, sample.low, sample.high) == (
        1,
        0.5,
        None,
        None,
        None,
    )


@given(SCORES, SCORES)
def test_welch_test_is_that_of_scipy(first: list[int], second: list[int]) -> None:
    expected = stats.ttest_ind(first, second, equal_var=False)
    test = welch_test(first, second)
    assert test is not None
    assert test.t == pytest.approx(expected.statistic, rel=1e-9, abs=1e-9)
    assert test.degrees == pytest.approx(expected.df)
    assert test.p_value == pytest.approx(expected.pvalue, rel=1e-7)
    interval = expected.confidence_interval()
    assert (test.low, test.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=2, max_size=12))
def test_paired_test_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    test = paired_test(first, second)
    if len({a - b for a, b in pairs}) == 1:
        assert test is None
        return
    expected = stats.ttest_rel(first, second)
    assert test is not None
    assert test.p_value == pytest.approx(expected.pvalue, rel=1e-7)
    interval = expected.confidence_interval()
    assert (test.low, test.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


@pytest.mark.parametrize(
    ("first", "second"), [([0.9], [0.8, 0.7]), ([0.9, 0.9], [0.8, 0.8]), ([0.1 + 0.2, 0.3], [1, 1])]
)
def test_no_spread_over_seeds_gives_no_test(first: list[float], second: list[float]) -> None:
    assert welch_test(first, second) is None
    assert paired_test(first[:1], second[:1]) is None


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_test_is_the_binomial_test_of_scipy(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_test(first, second) == pytest.approx(expected, rel=1e-8)


def test_mcnemar_test_of_many_images() -> None:
    expected = stats.binomtest(30_100, 59_100).pvalue
    assert mcnemar_test(30_100, 29_000) == pytest.approx(expected, rel=1e-7)
    assert mcnemar_test(3000, 0) == pytest.approx(0, abs=1e-300)


def test_explained_variance_is_one_for_a_group_that_tells_the_value_and_zero_for_noise() -> None:
    assert explained_variance([1, 1, 2, 2, 3, 3], "aabbcc") == 1
    assert explained_variance([1, 2, 1, 2], "aabb") == 0
    assert explained_variance([1, 2, 3], "abc") == 0  # one value each: nothing is left to compare
    assert explained_variance([5, 5, 5, 5], "aabb") == 0
    # Kelley 1935 by way of the one-way analysis of variance: (F - 1) / (F + within / between).
    values, groups = [1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 2.0, 4.0], "aaabbbcc"
    f = stats.f_oneway(values[:3], values[3:6], values[6:]).statistic
    assert explained_variance(values, groups) == pytest.approx((f - 1) / (f + 5 / 2))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = rank_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
    assert not math.isnan(found)
