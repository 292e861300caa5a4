"""Where W&B, which reads YAML 1.1, sees another value in a sweep file than people mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from mnist_wandb.layers import KeyPath, Layer, parse_value

TEXT_SETTINGS = ("name", "notes", "tags", "group", "device")
"""Settings whose values are text, even where it looks like a number."""


@dataclass(frozen=True)
class Problem:
    """Something wrong in a sweep file.

    Attributes:
        where: file, line and column.
        text: what is wrong and what to do.
        is_error: false for a warning, with which the sweep can run.
        position: line and column, for sorting.
    """

    where: str
    text: str
    is_error: bool = True
    position: tuple[int, int] = field(default=(0, 0), compare=False)

    @classmethod
    def at(cls, layer: Layer, path: KeyPath, text: str, is_error: bool = True) -> Problem:
        """A problem of the value under a path."""
        position = next(
            (layer.marks[path[:i]] for i in range(len(path), 0, -1) if path[:i] in layer.marks),
            (0, 0),
        )
        return cls(layer.where(path), text, is_error, position)

    def __str__(self) -> str:
        return f"{self.where}: {'' if self.is_error else 'warning: '}{self.text}"


def reading_problems(text: str, layer: Layer) -> list[Problem]:
    """Scalars of a valid YAML file that W&B reads as something else, and numbers in quotes."""
    problems = []
    for node, path in _scalars(yaml.compose(text, yaml.SafeLoader), ()):
        advice = _advice(node, _value(layer.values, path), path)
        if advice:
            mark = node.start_mark
            where = f"{layer.label}:{mark.line + 1}:{mark.column + 1}"
            problems.append(Problem(where, advice, position=(mark.line + 1, mark.column + 1)))
    return problems


def _scalars(node: yaml.Node | None, path: KeyPath) -> Iterator[tuple[yaml.ScalarNode, KeyPath]]:
    if isinstance(node, yaml.ScalarNode):
        yield node, path
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _scalars(value, (*path, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _scalars(value, (*path, index))


def _value(values: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):  # came in through a merge key
            return None
    return values


def _advice(node: yaml.ScalarNode, value: Any, path: KeyPath) -> str:
    """What to write instead, or nothing where both see the same."""
    text, tag = str(node.value), node.tag.rpartition(":")[2]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and tag == "str":
        return f"W&B reads {text} as text; write {_with_point(text)}"
    if is_number and re.fullmatch(r"[-+]?0[0-9]+", text):
        return f"W&B reads {text} as an octal number; leave out the leading zero"
    if isinstance(value, str) and node.style is None and tag != "str":
        kind = {"bool": "true or false", "null": "null", "timestamp": "a date"}.get(tag, "a number")
        return f"W&B reads {text} as {kind}; put it into quotes if it is meant as text"
    if isinstance(value, str) and node.style in ("'", '"') and _is_sweep_value(path):
        found = parse_value(text)
        if isinstance(found, int | float | None):
            shown = "null" if found is None else str(found).lower()
            kind = "a number" if isinstance(found, int | float) else "null"
            kind = "true or false" if isinstance(found, bool) else kind
            return f"the text {text!r} looks like {kind}; write {shown} without quotes"
    return ""


def _is_sweep_value(path: KeyPath) -> bool:
    """Whether it stands in a parameter's fields, and the parameter is not a text."""
    keys = [part for part in path if isinstance(part, str)]
    if keys[:1] != ["parameters"] or len(keys) < 3 or keys[-1] == "distribution":
        return keys[:1] in (["run_cap"], ["early_terminate"]) or keys == ["metric", "target"]
    return keys[-2].rpartition(".")[2] not in TEXT_SETTINGS


def _with_point(text: str) -> str:
    """1e-3 as YAML 1.1 has it: 1.0e-3."""
    mantissa, _, exponent = text.lower().partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    sign = "" if exponent[:1] in ("+", "-") else "+"
    return f"{mantissa}e{sign}{exponent}"
