"""Checks that a recipe for training can be trusted, after Karpathy.

Source: Andrej Karpathy 2019, "A Recipe for Training Neural Networks",
https://karpathy.github.io/2019/04/25/recipe/
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnist_wandb.config import (
    AdamConfig,
    AugmentConfig,
    CnnConfig,
    ConstantConfig,
    MlpConfig,
    ModelConfig,
    ResnetConfig,
    RunConfig,
    TrainingConfig,
)
from mnist_wandb.data import Preprocessing, Split, Splits, batch_indices, load_dataset
from mnist_wandb.device import choose_plan
from mnist_wandb.errors import DivergedError
from mnist_wandb.evaluate import evaluate
from mnist_wandb.jobs import Table, open_job
from mnist_wandb.metrics import EvalResult
from mnist_wandb.models import build_model
from mnist_wandb.settings import Settings
from mnist_wandb.train import Event, Logged, train

NUM_IMAGES = 256
"""Images of each split that the checks use at most."""
BATCH_SIZE, EPOCHS = 32, 8
ONE_BATCH, ONE_BATCH_STEPS = 16, 500
LR = 1e-3
INITIAL_TOLERANCE = 0.2
"""Share of ln(classes) by which the first loss may differ: PyTorch's initial weights give some."""
NEAR_ZERO_LOSS = 0.05
SMALLEST_GAIN = 0.15
"""Accuracy that real input must gain over blank input, and that shuffled labels must not gain."""
SHRINKING = 8
"""How many times narrower the network is that the configured one has to beat."""
TOLERANCE = 1e-3

PROTOCOL = (
    f"up to {NUM_IMAGES} training and {NUM_IMAGES} validation images, Adam with lr {LR:g}, batches"
    f" of {BATCH_SIZE}, {EPOCHS} epochs, no augmentation, dropout off in training"
)
"""What the checks use, in words."""


@dataclass(frozen=True)
class CheckResult:
    """One check: its name, what it is about, expected and measured in words, the verdict."""

    name: str
    about: str
    expected: str
    measured: str
    passed: bool


def build_configured(config: RunConfig, splits: Splits) -> nn.Module:
    """The model of a configuration, freshly initialised, on the device of the data."""
    model = build_model(config.model, splits.image_shape, len(splits.class_names), seed=config.seed)
    return model.to(splits.train.images.device)


@dataclass(frozen=True)
class Recipe:
    """What is checked: a configuration, its data, and the parts of a program that trains.

    Attributes:
        config: model, scaling, loss and seed are used.
        splits: see `load_dataset`; `take_images` makes them small.
        build: gives a fresh model for a configuration and its data.
        train: like `mnist_wandb.train`.
        evaluate: like `mnist_wandb.evaluate`.

    Parts of one's own can be checked by giving them here.
    """

    config: RunConfig
    splits: Splits
    build: Callable[[RunConfig, Splits], nn.Module] = build_configured
    train: Callable[..., Any] = train
    evaluate: Callable[[nn.Module, Split, Preprocessing], EvalResult] = evaluate

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """From pixels to input, as configured."""
        return Preprocessing.fit(self.config.data.scaling, self.splits.mean, self.splits.std)

    @cached_property
    def plain_config(self) -> RunConfig:
        """The configuration without what makes training random or slow to learn by heart."""
        config = self.config
        model = config.model
        if isinstance(model, MlpConfig):
            model = model.model_copy(update={"dropout": (0.0,) * len(model.hidden_sizes)})
        elif isinstance(model, CnnConfig):
            model = model.model_copy(update={"dropout": 0.0})
        return config.model_copy(
            update={
                "model": model,
                "data": config.data.model_copy(update={"augment": AugmentConfig()}),
                "optimizer": AdamConfig(lr=LR),
                "schedule": ConstantConfig(),
                "training": TrainingConfig(
                    epochs=EPOCHS,
                    batch_size=BATCH_SIZE,
                    loss=config.training.loss,
                    precision="fp32",
                    deterministic=config.training.deterministic,
                ),
            }
        )

    @cached_property
    def reference(self) -> dict[str, float]:
        """The last metrics of the configured model, trained on the images as they are."""
        return self.last_metrics(self.plain_config, self.splits)

    def last_metrics(
        self, config: RunConfig, splits: Splits, *, enough_loss: float = -math.inf
    ) -> dict[str, float]:
        """Train a fresh model, until its loss is below `enough_loss`; returns the last metrics."""
        last: dict[str, float] = {}

        def keep(event: Event) -> None:
            if isinstance(event, Logged):
                last.update(event.values, step=event.step)

        def is_enough() -> bool:
            return last.get("train/loss", math.inf) < enough_loss

        model = self.build(config, splits)
        self.train(model, splits, config, emit=keep, should_stop=is_enough)
        return last


def take_images(splits: Splits, seed: int = 0, count: int = NUM_IMAGES) -> Splits:
    """Splits with at most so many images each, drawn by the seed; mean and std stay those of all.

    Args:
        splits: see `load_dataset`.
        seed: of the choice.
        count: images of each split; a multiple of the batch size where there are enough.
    """

    def take(split: Split) -> Split:
        size = min(count, len(split))
        size -= size % BATCH_SIZE if size > BATCH_SIZE else 0
        (chosen, *_) = batch_indices(len(split), size, seed=seed, epoch=0)
        return select(split, chosen)

    return replace(splits, train=take(splits.train), val=take(splits.val), test=take(splits.test))


def select(split: Split, chosen: Tensor) -> Split:
    """Some images of a split, by their positions."""
    on_device = chosen.to(split.images.device)
    return replace(
        split,
        images=split.images[on_device],
        labels=split.labels[on_device],
        ids=split.ids[chosen],
        shortcut_agrees=None,
    )


# ── the checks ───────────────────────────────────────────────────────────────────────────────


def check_initial_loss(recipe: Recipe) -> CheckResult:
    """An untrained classifier should find all classes equally likely."""
    expected = math.log(len(recipe.splits.class_names))
    model = recipe.build(recipe.config, recipe.splits)
    loss = recipe.evaluate(model, recipe.splits.val, recipe.preprocessing).loss
    return CheckResult(
        "initial_loss",
        "loss before training is ln(classes)",
        f"{expected:.2f} ± {INITIAL_TOLERANCE * expected:.2f}",
        f"{loss:.2f}",
        abs(loss - expected) <= INITIAL_TOLERANCE * expected,
    )


def check_batch_independence(recipe: Recipe) -> CheckResult:
    """The output for one image must not depend on the others; a wrong reshape mixes them."""
    model = recipe.build(recipe.config, recipe.splits).eval()
    images = recipe.preprocessing(recipe.splits.train.images[:ONE_BATCH]).requires_grad_()
    middle = len(images) // 2
    model(images)[middle].sum().backward()
    assert images.grad is not None
    touched = images.grad.flatten(1).abs().amax(dim=1) > 0
    others = int(touched.sum()) - int(touched[middle])
    return CheckResult(
        "batch_independence",
        "gradient of one image's output reaches its own input only",
        "0 others, and its own",
        f"{others} others, {'and' if touched[middle] else 'not'} its own",
        others == 0 and bool(touched[middle]),
    )


def check_same_preprocessing(recipe: Recipe) -> CheckResult:
    """Training and evaluation must show the model the same input for the same images."""
    images = select(recipe.splits.train, torch.arange(min(BATCH_SIZE, len(recipe.splits.train))))
    splits = replace(recipe.splits, train=images, val=images)
    config = _with_training(recipe.plain_config, epochs=1)
    model = recipe.build(config, splits)
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    try:
        recipe.train(model, splits, config)
        in_training = _sorted_rows(seen[0])
        seen.clear()
        recipe.evaluate(model, images, recipe.preprocessing)
        in_evaluation = _sorted_rows(torch.cat(seen))
    finally:
        hook.remove()
    same = in_training.shape == in_evaluation.shape and np.allclose(
        in_training, in_evaluation, atol=TOLERANCE
    )
    stats = [f"mean {v.mean():.3f}, std {v.std():.3f}" for v in (in_training, in_evaluation)]
    return CheckResult(
        "same_preprocessing",
        "input of the model in training and in evaluation",
        f"the same ({stats[0]})",
        f"{'the same' if same else 'different'} ({stats[1]})",
        bool(same),
    )


def check_repeatable_evaluation(recipe: Recipe) -> CheckResult:
    """A score must not depend on dropout or on the batch: evaluation needs `model.eval()`."""
    model = recipe.build(recipe.config, recipe.splits).train()
    val = recipe.splits.val
    half = select(val, torch.arange(max(2, len(val) // 2)))
    whole = recipe.evaluate(model, val, recipe.preprocessing).probabilities[: len(half)]
    again = recipe.evaluate(model, half, recipe.preprocessing).probabilities
    difference = float(np.abs(whole - again).max())
    return CheckResult(
        "repeatable_evaluation",
        "largest difference of a probability, evaluated twice, in other batches",
        f"below {TOLERANCE:g}",
        f"{difference:.1e}",
        difference < TOLERANCE,
    )


def check_one_batch(recipe: Recipe) -> CheckResult:
    """A model that cannot learn a few images by heart is too small, or broken."""
    batch = select(recipe.splits.train, torch.arange(min(ONE_BATCH, len(recipe.splits.train))))
    splits = replace(recipe.splits, train=batch, val=batch)
    config = _with_training(
        recipe.plain_config, epochs=ONE_BATCH_STEPS, batch_size=len(batch), loss="cross_entropy"
    )
    last = recipe.last_metrics(config, splits, enough_loss=NEAR_ZERO_LOSS)
    return CheckResult(
        "one_batch",
        f"training loss on {len(batch)} images",
        f"below {NEAR_ZERO_LOSS:g} within {ONE_BATCH_STEPS} steps",
        f"{last['train/loss']:.4f} after {last['step']:g} steps",
        last["train/loss"] < NEAR_ZERO_LOSS,
    )


def check_input_matters(recipe: Recipe) -> CheckResult:
    """With blank images only the classes' shares can be learned; real ones must do better."""
    splits = recipe.splits
    blank = replace(splits, train=_blank(splits.train), val=_blank(splits.val))
    baseline = recipe.last_metrics(recipe.plain_config, blank)["val/accuracy"]
    accuracy = recipe.reference["val/accuracy"]
    return CheckResult(
        "input_matters",
        "validation accuracy with real images, against blank ones",
        f"above {baseline:.3f} + {SMALLEST_GAIN:g}",
        f"{accuracy:.3f}",
        accuracy > baseline + SMALLEST_GAIN,
    )


def check_shuffled_labels(recipe: Recipe) -> CheckResult:
    """Labels that have nothing to do with the images must not help on other images."""
    train_split = recipe.splits.train
    (order,) = batch_indices(len(train_split), len(train_split), seed=recipe.config.seed, epoch=1)
    labels = train_split.labels[order.to(train_split.labels.device)]
    shuffled = replace(recipe.splits, train=replace(train_split, labels=labels))
    accuracy = recipe.last_metrics(recipe.plain_config, shuffled)["val/accuracy"]
    counts = torch.bincount(recipe.splits.val.labels)
    chance = float(counts.max() / counts.sum())
    return CheckResult(
        "shuffled_labels",
        "validation accuracy after training with shuffled labels",
        f"below {chance:.3f} + {SMALLEST_GAIN:g}",
        f"{accuracy:.3f}",
        accuracy < chance + SMALLEST_GAIN,
    )


def check_capacity(recipe: Recipe) -> CheckResult:
    """More capacity must lower the training loss; else something else holds it up."""
    plain = recipe.plain_config
    narrow = _narrower(plain.model)
    loss = recipe.reference["train/loss"]
    if narrow is None:  # softmax regression has no width: a hidden layer has to beat it
        smaller, larger = "softmax regression", "a hidden layer of 128"
        wide = plain.model_copy(update={"model": MlpConfig(hidden_sizes=(128,), dropout=(0.0,))})
        small_loss, loss = loss, recipe.last_metrics(wide, recipe.splits)["train/loss"]
    else:
        smaller, larger = f"{SHRINKING} times narrower", "as configured"
        config = plain.model_copy(update={"model": narrow})
        small_loss = recipe.last_metrics(config, recipe.splits)["train/loss"]
    return CheckResult(
        "capacity",
        f"training loss of the larger network ({larger})",
        f"below {small_loss:.4f} ({smaller})",
        f"{loss:.4f}",
        loss < small_loss,
    )


CHECKS: tuple[Callable[[Recipe], CheckResult], ...] = (
    check_initial_loss,
    check_batch_independence,
    check_same_preprocessing,
    check_repeatable_evaluation,
    check_one_batch,
    check_input_matters,
    check_shuffled_labels,
    check_capacity,
)
"""All checks, the quick ones first."""


def _with_training(config: RunConfig, **fields: Any) -> RunConfig:
    training = config.training.model_copy(update=fields)
    return config.model_copy(update={"training": training})


def _sorted_rows(inputs: Tensor) -> np.ndarray[Any, Any]:
    """The images as rows, in an order that depends on the rows alone."""
    rows = inputs.float().flatten(1).cpu().numpy()
    return np.asarray(rows[np.lexsort(rows.round(2).T)])


def _blank(split: Split) -> Split:
    return replace(split, images=torch.zeros_like(split.images))


def _narrower(model: ModelConfig) -> ModelConfig | None:
    """The same network with a fraction of its units; None where it has no width."""

    def narrow(sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(1, size // SHRINKING) for size in sizes)

    match model:
        case MlpConfig(hidden_sizes=sizes):
            return model.model_copy(update={"hidden_sizes": narrow(sizes)})
        case CnnConfig(blocks=blocks, hidden_sizes=sizes):
            channels = narrow([block.channels for block in blocks])
            thin = tuple(
                block.model_copy(update={"channels": count})
                for block, count in zip(blocks, channels, strict=True)
            )
            return model.model_copy(update={"blocks": thin, "hidden_sizes": narrow(sizes)})
        case ResnetConfig(widths=widths):
            return model.model_copy(update={"widths": narrow(widths)})
        case _:
            return None


# ── running them ─────────────────────────────────────────────────────────────────────────────


def check_recipe(
    recipe: Recipe, on_result: Callable[[CheckResult], None] = lambda result: None
) -> list[CheckResult]:
    """Do all checks.

    Args:
        recipe: what is checked.
        on_result: called with each result as soon as it is there.
    """
    results = []
    for check in CHECKS:
        try:
            result = check(recipe)
        except DivergedError as error:
            name = check.__name__.removeprefix("check_")
            about = str(check.__doc__).partition(";")[0]
            result = CheckResult(name, about, "training that converges", str(error)[:60], False)
        results.append(result)
        on_result(result)
    return results


@dataclass(frozen=True)
class CheckOutcome:
    """All results and where they are kept: the folder and the W&B record."""

    results: tuple[CheckResult, ...]
    folder: Path
    wandb: Mapping[str, str | None]

    @property
    def passed(self) -> bool:
        """Whether all checks have passed."""
        return all(result.passed for result in self.results)


def run_checks(
    config: RunConfig,
    settings: Settings,
    *,
    on_result: Callable[[CheckResult], None] = lambda result: None,
) -> CheckOutcome:
    """Check the recipe of a configuration; keep the results in a folder and in W&B.

    Raises:
        MnistWandbError: with nothing left behind.
    """
    plan = choose_plan(config)
    splits = load_dataset(config.data, data_dir=settings.data_dir, device=plan.device)
    recipe = Recipe(config, take_images(splits, config.seed))
    with open_job("check", config, settings) as job:
        outcome = CheckOutcome(
            tuple(check_recipe(recipe, on_result)), job.folder.path, job.wandb_facts
        )
        job.write({"protocol": PROTOCOL, "results": [asdict(r) for r in outcome.results]})
        job.recorder.forward("log_tables", "check", [results_table(outcome.results)])
        job.totals = {r.name: float(r.passed) for r in outcome.results}
        job.exit_code = 0 if outcome.passed else 1
    return outcome


def results_table(results: Iterable[CheckResult]) -> Table:
    """The results for people and for W&B."""
    rows = [
        (r.name, r.about, r.expected, r.measured, "ok" if r.passed else "FAILED") for r in results
    ]
    columns = ("check", "what is measured", "expected", "measured", "verdict")
    return Table("results", f"checks ({PROTOCOL})", columns, rows)
