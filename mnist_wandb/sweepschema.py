"""JSON Schema of sweep files, for editors (completion, documentation, checks)."""

from __future__ import annotations

from typing import Any

from mnist_wandb.distributions import KINDS
from mnist_wandb.loading import settings_table
from mnist_wandb.sweepfile import GOALS, LOGGED_METRICS, METHODS

_NUMBER: dict[str, Any] = {"type": "number"}
_FIELDS: dict[str, dict[str, Any]] = {
    "value": {},
    "values": {"type": "array", "minItems": 1},
    "probabilities": {"type": "array", "minItems": 1, "items": {"type": "number", "minimum": 0}},
    "min": _NUMBER,
    "max": _NUMBER,
    "q": {"type": "number", "exclusiveMinimum": 0},
    "mu": _NUMBER,
    "sigma": {"type": "number", "minimum": 0},
    "a": {"type": "number", "exclusiveMinimum": 0},
    "b": {"type": "number", "exclusiveMinimum": 0},
}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def sweep_schema() -> dict[str, Any]:
    """The schema; comparisons of values (min < max, …) are left to `sweep check`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "W&B sweep file for mnist-wandb",
        "type": "object",
        "required": ["method", "parameters"],
        "additionalProperties": False,
        "properties": {
            "method": {"enum": list(METHODS), "description": "How points are chosen."},
            "metric": _metric(),
            "parameters": {"$ref": "#/$defs/parameters"},
            "early_terminate": _early_terminate(),
            "run_cap": {"type": "integer", "minimum": 1, "description": "Largest number of runs."},
            "command": {
                "type": "array",
                "minItems": 1,
                "items": {"type": ["string", "number"]},
                "description": "What an agent starts, with macros such as ${args_no_hyphens}.",
            },
            "program": _text("What ${program} in `command` stands for."),
            "name": _text("Name of the sweep and, unless configured, group of its runs."),
            "description": _text("Free text."),
            "project": _text("W&B project."),
            "entity": _text("W&B user or team."),
            "apiVersion": {"type": "string"},
            "kind": {"enum": ["sweep"]},
            "controller": {"type": "object"},
            "settings": {"type": "object"},
        },
        "$defs": {
            "parameters": {
                "type": "object",
                "minProperties": 1,
                "description": "Settings by name: dotted, or nested with `parameters`.",
                "properties": _settings(),
                "additionalProperties": {"$ref": "#/$defs/parameter"},
            },
            "parameter": {"anyOf": [_nested(), *(_parameter(kind) for kind in KINDS)]},
        },
    }


def _metric() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {
            "name": {"enum": list(LOGGED_METRICS), "description": "What is optimised."},
            "goal": {"enum": list(GOALS), "default": "minimize"},
            "target": {"type": "number", "description": "No new run once this is reached."},
            "impute": {"enum": ["latest", "best", "worst"]},
        },
    }


def _early_terminate() -> dict[str, Any]:
    count = {"type": "integer", "minimum": 1}
    return {
        "type": "object",
        "required": ["type"],
        "additionalProperties": False,
        "oneOf": [{"required": ["min_iter"]}, {"required": ["max_iter", "s"]}],
        "properties": {
            "type": {"const": "hyperband"},
            "min_iter": {**count, "description": "First band, in logged values of the metric."},
            "max_iter": {**count, "description": "Logged values of a whole run."},
            "s": {**count, "description": "Number of bands below max_iter."},
            "eta": {"type": "number", "exclusiveMinimum": 1, "default": 3},
            "strict": {"type": "boolean", "default": False},
        },
    }


def _settings() -> dict[str, Any]:
    """Every setting by its dotted name and every section, for completion."""
    parameter = {"$ref": "#/$defs/parameter"}
    found: dict[str, Any] = {"config": {**parameter, "description": "A preset."}}
    for name, _, description in settings_table():
        found.setdefault(name.partition(" (")[0], {**parameter, "description": description})
    return found


def _nested() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["parameters"],
        "additionalProperties": False,
        "properties": {"parameters": {"$ref": "#/$defs/parameters"}},
    }


def _parameter(kind: str) -> dict[str, Any]:
    row = KINDS[kind]
    fields = [*row.required, *row.defaults]
    fields += ["probabilities"] if kind == "categorical" else []
    properties = {name: dict(_FIELDS[name]) for name in fields}
    if kind == "int_uniform":
        properties = {name: {"type": "integer"} for name in fields}
    for name, default in row.defaults.items():
        properties[name]["default"] = default
    inferred = kind in ("constant", "categorical", "int_uniform", "uniform")
    names = [kind, "categorical_w_probabilities"] if kind == "categorical" else [kind]
    return {
        "type": "object",
        "description": row.meaning,
        "required": [*row.required, *([] if inferred else ["distribution"])],
        "additionalProperties": False,
        "properties": {"distribution": {"enum": names}, **properties},
    }
