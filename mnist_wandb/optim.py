"""The optimizer, and the learning rate of each step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mnist_wandb.config import (
    AdagradConfig,
    AdamConfig,
    AdamwConfig,
    CosineConfig,
    NadamConfig,
    OneCycleConfig,
    OptimizerConfig,
    RmspropConfig,
    ScheduleConfig,
    SgdConfig,
    StepConfig,
)

IMPLEMENTATION = ("fused", "foreach", "capturable", "lr")
"""Settings of an optimizer that are the machine's, and the rate, which each step sets anew."""


def step_kind(config: OptimizerConfig, device_type: str = "cpu") -> str:
    """How the update is computed: `fused`, one kernel for all weights, or `foreach`, several."""
    if isinstance(config, AdagradConfig):
        return "fused" if device_type == "cpu" else "foreach"
    return "fused" if isinstance(config, SgdConfig | AdamConfig | AdamwConfig) else "foreach"


def can_be_recorded(config: OptimizerConfig) -> bool:
    """Whether a CUDA graph can hold the update: Adagrad counts its steps on the CPU."""
    return not isinstance(config, AdagradConfig)


def make_optimizer(
    config: OptimizerConfig, model: nn.Module, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """Build the torch optimizer; fused where torch has that, on a CPU too.

    Args:
        config: the `optimizer` section.
        model: on the device where it is trained.
        capturable: keep all of the optimizer's state on the GPU, for a CUDA graph.
    """
    _skip_compiler()
    parameters = list(model.parameters())
    lr, decay = config.lr, config.weight_decay
    kind = {step_kind(config, parameters[0].device.type): True}
    if capturable and not isinstance(config, SgdConfig):  # which counts nothing
        kind["capturable"] = True
    match config:
        case SgdConfig(momentum=momentum, nesterov=nesterov):
            return torch.optim.SGD(
                parameters, lr, momentum, weight_decay=decay, nesterov=nesterov, **kind
            )
        case RmspropConfig(alpha=alpha, momentum=momentum, eps=eps):
            return torch.optim.RMSprop(
                parameters, lr, alpha, eps, weight_decay=decay, momentum=momentum, **kind
            )
        case AdagradConfig(eps=eps):
            return torch.optim.Adagrad(parameters, lr, weight_decay=decay, eps=eps, **kind)
        case AdamConfig(betas=betas, eps=eps):
            return torch.optim.Adam(parameters, lr, betas, eps, weight_decay=decay, **kind)
        case AdamwConfig(betas=betas, eps=eps):
            return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay=decay, **kind)
        case NadamConfig(betas=betas, eps=eps):
            return torch.optim.NAdam(parameters, lr, betas, eps, weight_decay=decay, **kind)


def _skip_compiler() -> None:
    """Let optimizers be made, saved and loaded without importing `torch._dynamo`.

    Torch wraps these methods, so that `torch.compile` leaves them out, in a function that imports
    it when first called: 2 s of a process that compiles nothing. The attribute is where the
    wrapper keeps its result; in a torch without it nothing changes but these 2 s.
    """
    for name in ("add_param_group", "state_dict", "load_state_dict"):
        plain = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        setattr(plain, "__dynamo_disable", plain)


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Load an optimizer's state, maybe from another device; how it computes stays its own."""
    groups = [
        {**theirs, **{name: own[name] for name in IMPLEMENTATION if name in own}}
        for theirs, own in zip(stored["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**stored, "param_groups": groups})


def make_update(optimizer: torch.optim.Optimizer) -> Callable[[float | Tensor], None]:
    """The function that does one update with a learning rate and drops the gradients.

    It is the optimizer's own `step`, without the wrappers, which import `torch._dynamo`.
    """
    step = inspect.unwrap(type(optimizer).step)
    base = [group["lr"] for group in optimizer.param_groups]

    @torch.no_grad()
    def update(lr: float | Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        step(optimizer)
        for group, value in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = value  # a checkpoint keeps numbers, no tensor of this device
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    return update


def average_weights(mean: nn.Module, model: nn.Module, decay: float, *, first: bool) -> None:
    """Move an exponential mean of a model's weights and statistics on by one step.

    mean = decay · mean + (1 - decay) · model, and the model itself after the first step. Counters
    are copied. But for them it is torch's AveragedModel with get_ema_multi_avg_fn, which asks the
    device for its own count of steps.
    """
    pairs = [
        (its.detach(), new.detach())
        for its, new in zip(
            chain(mean.parameters(), mean.buffers()),
            chain(model.parameters(), model.buffers()),
            strict=True,
        )
    ]
    moving = [pair for pair in pairs if not first and pair[0].is_floating_point()]
    for its, new in pairs:
        if first or not its.is_floating_point():
            its.copy_(new)
    if moving:
        means, values = map(list, zip(*moving, strict=True))
        torch._foreach_lerp_(means, values, 1 - decay)


def lr_factor(config: ScheduleConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Learning rate of one update as a share of `optimizer.lr`.

    Args:
        config: the `schedule` section.
        step: updates done before, from 0 to total_steps - 1.
        total_steps: updates of the whole run.
        steps_per_epoch: updates of one epoch.

    Source: the same curves as torch's StepLR, CosineAnnealingLR (T_max = total_steps) and
    OneCycleLR (without momentum cycling), stepped once an update.
    """
    match config:
        case StepConfig(every_epochs=every, gamma=gamma):
            return float(gamma ** (step // steps_per_epoch // every))
        case CosineConfig(warmup_fraction=warmup, final_fraction=final):
            warmup_steps = round(warmup * total_steps)
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return _blend(1.0, final, (step - warmup_steps) / (total_steps - warmup_steps))
        case OneCycleConfig(
            warmup_fraction=warmup, start_fraction=start, final_fraction=final, anneal=anneal
        ):
            peak = warmup * total_steps - 1 if warmup else 0.0
            last = total_steps - 1
            linear = anneal == "linear"
            if step < peak:
                return _blend(start, 1.0, step / peak, linear=linear)
            return _blend(
                1.0, final, (step - peak) / (last - peak) if last > peak else 0.0, linear=linear
            )
        case _:
            return 1.0


def _blend(start: float, end: float, progress: float, *, linear: bool = False) -> float:
    share = progress if linear else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share
