"""The texts a configuration comes from: YAML with positions, and one grammar for overrides."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mnist_wandb.errors import ConfigError

KeyPath = tuple[str | int, ...]

MOST_VALUES = 10_000
"""More values than any configuration has; stops files that grow by aliases of aliases."""
DEEPEST_KEY = 8
"""More parts than any dotted key has."""

# What an agent adds to the command line of a resumed sweep run; it is not a setting.
IGNORED_KEYS = frozenset({"_wandb"})


@dataclass(frozen=True)
class Layer:
    """Values from one place, and where in it each of them stands.

    Attributes:
        label: how messages and `show` call the place ("cnn_large.yaml", "command line").
        values: nested mapping of settings.
        marks: line and column (from 1) of each key, where the place is a file.
    """

    label: str
    values: dict[str, Any]
    marks: Mapping[KeyPath, tuple[int, int]] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Name the place of a key: "file.yaml:3:5", or the label alone."""
        while path:
            if path in self.marks:
                line, column = self.marks[path]
                return f"{self.label}:{line}:{column}"
            path = path[:-1]
        return self.label


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars as people mean them: `1e-3` is a number, `on` and `no` are texts."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    ("merge", r"^(?:<<)$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _error(message: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


def _construct_scalar(loader: _Loader, node: yaml.Node) -> Any:
    """One plain value by its tag; 010 is ten here, not YAML 1.1's octal eight."""
    tag = node.tag.rpartition(":")[2]
    if not isinstance(node, yaml.ScalarNode):
        raise _error(f"not a value of type {tag}", node)
    text = str(node.value)
    try:
        if tag == "bool":
            return {"true": True, "false": False}[text.lower()]
        if tag == "int":
            return int(text)
        if tag == "float":
            plain = text.lower().lstrip("+").replace(".inf", "inf").replace(".nan", "nan")
            return _NUMBERS[plain] if plain in _NUMBERS else float(text)
        return None if tag == "null" else text
    except (ValueError, KeyError):
        raise _error(f"{text[:60]!r} is not of type {tag}", node) from None


def _construct_list(loader: _Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise _error("not a list", node)
    return [loader.construct_object(item, deep=True) for item in node.value]


def _construct_mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _error("not a mapping", node)
    seen: dict[str, yaml.Mark] = {}
    for key_node, _ in node.value:
        if (
            not isinstance(key_node, yaml.ScalarNode)
            or key_node.tag.endswith(":null")
            or re.search("[\ud800-\udfff]", key_node.value)
        ):
            raise _error("a key must be plain text", key_node)
        if key_node.value in seen and key_node.value != "<<":
            first = seen[key_node.value].line + 1
            raise _error(f"duplicate key {key_node.value!r} (first in line {first})", key_node)
        seen[key_node.value] = key_node.start_mark
    loader.flatten_mapping(node)
    return {
        key_node.value: loader.construct_object(value_node, deep=True)
        for key_node, value_node in node.value
    }


def _refuse_tag(_loader: _Loader, node: yaml.Node) -> None:
    raise _error(f"the tag {node.tag!r} is not allowed here", node)


_Loader.yaml_constructors = {
    **{
        f"tag:yaml.org,2002:{t}": _construct_scalar for t in ("bool", "int", "float", "null", "str")
    },
    "tag:yaml.org,2002:seq": _construct_list,
    "tag:yaml.org,2002:map": _construct_mapping,
    None: _refuse_tag,
}


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every text that `_Loader` or YAML 1.1 would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def write_value(value: Any) -> str:
    """One value on one line, as `parse_yaml` reads it back."""

    def plain(item: Any) -> Any:
        if isinstance(item, list | tuple):
            return [plain(element) for element in item]
        return item.model_dump(mode="json") if hasattr(item, "model_dump") else item

    text = yaml.dump(
        plain(value), Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _collect_marks(
    node: yaml.Node | None, path: KeyPath, marks: dict[KeyPath, tuple[int, int]]
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            below = (*path, str(key_node.value))
            marks[below] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            _collect_marks(value_node, below, marks)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            marks[*path, index] = (item.start_mark.line + 1, item.start_mark.column + 1)
            _collect_marks(item, (*path, index), marks)


def _refuse_recursion(node: yaml.Node, above: frozenset[int], visits: Iterator[int]) -> None:
    if next(visits) > MOST_VALUES:
        raise _error(f"more than {MOST_VALUES:,} values (aliases of aliases?)", node)
    if id(node) in above:
        raise _error("an alias of itself", node)
    if isinstance(node, yaml.CollectionNode) and len(above) > 2 * DEEPEST_KEY:
        raise _error("nested too deeply", node)
    above |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            _refuse_recursion(value, above, visits)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_recursion(value, above, visits)


def parse_yaml(text: str, label: str) -> Layer:
    """Read one YAML mapping.

    Args:
        text: the YAML document; empty means no settings.
        label: how messages call it.

    Raises:
        ConfigError: broken YAML, a duplicate key, a recursive alias, or no mapping at the top.
    """
    marks: dict[KeyPath, tuple[int, int]] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _refuse_recursion(node, frozenset(), itertools.count())
            _collect_marks(node, (), marks)
            values = loader.construct_document(node) if node is not None else {}
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{label}: not valid YAML: {reason}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{label}: found {describe_value(values)}, expected sections like `training: {{…}}`"
        )
    return Layer(label, values, marks)


def look_up(source: str) -> tuple[Path | None, bool]:
    """The file of a path that a user gave, or None; and whether it is a folder instead."""
    try:
        path = Path(source).expanduser()
        return (path, False) if path.is_file() else (None, path.is_dir())
    except (OSError, ValueError, RuntimeError):  # not a path at all
        return None, False


def read_yaml(path: Path, label: str | None = None) -> Layer:
    """Read a YAML file; see `parse_yaml`.

    Raises:
        ConfigError: also when the file cannot be read or is not UTF-8 text.
    """
    name = label or str(path)
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), name)
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name}: cannot be read: {reason}") from None


def parse_value(text: str) -> Any:
    """Read one value as JSON, else as a Python literal, else a list or mapping in YAML, else text.

    Agents write Python's `str()` (`True`, `None`, `[64, 32]`, `{'name': 'cnn'}`), people write
    JSON or YAML (`true`, `null`, `1e-3`).
    """
    stripped = text.strip()
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # of Python's own parser
                return _plain(parse(stripped))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    if stripped[:1] in ("[", "{"):  # as in a YAML file: [lab, first]
        with contextlib.suppress(ConfigError):
            return parse_yaml(f"value: {stripped}", "value").values["value"]
        return text
    number = stripped.lower().lstrip("+").replace("infinity", "inf").replace("-nan", "nan")
    if number in _NUMBERS:
        return _NUMBERS[number]  # rejected by validation, by its name
    return text


def _plain(value: Any) -> Any:
    """Lists for tuples; refuse what YAML and JSON cannot say (bytes, sets, complex, …)."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("keys must be text")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{type(value).__name__} is not a setting")


def parse_overrides(arguments: Sequence[str], label: str = "command line") -> Layer:
    """Read overrides in every form that people and agents write.

    `section.field=value`, `--section.field=value`, `--section.field value`, `+…`/`++…` (Hydra),
    `--flag` alone (true), and one JSON object (`${args_json}`) or the path of a `.json` file
    (`${args_json_file}`). Later ones win; mappings merge deeply; `--_wandb=…` is ignored.

    Raises:
        ConfigError: an argument in none of these forms, with the nearest correct form.
    """
    values: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        body = argument.lstrip("+") if argument.startswith("+") else argument
        is_option = body.startswith("--")
        body = body[2:] if is_option else body
        key, equals, text = body.partition("=")
        if argument.lstrip().startswith("{"):
            merge_into(values, _parse_json_object(argument, argument))
        elif not is_option and not equals and argument.endswith(".json"):
            merge_into(values, _read_json_file(argument))
        elif equals:
            set_path(values, _split_key(key, argument), parse_value(text))
        elif is_option and pending and not pending[0].startswith("--") and "=" not in pending[0]:
            set_path(values, _split_key(key, argument), parse_value(pending.pop(0)))
        elif is_option:
            set_path(values, _split_key(key, argument), True)
        else:
            raise ConfigError(
                f"{label}: cannot read {argument!r}; write section.field=value,"
                " for example training.epochs=5"
            )
    return Layer(label, {key: v for key, v in values.items() if key not in IGNORED_KEYS})


def read_sweep_parameters(path: Path) -> Layer:
    """Read the file that `wandb agent` names in WANDB_SWEEP_PARAM_PATH: `{key: {value: …}}`.

    Raises:
        ConfigError: the file is missing or of another form.
    """
    layer = read_yaml(path, "sweep parameters")
    values: dict[str, Any] = {}
    for key, entry in layer.values.items():
        if key == "wandb_version" or key in IGNORED_KEYS:
            continue
        if not isinstance(entry, dict) or "value" not in entry:
            raise ConfigError(f"{layer.where((key,))}: {key}: expected a mapping with `value`")
        set_path(values, _split_key(key, key, layer.where((key,))), entry["value"])
    return Layer(layer.label, values)


def _split_key(key: str, argument: str, where: str = "command line") -> list[str]:
    parts = key.strip().split(".")
    if len(parts) > DEEPEST_KEY or not all(
        re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", part) for part in parts
    ):
        raise ConfigError(f"{where}: cannot read {argument[:80]!r}; write section.field=value")
    return parts


def _shown(text: str) -> str:
    return text[:80] if text.isprintable() else repr(text[:80])


def _parse_json_object(text: str, argument: str) -> dict[str, Any]:
    value = parse_value(text)
    if not isinstance(value, dict):
        raise ConfigError(f"command line: {argument!r} is not a JSON object")
    nested: dict[str, Any] = {}
    for key, item in value.items():
        set_path(nested, _split_key(key, argument), item)
    return nested


def _read_json_file(argument: str) -> dict[str, Any]:
    try:
        text = Path(argument).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"command line: {_shown(argument)}: cannot be read: {error}") from None
    return _parse_json_object(text, argument)


def set_path(target: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    """Merge a value into a nested mapping under a dotted key, given as its parts."""
    for part in reversed(parts):
        value = {part: value}
    merge_into(target, value)


def merge_into(target: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Merge deeply and in place: mappings merge, anything else replaces."""
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge_into(target[key], value)
        elif isinstance(value, Mapping):
            target[key] = {}
            merge_into(target[key], value)
        else:
            target[key] = value


def describe_value(value: Any) -> str:
    """Say what was found, short, in the terms of YAML: `the text 'abc'`, `a list`, `3`."""
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"the list {str(list(value))[:60]}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        return str(value)[:60]
    except ValueError:  # Python refuses to write out integers of over 4,300 digits
        return "a number of thousands of digits"
