"""The plan of the house, read from the sources: who may import whom, and what is where."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mnist_wandb

PACKAGE = Path(mnist_wandb.__file__).parent
ROWS = [
    ("errors", "signals", "forking"),
    ("layers",),
    ("config", "distributions", "hyperband", "sweepyaml"),
    ("loading", "sweepfile"),
    ("settings", "metrics", "options", "agent", "sweepschema", "significance", "charts"),
    ("runs", "sweep_messages"),
    ("records", "background", "study"),
    ("compare",),
    ("seedgroup",),
    ("augment", "pictures", "idx", "models", "optim", "ranks", "tracking", "drawing"),
    ("device", "folders", "jobs"),
    ("sources", "stepgraph"),
    ("data",),
    ("checkpoint", "remote", "gallery"),
    ("evaluate", "onnx_export", "report"),
    ("train",),
    ("ensemble", "experiment", "explore", "checks"),
    ("seeds", "sync", "sweep_template"),
    ("sweep_worker",),
    ("sweep",),
    ("display",),
    ("commands_compare", "commands_lab", "commands_seeds", "commands_sweep"),
    ("cli",),
]
"""A module imports from earlier rows only, never sideways."""
ROW = {module: index for index, row in enumerate(ROWS) for module in row}
LIGHT = (
    "errors",
    "signals",
    "forking",
    "layers",
    "config",
    "distributions",
    "hyperband",
    "sweepyaml",
    "loading",
    "sweepfile",
    "agent",
    "sweepschema",
    "settings",
    "metrics",
    "runs",
    "sweep_messages",
    "options",
    "significance",
    "records",
    "compare",
    "commands_compare",
    "commands_lab",
    "commands_seeds",
    "commands_sweep",
    "seedgroup",
    "cli",
)
"""Imported without torch and wandb, so that help and configuration errors come at once."""
HOMES = {
    "wandb": {"tracking", "remote"},
    "typer": {
        "cli",
        "commands_compare",
        "commands_lab",
        "commands_seeds",
        "commands_sweep",
        "options",
    },
    "rich": {"cli", "display"},
    "jinja2": {"report"},
    "vl_convert": {"report"},
    "onnx": {"onnx_export"},
    "onnxruntime": {"onnx_export"},
    "optuna": {"study"},
    "sqlalchemy": {"study"},
    "multiprocessing": {
        "signals",
        "forking",
        "sweep",
        "sweep_template",
        "sweep_worker",
        "folders",
    },
}
"""Packages that stay in one room."""
UNUSED = {"matplotlib", "sklearn", "pandas", "scipy"}
MAX_LINES = 60

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.glob("*.py"))}
TREES = {module: ast.parse(source) for module, source in SOURCES.items()}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
every_module = pytest.mark.parametrize("module", TREES)


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run, those inside of functions as well; not what only type checkers see."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from walk(other)
        else:
            yield from walk(child)


def imports_of(module: str) -> Iterator[str]:
    """Dotted names of what a module imports; a public name of the package counts as its home."""
    for node in walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py:{node.lineno}: imports are absolute"
            if node.module == "mnist_wandb":
                homes = mnist_wandb._HOMES
                yield from (f"mnist_wandb.{homes.get(a.name, a.name)}" for a in node.names)
            else:
                yield str(node.module)


def test_every_module_has_its_row() -> None:
    assert set(TREES) - {"__init__", "__main__"} == set(ROW)
    assert [path.name for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE] == []


@pytest.mark.parametrize("module", ROW)
def test_modules_import_from_earlier_rows_only(module: str) -> None:
    imported = {
        name.split(".")[1] for name in imports_of(module) if name.startswith("mnist_wandb.")
    }
    assert sorted(m for m in imported - {"__version__"} if ROW[m] >= ROW[module]) == []


@every_module
def test_packages_stay_in_their_rooms(module: str) -> None:
    tops = {name.partition(".")[0] for name in imports_of(module)}
    assert sorted(top for top in tops if module not in HOMES.get(top, {module})) == []
    assert sorted(tops & UNUSED) == []


def test_light_modules_import_neither_torch_nor_wandb() -> None:
    code = f"""
import importlib, sys
for module in {("", *(f".{name}" for name in LIGHT))}:
    importlib.import_module("mnist_wandb" + module)
    heavy = {{"torch", "torchvision", "wandb", "optuna", "sqlalchemy"}} & set(sys.modules)
    if heavy:
        sys.exit(f"mnist_wandb{{module}} imports {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@every_module
def test_only_settings_reads_the_environment(module: str) -> None:
    """The exception: device.py tells cuBLAS to be deterministic."""
    if module == "settings":
        return
    used = [
        ast.unparse(node)
        for node in walk(TREES[module])
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os")
        or (isinstance(node, ast.Attribute) and node.attr in ("putenv", "unsetenv"))
    ]
    writes = [
        ast.unparse(node)
        for node in walk(TREES[module])
        if isinstance(node, ast.Call)
        and ast.unparse(node).startswith("os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG'")
    ]
    assert len(used) == (len(writes) if module == "device" else 0), used


@every_module
def test_nothing_prints_or_exits_behind_the_command_line(module: str) -> None:
    calls = [ast.unparse(n.func) for n in walk(TREES[module]) if isinstance(n, ast.Call)]
    allowed = {"__main__": {"sys.exit"}, "cli": {"sys.stderr.write"}, "signals": {"os._exit"}}.get(
        module, set()
    )
    forbidden = {"print", "pprint", "sys.exit", "exit", "quit", "os._exit", "SystemExit", "input"}
    forbidden |= {"sys.stdout.write", "sys.stderr.write"}
    assert sorted((set(calls) & forbidden) - allowed) == []


@every_module
def test_functions_are_short(module: str) -> None:
    lengths = {
        f"{module}.py:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for node in ast.walk(TREES[module])
        if isinstance(node, FUNCTIONS) and node.end_lineno is not None
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def undocumented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)) and not child.name.startswith("_"):
            if not ast.get_docstring(child):
                yield prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{prefix}{child.name}.")


@every_module
def test_everything_public_is_documented(module: str) -> None:
    assert ast.get_docstring(TREES[module])
    assert list(undocumented(TREES[module], f"{module}.")) == []


# ── public names ─────────────────────────────────────────────────────────────────────────────


def test_public_names_are_sorted_and_can_be_imported() -> None:
    assert mnist_wandb.__all__ == sorted(mnist_wandb.__all__)
    assert set(mnist_wandb.__all__) <= set(dir(mnist_wandb))
    for name in mnist_wandb.__all__:
        found = getattr(mnist_wandb, name)
        home = importlib.import_module(f"mnist_wandb.{mnist_wandb._HOMES[name]}")
        assert inspect.isclass(found) or inspect.isfunction(found), name
        assert found.__module__ == home.__name__, name
        assert found.__name__ == name


def test_public_names_are_those_that_type_checkers_see() -> None:
    seen = [
        (alias.name, str(node.module).removeprefix("mnist_wandb."))
        for node in ast.walk(TREES["__init__"])
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mnist_wandb.")
        for alias in node.names
    ]
    assert dict(seen) == mnist_wandb._HOMES
    assert sorted(dict(seen)) == mnist_wandb.__all__


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mnist_wandb' has no attribute 'nonsense'"):
        _ = mnist_wandb.nonsense
    assert not hasattr(mnist_wandb, "__path_to_nowhere__")


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_train_and_evaluate_are_functions_though_modules_have_these_names(name: str) -> None:
    module = importlib.import_module(f"mnist_wandb.{name}")
    function = getattr(mnist_wandb, name)
    assert inspect.ismodule(module)
    assert inspect.isfunction(function)
    assert function is getattr(module, name)
    scope: dict[str, object] = {}
    exec(f"import mnist_wandb.{name}\nfrom mnist_wandb import {name} as found", scope)
    assert scope["found"] is function
