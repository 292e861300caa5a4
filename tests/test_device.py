from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_wandb.config import RunConfig
from mnist_wandb.device import (
    Plan,
    available_devices,
    choose_plan,
    device_name,
    limit_threads,
    numeric_mode,
    resolve_device,
)
from mnist_wandb.errors import ConfigError
from mnist_wandb.loading import load_config
from mnist_wandb.settings import Launch

needs_no_gpu = pytest.mark.skipif(len(available_devices()) > 1, reason="there is a GPU")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def config(*overrides: str) -> RunConfig:
    return load_config("quickstart", overrides)


# ── choosing ─────────────────────────────────────────────────────────────────────────────────


@needs_no_gpu
def test_auto_chooses_the_cpu_where_there_is_no_gpu() -> None:
    assert resolve_device("auto") == (torch.device("cpu"), "auto: no GPU found")
    assert available_devices() == ["cpu"]


@needs_cuda
def test_auto_chooses_the_first_gpu() -> None:
    assert resolve_device("auto") == (torch.device("cuda:0"), "auto: the fastest device found")
    assert resolve_device("cuda") == (torch.device("cuda:0"), "as configured")
    assert choose_plan(config("device=cuda")).describe()["device_name"] != "cuda"


def test_cpu_is_everywhere() -> None:
    assert resolve_device("cpu") == (torch.device("cpu"), "as configured")
    assert "cpu" in available_devices()
    assert device_name(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps", "cuda:99"])
def test_device_that_is_not_there_is_an_error_that_lists_those_that_are(name: str) -> None:
    if name in available_devices():
        pytest.skip(f"{name} is there")
    listed = ", ".join(["auto", *available_devices()])
    with pytest.raises(ConfigError) as caught:
        choose_plan(config(f"device={name}"))
    assert str(caught.value) == f"device: {name} is not on this machine; available: {listed}"


CPU_PLAN = Plan(
    torch.device("cpu"),
    "as configured",
    "fp32",
    compile=False,
    cuda_graph=False,
    channels_last=False,
    optimizer_step="fused",
    allocator="default",
)
SECOND_OF_TWO = Launch(rank=1, size=2, local_rank=1, local_size=2)


@needs_no_gpu
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_several_processes_share_the_cpu_where_there_is_no_gpu(name: str) -> None:
    assert choose_plan(config(f"device={name}"), SECOND_OF_TWO).device == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_one_device_is_not_for_several_processes(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_plan(config(f"device={name}"), SECOND_OF_TWO)
    assert str(caught.value) == (
        f"device: {name} is one device, and torchrun has started 2 processes; allowed with several:"
        " auto, cpu, cuda (a GPU for each)"
    )


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_its_own_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The choice alone: this needs no GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    plan = choose_plan(config(f"device={name}"), SECOND_OF_TWO)
    assert (plan.device, plan.reason) == (torch.device("cuda:1"), "a GPU for each process")
    three = Launch(rank=1, size=3, local_rank=1, local_size=3)
    with pytest.raises(ConfigError) as caught:
        choose_plan(config(f"device={name}"), three)
    assert str(caught.value) == (
        "device: torchrun has started 3 processes on a machine with 2 GPUs; use --nproc-per-node=2"
        " or device=cpu"
    )


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as choices go; nothing can be computed on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        *[("linear", "tf32"), ("mlp_large", "tf32"), ("cnn_small", "tf32")],
        *[("cnn_valid", "bf16"), ("cnn_batchnorm", "bf16"), ("resnet", "bf16")],
    ],
)
def test_a_gpu_computes_wide_convolutions_in_bf16_and_the_rest_in_tf32(
    model: str, chosen: str
) -> None:
    assert choose_plan(config("device=cuda", f"model.name={model}")).precision == chosen
    compiled = choose_plan(config("device=cuda", f"model.name={model}", "training.compile=true"))
    assert compiled.precision == "bf16"
    for precision in ("fp32", "tf32", "bf16"):
        overrides = ("device=cuda", f"model.name={model}", f"training.precision={precision}")
        assert choose_plan(config(*overrides)).precision == precision


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_an_old_gpu_computes_in_fp32_only(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert choose_plan(config("device=cuda")).precision == "fp32"
    with pytest.raises(ConfigError) as caught:
        choose_plan(config("device=cuda", f"training.precision={precision}"))
    assert str(caught.value) == (f"training.precision: A GPU has no {precision}; use fp32 or auto")


def test_a_cpu_has_no_tf32() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_plan(config("device=cpu", "training.precision=tf32"))
    assert str(caught.value) == "training.precision: cpu has no tf32; use fp32 or auto"


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("overrides", "launch", "recorded"),
    [
        (("device=cuda",), None, True),
        (("device=cuda", 'optimizer={"name": "nadam"}'), None, True),
        (("device=cuda", 'optimizer={"name": "adagrad"}'), None, False),
        (("device=cuda", "training.compile=true"), None, False),
        (("device=cuda", "tracking.watch=true"), None, False),
        (("device=cuda",), Launch(rank=0, size=2, local_rank=0, local_size=1), False),
        (("device=cpu",), None, False),
    ],
)
def test_steps_are_recorded_on_a_gpu_where_a_graph_can_hold_them(
    overrides: tuple[str, ...], launch: Launch | None, recorded: bool
) -> None:
    plan = choose_plan(config(*overrides), launch)
    assert plan.cuda_graph is recorded
    assert plan.describe()["cuda_graph"] is recorded


# ── the plan ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("precision", "chosen"), [("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")]
)
def test_cpu_computes_in_fp32_unless_bf16_is_asked_for(precision: str, chosen: str) -> None:
    plan = choose_plan(config("device=cpu", f"training.precision={precision}"))
    assert plan.precision == chosen


@pytest.mark.parametrize(("value", "chosen"), [("auto", False), ("false", False), ("true", True)])
def test_model_is_compiled_on_the_cpu_only_when_asked(value: str, chosen: bool) -> None:
    assert choose_plan(config("device=cpu", f"training.compile={value}")).compile is chosen


@pytest.mark.parametrize(
    ("model", "channels_last"),
    [("linear", False), ("mlp_small", False), ("cnn_small", True), ("resnet", True)],
)
def test_convolutions_lie_channels_last(model: str, channels_last: bool) -> None:
    plan = choose_plan(config("device=cpu", f"model.name={model}"))
    assert plan.channels_last is channels_last
    format_name = "channels_last" if channels_last else "contiguous"
    assert plan.describe()["memory_format"] == format_name


def test_plan_describes_itself_in_plain_values() -> None:
    plan = Plan(
        torch.device("cpu"),
        "as configured",
        "bf16",
        compile=True,
        cuda_graph=False,
        channels_last=False,
        optimizer_step="foreach",
        allocator="default",
    )
    assert plan.describe() == {
        "device": "cpu",
        "device_reason": "as configured",
        "device_name": "cpu",
        "precision": "bf16",
        "compile": True,
        "cuda_graph": False,
        "memory_format": "contiguous",
        "num_threads": torch.get_num_threads(),
        "optimizer_step": "foreach",
        "allocator": "default",
    }


# ── memory and threads ───────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_memory_that_is_freed_stays_in_the_process() -> None:
    code = """
import resource, torch
from mnist_wandb.device import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()  # the first one takes the memory
print(kept, faults(), sep=", ")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split(", ")
    assert kept == "kept in the process"
    assert int(faults) < 1000  # five times 64 MiB are 81,920 pages


@pytest.mark.parametrize(
    ("limit", "threads"),
    [
        ("max 100000", 4),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("300000 100000", 3),
        ("800000 100000", 4),
        ("nonsense", 4),
    ],
)
def test_a_container_gets_no_more_threads_than_it_has_cores(
    limit: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_wandb.device.CPU_LIMIT", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(limit + "\n")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        limit_threads()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# ── determinism ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's global switches are put back, whatever the test does."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before, benchmark = current_switches()
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cudnn.benchmark = benchmark


def current_switches() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("before", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("enabled", [True, False])
def test_numeric_mode_puts_the_global_switches_back(
    enabled: bool, before: tuple[bool, bool]
) -> None:
    memory: Any = torch.utils.deterministic
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]
    with numeric_mode(CPU_PLAN, deterministic=enabled):
        assert current_switches() == (enabled, not enabled)
        assert not memory.fill_uninitialized_memory
    assert current_switches() == before
    assert memory.fill_uninitialized_memory
    with pytest.raises(KeyError), numeric_mode(CPU_PLAN, deterministic=enabled):
        raise KeyError
    assert current_switches() == before


@pytest.mark.parametrize(
    ("device", "precision", "chosen"),
    [
        ("cuda:0", "fp32", "ieee"),
        ("cuda:0", "tf32", "tf32"),
        ("cuda:0", "bf16", "ieee"),
        ("cpu", "fp32", None),
    ],
)
def test_float32_on_a_gpu_is_tf32_only_where_that_is_chosen(
    device: str, precision: str, chosen: str | None
) -> None:
    cudnn: Any = torch.backends.cudnn
    backends: Any = (torch.backends.cuda.matmul, cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    plan = replace(CPU_PLAN, device=torch.device(device), precision=precision)
    with numeric_mode(plan, deterministic=True):
        found = [backend.fp32_precision for backend in backends]
        assert found == ([chosen, chosen] if chosen else before)
    assert [backend.fp32_precision for backend in backends] == before


@pytest.mark.usefixtures("switches")
def test_numeric_mode_refuses_where_the_user_only_wants_a_warning() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    with numeric_mode(CPU_PLAN, deterministic=True):
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.usefixtures("switches")
def test_numeric_mode_refuses_an_operation_without_a_deterministic_form() -> None:
    def put() -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    with (
        numeric_mode(CPU_PLAN, deterministic=True),
        pytest.raises(RuntimeError, match="deterministic"),
    ):
        put()
    with numeric_mode(CPU_PLAN, deterministic=False):
        put()


@pytest.mark.usefixtures("switches")
def test_a_plan_keeps_the_users_cublas_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_plan(RunConfig())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    choose_plan(RunConfig())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
