"""From files, presets and overrides to a validated `RunConfig`, and back to YAML.

The layers are put together in the order preset or file, sweep parameters, command line; a later one
wins. What is wrong is said in one line for each problem.
"""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mnist_wandb.config import SHORTCUT_DATASET, VARIANTS, ZOO, RunConfig, Section, tag_of
from mnist_wandb.errors import ConfigError
from mnist_wandb.layers import (
    KeyPath,
    Layer,
    describe_value,
    look_up,
    merge_into,
    parse_overrides,
    read_sweep_parameters,
    read_yaml,
    write_value,
)

PRESETS_DIR = Path(__file__).parent / "configs"
DEFAULT_PRESET = "quickstart"


@dataclass(frozen=True)
class ResolvedConfig:
    """A validated configuration and where each of its values comes from.

    Attributes:
        config: the configuration.
        preset: name of the preset, or path of the file, that it started from.
        origins: label of the deciding layer, by dotted path ("default" where none spoke).
    """

    config: RunConfig
    preset: str
    origins: Mapping[str, str]


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def find_config(source: str) -> Path:
    """Find a file of one's own, else a shipped preset by name (with or without `.yaml`).

    Raises:
        ConfigError: neither exists; names the nearest presets.
    """
    path, is_folder = look_up(source)
    if path is not None:
        return path
    names = preset_names()
    name = source.removesuffix(".yaml")
    if name in names:
        return PRESETS_DIR / f"{name}.yaml"
    if is_folder:
        raise ConfigError(f"--config {source}: is a folder, expected a YAML file")
    if "/" in source or "\\" in source:
        raise ConfigError(f"--config {source}: no such file")
    raise ConfigError(
        f"--config {source}: no such preset or file{_did_you_mean(_near(name, names, 3))};"
        " `mnist-wandb configs` lists the presets"
    )


def load_config(
    source: str | None = None,
    overrides: Sequence[str] = (),
    *,
    sweep_parameters: Path | None = None,
) -> RunConfig:
    """Resolve and validate a configuration.

    Args:
        source: preset name or YAML file; default: the preset `quickstart`.
        overrides: `section.field=value` texts, see `layers.parse_overrides`.
        sweep_parameters: file written by `wandb agent`; lies between `source` and `overrides`.

    Returns:
        The complete configuration; `load_config` of its dump gives an equal one.

    Raises:
        ConfigError: with one line for each problem.
    """
    return resolve_config(source, overrides, sweep_parameters=sweep_parameters).config


def resolve_config(
    source: str | None = None,
    overrides: Sequence[str] = (),
    *,
    sweep_parameters: Path | None = None,
) -> ResolvedConfig:
    """Like `load_config`, and say where each value comes from."""
    later = [read_sweep_parameters(sweep_parameters)] if sweep_parameters else []
    return resolve_layers(source, [*later, parse_overrides(overrides)])


def resolve_layers(
    source: str | None, later: Sequence[Layer], *, lowest: Layer | None = None
) -> ResolvedConfig:
    """Put a preset or file and the layers that win over it together; validate the result.

    Args:
        source: preset name or YAML file, unless a layer has `config`; default: `quickstart`.
        later: in ascending order of precedence.
        lowest: what even the preset or file wins over.

    Raises:
        ConfigError: with one line for each problem.
    """
    for layer in later:  # a sweep may vary the preset itself
        chosen = layer.values.pop("config", None)
        if chosen is not None and not isinstance(chosen, str):
            raise ConfigError(f"{layer.label}: config: expected a preset name")
        source = chosen or source
    path = find_config(source or DEFAULT_PRESET)
    is_preset = path.parent == PRESETS_DIR
    preset = path.stem if is_preset else str(path)
    layers = [read_yaml(path, path.name if is_preset else str(path)), *later]
    layers = [lowest, *layers] if lowest else layers
    merged, owners = _merge_layers(layers)
    config = validate(merged, owners)
    return ResolvedConfig(config, preset, _origins(config, owners))


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A configuration with some values replaced; see `layers.parse_overrides`.

    Raises:
        ConfigError: with one line for each problem.
    """
    layers = [Layer("checkpoint", config.model_dump(mode="json")), parse_overrides(overrides)]
    return validate(*_merge_layers(layers))


def validate(values: Mapping[str, Any], owners: Mapping[KeyPath, Layer] | None = None) -> RunConfig:
    """Validate a nested mapping.

    Raises:
        ConfigError: with one line for each problem, naming the layer that said it.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(details, values, owners or {}) for details in error.errors()]
        raise ConfigError("\n".join(line for line in dict.fromkeys(lines) if line)) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}") from None


def to_yaml(config: RunConfig, origins: Mapping[str, str] | None = None) -> str:
    """Write a configuration as YAML that `load_config` reads back as an equal one.

    Args:
        config: the configuration.
        origins: where given, a comment behind each value says where it comes from.
    """
    lines: list[tuple[str, str]] = []

    def write(values: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for key, value in values.items():
            below = (*path, key)
            indent = "  " * len(path)
            if isinstance(value, Mapping):
                lines.append((f"{indent}{key}:", ""))
                write(value, below)
            else:
                origin = (origins or {}).get(".".join(below), "")
                lines.append((f"{indent}{key}: {write_value(value)}", origin))

    write(config.model_dump(mode="json"), ())
    width = min(60, max(len(text) for text, _ in lines))
    return "".join(f"{text:<{width}}  # {why}\n" if why else f"{text}\n" for text, why in lines)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors (completion, documentation, checks)."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "mnist-wandb run configuration"
    for section in VARIANTS:
        # A file may leave out `name`, and then fits several variants.
        entry = schema["properties"][section]
        entry["anyOf"] = entry.pop("oneOf")
        entry.pop("discriminator", None)
    return schema


def settings_table() -> list[tuple[str, str, str]]:
    """(dotted name, default, description) of every setting, in the order of the sections.

    Fields of a section with variants are listed once for each variant that has them, as
    `optimizer.momentum (sgd)`.
    """
    rows: list[tuple[str, str, str]] = []

    def write(cls: type[BaseModel], prefix: str, suffix: str) -> None:
        for key, info in cls.model_fields.items():
            if suffix and key == "name":
                continue
            if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
                write(info.annotation, f"{prefix}{key}.", suffix)
                continue
            default = write_value(info.get_default(call_default_factory=True))
            rows.append((f"{prefix}{key}{suffix}", default, str(info.description)))

    for key, info in RunConfig.model_fields.items():
        if key in VARIANTS:
            names = ", ".join(_variant_names(key))
            rows.append((f"{key}.name", _default_name(key), f"One of {names}."))
            for name, variant in VARIANTS[key].items():
                write(variant, f"{key}.", f" ({name})")
        elif isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            write(info.annotation, f"{key}.", "")
        else:
            rows.append((key, write_value(info.default), str(info.description)))
    return rows


# ── merging ──────────────────────────────────────────────────────────────────────────────────


def _merge_layers(layers: Iterable[Layer]) -> tuple[dict[str, Any], dict[KeyPath, Layer]]:
    """Merge deeply, later wins; a new variant drops what does not fit it (DESIGN, section 3)."""
    merged: dict[str, Any] = {s: {"name": _default_name(s)} for s in VARIANTS}
    owners: dict[KeyPath, Layer] = {}
    for layer in layers:
        for section in VARIANTS:
            said = layer.values.get(section)
            if isinstance(said, Mapping) and isinstance(said.get("name"), str):
                _drop_misfits(section, said["name"], merged, owners)
        _drop_shortcut(layer.values.get("data"), merged, owners)
        for path in _leaves(layer.values):
            says_something = _get(layer.values, path) != {}  # unlike `optimizer: {}`
            for other in list(owners):  # a scalar for a section, or a section for a scalar
                if says_something and (other[: len(path)] == path or path[: len(other)] == other):
                    del owners[other]
            owners[path] = layer
        merge_into(merged, layer.values)
    return merged, owners


@functools.cache
def _default_name(section: str) -> str:
    return str(RunConfig().model_dump()[section]["name"])


def _drop_misfits(
    section: str, name: str, merged: dict[str, Any], owners: dict[KeyPath, Layer]
) -> None:
    earlier = merged.get(section)
    if not isinstance(earlier, dict) or earlier.get("name") == name:
        return
    variant = VARIANTS[section].get(name)
    for key in list(earlier):
        if section == "model" or (variant is not None and key not in variant.model_fields):
            del earlier[key]
            for path in [p for p in owners if p[:2] == (section, key)]:
                del owners[path]


def _drop_shortcut(said: Any, merged: dict[str, Any], owners: dict[KeyPath, Layer]) -> None:
    """A layer that chooses another data set takes the shortcut of earlier layers away."""
    earlier = merged.get("data")
    if not isinstance(said, Mapping) or not isinstance(earlier, dict):
        return
    if said.get("dataset", SHORTCUT_DATASET) != SHORTCUT_DATASET and "shortcut" in earlier:
        del earlier["shortcut"]
        for path in [p for p in owners if p[:2] == ("data", "shortcut")]:
            del owners[path]


def _get(values: Any, path: KeyPath) -> Any:
    """The value under a path; an empty mapping where nothing is said."""
    for part in path:
        if not isinstance(values, Mapping):
            return values
        if part not in values:
            return {}
        values = values[part]
    return values


def _leaves(values: Mapping[str, Any], path: KeyPath = ()) -> Iterable[KeyPath]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)


def _origins(config: RunConfig, owners: Mapping[KeyPath, Layer]) -> dict[str, str]:
    origins = {}
    zoo_row = ZOO.get(config.model.name)
    for path in _leaves(config.model_dump(mode="json")):
        prefixes = [path[:i] for i in range(len(path), 0, -1)]
        spoken = [p for p in prefixes if p in owners and _get(owners[p].values, p) != {}]
        owner = owners[spoken[0]] if spoken else None
        origin = owner.label if owner else "default"
        if owner is None and path[0] == "model" and zoo_row and path[1] in zoo_row.fields:
            origin = f"zoo {config.model.name}"
        origins[".".join(map(str, path))] = origin
    return origins


# ── messages ─────────────────────────────────────────────────────────────────────────────────


def _near(word: str, known: Iterable[str], n: int = 1, cutoff: float = 0.5) -> list[str]:
    return difflib.get_close_matches(word, list(known), n=n, cutoff=cutoff)


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def _explain(details: Any, values: Mapping[str, Any], owners: Mapping[KeyPath, Layer]) -> str:
    """One line for one pydantic error: where, what was found, what is allowed."""
    path: KeyPath = tuple(details["loc"])
    if len(path) > 1 and path[0] in VARIANTS and path[1] in VARIANTS[str(path[0])]:
        path = (path[0], *path[2:])  # pydantic names the variant in between
    while path and isinstance(path[-1], int) and not isinstance(_get(values, path[:-1]), list):
        path = path[:-1]  # one number that stands for a list
    kind, context, got = details["type"], details.get("ctx", {}), details["input"]
    dotted = ".".join(str(p) if str(p).isprintable() else repr(p) for p in path) or "configuration"
    where = _where(path, owners) + dotted
    if kind == "extra_forbidden":
        return f"{where}: {_explain_unknown(path, values)}"
    if path and path[0] in VARIANTS and len(path) == 1 and not isinstance(got, Mapping):
        return f"{where}: got {describe_value(got)}, expected a section; write {dotted}.name=…"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        where = f"{_where((*path, 'name'), owners)}{dotted}.name"
        return f"{where}: {_explain_choice(got.get('name'), _variant_names(str(path[0])))}"
    if kind == "value_error":
        found = "" if isinstance(got, Mapping | BaseModel) else f"got {describe_value(got)}, "
        return f"{where}: {found}{context['error']}"
    if kind == "literal_error":
        options = [w.strip("'") for w in context["expected"].replace(" or ", ", ").split(", ")]
        return f"{where}: {_explain_choice(got, options)}"
    if kind == "missing":
        return f"{where}: is missing"
    if kind == "too_short" and got:  # its items are wrong, and have a line each
        return ""
    return f"{where}: got {describe_value(got)}, {_expected(kind, details['msg'], context, path)}"


def _explain_choice(got: Any, options: Sequence[str]) -> str:
    near = _near(got, options) if isinstance(got, str) else []
    return f"got {describe_value(got)}, allowed: {', '.join(options)}{_did_you_mean(near)}"


def _expected(kind: str, message: str, context: Mapping[str, Any], path: KeyPath) -> str:
    section = "expected a section (key: value)"
    plain = {
        "model_type": section,
        "model_attributes_type": section,
        "dict_type": section,
        "finite_number": "expected a finite number",
        "int_type": "expected a whole number",
        "float_type": "expected a number",
        "bool_type": "expected true or false",
        "string_type": "expected text (put it in quotes)",
        "string_too_short": "expected some text, or null",
        "tuple_type": "expected a list like [a, b]",
        "too_short": "expected at least one item",
    }
    if kind in plain:
        return plain[kind]
    if kind == "too_long":
        return f"expected at most {context['max_length']} items"
    if kind == "string_pattern_mismatch":
        if path == ("device",):
            return "allowed: auto, cpu, cuda, cuda:N, mps"
        more = " or / \\ # ? % :" if path[0] == "tracking" else ""
        return f"allowed: text without control characters{more}"
    expected = message.replace("Input should be ", "expected ")
    return expected[0].lower() + expected[1:]


def _where(path: KeyPath, owners: Mapping[KeyPath, Layer]) -> str:
    for end in range(len(path), 0, -1):
        for owned, layer in reversed(list(owners.items())):
            if owned[:end] == path[:end]:
                return f"{layer.where(path)}: "
    return ""


def _variant_names(section: str) -> list[str]:
    names = [*ZOO, *VARIANTS[section]] if section == "model" else [*VARIANTS[section]]
    return list(dict.fromkeys(names))


def _explain_unknown(path: KeyPath, values: Mapping[str, Any]) -> str:
    key = str(path[-1])
    known: list[str] = []
    if len(path) == 2 and path[0] in VARIANTS:
        section = str(path[0])
        name = _get(values, (section, "name"))
        known = list(VARIANTS[section][tag_of({"name": name})].model_fields)
        owners = [n for n, cls in VARIANTS[section].items() if key in cls.model_fields]
        if owners:
            return (
                f"{section} {name!r} has no such field (it belongs to {', '.join(owners)});"
                f" {name} has: {', '.join(known)}"
            )
    else:
        section_class: type[BaseModel] | None = RunConfig
        for i, part in enumerate(path[:-1]):
            if isinstance(part, str) and section_class is not None:
                section_class = _section_class(section_class, part, _get(values, path[: i + 1]))
        known = list(section_class.model_fields) if section_class else []
    if "." in key:
        nested = key.replace(".", ": {") + ": …" + "}" * key.count(".")
        return f"unknown key; in a file write {nested}"
    hint = _did_you_mean(_nearest_keys(key, known, top_level=len(path) == 1))
    return f"unknown key{hint}; known: {', '.join(known)}"


def _nearest_keys(key: str, known: Sequence[str], *, top_level: bool) -> list[str]:
    """The key that was meant: in this section, or by its full name in another one."""
    homes: dict[str, str] = {}
    for name, _, _ in settings_table():
        dotted = name.partition(" (")[0]
        homes.setdefault(dotted.rpartition(".")[2], dotted)
    if top_level and key in homes:
        return [homes[key]]
    near = _near(key, known, cutoff=0.7)
    if not near and key in homes:
        return [homes[key]]
    if not near and top_level:
        near = [homes[match] for match in _near(key, homes, cutoff=0.8)]
    return near or _near(key, known)


def _section_class(owner: type[BaseModel], key: str, values: Any) -> type[BaseModel] | None:
    """The class behind a nested field, looking through `| None` and lists."""
    if key not in owner.model_fields:
        return None
    if owner is RunConfig and key in VARIANTS:
        return VARIANTS[key].get(tag_of(values))
    pending: list[Any] = [owner.model_fields[key].annotation]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        pending += typing.get_args(annotation)
    return None
