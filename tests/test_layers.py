"""YAML as people mean it, and one grammar for overrides."""

from __future__ import annotations

import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_wandb.errors import ConfigError
from mnist_wandb.layers import (
    Layer,
    describe_value,
    merge_into,
    parse_overrides,
    parse_value,
    parse_yaml,
    read_sweep_parameters,
    read_yaml,
)

fuzz = settings(max_examples=150, deadline=None, database=None)


def yaml_error(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    return str(caught.value)


def override_error(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(arguments)
    return str(caught.value)


# ── YAML ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-3", 0.001),
        ("1e-05", 1e-5),
        ("1.0e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("+5", 5),
        ("010", 10),
        ("-010", -10),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("", None),
        ("~", None),
        ("null", None),
        ("NULL", None),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("1e", "1e"),
        (".", "."),
        ("nan", "nan"),
        ('"1e-3"', "1e-3"),
        ("'true'", "true"),
        ("[1, on, .5]", [1, "on", 0.5]),
        ("{b: {c: 1e-3}}", {"b": {"c": 0.001}}),
    ],
)
def test_yaml_scalars_are_what_people_mean(written: str, meant: Any) -> None:
    value = parse_yaml(f"a: {written}", "f.yaml").values["a"]
    assert value == meant
    assert type(value) is type(meant)


@pytest.mark.parametrize(("written", "sign"), [(".inf", 1), ("+.INF", 1), ("-.inf", -1)])
def test_yaml_infinity_is_a_number_for_validation_to_reject(written: str, sign: int) -> None:
    assert parse_yaml(f"a: {written}", "f.yaml").values == {"a": sign * math.inf}


def test_yaml_nan_is_a_number_for_validation_to_reject() -> None:
    assert math.isnan(parse_yaml("a: .nan", "f.yaml").values["a"])


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "null", "---\n"])
def test_empty_yaml_says_nothing(text: str) -> None:
    assert parse_yaml(text, "f.yaml").values == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3:1: not valid YAML: duplicate key 'a' (first in line 1)"),
        ('"a": 1\na: 2', "f.yaml:2:1: not valid YAML: duplicate key 'a' (first in line 1)"),
        (
            "t:\n  e: 1\n  x: 0\n  e: 2\n",
            "f.yaml:4:3: not valid YAML: duplicate key 'e' (first in line 2)",
        ),
        ("a: {b: 1, b: 1}", "f.yaml:1:11: not valid YAML: duplicate key 'b' (first in line 1)"),
        ("a: {b: 1\n", "f.yaml:2:1: not valid YAML: expected ',' or '}'"),
        ("a: 1\n b: 2", "f.yaml:2:3: not valid YAML: mapping values are not allowed here"),
        ("\ta: 1", "f.yaml:1:1: not valid YAML: found character '\\t'"),
        ("a: *x", "f.yaml:1:4: not valid YAML: found undefined alias 'x'"),
        ("a: &x {b: *x}", "f.yaml:1:4: not valid YAML: an alias of itself"),
        ("a: &x [*x]", "f.yaml:1:4: not valid YAML: an alias of itself"),
        ("a: 1\n---\nb: 2", "f.yaml:2:1: not valid YAML: but found another document"),
        ("? [a]\n: 1", "f.yaml:1:3: not valid YAML: a key must be plain text"),
        ("~: 1", "f.yaml:1:1: not valid YAML: a key must be plain text"),
        ("<<: 1", "f.yaml:1:5: not valid YAML: expected a mapping or list of mappings"),
        (
            "a: !!python/object:os.system x",
            "f.yaml:1:4: not valid YAML: the tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
        ("a: !thing x", "f.yaml:1:4: not valid YAML: the tag '!thing' is not allowed here"),
        (
            "a: !!timestamp x",
            "f.yaml:1:4: not valid YAML: the tag 'tag:yaml.org,2002:timestamp' is not allowed",
        ),
        ("a:\n  b: !!bool maybe", "f.yaml:2:6: not valid YAML: 'maybe' is not of type bool"),
        ('a: !!float ""', "f.yaml:1:4: not valid YAML: '' is not of type float"),
        ("a: !!int 1.5", "f.yaml:1:4: not valid YAML: '1.5' is not of type int"),
        ("a: !!str [1]", "f.yaml:1:4: not valid YAML: not a value of type str"),
        ("a: !!seq x", "f.yaml:1:4: not valid YAML: not a list"),
        ("a: !!map [1]", "f.yaml:1:4: not valid YAML: not a mapping"),
        ("a: !!map x", "f.yaml:1:4: not valid YAML: not a mapping"),
        ("!!map [1]", "f.yaml:1:1: not valid YAML: not a mapping"),
        ("a: \x00", "f.yaml: not valid YAML: unacceptable character #x0000"),
        ("a: " + "9" * 5000, "f.yaml:1:4: not valid YAML: '9999"),
        ("a: " + "[" * 1100, "f.yaml: not valid YAML: maximum recursion depth exceeded"),
        ("- 1\n- 2", "f.yaml: found the list [1, 2], expected sections like `training: {…}`"),
        ("quickstart", "f.yaml: found the text 'quickstart', expected sections like"),
        ("3", "f.yaml: found 3, expected sections like"),
        ("true", "f.yaml: found true, expected sections like"),
    ],
)
def test_broken_yaml_names_line_and_column(text: str, message: str) -> None:
    assert yaml_error(text).startswith(message)
    assert "\n" not in yaml_error(text)


@pytest.mark.parametrize(
    ("start", "level"),
    [
        ("[x, x, x]", "[{}]"),
        ("{x: 1}", "{{k: [{}]}}"),
        ("{x: 1}", "{{<<: [{}]}}"),
        ("{x: 1, x: 2}", "{{k: [{}], k: 1}}"),
    ],
)
def test_yaml_that_grows_by_aliases_of_aliases_is_refused_at_once(start: str, level: str) -> None:
    lines = [f"a0: &a0 {start}"]
    for i in range(1, 8):
        lines.append(f"a{i}: &a{i} " + level.format(", ".join([f"*a{i - 1}"] * 9)))
    begun = time.process_time()
    assert yaml_error("\n".join(lines)).startswith("f.yaml")
    assert time.process_time() - begun < 2


def test_yaml_anchors_and_merge_keys_work() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n"
    assert parse_yaml(text, "f.yaml").values == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 2},
    }


def test_layer_knows_where_each_key_stands() -> None:
    layer = parse_yaml("a:\n  b: [1,\n   {c: 2}]\n", "f.yaml")
    assert layer.where(("a",)) == "f.yaml:1:1"
    assert layer.where(("a", "b")) == "f.yaml:2:3"
    assert layer.where(("a", "b", 1, "c")) == "f.yaml:3:5"
    assert layer.where(("a", "b", 1, "missing")) == "f.yaml:3:4"
    assert layer.where(("nowhere",)) == "f.yaml"
    assert Layer("command line", {"a": 1}).where(("a",)) == "command line"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "f.yaml: cannot be read: No such file or directory"),
        ("a: é".encode("latin-1"), "f.yaml: not a text file in UTF-8"),
        (b"\xff\xfe\x00", "f.yaml: not a text file in UTF-8"),
        (b"a: 1\na: 2", "f.yaml:2:1: not valid YAML: duplicate key 'a' (first in line 1)"),
    ],
)
def test_read_yaml_names_the_file_it_cannot_read(content: bytes | None, message: str) -> None:
    if content is not None:
        Path("f.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(Path("f.yaml"))
    assert str(caught.value) == message


def test_read_yaml_rejects_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"^here: cannot be read: Is a directory$"):
        read_yaml(Path(), "here")


def test_read_yaml_accepts_a_byte_order_mark() -> None:
    Path("f.yaml").write_bytes(b"\xef\xbb\xbfa: \xc3\xa9")
    assert read_yaml(Path("f.yaml")).values == {"a": "é"}


@fuzz
@given(st.text("ab:{}[]-#&*!?|>'\"%@`,\n \t~<=0.1e\\é\x85\u2028\x07", max_size=40) | st.text())
def test_parse_yaml_gives_a_layer_or_a_config_error(text: str) -> None:
    message = "f.yaml"
    try:
        parse_yaml(text, "f.yaml")
    except ConfigError as error:
        message = str(error)
    assert message.startswith("f.yaml")


# ── values ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("+1", 1),
        ("1e-3", 0.001),
        ("1e-05", 1e-5),
        (".5", 0.5),
        ("5.", 5.0),
        (" 1 ", 1),
        ("1_000", 1000),
        ("true", True),
        ("True", True),
        ("false", False),
        ("False", False),
        ("null", None),
        ("None", None),
        ("[64, 32]", [64, 32]),
        ("(64, 32)", [64, 32]),
        ("64, 32", [64, 32]),
        ('{"a": {"b": [1]}}', {"a": {"b": [1]}}),
        ("{'a': (1, None, True)}", {"a": [1, None, True]}),
        ('"1"', "1"),
        ("'1'", "1"),
        ("abc", "abc"),
        ("on", "on"),
        ("no", "no"),
        ("", ""),
        ("  ", "  "),
        ("010", "010"),
        ("1+2", "1+2"),
        ("1j", "1j"),
        ('b"x"', 'b"x"'),
        ("[lab, first]", ["lab", "first"]),
        ("[1e-3, on, 010, ~]", [0.001, "on", 10, None]),
        ("{name: sgd, lr: 1e-3}", {"name": "sgd", "lr": 0.001}),
        ("{1: 2}", {"1": 2}),
        ("{a: 1, a: 2}", "{a: 1, a: 2}"),
        ("[*a]", "[*a]"),
        ("[!thing a]", "[!thing a]"),
        ("...", "..."),
        ("__import__('os')", "__import__('os')"),
        ("[1", "[1"),
        ("a\x00b", "a\x00b"),
        ("\x00", "\x00"),
        ("\ud800", "\ud800"),
        ("1" * 4300, int("1" * 4300)),
        ("9" * 5000, "9" * 5000),
        ("[" * 100_000, "[" * 100_000),
        ("(" * 5000, "(" * 5000),
        ("-" * 5000, "-" * 5000),
    ],
    ids=lambda v: ascii(v)[:20],
)
def test_parse_value_reads_json_then_python_then_yaml_then_text(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["nan", "NaN", "-nan"])
def test_parse_value_reads_nan_as_a_number_for_validation_to_reject(text: str) -> None:
    assert math.isnan(parse_value(text))


@pytest.mark.parametrize(
    ("text", "sign"),
    [("inf", 1), ("+Inf", 1), ("Infinity", 1), ("1e400", 1), ("-inf", -1), ("-Infinity", -1)],
)
def test_parse_value_reads_infinity_as_a_number_for_validation_to_reject(
    text: str, sign: int
) -> None:
    assert parse_value(text) == sign * math.inf


@pytest.mark.parametrize(
    ("text", "value"),
    [(r"\d", r"\d"), (r"'\d'", r"\d"), (r"['\q', 1]", [r"\q", 1]), ("1is 2", "1is 2")],
)
def test_parse_value_says_nothing_about_odd_literals(text: str, value: Any) -> None:
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert parse_value(text) == value
    assert caught == []


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@fuzz
@given(json_values)
def test_parse_value_reads_back_what_json_and_python_write(value: Any) -> None:
    assert parse_value(json.dumps(value)) == value
    if not isinstance(value, str):  # str() of a text has no quotes
        assert parse_value(str(value)) == value


# ── overrides ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], {}),
        (["training.epochs=5"], {"training": {"epochs": 5}}),
        (["--training.epochs=5"], {"training": {"epochs": 5}}),
        (["--training.epochs", "5"], {"training": {"epochs": 5}}),
        (["--optimizer.lr", "-1"], {"optimizer": {"lr": -1}}),
        (["--model.hidden_sizes", "[64, 32]"], {"model": {"hidden_sizes": [64, 32]}}),
        (["+training.epochs=5"], {"training": {"epochs": 5}}),
        (["++training.epochs=5"], {"training": {"epochs": 5}}),
        (["--tracking.watch"], {"tracking": {"watch": True}}),
        (["--tracking.watch", "--seed=3"], {"tracking": {"watch": True}, "seed": 3}),
        (["--tracking.watch", "seed=3"], {"tracking": {"watch": True}, "seed": 3}),
        (["--name", "x", "seed=3"], {"name": "x", "seed": 3}),
        (['{"seed": 1, "training": {"epochs": 5}}'], {"seed": 1, "training": {"epochs": 5}}),
        (['{"training.epochs": 5}'], {"training": {"epochs": 5}}),
        (["{'seed': None, 'tracking.watch': True}"], {"seed": None, "tracking": {"watch": True}}),
        (["{seed: 1, tracking.watch: true}"], {"seed": 1, "tracking": {"watch": True}}),
        (["{}"], {}),
        (['--_wandb={"x": 1}'], {}),
        (["--_wandb={}", "seed=1"], {"seed": 1}),
        (['{"_wandb": {}, "seed": 1}'], {"seed": 1}),
        (["seed=1", "seed=2"], {"seed": 2}),
        (["seed=1", '{"seed": 2}', "--seed=3"], {"seed": 3}),
        (["a.b=1", "a.c=2", "a.b=3"], {"a": {"b": 3, "c": 2}}),
        (['a={"b": {"x": 1}}', 'a={"b": {"y": 2}}'], {"a": {"b": {"x": 1, "y": 2}}}),
        (["a.b=1", "a=null"], {"a": None}),
        (["a=1", "a.b=2"], {"a": {"b": 2}}),
        (["a=[1]", "a=[2]"], {"a": [2]}),
        (["name=a=b"], {"name": "a=b"}),
        (["name="], {"name": ""}),
        (["name=x.json"], {"name": "x.json"}),
        (["tracking.tags=[lab, first]"], {"tracking": {"tags": ["lab", "first"]}}),
        (["--tracking.tags", "[lab, 1e-3]"], {"tracking": {"tags": ["lab", 0.001]}}),
        (["training.epochs=[!!bool x]"], {"training": {"epochs": "[!!bool x]"}}),
        (["a.b.c.d.e.f.g.h=1"], {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": 1}}}}}}}}),
    ],
)
def test_parse_overrides_reads_every_documented_form(
    arguments: list[str], values: dict[str, Any]
) -> None:
    layer = parse_overrides(arguments)
    assert layer.values == values
    assert layer.label == "command line"


def test_parse_overrides_reads_a_json_file_between_others() -> None:
    Path("args.json").write_text('{"training.epochs": 3, "optimizer": {"name": "sgd"}, "seed": 1}')
    assert parse_overrides(["seed=0", "args.json", "training.epochs=4"]).values == {
        "seed": 1,
        "training": {"epochs": 4},
        "optimizer": {"name": "sgd"},
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        *(
            (bad, f"command line: cannot read {bad!r}; write section.field=value")
            for bad in (
                *("quickstart", "", "-", "-a", "-a=1", "=", "=1", "--", "--=1", ".a=1", "a..b=1"),
                *("a.=1", "a-b=1", "--a-b=1", "a b=1", "a.0=1", "a[0]=1", "é=1", "\x00=1", "+a"),
                *('{"": 1}', '{"a..b": 1}'),
            )
        ),
        ('{"a": 1', "command line: '{\"a\": 1' is not a JSON object"),
        ("{a: 1, a: 2}", "command line: '{a: 1, a: 2}' is not a JSON object"),
        ("{a: !!bool x}", "command line: '{a: !!bool x}' is not a JSON object"),
        (".".join(["a"] * 1500) + "=1", "command line: cannot read 'a.a.a.a.a.a.a.a.a.a.a.a.a"),
        ("--" + ".".join(["a"] * 1500), "command line: cannot read '--a.a.a.a.a.a.a.a.a.a.a.a"),
        ("missing.json", "command line: missing.json: cannot be read: "),
        ("\x00.json", "command line: '\\x00.json': cannot be read: "),
        ("list.json", "command line: 'list.json' is not a JSON object"),
        ("broken.json", "command line: 'broken.json' is not a JSON object"),
        ("binary.json", "command line: binary.json: cannot be read: "),
    ],
)
def test_parse_overrides_rejects_other_forms_and_shows_the_right_one(
    argument: str, message: str
) -> None:
    Path("list.json").write_text("[1]")
    Path("broken.json").write_text('{"a": ')
    Path("binary.json").write_bytes(b"\xff\xfe")
    error = override_error("seed=1", argument, "training.epochs=1")
    assert error.startswith(message)
    assert len(error) < 200


def test_parse_overrides_gives_an_example() -> None:
    assert override_error("mnist") == (
        "command line: cannot read 'mnist'; write section.field=value,"
        " for example training.epochs=5"
    )


@fuzz
@given(
    st.lists(
        st.text(max_size=12)
        | st.builds(
            "{}{}{}".format,
            st.sampled_from(["", "--", "+", "++", "-"]),
            st.sampled_from(["a", "a.b", "a.b.c", "", "a..b"]),
            st.text(max_size=12).map("={}".format) | st.just(""),
        )
        | json_values.map(json.dumps),
        max_size=5,
    )
)
def test_parse_overrides_gives_a_layer_or_a_config_error(arguments: list[str]) -> None:
    message = "command line: "
    try:
        parse_overrides(arguments)
    except ConfigError as error:
        message = str(error)
    assert message.startswith("command line: ")


def test_merge_into_merges_mappings_and_replaces_the_rest() -> None:
    target = {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}
    update = {"a": {"y": [3]}, "b": {"w": 2}, "c": None, "d": {"v": {"u": 1}}}
    merge_into(target, update)
    assert target == {"a": {"x": 1, "y": [3]}, "b": {"w": 2}, "c": None, "d": {"v": {"u": 1}}}
    target["d"]["v"]["u"] = 2  # type: ignore[index]
    assert update["d"] == {"v": {"u": 1}}, "the merged mapping must be a copy"


# ── sweep parameters ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("seed: {value: 3}", {"seed": 3}),
        ("seed: {desc: a seed, value: null}", {"seed": None}),
        ("wandb_version: 1\nseed: {value: 3}", {"seed": 3}),
        ("_wandb: {value: {}}\nseed: {value: 3}", {"seed": 3}),
        (
            "training.epochs: {value: 5}\ntraining.loss: {value: mse}",
            {"training": {"epochs": 5, "loss": "mse"}},
        ),
        (
            "optimizer: {value: {name: sgd, lr: 1e-3}}\noptimizer.momentum: {value: .5}",
            {"optimizer": {"name": "sgd", "lr": 0.001, "momentum": 0.5}},
        ),
    ],
)
def test_read_sweep_parameters_reads_dotted_and_nested_keys(
    text: str, values: dict[str, Any]
) -> None:
    Path("sweep.yaml").write_text(text)
    layer = read_sweep_parameters(Path("sweep.yaml"))
    assert layer.values == values
    assert layer.label == "sweep parameters"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 3", "sweep parameters:1:1: seed: expected a mapping with `value`"),
        (
            "wandb_version: 1\nseed: {desc: x}",
            "sweep parameters:2:1: seed: expected a mapping with `value`",
        ),
        (
            "training: {epochs: {value: 1}}",
            "sweep parameters:1:1: training: expected a mapping with `value`",
        ),
        (
            "seed: {value: 1}\nseed: {value: 2}",
            "sweep parameters:2:1: not valid YAML: duplicate key 'seed' (first in line 1)",
        ),
        ("- seed", "sweep parameters: found the list ['seed'], expected sections"),
        (
            "seed: {value: 1}\ntraining..epochs: {value: 2}",
            "sweep parameters:2:1: cannot read 'training..epochs'; write section.field=value",
        ),
        ("a b: {value: 1}", "sweep parameters:1:1: cannot read 'a b'; write section.field=value"),
    ],
)
def test_read_sweep_parameters_rejects_another_form(text: str, message: str) -> None:
    Path("sweep.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_sweep_parameters(Path("sweep.yaml"))
    assert str(caught.value).startswith(message)


def test_read_sweep_parameters_rejects_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"^sweep parameters: cannot be read: No such file"):
        read_sweep_parameters(Path("missing.yaml"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("abc", "the text 'abc'"),
        ({"a": 1}, "a mapping"),
        ([1, 2], "the list [1, 2]"),
        ((1, 2), "the list [1, 2]"),
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (3, "3"),
        (0.5, "0.5"),
        (math.nan, "nan"),
        (10**5000, "a number of thousands of digits"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_describe_value_speaks_yaml(value: Any, words: str) -> None:
    assert describe_value(value) == words


def test_describe_value_is_short() -> None:
    assert all(len(describe_value(v)) < 80 for v in ("x" * 999, ["x" * 999], 10**999))
