"""The distributions of W&B's sweep files: limits, quantile functions, points of a grid.

Each value is drawn through the quantile function (inverse of the cumulative distribution function)
at a uniform u in (0, 1), as W&B's own engine does.

Source: names, fields and defaults after https://docs.wandb.ai/models/sweeps/sweep-config-keys and
the schema of W&B's open-source engine (PyPI `sweeps` 0.2.0), against which the tests compare.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnist_wandb.layers import describe_value

EDGE = 1e-12
"""Quantiles are drawn from [EDGE, 1 - EDGE]: a normal variable is infinite at 0 and 1."""
LARGEST_EXPONENT = 700.0
"""exp(709.8) is the largest number that a float holds."""
MOST_GRID_VALUES = 100_000
"""More values of one parameter than any grid has; stops `min: 0, max: 10**9`."""


@dataclass(frozen=True)
class Kind:
    """Which fields a distribution has.

    Attributes:
        required: fields that must be given.
        defaults: fields that may be given, and their defaults.
        meaning: one line for the JSON schema.
    """

    required: tuple[str, ...]
    defaults: Mapping[str, float]
    meaning: str


_RANGE, _Q = ("min", "max"), {"q": 1}
_NORMAL, _BETA = {"mu": 0, "sigma": 1}, {"a": 1, "b": 1}
KINDS: dict[str, Kind] = {
    "constant": Kind(("value",), {}, "Always `value`."),
    "categorical": Kind(("values",), {}, "One of `values`; `probabilities` are equal by default."),
    "int_uniform": Kind(_RANGE, {}, "A whole number from `min` to `max`, both included."),
    "uniform": Kind(_RANGE, {}, "A number from `min` to `max`."),
    "q_uniform": Kind(_RANGE, _Q, "round(X / q) * q, X uniform from `min` to `max`."),
    "log_uniform": Kind(_RANGE, {}, "exp(X), X uniform: `min` and `max` are exponents of e."),
    "log_uniform_values": Kind(_RANGE, {}, "From `min` to `max`, its logarithm uniform."),
    "q_log_uniform": Kind(_RANGE, _Q, "round(X / q) * q, X as log_uniform."),
    "q_log_uniform_values": Kind(_RANGE, _Q, "round(X / q) * q, X as log_uniform_values."),
    "inv_log_uniform": Kind(_RANGE, {}, "log(1/X) uniform from `min` to `max`."),
    "inv_log_uniform_values": Kind(_RANGE, {}, "log(1/X) uniform, X from `min` to `max`."),
    "normal": Kind((), _NORMAL, "Normal with mean `mu` and standard deviation `sigma`."),
    "q_normal": Kind((), {**_NORMAL, **_Q}, "round(X / q) * q, X as normal."),
    "log_normal": Kind((), _NORMAL, "exp(X), X as normal."),
    "q_log_normal": Kind((), {**_NORMAL, **_Q}, "round(X / q) * q, X as log_normal."),
    "beta": Kind((), _BETA, "Beta with shape `a` and `b`."),
    "q_beta": Kind((), {**_BETA, **_Q}, "round(X / q) * q, X as beta."),
}
"""Every distribution by its name in a sweep file."""

ALIASES = {"categorical_w_probabilities": "categorical"}
GRID_KINDS = ("constant", "categorical", "int_uniform", "q_uniform")
"""What W&B can lay a grid over."""
FIELDS = tuple(
    dict.fromkeys(
        ["distribution", "probabilities", *(f for k in KINDS.values() for f in k.required)]
        + [f for k in KINDS.values() for f in k.defaults]
    )
)


@dataclass(frozen=True)
class Distribution:
    """What one parameter of a sweep is drawn from; made by `make_distribution`.

    Attributes:
        kind: a key of KINDS.
        fields: its fields, defaults filled in.
    """

    kind: str
    fields: Mapping[str, Any]

    def at(self, u: float) -> Any:
        """The value at a quantile u in (0, 1): int, float, or one of `values`."""
        if self.kind == "constant":
            return self.fields["value"]
        if self.kind == "categorical":
            return self.fields["values"][self._choose(u)]
        if self.kind == "int_uniform":
            low, high = self.fields["min"], self.fields["max"]
            return low + _position(u, high - low + 1)
        base = self.kind.removeprefix("q_")
        value = _QUANTILES[base](u, self.fields)
        if base == self.kind:
            return value
        q = self.fields["q"]
        return round(value / q) * q  # half to even, as numpy rounds

    def _choose(self, u: float) -> int:
        values, probabilities = self.fields["values"], self.fields.get("probabilities")
        if probabilities is None:
            return _position(u, len(values))
        total = 0.0
        for index, probability in enumerate(probabilities):
            total += probability
            if u < total:
                return index
        # Rounding has left u above the sum: the last value that can be drawn at all.
        return max(i for i, probability in enumerate(probabilities) if probability > 0)

    def grid(self) -> list[Any] | None:
        """All values in the order of W&B's grid, or None where there is no grid over this."""
        if self.kind == "constant":
            return [self.fields["value"]]
        if self.kind == "categorical" and "probabilities" not in self.fields:
            return list(self.fields["values"])
        if self.kind == "int_uniform":
            return list(range(self.fields["min"], self.fields["max"] + 1))
        if self.kind == "q_uniform":  # without `max`, as numpy.arange
            low, q = self.fields["min"], self.fields["q"]
            return [low + i * q for i in range(self._grid_size())]
        return None

    def _grid_size(self) -> int:
        span: float = self.fields["max"] - self.fields["min"]
        if self.kind == "int_uniform":
            return int(span) + 1
        return math.ceil(span / float(self.fields["q"]))

    @property
    def has_huge_grid(self) -> bool:
        """Whether a grid over it would have more than MOST_GRID_VALUES values."""
        return self.kind in ("int_uniform", "q_uniform") and self._grid_size() > MOST_GRID_VALUES


# ── quantile functions ───────────────────────────────────────────────────────────────────────


def _position(u: float, count: int) -> int:
    """Quantile of the uniform distribution on 0, …, count - 1."""
    return min(count - 1, max(0, math.ceil(u * count) - 1))


def _log_values(u: float, f: Mapping[str, Any]) -> float:
    low, high = math.log(f["min"]), math.log(f["max"])
    return min(float(f["max"]), max(float(f["min"]), math.exp(low + u * (high - low))))


def _normal(u: float, f: Mapping[str, Any]) -> float:
    return float(f["mu"] + f["sigma"] * statistics.NormalDist().inv_cdf(u))


_QUANTILES: dict[str, Callable[[float, Mapping[str, Any]], float]] = {
    "uniform": lambda u, f: float(f["min"] + u * (f["max"] - f["min"])),
    "log_uniform": lambda u, f: math.exp(f["min"] + u * (f["max"] - f["min"])),
    "log_uniform_values": _log_values,
    # log(1/X) is uniform, hence so is log(X), between the limits with their signs changed.
    "inv_log_uniform": lambda u, f: math.exp(-f["max"] + u * (f["max"] - f["min"])),
    "inv_log_uniform_values": _log_values,
    "normal": _normal,
    "log_normal": lambda u, f: math.exp(_normal(u, f)),
    "beta": lambda u, f: beta_quantile(u, f["a"], f["b"]),
}


def beta_quantile(u: float, a: float, b: float) -> float:
    """Quantile of the beta distribution, by bisection of its distribution function."""
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if beta_cdf(middle, a, b) < u else (low, middle)
    return middle


def beta_cdf(x: float, a: float, b: float) -> float:
    """Distribution function of the beta distribution: the regularised incomplete beta function.

    Source: Press et al., Numerical Recipes, 3rd ed., section 6.4 (continued fraction 6.4.5).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly: the symmetry 6.4.3
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + numerator * d, tiny)
            c = _away_from_zero(1 + numerator / c, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


# ── checks ───────────────────────────────────────────────────────────────────────────────────


def infer_kind(fields: Mapping[str, Any]) -> str | None:
    """The distribution that W&B takes where none is named."""
    if "value" in fields:
        return "constant"
    if "values" in fields:
        return "categorical"
    if "min" in fields or "max" in fields:
        whole = all(is_number(v) and isinstance(v, int) for v in _limits(fields))
        return "int_uniform" if whole else "uniform"
    return None


def _limits(fields: Mapping[str, Any]) -> Sequence[Any]:
    return [fields[name] for name in _RANGE if name in fields]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number (true and false are none)."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= 1.8e308
        and value == value
    )


def make_distribution(kind: str, fields: Mapping[str, Any]) -> Distribution:
    """A distribution with its defaults; the fields have no `find_problems`."""
    given = {key: value for key, value in fields.items() if key != "distribution"}
    return Distribution(kind, {**KINDS[kind].defaults, **given})


def find_problems(kind: str, fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What makes a distribution impossible: (field, what is wrong with it); empty when possible.

    The fields are those that belong to the kind. A problem of the whole is one of `distribution`.
    """
    missing = [name for name in KINDS[kind].required if name not in fields]
    if missing:
        return [("distribution", f"{kind} needs {' and '.join(missing)}")]
    if kind == "constant":
        return []
    if kind == "categorical":
        return _problems_of_values(fields)
    numbers = {name: v for name, v in fields.items() if name != "distribution"}
    wrong = [
        (name, f"got {describe_value(value)}, expected a finite number")
        for name, value in numbers.items()
        if not is_number(value)
    ]
    if wrong:
        return wrong
    found = {**KINDS[kind].defaults, **numbers}
    return _problems_of_numbers(kind, found)


def _problems_of_values(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    values, probabilities = fields["values"], fields.get("probabilities")
    if not isinstance(values, list) or not values:
        return [("values", f"got {describe_value(values)}, expected a list of at least one value")]
    if probabilities is None:
        return []
    if not isinstance(probabilities, list) or not all(
        is_number(p) and p >= 0 for p in probabilities
    ):
        return [("probabilities", "expected a list of numbers ≥ 0")]
    if len(probabilities) != len(values):
        return [("probabilities", f"{len(probabilities)} of them for {len(values)} values")]
    if not math.isclose(sum(probabilities), 1, rel_tol=1e-5, abs_tol=1e-8):
        return [("probabilities", f"add up to {sum(probabilities):g}, expected 1")]
    return []


def _problems_of_numbers(kind: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    if "min" in found:
        low, high = found["min"], found["max"]
        if low >= high:
            problems.append(("min", f"{low} is not less than max {high}"))
        if kind == "int_uniform":
            problems += [
                (name, f"got {found[name]}, int_uniform takes whole numbers")
                for name in _RANGE
                if not isinstance(found[name], int)
            ]
        if kind.endswith("_values") and low <= 0:
            problems.append(("min", f"got {low}, {kind} needs min > 0 (it has a logarithm)"))
        if kind.endswith("log_uniform"):
            problems += [
                (name, f"{kind} takes exponents, and exp({found[name]}) is out of range; for limits"
                 f" of the value itself write distribution: {kind}_values")
                for name in _RANGE
                if abs(found[name]) > LARGEST_EXPONENT
            ]  # fmt: skip
    for name in ("q", "a", "b"):
        if name in found and found[name] <= 0:
            problems.append((name, f"got {found[name]}, expected a number > 0"))
    if "sigma" in found:
        if found["sigma"] < 0:
            problems.append(("sigma", f"got {found['sigma']}, expected a number ≥ 0"))
        elif kind.endswith("log_normal") and found["mu"] + 8 * found["sigma"] > LARGEST_EXPONENT:
            problems.append(("mu", f"exp({found['mu']} + 8 × {found['sigma']}) is out of range"))
    return problems
