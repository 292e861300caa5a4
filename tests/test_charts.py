"""Every chart can be compiled and drawn, and axes are placed as people expect."""

from __future__ import annotations

from typing import Any

import pytest
import vl_convert

from mnist_wandb import charts

ROW = {"row": "A", "group": "A", "name": "A · x", "colour": "var(--c0)", "mean": 0.9, "low": 0.8,
       "high": 0.95, "test": 0.85, "runs": [0.9, 0.91], "parameters": 1000, "seconds": 2.5}  # fmt: skip
OTHER = {
    **ROW,
    "row": "B",
    "group": "B",
    "name": "B · y",
    "parameters": 200_000,
    "low": None,
    "high": None,
}
CLASSES = [
    {"class": c, "name": n, "colour": "red", "mean": 0.9, "low": 0.8, "high": 1.0}
    for c in "01"
    for n in "AB"
]
BINS = [{"name": "A", "colour": "red", "confidence": 0.5, "accuracy": 0.6, "images": 9}]
COLUMNS = {"lr": [0.1, 0.001, None], "model": ["a", "b", "a"], "score": [0.8, 0.9, 0.7]}
SPECS: dict[str, dict[str, Any]] = {
    "leaderboard": charts.leaderboard([ROW, OTHER], "val", "test"),
    "curves": charts.learning_curves(),
    "classes": charts.class_scores_chart(CLASSES),
    "calibration": charts.calibration(BINS),
    "cost": charts.cost([ROW, OTHER], "parameters", "parameters", "val"),
    "importance": charts.importance([{"setting": "lr", "share": 0.4, "direction": "higher"}]),
    "parallel": charts.parallel_coordinates(COLUMNS, ["x", "y", "z"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_charts_are_drawn_without_a_browser(name: str) -> None:
    svg = vl_convert.vegalite_to_svg(SPECS[name])
    assert svg.startswith("<svg")
    if name != "curves":  # the page brings its data
        assert svg.count("mark-symbol") + svg.count("mark-rect") > 0


def test_costs_over_a_wide_range_have_a_logarithmic_axis() -> None:
    assert SPECS["cost"]["encoding"]["x"]["scale"]["type"] == "log"
    narrow = charts.cost([ROW], "seconds", "seconds", "val")
    assert narrow["encoding"]["x"]["scale"]["type"] == "linear"


def ticks(values: list[Any]) -> tuple[list[float | None], list[tuple[float, str]]]:
    return charts._place(values)


def test_numbers_are_placed_in_proportion_or_by_their_logarithm() -> None:
    assert ticks([0, 5, 10, None])[0] == [0, 0.5, 1, None]
    places, labels = ticks([0.001, 0.01, 0.1])
    assert places == pytest.approx([0, 0.5, 1])
    assert [label for _, label in labels] == ["0.001", "0.01", "0.1"]
    assert len(ticks([float(i) for i in range(20)])[1]) == 3


def test_other_settings_are_placed_in_equal_steps() -> None:
    places, labels = ticks(["sgd", "adam", True, "adam"])
    assert places == [0.5, 0, 1, 0]
    assert labels == [(0, "adam"), (0.5, "sgd"), (1, "true")]
    assert ticks(["x", "x"])[0] == [0.5, 0.5]


def test_groups_after_the_eighth_share_a_colour() -> None:
    assert charts.colour_of(7) == "var(--c7)"
    assert charts.colour_of(8) == charts.colour_of(30) == "var(--other)"
