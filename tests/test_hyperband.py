"""Early termination against W&B's own engine."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_wandb.hyperband import Hyperband

with warnings.catch_warnings(action="ignore"):  # it is written for an older pydantic
    from sweeps import RunState, SweepRun, stop_runs

RULES: list[dict[str, Any]] = [
    {"type": "hyperband", "min_iter": 1},
    {"type": "hyperband", "min_iter": 2, "eta": 2},
    {"type": "hyperband", "min_iter": 3, "eta": 1.5},
    {"type": "hyperband", "max_iter": 27, "s": 2},
    {"type": "hyperband", "max_iter": 20, "s": 4, "eta": 2},
]


def test_bands_grow_from_min_iter_and_shrink_from_max_iter() -> None:
    assert Hyperband.from_fields({"min_iter": 3, "eta": 2}).bands[:4] == (3, 6, 12, 24)
    assert Hyperband.from_fields({"max_iter": 27, "s": 2}).bands == (3, 9)
    assert Hyperband.from_fields({"max_iter": 4, "s": 5, "eta": 2}).bands == (1, 2)
    assert Hyperband.from_fields({"max_iter": 2, "s": 1}).bands == ()


@pytest.mark.parametrize("fields", RULES)
@given(seed=st.integers(0, 10**6), maximize=st.booleans())
def test_the_same_runs_are_stopped_as_by_the_engine_of_wandb(
    fields: dict[str, Any], seed: int, maximize: bool
) -> None:
    rng = random.Random(seed)
    histories = [
        [rng.choice((0.1, 0.5, rng.random())) for _ in range(rng.randrange(30))]
        for _ in range(rng.randrange(1, 9))
    ]
    runs = [
        SweepRun(name=str(i), state=RunState.running, sampledHistory=[{"m": v} for v in values])
        for i, values in enumerate(histories)
    ]
    config = {
        "method": "random",
        "metric": {"name": "m", "goal": "maximize" if maximize else "minimize"},
        "early_terminate": fields,
        "parameters": {"a": {"values": [1]}},
    }
    expected = {run.name for run in stop_runs(config, runs)}
    rule = Hyperband.from_fields(fields)
    stopped = {
        str(i)
        for i, own in enumerate(histories)
        if rule.stopping_band(own, histories[:i] + histories[i + 1 :], maximize=maximize)
        is not None
    }
    assert stopped == expected


def test_a_lone_run_is_never_stopped() -> None:
    rule = Hyperband.from_fields({"min_iter": 1, "eta": 3})
    for length in range(1, 30):
        assert rule.stopping_band([-float(i) for i in range(length)], [], maximize=True) is None


def test_strict_looks_at_the_band_and_not_at_the_best_so_far() -> None:
    early_peak, others = [0.9, 0.1, 0.1], [[0.5, 0.5, 0.5], [0.4, 0.4, 0.4]]
    for strict, band in ((False, None), (True, 2)):
        rule = Hyperband.from_fields({"min_iter": 2, "eta": 3, "strict": strict})
        assert rule.stopping_band(early_peak, others, maximize=True) == band
