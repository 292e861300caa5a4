"""Every distribution of a sweep file against W&B's own engine, SciPy and its definition."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mnist_wandb.distributions import (
    EDGE,
    GRID_KINDS,
    KINDS,
    beta_cdf,
    beta_quantile,
    find_problems,
    infer_kind,
    make_distribution,
)

with warnings.catch_warnings(action="ignore"):  # it is written for an older pydantic
    from sweeps.params import HyperParameter

EXAMPLES: dict[str, dict[str, Any]] = {
    "constant": {"value": [1, "a"]},
    "categorical": {"values": ["a", None, 3]},
    "int_uniform": {"min": -2, "max": 5},
    "uniform": {"min": -1.5, "max": 2.5},
    "q_uniform": {"min": 0.0, "max": 10.0, "q": 0.5},
    "log_uniform": {"min": -7.0, "max": 0.0},
    "log_uniform_values": {"min": 1e-5, "max": 0.1},
    "q_log_uniform": {"min": 0.0, "max": 5.0, "q": 2},
    "q_log_uniform_values": {"min": 1.0, "max": 300.0, "q": 4},
    "inv_log_uniform": {"min": 1.0, "max": 3.0},
    "inv_log_uniform_values": {"min": 0.01, "max": 10.0},
    "normal": {"mu": 3.0, "sigma": 2.0},
    "q_normal": {"mu": 3.0, "sigma": 2.0, "q": 0.25},
    "log_normal": {"mu": -3.0, "sigma": 0.5},
    "q_log_normal": {"mu": 2.0, "sigma": 0.5, "q": 1},
    "beta": {"a": 2.0, "b": 5.0},
    "q_beta": {"a": 0.5, "b": 0.5, "q": 0.1},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
QUANTILES = [0.001, 0.05, 0.123, 0.333, 0.5, 0.6123, 0.75, 0.95, 0.999]


def draws(kind: str, count: int = 20_000, **fields: Any) -> list[Any]:
    distribution = make_distribution(kind, fields or EXAMPLES[kind])
    rng = random.Random(0)
    return [distribution.at(rng.uniform(EDGE, 1 - EDGE)) for _ in range(count)]


def test_there_is_an_example_of_every_distribution() -> None:
    assert set(EXAMPLES) == set(KINDS)


@every_kind
def test_every_quantile_is_that_of_the_engine_of_wandb(kind: str) -> None:
    fields = EXAMPLES[kind]
    reference = HyperParameter("x", {"distribution": kind, **fields})
    distribution = make_distribution(kind, fields)
    for u in QUANTILES:
        expected, got = reference.ppf(u), distribution.at(u)
        if kind in ("constant", "categorical"):
            assert got == expected
        else:
            assert got == pytest.approx(float(expected), rel=1e-9, abs=1e-12), u
            assert isinstance(got, int) == (kind == "int_uniform" or fields.get("q") in (1, 2, 4))


@every_kind
def test_defaults_are_those_of_the_engine_of_wandb(kind: str) -> None:
    required = {name: EXAMPLES[kind][name] for name in KINDS[kind].required}
    reference = HyperParameter("x", {"distribution": kind, **required}).config
    assert {**reference, "distribution": kind} == {
        "distribution": kind,
        **make_distribution(kind, required).fields,
    }


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"value": 1}, "constant"),
        ({"values": [1]}, "categorical"),
        ({"values": [1, 2], "probabilities": [0.5, 0.5]}, "categorical"),
        ({"min": 1, "max": 3}, "int_uniform"),
        ({"min": 1, "max": 3.0}, "uniform"),
        ({"min": 1.0, "max": 3}, "uniform"),
    ],
)
def test_the_distribution_is_inferred_as_wandb_does(fields: dict[str, Any], kind: str) -> None:
    assert infer_kind(fields) == kind
    names = {
        HyperParameter.CONSTANT: "constant",
        HyperParameter.CATEGORICAL: "categorical",
        HyperParameter.CATEGORICAL_PROB: "categorical",
        HyperParameter.INT_UNIFORM: "int_uniform",
        HyperParameter.UNIFORM: "uniform",
    }
    assert names[HyperParameter("x", fields).type] == kind


def test_probabilities_are_kept() -> None:
    values = draws("categorical", values=["a", "b", "c"], probabilities=[0.2, 0.0, 0.8])
    assert "b" not in values
    assert values.count("a") / len(values) == pytest.approx(0.2, abs=0.01)
    last = make_distribution("categorical", {"values": ["a", "b"], "probabilities": [1.0, 0.0]})
    assert last.at(1 - 1e-17) == "a"


@pytest.mark.parametrize(
    ("kind", "mean", "deviation", "transform"),
    [
        ("uniform", 0.5, 4 / math.sqrt(12), float),
        ("int_uniform", 1.5, math.sqrt((8**2 - 1) / 12), float),
        ("log_uniform_values", math.log(1e-3), math.log(1e4) / math.sqrt(12), math.log),
        ("log_uniform", -3.5, 7 / math.sqrt(12), math.log),
        ("inv_log_uniform", -2.0, 2 / math.sqrt(12), math.log),
        ("normal", 3.0, 2.0, float),
        ("log_normal", -3.0, 0.5, math.log),
        ("beta", 2 / 7, math.sqrt(10 / 49 / 8), float),
        ("q_normal", 3.0, math.sqrt(4 + 0.25**2 / 12), float),
    ],
)
def test_seeded_draws_have_the_moments_of_the_definition(
    kind: str, mean: float, deviation: float, transform: Callable[[Any], float]
) -> None:
    count = 4_000 if kind == "beta" else 20_000  # a draw of beta takes a search
    values = [transform(value) for value in draws(kind, count)]
    assert statistics.fmean(values) == pytest.approx(mean, abs=4 * deviation / math.sqrt(count))
    assert statistics.pstdev(values) == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize(
    "kind",
    [k for k in KINDS if k.endswith("_values") or (k.endswith("uniform") and "log" not in k)],
)
def test_draws_stay_within_the_limits(kind: str) -> None:
    fields, values = EXAMPLES[kind], draws(kind, 5000)
    slack = fields.get("q", 0) / 2
    assert min(values) >= fields["min"] - slack
    assert max(values) <= fields["max"] + slack


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("q_")])
def test_quantised_draws_are_multiples_of_q(kind: str) -> None:
    q = EXAMPLES[kind]["q"]
    for value in draws(kind, 1000):
        assert value / q == pytest.approx(round(value / q), abs=1e-9)


@given(st.floats(0.5, 50), st.floats(0.5, 50), st.floats(1e-3, 1 - 1e-3))
def test_the_beta_function_is_that_of_scipy(a: float, b: float, x: float) -> None:
    expected = float(scipy.stats.beta.cdf(x, a, b))
    assert beta_cdf(x, a, b) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    quantile = beta_quantile(x, a, b)
    assert float(scipy.stats.beta.cdf(quantile, a, b)) == pytest.approx(x, rel=1e-6, abs=1e-9)


# ── grids ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("int_uniform", {"min": 2, "max": 4}, [2, 3, 4]),
        ("q_uniform", {"min": 0, "max": 6, "q": 2}, [0, 2, 4]),
        ("q_uniform", {"min": 0.0, "max": 1.0, "q": 0.25}, [0, 0.25, 0.5, 0.75]),
        ("categorical", {"values": ["b", "a"]}, ["b", "a"]),
        ("constant", {"value": 7}, [7]),
        ("uniform", {"min": 0.0, "max": 1.0}, None),
    ],
)
def test_a_grid_has_the_values_of_wandb(
    kind: str, fields: dict[str, Any], expected: list[Any] | None
) -> None:
    assert make_distribution(kind, fields).grid() == expected
    assert (kind in GRID_KINDS) == (expected is not None)


def test_a_grid_over_billions_of_values_is_recognised_without_listing_them() -> None:
    assert make_distribution("int_uniform", {"min": 0, "max": 10**12}).has_huge_grid
    assert not make_distribution("int_uniform", {"min": 0, "max": 10}).has_huge_grid


# ── what is impossible ───────────────────────────────────────────────────────────────────────


@every_kind
def test_possible_distributions_have_no_problems(kind: str) -> None:
    assert find_problems(kind, EXAMPLES[kind]) == []


@pytest.mark.parametrize(
    ("kind", "fields", "field", "text"),
    [
        ("uniform", {"min": 2, "max": 1}, "min", "2 is not less than max 1"),
        ("uniform", {"min": 1}, "distribution", "uniform needs max"),
        ("int_uniform", {"min": 0.5, "max": 2}, "min", "int_uniform takes whole numbers"),
        ("uniform", {"min": True, "max": 2}, "min", "got true, expected a finite number"),
        ("uniform", {"min": "a", "max": 2}, "min", "got the text 'a', expected a finite number"),
        ("log_uniform_values", {"min": 0, "max": 1}, "min", "needs min > 0"),
        ("log_uniform", {"min": 1, "max": 1000}, "max", "write distribution: log_uniform_values"),
        ("q_uniform", {"min": 0, "max": 1, "q": 0}, "q", "expected a number > 0"),
        ("normal", {"sigma": -1}, "sigma", "expected a number ≥ 0"),
        ("log_normal", {"mu": 1e4}, "mu", "is out of range"),
        ("beta", {"a": 0}, "a", "expected a number > 0"),
        ("categorical", {"values": []}, "values", "expected a list of at least one value"),
        ("categorical", {"values": 3}, "values", "expected a list of at least one value"),
        ("categorical", {"values": [1, 2], "probabilities": [1]}, "probabilities", "1 of them for 2"),
        ("categorical", {"values": [1, 2], "probabilities": [0.5, 0.6]}, "probabilities", "add up to 1.1"),
        ("categorical", {"values": [1, 2], "probabilities": [2, -1]}, "probabilities", "numbers ≥ 0"),
    ],
)  # fmt: skip
def test_impossible_distributions_are_told(
    kind: str, fields: dict[str, Any], field: str, text: str
) -> None:
    ((found, message),) = find_problems(kind, fields)
    assert found == field
    assert text in message
