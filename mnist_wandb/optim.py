"""The optimizer, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

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


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the torch optimizer; fused (one kernel for all weights) where torch has that."""
    parameters = list(model.parameters())
    lr, decay = config.lr, config.weight_decay
    match config:
        case SgdConfig(momentum=momentum, nesterov=nesterov):
            return torch.optim.SGD(
                parameters, lr, momentum, weight_decay=decay, nesterov=nesterov, fused=True
            )
        case RmspropConfig(alpha=alpha, momentum=momentum, eps=eps):
            return torch.optim.RMSprop(
                parameters, lr, alpha, eps, weight_decay=decay, momentum=momentum, foreach=True
            )
        case AdagradConfig(eps=eps):
            return torch.optim.Adagrad(parameters, lr, weight_decay=decay, eps=eps, foreach=True)
        case AdamConfig(betas=betas, eps=eps):
            return torch.optim.Adam(parameters, lr, betas, eps, weight_decay=decay, fused=True)
        case AdamwConfig(betas=betas, eps=eps):
            return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay=decay, fused=True)
        case NadamConfig(betas=betas, eps=eps):
            return torch.optim.NAdam(parameters, lr, betas, eps, weight_decay=decay, foreach=True)


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
