"""Where a run computes, and what is chosen automatically for that device."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from mnist_wandb.config import CnnConfig, ResnetConfig, RunConfig
from mnist_wandb.errors import ConfigError
from mnist_wandb.optim import can_be_recorded, step_kind
from mnist_wandb.settings import Launch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt` (malloc.h; see mallopt(3))."""
HEAP_STEP_BYTES = 64 * 2**20
BF16_CHANNELS = 64
"""Convolutions to so many channels gain more from bf16 than its casts cost."""
AMPERE = (8, 0)
"""The generation from which on NVIDIA's cards have TF32 and bf16, as a compute capability."""
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Plan:
    """How a configuration runs on this machine.

    Attributes:
        device: the torch device.
        reason: why this device, in a few words.
        precision: "fp32", "tf32" (matrix products and convolutions of a GPU) or "bf16" (autocast of
            the forward pass).
        compile: whether the model goes through `torch.compile`.
        cuda_graph: whether steps are recorded as CUDA graphs; see `stepgraph.py`.
        channels_last: whether images and convolution weights lie channels-last in memory.
        optimizer_step: "fused" or "foreach"; see `optim.step_kind`.
        allocator: what happens to memory that torch frees; see `keep_freed_memory`.
    """

    device: torch.device
    reason: str
    precision: str
    compile: bool
    cuda_graph: bool
    channels_last: bool
    optimizer_step: str
    allocator: str

    def describe(self) -> dict[str, Any]:
        """The choices as plain values, for people and for environment.json."""
        return {
            "device": str(self.device),
            "device_reason": self.reason,
            "device_name": device_name(self.device),
            "precision": self.precision,
            "compile": self.compile,
            "cuda_graph": self.cuda_graph,
            "memory_format": "channels_last" if self.channels_last else "contiguous",
            "num_threads": torch.get_num_threads(),
            "optimizer_step": self.optimizer_step,
            "allocator": self.allocator,
        }


def choose_plan(config: RunConfig, launch: Launch | None = None) -> Plan:
    """Decide everything that the configuration leaves to the machine, and set the process up.

    Args:
        config: a validated configuration.
        launch: which process of several this is; None for the only one.

    Raises:
        ConfigError: a device or precision was asked for that is not there.
    """
    if launch is None:
        device, reason = resolve_device(config.device)
    else:
        device, reason = _resolve_own_device(config.device, launch)
    limit_threads()
    if config.training.deterministic:
        # cuBLAS is deterministic only with a fixed workspace; read when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    compiles = config.training.compile is True
    return Plan(
        device=device,
        reason=reason,
        precision=choose_precision(config, device),
        # Compiling takes longer than any preset saves by it, so `auto` leaves it off.
        compile=compiles,
        cuda_graph=(
            device.type == "cuda"
            and launch is None
            and not compiles
            and not config.tracking.watch  # which reads the gradients in each step
            and can_be_recorded(config.optimizer)
        ),
        channels_last=isinstance(config.model, CnnConfig | ResnetConfig) and device.type != "mps",
        optimizer_step=step_kind(config.optimizer, device.type),
        allocator=keep_freed_memory(),
    )


def choose_precision(config: RunConfig, device: torch.device) -> str:
    """The precision of a run: as configured, or what is fastest for its net on the device.

    Raises:
        ConfigError: the device cannot compute in the precision that was asked for.
    """
    precision = config.training.precision
    on_gpu = device.type == "cuda"
    has_both = on_gpu and torch.cuda.get_device_capability(device) >= AMPERE
    if precision == "auto":
        return _fastest_precision(config) if has_both else "fp32"
    if (precision == "tf32" or (precision == "bf16" and on_gpu)) and not has_both:
        raise ConfigError(
            f"training.precision: {device_name(device)} has no {precision}; use fp32 or auto"
        )
    return precision


def _fastest_precision(config: RunConfig) -> str:
    """What is fastest on an H100 (docs/speed.md): bf16 casts weights and images in each step."""
    if config.training.compile is True:  # which torch 2.9 and 2.10 refuse with TF32
        return "bf16"
    model = config.model
    widths: tuple[int, ...] = ()
    if isinstance(model, CnnConfig):
        widths = tuple(block.channels for block in model.blocks)
    elif isinstance(model, ResnetConfig):
        widths = model.widths
    return "bf16" if max(widths, default=0) >= BF16_CHANNELS else "tf32"


@functools.cache
def keep_freed_memory() -> str:
    """Let glibc keep what torch frees: `kept in the process`, or `default` where that is not glibc.

    By default the buffers of each step, being large, go back to the kernel, and come again page by
    page, each page zeroed and faulted in. The process then keeps its peak memory until it ends.
    """
    if sys.platform != "linux":
        return "default"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return "default"
    done = [
        mallopt(M_MMAP_MAX, 0),  # no buffer gets a mapping of its own
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1),
        mallopt(M_TOP_PAD, HEAP_STEP_BYTES),
    ]
    return "kept in the process" if all(done) else "default"


def limit_threads() -> None:
    """Use no more threads than a container may use cores (cgroup v2), where torch sees them all."""
    try:
        quota, period = CPU_LIMIT.read_text().split()
        cores = max(1, math.floor(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return
    if cores < torch.get_num_threads():
        torch.set_num_threads(cores)


def available_devices() -> list[str]:
    """Names that `device:` accepts on this machine."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def resolve_device(name: str) -> tuple[torch.device, str]:
    """Turn `auto | cpu | cuda | cuda:N | mps` into a device that exists, and say why.

    Raises:
        ConfigError: the device is not on this machine; names those that are.
    """
    available = available_devices()
    if name == "auto":
        best = next((n for n in ("cuda", "mps") if n in available), "cpu")
        why = "auto: no GPU found" if best == "cpu" else "auto: the fastest device found"
        return torch.device("cuda:0" if best == "cuda" else best), why
    if name not in available:
        raise ConfigError(
            f"device: {name} is not on this machine; available: auto, {', '.join(available)}"
        )
    return torch.device("cuda:0" if name == "cuda" else name), "as configured"


def _resolve_own_device(name: str, launch: Launch) -> tuple[torch.device, str]:
    """The device of one of several processes: a GPU for each, or the CPU for all."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"device: {name} is one device, and torchrun has started {launch.size} processes;"
            " allowed with several: auto, cpu, cuda (a GPU for each)"
        )
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu"), "auto: no CUDA GPU found"
    device, reason = resolve_device(name)
    if device.type == "cpu":
        return device, reason
    num_gpus = torch.cuda.device_count()
    if launch.local_size > num_gpus:
        raise ConfigError(
            f"device: torchrun has started {launch.local_size} processes on a machine with"
            f" {num_gpus} GPUs; use --nproc-per-node={num_gpus} or device=cpu"
        )
    return torch.device("cuda", launch.local_rank), "a GPU for each process"


def device_name(device: torch.device) -> str:
    """The device's product name where torch knows it, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def numeric_mode(plan: Plan, *, deterministic: bool) -> Iterator[None]:
    """Set how torch computes, and put its global switches back afterwards.

    Args:
        plan: on CUDA, float32 is full float32 unless the plan says TF32; for convolutions that is
            not torch's default.
        deterministic: use deterministic kernels only.
    """
    before = torch.get_deterministic_debug_mode()
    cudnn: Any = torch.backends.cudnn
    benchmark = cudnn.benchmark
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    backends: Any = (torch.backends.cuda.matmul, cudnn.conv) if plan.device.type == "cuda" else ()
    formats = [backend.fp32_precision for backend in backends]
    # The same switch as `torch.use_deterministic_algorithms`, which imports the compiler (2 s).
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    cudnn.benchmark = not deterministic
    # Nothing here reads memory before it is written; to fill each buffer takes up to 8 % of a step.
    memory.fill_uninitialized_memory = False
    for backend in backends:
        backend.fp32_precision = "tf32" if plan.precision == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = fills
        for backend, name in zip(backends, formats, strict=True):
            backend.fp32_precision = name
