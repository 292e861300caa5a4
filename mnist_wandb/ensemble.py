"""Several seeds of one configuration trained together, as one batched model.

The seeds' weights are stacked, and one call of each operation serves all of them. Each seed has its
own first weights, batches, validation, best weights, early stop and checkpoints, and tells the same
events as `train` does. Source: PyTorch's tutorial on model ensembling (`torch.func`).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from mnist_wandb.augment import is_off
from mnist_wandb.config import LinearConfig, MlpConfig, RunConfig
from mnist_wandb.data import Splits, batch_indices
from mnist_wandb.device import Plan, numeric_mode
from mnist_wandb.errors import DivergedError
from mnist_wandb.evaluate import compute_loss
from mnist_wandb.optim import average_weights, lr_factor, make_update
from mnist_wandb.stepgraph import Step, make_step
from mnist_wandb.train import (
    CHECKPOINT_SECONDS,
    Event,
    Loop,
    StepDone,
    TrainingState,
    make_state,
    normalises,
)

log = logging.getLogger(__name__)

CPU_PARAMETERS = 300_000
"""Linear models and MLPs up to this size train faster together on a CPU (benchmarks/seeds.py)."""
GPU_PARAMETERS = 700_000
"""Linear models and MLPs up to this size train faster together on a GPU; larger: not measured."""
CLIP_EPS = 1e-6
"""Added to the norm as in `torch.nn.utils.clip_grad_norm_`."""


def why_apart(config: RunConfig, plan: Plan) -> str | None:
    """Why seeds of a configuration cannot train together with the results of separate runs.

    Returns:
        The reason in a few words; None where they can.
    """
    dropout = getattr(config.model, "dropout", ())
    reasons = {
        "dropout draws random numbers": any(dropout if isinstance(dropout, tuple) else (dropout,)),
        # Rounding grows fast with it: a bias before it has a gradient of zero, and Adam makes whole
        # steps of the rounding errors.
        "batch normalisation": normalises(config.model),
        "data.augment draws random numbers": not is_off(config.data.augment),
        # Its rounding is of other tensors than in a separate run.
        "precision bf16; training.precision=fp32 allows it": plan.precision == "bf16",
        "training.compile": plan.compile,
        "tracking.watch": config.tracking.watch,
        "tracking.log_model=every_epoch": config.tracking.log_model == "every_epoch",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def pays(config: RunConfig, plan: Plan, num_parameters: int) -> tuple[bool, str]:
    """Whether training together is faster, as far as measured, and the reason in a few words."""
    device = {"cpu": "a CPU", "cuda": "a GPU"}.get(plan.device.type)
    if device is None:
        return False, f"not measured on {plan.device.type}"
    if not isinstance(config.model, LinearConfig | MlpConfig):
        gain = "slower" if plan.device.type == "cpu" else "hardly faster"
        return False, f"convolutions are {gain} together on {device}"
    limit = CPU_PARAMETERS if plan.device.type == "cpu" else GPU_PARAMETERS
    small = num_parameters <= limit
    return small, f"{'up to' if small else 'more than'} {limit:,} parameters on {device}"


def train_together(
    models: Sequence[nn.Module],
    splits: Splits,
    configs: Sequence[RunConfig],
    *,
    plan: Plan,
    emit: Callable[[int, Event], None] = lambda position, event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train S models in one process, each as `train` would; equal to it but for rounding.

    A seed that diverges is left out from then on; its last checkpoint is finite. One that has
    stopped early is left out, too. What each has come to is in its checkpoints: `train` with
    `resume` goes on from them, or ends at once where nothing is left to do. Training seconds are
    shared out: the seeds' seconds sum to those that have passed.

    Args:
        models: one for each seed, from float32 (N, 1, H, W) to logits (N, C).
        splits: training and validation images, on the plan's device.
        configs: one for each model; they differ by seed only, and `why_apart` has nothing to say.
        plan: device and precision.
        emit: called with a model's position and each of its events, see `train`.
        should_stop: asked before each step; true ends training after a last checkpoint of each.

    """
    loops = [
        Loop(make_state(model, config, plan), splits, config, plan, partial(emit, position), bool)
        for position, (model, config) in enumerate(zip(models, configs, strict=True))
    ]
    with numeric_mode(plan, deterministic=configs[0].training.deterministic):
        _Ensemble(loops, should_stop).run()


class _Stack(nn.Module):
    """Equal models as one: each parameter is (S, …), one row for each of S seeds."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        weights, _ = stack_module_state([model.train() for model in models])
        self.names = list(weights)
        self.weights = nn.ParameterList(weight.contiguous() for weight in weights.values())
        skeleton = copy.deepcopy(models[0]).to("meta")

        def call(weights: dict[str, Tensor], images: Tensor) -> Tensor:
            logits: Tensor = functional_call(skeleton, weights, (images,))
            return logits

        self.call = vmap(call)

    def forward(self, images: Tensor) -> Tensor:
        """Map float (S, N, 1, H, W) to logits (S, N, C)."""
        logits: Tensor = self.call(dict(zip(self.names, self.weights, strict=True)), images)
        return logits

    def write_row(self, row: int, model: nn.Module) -> None:
        """Copy one seed's parameters into its own model."""
        with torch.no_grad():
            for its, stacked in zip(model.parameters(), self.parameters(), strict=True):
                its.copy_(stacked[row])

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all other rows."""
        for stacked in self.parameters():
            stacked.data = stacked.data[rows]


class _Ensemble:
    """The loops of the seeds that are still training, and their state as one.

    Row i of every stacked tensor belongs to loop i. The loops' own models and optimizers are
    brought up to date by `hand_over` before they are used.
    """

    def __init__(self, loops: Sequence[Loop], should_stop: Callable[[], bool]) -> None:
        self.loops, self.should_stop = list(loops), should_stop
        first = self.loops[0]
        self.config, self.plan, self.splits = first.config, first.plan, first.splits
        self.steps_per_epoch, self.total_steps = first.steps_per_epoch, first.total_steps
        self.preprocessing = first.preprocessing
        self.stack = _Stack([loop.state.model for loop in self.loops])
        # Memory formats are of single models; a stack has one axis more.
        self.state: TrainingState = make_state(
            self.stack, self.config, replace(self.plan, channels_last=False)
        )
        self.update = make_update(self.state.optimizer)
        self.orders = torch.empty(0)
        self.last_checkpoint = time.perf_counter()

    @property
    def stacks(self) -> list[_Stack]:
        """The weights, and their means where EMA is on."""
        averaged = self.state.averaged
        return [self.stack] + ([] if averaged is None else [cast(_Stack, averaged)])

    def run(self) -> None:
        """Train to the end of the schedule, to the last seed's early stop or to an interruption."""
        step = make_step(self.compute_step, self.plan)
        while self.loops and self.state.step < self.total_steps:
            if not self.train_epoch(step):
                return
            if self.loops:
                self.hand_over(weights=True)
                self.for_each(lambda row, loop: loop.save(best=loop.validate(), end_of_epoch=True))
                self.last_checkpoint = time.perf_counter()

    def train_epoch(self, step: Step) -> bool:
        """Do the epoch's steps; False when asked to stop within it."""
        state, config = self.state, self.config
        epoch = state.step // self.steps_per_epoch
        count, size = len(self.splits.train), config.training.batch_size
        self.orders = torch.stack([self.draw_order(loop, epoch) for loop in self.loops])
        since = time.perf_counter()
        for start in range(0, count, size):
            if not self.loops or state.step == self.total_steps:
                break
            if self.should_stop():
                self.save(since)
                return False
            lr = config.optimizer.lr * lr_factor(
                config.schedule, state.step, self.total_steps, self.steps_per_epoch
            )
            state.step += 1
            ends_epoch = state.step % self.steps_per_epoch == 0 or state.step == self.total_steps
            logs = ends_epoch or state.step % config.tracking.log_every_steps == 0
            index = self.orders[:, start : start + size]
            losses, hits, *norms = step(index, lr, logs)
            state.pending.append((losses, hits, index.shape[1]))
            if logs:
                since = self.log_training(lr, norms[0], since)
            self.tell_step(epoch)
            if time.perf_counter() - self.last_checkpoint > CHECKPOINT_SECONDS and not ends_epoch:
                since = self.save(since)
        return True

    def draw_order(self, loop: Loop, epoch: int) -> Tensor:
        """int64 (N,): the training images in the order of a seed's batches."""
        count, size = len(self.splits.train), self.config.training.batch_size
        seed, device = loop.config.seed, self.plan.device
        return torch.cat(batch_indices(count, size, seed=seed, epoch=epoch, device=device))

    def compute_step(
        self, index: Tensor, lr: float | Tensor, with_norms: bool
    ) -> tuple[Tensor, ...]:
        """One optimizer step of each seed; nothing in it waits for the device.

        Args:
            index: int64 (S, N), each seed's batch.
            lr: learning rate.
            with_norms: whether the norms of the gradients are asked for.

        Returns:
            (S,) losses and hits, and norms before clipping where asked for.
        """
        state, training = self.state, self.config.training
        # ── Forward and backward; a seed's gradient does not depend on the other seeds' losses.
        labels = self.splits.train.labels[index]
        logits = state.model(self.preprocessing(self.splits.train.images[index]))
        losses = vmap(compute_loss, in_dims=(0, 0, None, None))(
            logits, labels, training.loss, training.label_smoothing
        )
        losses.sum().backward()  # type: ignore[no-untyped-call]
        results = [losses.detach(), (logits.detach().argmax(dim=2) == labels).sum(dim=1)]
        # ── Update; every optimizer works element by element.
        if training.grad_clip_norm is not None or with_norms:
            norms = self.gradient_norms()
            results += [norms] if with_norms else []
            if training.grad_clip_norm is not None:
                self.scale_gradients((training.grad_clip_norm / (norms + CLIP_EPS)).clamp(max=1))
        self.update(lr)
        if state.averaged is not None and training.ema_decay is not None:
            average_weights(state.averaged, state.model, training.ema_decay, first=state.step == 1)
        return tuple(results)

    def gradient_norms(self) -> Tensor:
        """float32 (S,): norm of each seed's gradient over all parameters."""
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
        found: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return found

    def scale_gradients(self, factors: Tensor) -> None:
        """Multiply each seed's gradient by its factor, float32 (S,)."""
        for parameter in self.state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factors.view(-1, *[1] * (parameter.grad.dim() - 1)))

    # ── What each seed does by itself.

    def for_each(self, action: Callable[[int, Loop], None]) -> None:
        """Do something for each seed; those that have diverged or stopped early leave."""
        staying = []
        for row, loop in enumerate(self.loops):
            try:
                action(row, loop)
            except DivergedError as error:
                log.info("seed %d: diverged at step %d", loop.config.seed, error.step)
                continue
            if not loop.has_stalled():
                staying.append(row)
        if len(staying) < len(self.loops):
            self.keep_rows(staying)

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with these seeds only."""
        self.loops = [self.loops[row] for row in rows]
        self.orders = self.orders[rows]
        for parameter, values in self.state.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = value[rows]
        for stack in self.stacks:
            stack.keep_rows(rows)

    def log_training(self, lr: float, norms: Tensor, since: float) -> float:
        """Have each seed log its means since the last log; returns the new start time."""
        share = self.hand_over(weights=False, since=since)

        def log_one(row: int, loop: Loop) -> None:
            loop.log_training(lr, norms[row], time.perf_counter() - share)

        self.for_each(log_one)
        return time.perf_counter()

    def save(self, since: float) -> float:
        """Have each seed save a checkpoint within an epoch; returns the new start time."""
        share = self.hand_over(weights=True, since=since)

        def save_one(_row: int, loop: Loop) -> None:
            loop.state.training_seconds += share
            loop.save(best=False, end_of_epoch=False)

        self.for_each(save_one)
        self.last_checkpoint = time.perf_counter()
        return self.last_checkpoint

    def tell_step(self, epoch: int) -> None:
        """Tell of each seed that it has done a step."""
        step = self.state.step
        in_epoch = step - epoch * self.steps_per_epoch
        event = StepDone(step, self.total_steps, epoch, in_epoch, self.steps_per_epoch)
        for loop in self.loops:
            loop.emit(event)

    def hand_over(self, *, weights: bool, since: float = 0.0) -> float:
        """Bring the loops' states up to date.

        Args:
            weights: also models and optimizers, not only the step and what is to be logged.
            since: when the last log was.

        Returns:
            Each seed's share of the seconds since then, in which the device has done its steps.
        """
        pending = self.state.pending
        if pending:
            losses = torch.stack([losses for losses, _, _ in pending], dim=1)
            hits = torch.stack([hits for _, hits, _ in pending], dim=1)
            losses[:, -1].tolist()  # waits for the device
        share = (time.perf_counter() - since) / len(self.loops)
        for row, loop in enumerate(self.loops):
            loop.state.step = self.state.step
            if pending:
                sizes = [size for _, _, size in pending]
                loop.state.pending += zip(losses[row], hits[row], sizes, strict=True)
            if weights:
                self.write_row(row, loop.state)
        pending.clear()
        return share

    def write_row(self, row: int, state: TrainingState) -> None:
        """Copy one seed's weights, averaged weights and optimizer state into its own state."""
        own = [state.model] if state.averaged is None else [state.model, state.averaged]
        for stack, model in zip(self.stacks, own, strict=True):
            stack.write_row(row, model)
        mine = self.state.optimizer
        for group, stacked_group in zip(
            state.optimizer.param_groups, mine.param_groups, strict=True
        ):
            for own, stacked in zip(group["params"], stacked_group["params"], strict=True):
                state.optimizer.state[own] = {
                    name: _own_value(value, row, stacked, own)
                    for name, value in mine.state[stacked].items()
                }


def _own_value(value: object, row: int, stacked: Tensor, own: Tensor) -> object:
    """A seed's row of an optimizer's tensor, laid out in memory like its parameter."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != stacked.shape:  # a counter, the same for all seeds
        return value.clone()
    return torch.empty_like(own, requires_grad=False).copy_(value[row])
