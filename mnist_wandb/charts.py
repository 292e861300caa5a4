"""The report's charts as Vega-Lite specifications.

Colours are CSS variables of the page, so that light, dark and print need no second drawing.
Source: Satyanarayan et al. 2017, "Vega-Lite: A Grammar of Interactive Graphics".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
Row = Mapping[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
NUM_COLOURS = 8
"""Groups after these share one more colour."""
LOG_RATIO = 30
"""A numeric axis is logarithmic when its largest value is this many times its smallest."""
LABEL_PIXELS = 150

_TEXT, _FAINT, _GRID = "var(--text)", "var(--faint)", "var(--line)"
_CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _TEXT,
        "titleColor": _FAINT,
        "titleFontWeight": "normal",
        "domainColor": _GRID,
        "tickColor": _GRID,
        "gridColor": _GRID,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "labelLimit": LABEL_PIXELS,
    },
    "axisX": {"labelOverlap": True, "tickCount": {"expr": "max(2, ceil(width / 90))"}},
    "text": {"color": _TEXT, "fontSize": 12},
}


def colour_of(index: int) -> str:
    """The colour of the group with this index, as a CSS variable."""
    return f"var(--c{index})" if index < NUM_COLOURS else "var(--other)"


def leaderboard(rows: Sequence[Row], metric: str, test_metric: str) -> Spec:
    """Mean, interval and single runs of each group; the test mean beside them.

    Args:
        rows: row (its label), name, colour, mean, low, high, test, runs (values); best first.
        metric: on the x axis.
        test_metric: shown hollow.
    """
    y = {"field": "row", "type": "nominal", "sort": None, "title": None}
    x = {"type": "quantitative", "scale": {"zero": False, "nice": True}, "title": metric}
    singles = [
        {**_pick(row, "row", "colour"), "value": value} for row in rows for value in row["runs"]
    ]
    tips = [
        _tip("name", "group"),
        _tip("mean", metric),
        _tip("low", "95 % from"),
        _tip("high", "to"),
    ]
    colour = _own_colour()
    return _spec(
        f"{metric} of each group with 95 % intervals",
        30 * len(rows),
        layer=[
            {
                "data": {"values": singles},
                "mark": {"type": "tick", "thickness": 2, "size": 12, "opacity": 0.55},
                "encoding": {"y": y, "x": {**x, "field": "value"}, "color": colour},
            },
            {
                "data": {"values": [row for row in rows if row["low"] is not None]},
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {
                    "y": y,
                    "x": {**x, "field": "low"},
                    "x2": {"field": "high"},
                    "color": colour,
                },
            },
            {
                "data": {"values": [row for row in rows if row["test"] is not None]},
                "mark": {"type": "point", "shape": "diamond", "size": 70, "filled": False},
                "encoding": {
                    "y": y,
                    "x": {**x, "field": "test"},
                    "color": colour,
                    "tooltip": [_tip("name", "group"), _tip("test", test_metric)],
                },
            },
            {
                "data": {"values": list(rows)},
                "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
                "encoding": {"y": y, "x": {**x, "field": "mean"}, "color": colour, "tooltip": tips},
            },
        ],
    )


def learning_curves() -> Spec:
    """Curves over epochs; the page puts rows (run, name, colour, epoch, value) into `curves`."""
    x = {"field": "epoch", "type": "quantitative", "title": "epoch", "scale": {"nice": False}}
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    # The nearest point is found through a mark that lies over the points and has them as data;
    # Vega-Lite 6.4 sees to that in the tooltip's numbers, but not in its texts.
    tooltip = {
        "expr": "{'run': (datum.datum || datum).name,"
        " 'epoch': format((datum.datum || datum).epoch, '.3~g'),"
        " 'value': format((datum.datum || datum).value, '.4~g')}"
    }
    return _spec(
        "Learning curves of the chosen runs",
        320,
        data={"name": "curves", "values": []},
        encoding={"x": x, "y": y, "color": _own_colour(), "detail": {"field": "run"}},
        layer=[
            {"mark": {"type": "line", "strokeWidth": 1.8, "opacity": 0.85}},
            {
                "params": [
                    {
                        "name": "near",
                        "select": {
                            "type": "point",
                            "nearest": True,
                            "on": "pointerover",
                            "clear": "pointerout",
                        },
                    }
                ],
                "mark": {"type": "point", "filled": True, "size": 80, "tooltip": tooltip},
                "encoding": {
                    "opacity": {
                        "condition": {"param": "near", "empty": False, "value": 1},
                        "value": 0,
                    },
                },
            },
        ],
    )


def class_scores_chart(rows: Sequence[Row]) -> Spec:
    """F1 of each class and group.

    Args:
        rows: class, name (of the group), colour, mean, low, high (over its runs).
    """
    y = {"field": "class", "type": "nominal", "sort": None, "title": None}
    x = {"type": "quantitative", "title": "F1", "scale": {"zero": False}}
    names = list(dict.fromkeys(row["name"] for row in rows))
    offset = {"field": "name", "type": "nominal", "sort": names}
    tips = [_tip("class", "class"), _tip("name", "group"), _tip("mean", "F1"), _tip("low", "from"),
            _tip("high", "to")]  # fmt: skip
    return _spec(
        "F1 of each class and group",
        len(rows) * max(6, min(14, 42 // len(names))) + 16 * len({row["class"] for row in rows}),
        data={"values": list(rows)},
        encoding={"y": y, "yOffset": offset, "color": _own_colour(), "tooltip": tips},
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.5},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
                "encoding": {"x": {**x, "field": "mean"}},
            },
        ],
    )


def calibration(rows: Sequence[Row]) -> Spec:
    """Accuracy against confidence of the best run of each group.

    Args:
        rows: name, colour, confidence, accuracy, images (in the bin).
    """
    axis = {"type": "quantitative", "scale": {"domain": [0, 1]}}
    return _spec(
        "Accuracy of the answers by their confidence",
        320,
        layer=[
            {
                "data": {"values": [{"a": 0, "b": 0}, {"a": 1, "b": 1}]},
                "mark": {"type": "line", "strokeDash": [4, 4], "color": _FAINT},
                "encoding": {"x": {**axis, "field": "a"}, "y": {**axis, "field": "b"}},
            },
            {
                "data": {"values": list(rows)},
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": {
                    "x": {**axis, "field": "confidence", "title": "confidence"},
                    "y": {**axis, "field": "accuracy", "title": "accuracy"},
                    "color": _own_colour(),
                    "detail": {"field": "name"},
                },
            },
            {
                "data": {"values": list(rows)},
                "mark": {"type": "circle", "opacity": 0.8},
                "encoding": {
                    "x": {**axis, "field": "confidence"},
                    "y": {**axis, "field": "accuracy"},
                    "color": _own_colour(),
                    "size": {
                        "field": "images",
                        "type": "quantitative",
                        "scale": {"range": [12, 260]},
                        "legend": None,
                    },
                    "tooltip": [
                        _tip("name", "run"),
                        _tip("confidence", "mean confidence"),
                        _tip("accuracy", "accuracy"),
                        _tip("images", "images", ",d"),
                    ],
                },
            },
        ],
    )


def cost(rows: Sequence[Row], field: str, title: str, metric: str) -> Spec:
    """The metric against what it costs, one point for each group.

    Args:
        rows: group (its letter), name, colour, mean, low, high and `field`.
        field: what is on the x axis.
        title: of the x axis.
        metric: on the y axis.
    """
    values = [row[field] for row in rows]
    axis = {"format": "~s"}
    scale = _scale(values)
    x = {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis}
    y = {"type": "quantitative", "title": metric, "scale": {"zero": False}}
    tips = [_tip("name", "group"), _tip("mean", metric), _tip(field, title, ",.4~r")]
    return _spec(
        f"{metric} against {title}",
        260,
        data={"values": list(rows)},
        encoding={"x": x, "color": _own_colour()},
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.5},
                "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {"y": {**y, "field": "mean"}, "tooltip": tips},
            },
            {
                "mark": {"type": "text", "dx": 11, "dy": -7, "align": "left"},
                "encoding": {
                    "y": {**y, "field": "mean"},
                    "text": {"field": "group"},
                    "color": {"value": _TEXT},
                },
            },
        ],
    )


def importance(rows: Sequence[Row]) -> Spec:
    """How much of the metric's variance each setting explains alone.

    Args:
        rows: setting, share, direction (words).
    """
    y = {"field": "setting", "type": "nominal", "sort": None, "title": None}
    x = {"field": "share", "type": "quantitative", "title": "explained share of the variance"}
    tips = [
        _tip("setting", "setting"),
        _tip("share", "share", ".1%"),
        _tip("direction", "direction"),
    ]
    return _spec(
        "Importance of each setting",
        28 * len(rows),
        data={"values": list(rows)},
        encoding={"y": y, "tooltip": tips},
        layer=[
            {
                "mark": {"type": "bar", "color": "var(--c0)", "height": 14, "cornerRadiusEnd": 3},
                "encoding": {"x": {**x, "scale": {"domain": [0, 1]}, "axis": {"format": "%"}}},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 6, "color": _FAINT},
                "encoding": {"x": x, "text": {"field": "direction"}},
            },
        ],
    )


def parallel_coordinates(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Spec:
    """One line for each run through all its settings, coloured by the last column.

    Args:
        columns: values of each run by column; the last column is the metric.
        names: of the runs.
    """
    lines: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    metric = list(columns)[-1]
    for column, values in columns.items():
        places, ticks = _place(values)
        marks += [{"axis": column, "place": at, "label": label} for at, label in ticks]
        for i, at in enumerate(places):
            if at is not None:
                shown = _label(values[i])
                lines.append(
                    {"run": i, "name": names[i], "axis": column, "place": at, "value": shown,
                     "score": columns[metric][i]}
                )  # fmt: skip
    x = {
        "field": "axis",
        "type": "nominal",
        "sort": list(columns),
        "title": None,
        "scale": {"padding": 0.3},
        "axis": {"orient": "top", "labelAngle": 0, "domain": False, "ticks": False},
    }
    y = {
        "field": "place",
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [-0.04, 1.04], "nice": False, "zero": False},
    }
    rules = {
        "data": {"values": [{"axis": column} for column in columns]},
        "mark": {"type": "rule", "color": _GRID, "strokeWidth": 1},
        "encoding": {"x": x},
    }
    labels = {
        "data": {"values": marks},
        "mark": {"type": "text", "align": "left", "dx": 7, "fontSize": 11, "limit": 90},
        "encoding": {"x": x, "y": y, "text": {"field": "label"}, "color": {"value": _FAINT}},
    }
    lines_layer = {"data": {"values": lines}, **_parallel_lines(x, y)}
    return _spec("Settings and scores of all runs", 300, layer=[rules, lines_layer, labels])


def _parallel_lines(x: Spec, y: Spec) -> Spec:
    """The lines; the one under the pointer comes to the fore."""
    # Visible on light and on dark: a blend needs real colours, not variables.
    blend = {"range": ["#4f74d9", "#b45fc0", "#ee8a45"], "interpolate": "lab"}
    hover = {"type": "point", "fields": ["run"], "on": "pointerover", "clear": "pointerout"}
    near = {"param": "hovered", "empty": False}
    return {
        "params": [{"name": "hovered", "select": hover}],
        "mark": {"type": "line", "point": {"size": 40}, "interpolate": "monotone"},
        "encoding": {
            "x": x,
            "y": y,
            "detail": {"field": "run"},
            "color": {"field": "score", "type": "quantitative", "scale": blend, "legend": None},
            "strokeWidth": {"condition": {**near, "value": 4}, "value": 1.6},
            "opacity": {"condition": {"param": "hovered", "value": 0.9}, "value": 0.15},
            "tooltip": [_tip("name", "run"), _tip("axis", "setting"), _tip("value", "value")],
        },
    }


# ── small parts ──────────────────────────────────────────────────────────────────────────────


def _spec(description: str, height: int, **parts: Any) -> Spec:
    return {
        "$schema": SCHEMA,
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": _CONFIG,
        **parts,
    }


def _own_colour() -> Spec:
    return {"field": "colour", "type": "nominal", "scale": None, "legend": None}


def _tip(field: str, title: str, number_format: str = ".4f") -> Spec:
    texts = ("name", "group", "class", "setting", "direction", "axis", "value")
    if field in texts and number_format == ".4f":
        return {"field": field, "title": title, "type": "nominal"}
    return {"field": field, "title": title, "type": "quantitative", "format": number_format}


def _pick(row: Row, *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _scale(values: Sequence[float]) -> Spec:
    if min(values) > 0 and max(values) >= LOG_RATIO * min(values):
        return {"type": "log", "nice": True}
    return {"type": "linear", "zero": False, "nice": True}


def is_number(value: Any) -> bool:
    """Whether a setting is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(value: Any) -> str:
    if is_number(value):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _place(values: Sequence[Any]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Positions in [0, 1] along one axis, and (position, label) of its ticks.

    Numbers are placed in proportion (or by their logarithm), everything else in equal steps.
    """
    known = [value for value in values if value is not None]
    if known and all(is_number(value) for value in known) and min(known) < max(known):
        logarithmic = _scale(known)["type"] == "log"
        measure = math.log if logarithmic else float
        low, high = measure(min(known)), measure(max(known))
        places = [None if v is None else (measure(v) - low) / (high - low) for v in values]
        distinct = sorted(set(known))
        if len(distinct) > 5:
            middle = math.exp((low + high) / 2) if logarithmic else (low + high) / 2
            distinct = [distinct[0], middle, distinct[-1]]
        return places, [((measure(v) - low) / (high - low), _label(v)) for v in distinct]
    order = sorted({_label(value) for value in values})
    step = 1 / max(1, len(order) - 1)
    spots = {text: (i * step if len(order) > 1 else 0.5) for i, text in enumerate(order)}
    return [spots[_label(value)] for value in values], [(at, text) for text, at in spots.items()]
