"""The training loop, top to bottom. It sees tensors only: no YAML, no files, no W&B.

What happens is told through one callback (`emit`), as the events defined here.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mnist_wandb.augment import augment, is_off
from mnist_wandb.checkpoint import Checkpoint, describe_data
from mnist_wandb.config import IMAGE_SIZE, MlpConfig, ModelConfig, ResnetConfig, RunConfig
from mnist_wandb.data import Preprocessing, Splits, batch_indices
from mnist_wandb.device import Plan, choose_plan, numeric_mode
from mnist_wandb.errors import CheckpointError, ConfigError, DivergedError
from mnist_wandb.evaluate import compute_loss, evaluate
from mnist_wandb.metrics import EvalResult
from mnist_wandb.optim import (
    average_weights,
    load_optimizer,
    lr_factor,
    make_optimizer,
    make_update,
)
from mnist_wandb.ranks import ONE, Ranks
from mnist_wandb.stepgraph import Step, make_step

CHECKPOINT_SECONDS = 60.0
"""Longest time between two checkpoints, so that a kill in a long epoch costs a minute."""


# ── events ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StepDone:
    """One optimizer step is done (sent at each step; holds nothing that has to be waited for)."""

    step: int
    total_steps: int
    epoch: int
    step_in_epoch: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Logged:
    """Values for the metrics file: training values by step, or validation values by epoch.

    `training_seconds` and `images_used` count from the start of the run.
    """

    step: int
    epoch: float
    values: dict[str, float]
    training_seconds: float
    images_used: int


@dataclass(frozen=True)
class Validated:
    """The validation split was scored at the end of an epoch; `Logged` has gone before."""

    step: int
    epoch: float
    result: EvalResult
    improved: bool


@dataclass(frozen=True)
class CheckpointReady:
    """The state can be saved now; `best` says that these are the best weights so far."""

    checkpoint: Checkpoint
    best: bool
    end_of_epoch: bool


Event = StepDone | Logged | Validated | CheckpointReady


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        status: finished | early_stopped | interrupted.
        steps: optimizer steps done.
        epochs: epochs done (a fraction where the run ended within one).
        training_seconds: time spent in training steps, without validation and checkpoints.
        images_used: training images used, each as often as it was.
        images_per_second: `images_used` divided by `training_seconds`.
        best_epoch: epoch of the best validation accuracy, 0 before the first validation.
        best_accuracy: that accuracy in [0, 1].
    """

    status: str
    steps: int
    epochs: float
    training_seconds: float
    images_used: int
    images_per_second: float
    best_epoch: float
    best_accuracy: float


# ── state ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class TrainingState:
    """Everything that changes while training; what a checkpoint has to bring back.

    `pending` holds loss, hits and size of each step since the last log, on the device, so that
    no step waits for the device. The first `num_reduced` of them are those of all processes.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: nn.Module | None
    step: int = 0
    pending: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    num_reduced: int = 0
    best_epoch: float = 0
    best_accuracy: float = -1.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    reference_accuracy: float = -1.0
    epochs_without_gain: int = 0
    last_finite_loss: float | None = None
    training_seconds: float = 0.0
    logged_seconds: float = 0.0
    images_used: int = 0

    NUMBERS: ClassVar = (
        "step",
        "best_epoch",
        "best_accuracy",
        "reference_accuracy",
        "epochs_without_gain",
        "last_finite_loss",
        "training_seconds",
        "logged_seconds",
        "images_used",
    )

    @property
    def scored_model(self) -> nn.Module:
        """The model to validate and keep: the averaged one where EMA is on."""
        return self.averaged if self.averaged is not None else self.model

    def state_dict(self, device: torch.device) -> dict[str, Any]:
        """Tensors and plain values only, for `torch.load(weights_only=True)`."""
        losses = [loss for loss, _, _ in self.pending]
        hits = [correct for _, correct, _ in self.pending]
        return {
            **{name: getattr(self, name) for name in self.NUMBERS},
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_weights": self.best_weights,
            "pending_losses": torch.stack(losses) if losses else torch.empty(0),
            "pending_hits": torch.stack(hits) if hits else torch.empty(0),
            "pending_sizes": [size for _, _, size in self.pending],
            "rng": torch.get_rng_state(),
            "device_rng": _device_rng(device),
            "device_type": device.type,
        }

    def load_state_dict(self, stored: dict[str, Any], device: torch.device) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            CheckpointError: the state belongs to another model or optimizer.
        """
        try:
            self.model.load_state_dict(stored["model"])
            if self.averaged is not None:
                self.averaged.load_state_dict(stored["averaged"])
            load_optimizer(self.optimizer, stored["optimizer"])
            for name in self.NUMBERS:
                setattr(self, name, stored[name])
            self.best_weights = {k: v.to(device) for k, v in stored["best_weights"].items()}
            self.pending = [
                (loss, hits, size)
                for loss, hits, size in zip(
                    stored["pending_losses"].to(device),
                    stored["pending_hits"].to(device),
                    stored["pending_sizes"],
                    strict=True,
                )
            ]
            self.num_reduced = len(self.pending)
            torch.set_rng_state(stored["rng"])
            if stored["device_type"] == device.type == "cuda":
                torch.cuda.set_rng_state(stored["device_rng"], device)
            elif stored["device_type"] == device.type == "mps":
                torch.mps.set_rng_state(stored["device_rng"])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"this state cannot be continued: {error}") from None

    def is_finite(self) -> bool:
        """Whether all weights and all losses since the last log are finite (waits for them)."""
        tensors = [p.detach() for p in self.model.parameters()]
        tensors += [loss for loss, _, _ in self.pending]
        return bool(torch.stack([t.isfinite().all() for t in tensors]).all())


def _device_rng(device: torch.device) -> Tensor | None:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


# ── the loop ─────────────────────────────────────────────────────────────────────────────────


def train(
    model: nn.Module,
    splits: Splits,
    config: RunConfig,
    *,
    plan: Plan | None = None,
    resume: Checkpoint | None = None,
    emit: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ONE,
) -> TrainResult:
    """Train a model in place and leave the best validation weights in it.

    Seeds torch's global generators with `config.seed`: the same model, data and configuration
    give the same weights bit for bit on one machine.

    Args:
        model: from float32 (N, 1, H, W) to logits (N, C); moved to the plan's device. On CUDA its
            Python code runs twice for each kind of batch and is then replayed as a CUDA graph; one
            that counts or reads from the device needs `replace(plan, cuda_graph=False)`.
        splits: training and validation images, on the plan's device. The test split is not used.
        config: a validated configuration.
        plan: device and precision; default: the device of the data, precision as configured.
        resume: a checkpoint with training state, to be continued from exactly there.
        emit: called with each `Event`; runs between steps, so it should be quick.
        should_stop: asked after each step; true ends training after a last checkpoint.
        ranks: the processes that train together; each calls this with the same arguments.

    Returns:
        How training ended. After `interrupted` the model holds the last weights, not the best.

    Raises:
        DivergedError: loss or weights became NaN or infinite; nothing is emitted after that.
        CheckpointError: `resume` does not fit.
        ConfigError: the last batch is too small for batch normalisation.
    """
    check_batches(config, len(splits.train), ranks.size)
    device = splits.train.images.device
    if plan is None:
        name = f"cuda:{device.index}" if device.type == "cuda" else device.type
        plan = choose_plan(config.model_copy(update={"device": name}))
    if plan.device.type != device.type:
        raise ConfigError(f"device: the data lie on {device}, the plan is for {plan.device}")
    state = make_state(model, config, plan, ranks)
    torch.manual_seed(config.seed)
    if resume is not None:
        if resume.training is None:
            raise CheckpointError("this checkpoint has no training state to continue from")
        if resume.config.optimizer.name != config.optimizer.name:
            raise CheckpointError(
                f"this state is of optimizer {resume.config.optimizer.name!r}, the configuration"
                f" has {config.optimizer.name!r}"
            )
        state.load_state_dict(resume.training, plan.device)
    with numeric_mode(plan, deterministic=config.training.deterministic):
        return Loop(state, splits, config, plan, emit, should_stop, ranks).run()


def make_state(
    model: nn.Module, config: RunConfig, plan: Plan, ranks: Ranks = ONE
) -> TrainingState:
    """The state before the first step; moves the model to the plan's device."""
    model.to(plan.device)
    if plan.channels_last:
        model.to(memory_format=torch.channels_last)
    model = ranks.prepare(model)
    averaged = None
    if config.training.ema_decay is not None:
        averaged = copy.deepcopy(model)
    optimizer = make_optimizer(config.optimizer, model, capturable=plan.cuda_graph)
    return TrainingState(model, optimizer, averaged)


def check_batches(config: RunConfig, num_images: int, num_processes: int = 1) -> None:
    """Refuse a batch of one image where batch normalisation would see one value per channel.

    Of several processes, each must have images of every full batch, and enough of each batch for
    batch normalisation.

    Raises:
        ConfigError: with the sizes.
    """
    batch_size = config.training.batch_size
    if batch_size < num_processes:
        raise ConfigError(
            f"training.batch_size: {batch_size} images cannot be shared by {num_processes}"
            " processes; it is the size of the whole batch: choose a larger one or fewer processes"
        )
    last = num_images % batch_size or batch_size
    smallest = last // num_processes
    needed = 2 if _normalises_single_values(config) else int(normalises(config.model))
    if smallest >= needed:
        return
    if num_processes == 1:
        raise ConfigError(
            f"training.batch_size: {batch_size} leaves a batch of one of the {num_images} training"
            " images, and batch normalisation needs two; choose another size"
        )
    raise ConfigError(
        f"training.batch_size: {batch_size} leaves a batch of {last} of the {num_images} training"
        f" images, of which a process gets {smallest}, and batch normalisation needs {needed};"
        " choose another size"
    )


def normalises(model: ModelConfig) -> bool:
    """Whether a model has batch normalisation."""
    return (
        isinstance(model, ResnetConfig)
        or getattr(model, "batch_norm", False)
        or any(block.batch_norm for block in getattr(model, "blocks", ()))
    )


def _normalises_single_values(config: RunConfig) -> bool:
    if isinstance(config.model, MlpConfig):
        return config.model.batch_norm
    size = IMAGE_SIZE
    for block in getattr(config.model, "blocks", ()):
        normed = block if block.pool_first else block.model_copy(update={"pool": None})
        if block.batch_norm and normed.output_size(size) == 1:
            return True
        size = block.output_size(size)
    return False


class Loop:
    """One training run: fixed things as attributes, changing things in `state`.

    `train` runs one. Several that ensemble.py steps together log, validate and save by themselves.
    """

    def __init__(
        self,
        state: TrainingState,
        splits: Splits,
        config: RunConfig,
        plan: Plan,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        ranks: Ranks = ONE,
    ) -> None:
        self.state, self.splits, self.config, self.plan = state, splits, config, plan
        self.emit, self.should_stop, self.ranks = emit, should_stop, ranks
        self.preprocessing = Preprocessing.fit(config.data.scaling, splits.mean, splits.std)
        forward = torch.compile(state.model) if plan.compile else state.model
        self.forward = ranks.wrap(forward, (config.training.batch_size, *splits.image_shape))
        self.update = make_update(state.optimizer)
        self.augment = None if is_off(config.data.augment) else config.data.augment
        self.steps_per_epoch = math.ceil(len(splits.train) / config.training.batch_size)
        self.total_steps = count_steps(config, len(splits.train))
        self.last_checkpoint = time.perf_counter()

    def run(self) -> TrainResult:
        """Train to the end of the schedule, an early stop or an interruption."""
        state = self.state
        step = make_step(self.compute_step, self.plan)
        status = "finished"
        while state.step < self.total_steps and not self.has_stalled():
            # ── One epoch, or what is left of it after a resume.
            if not self.train_epoch(step):
                status = "interrupted"
                break
            # ── Validate, keep the best weights, save.
            self.save(best=self.validate(), end_of_epoch=True)
        if status != "interrupted":
            status = "finished" if state.step == self.total_steps else "early_stopped"
            state.scored_model.load_state_dict(state.best_weights)
            if state.averaged is not None:
                state.model.load_state_dict(state.best_weights)
        seconds = state.training_seconds
        images = state.images_used + sum(size for _, _, size in state.pending)
        return TrainResult(
            status=status,
            steps=state.step,
            epochs=self.epoch_at(state.step),
            training_seconds=seconds,
            images_used=images,
            images_per_second=images / seconds if seconds else 0.0,
            best_epoch=state.best_epoch,
            best_accuracy=max(0.0, state.best_accuracy),
        )

    def has_stalled(self) -> bool:
        """Whether early stopping is on and its patience is used up."""
        stopping = self.config.training.early_stopping
        return stopping is not None and self.state.epochs_without_gain >= stopping.patience

    def train_epoch(self, step: Step) -> bool:
        """Do the epoch's remaining steps; False when asked to stop within it."""
        state, config = self.state, self.config
        epoch, done = divmod(state.step, self.steps_per_epoch)
        batches = batch_indices(
            len(self.splits.train),
            config.training.batch_size,
            seed=config.seed,
            epoch=epoch,
            device=self.plan.device,
        )
        state.model.train()
        since = time.perf_counter()
        for index in batches[done : done + self.total_steps - state.step]:
            if self.ranks.agrees_to_stop(self.should_stop()):
                state.training_seconds += time.perf_counter() - since
                self.save(best=False, end_of_epoch=False)
                return False
            lr = config.optimizer.lr * lr_factor(
                config.schedule, state.step, self.total_steps, self.steps_per_epoch
            )
            state.step += 1
            ends_epoch = state.step % self.steps_per_epoch == 0 or state.step == self.total_steps
            logs = ends_epoch or state.step % config.tracking.log_every_steps == 0
            index = self.ranks.take(index)
            self.ranks.seed_step(config.seed, state.step)
            # ── The step; its metrics stay on the device until the next log.
            loss, hits, *norms = step(index, lr, logs)
            state.pending.append(self.ranks.weigh(loss, hits, len(index)))
            if logs:
                since = self.log_training(lr, norms[0], since)
            step_in_epoch = state.step - epoch * self.steps_per_epoch
            self.emit(
                StepDone(state.step, self.total_steps, epoch, step_in_epoch, self.steps_per_epoch)
            )
            is_due = time.perf_counter() - self.last_checkpoint > CHECKPOINT_SECONDS
            if self.ranks.agrees_to_save(is_due) and not ends_epoch:
                state.training_seconds += time.perf_counter() - since
                self.save(best=False, end_of_epoch=False)
                since = time.perf_counter()
        return True

    def compute_step(
        self, index: Tensor, lr: float | Tensor, with_norms: bool
    ) -> tuple[Tensor, ...]:
        """One optimizer step on a batch; nothing in it waits for the device.

        Args:
            index: int64 (N,), the batch's training images.
            lr: learning rate.
            with_norms: whether the norm of the gradient is asked for.

        Returns:
            Loss and hits, and the norm before clipping where asked for: scalars on the device.
        """
        state, training, split = self.state, self.config.training, self.splits.train
        # ── Input: augmentation and scaling on the device.
        images, labels = split.images[index], split.labels[index]
        if self.augment is not None:
            images = augment(images, self.augment)
        inputs = self.preprocessing(images)
        if self.plan.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        # ── Forward and backward.
        with torch.autocast(
            self.plan.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"
        ):
            logits = self.forward(inputs)
        loss = compute_loss(logits, labels, training.loss, training.label_smoothing)
        self.ranks.scale(loss).backward()  # type: ignore[no-untyped-call]
        # ── Update.
        results = [loss.detach(), (logits.detach().argmax(dim=1) == labels).sum()]
        if training.grad_clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(state.model.parameters(), training.grad_clip_norm)
            results += [norm] if with_norms else []
        elif with_norms:
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            results.append(nn.utils.get_total_norm(gradients))
        self.update(lr)
        if state.averaged is not None and training.ema_decay is not None:
            average_weights(state.averaged, state.model, training.ema_decay, first=state.step == 1)
        return tuple(results)

    def log_training(self, lr: float, grad_norm: Tensor, since: float) -> float:
        """Read the pending metrics and emit their means over images; returns when that was.

        What the recording of these values takes counts as training time of the next ones.
        """
        state = self.state
        self.reduce_pending()
        sizes = [size for _, _, size in state.pending]
        losses = torch.stack([loss for loss, _, _ in state.pending]).tolist()
        hits = sum(torch.stack([hits for _, hits, _ in state.pending]).tolist())
        now = time.perf_counter()  # after the reads above, which waited for the device
        for position, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise self.diverged(state.step - len(losses) + position + 1, "training loss", loss)
            state.last_finite_loss = loss
        state.pending.clear()
        state.num_reduced = 0
        state.training_seconds += now - since
        state.images_used += sum(sizes)
        state.logged_seconds, since_log = (
            state.training_seconds,
            (state.training_seconds - state.logged_seconds),
        )
        values = {
            "train/loss": math.fsum(loss * size for loss, size in zip(losses, sizes, strict=True))
            / sum(sizes),
            "train/accuracy": hits / sum(sizes),
            "train/lr": lr,
            "train/images_per_second": sum(sizes) / since_log,
            "train/grad_norm": float(grad_norm),
        }
        if not math.isfinite(values["train/grad_norm"]):
            raise self.diverged(state.step, "gradient norm", values["train/grad_norm"])
        self.emit_values(values)
        return now

    def reduce_pending(self) -> None:
        """Make the pending metrics those of all processes, each of them once."""
        state = self.state
        done = state.num_reduced
        state.pending[done:] = self.ranks.reduce(state.pending[done:])
        state.num_reduced = len(state.pending)

    def validate(self) -> bool:
        """Score the validation split; keep the weights where they are the best so far."""
        state, config = self.state, self.config
        self.ranks.sync_buffers(state.scored_model)
        result = evaluate(
            state.scored_model,
            self.splits.val,
            self.preprocessing,
            loss=config.training.loss,
            precision=self.plan.precision,
            channels_last=self.plan.channels_last,
            ranks=self.ranks,
        )
        if not math.isfinite(result.loss):
            raise self.diverged(state.step, "validation loss", result.loss)
        epoch, accuracy = self.epoch_at(state.step), result.accuracy
        improved = accuracy > state.best_accuracy
        if improved:
            state.best_accuracy, state.best_epoch = accuracy, epoch
            state.best_weights = copy.deepcopy(state.scored_model.state_dict())
        stopping = config.training.early_stopping
        if accuracy > state.reference_accuracy + (stopping.min_delta if stopping else 0.0):
            state.reference_accuracy, state.epochs_without_gain = accuracy, 0
        else:
            state.epochs_without_gain += 1
        values = result.metrics("val")
        del values["val/calibration_error"]  # reported for the test split only
        values |= {"best/val_accuracy": state.best_accuracy, "best/epoch": state.best_epoch}
        self.emit_values(values)
        self.emit(Validated(state.step, epoch, result, improved))
        return improved

    def emit_values(self, values: dict[str, float]) -> None:
        """Emit one row of metrics."""
        state = self.state
        epoch = self.epoch_at(state.step)
        self.emit(Logged(state.step, epoch, values, state.training_seconds, state.images_used))

    def save(self, *, best: bool, end_of_epoch: bool) -> None:
        """Emit a checkpoint, unless the weights are broken."""
        state = self.state
        self.reduce_pending()
        if not state.is_finite():
            raise self.diverged(state.step, "weights or loss", math.nan)
        checkpoint = Checkpoint(
            config=self.config,
            **describe_data(self.splits, self.preprocessing),
            weights=state.scored_model.state_dict(),
            step=state.step,
            epoch=self.epoch_at(state.step),
            metrics=(
                {"best/val_accuracy": state.best_accuracy, "best/epoch": state.best_epoch}
                if state.best_weights
                else {}
            ),
            training=state.state_dict(self.plan.device),
        )
        self.emit(CheckpointReady(checkpoint, best, end_of_epoch))
        self.last_checkpoint = time.perf_counter()

    def epoch_at(self, step: int) -> float:
        """Epochs done after so many steps; a whole number at an epoch's end."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs if rest == 0 else round(step / self.steps_per_epoch, 6)

    def diverged(self, step: int, what: str, value: float) -> DivergedError:
        """The error for a value that is not finite any more."""
        lr = self.config.optimizer.lr * lr_factor(
            self.config.schedule, max(0, step - 1), self.total_steps, self.steps_per_epoch
        )
        last = self.state.last_finite_loss
        return DivergedError(
            f"training diverged at step {step}: {what} is {value} (lr {lr:.3g}, last finite loss"
            f" {'none' if last is None else f'{last:.4g}'}); try a smaller optimizer.lr or"
            " training.grad_clip_norm=1",
            step=step,
        )


def count_steps(config: RunConfig, num_images: int) -> int:
    """Optimizer steps of a whole run on so many training images."""
    steps_per_epoch = math.ceil(num_images / config.training.batch_size)
    # 0.1 epochs of 30 steps are 3 steps, whatever binary fractions say.
    return max(1, math.ceil(config.training.epochs * steps_per_epoch - 1e-9))
