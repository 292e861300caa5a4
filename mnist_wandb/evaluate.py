"""Score a model on a split, or on single pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_wandb.checkpoint import Checkpoint, load_checkpoint
from mnist_wandb.config import IMAGE_SIZE, RunConfig
from mnist_wandb.data import Preprocessing, Split, load_dataset
from mnist_wandb.device import choose_plan, numeric_mode
from mnist_wandb.errors import CheckpointError, ConfigError
from mnist_wandb.metrics import EvalResult
from mnist_wandb.pictures import read_picture
from mnist_wandb.ranks import ONE, Ranks

log = logging.getLogger(__name__)

EVAL_BATCH_SIZE = 1000
"""Images per forward pass; does not change any score beyond float rounding."""


def compute_loss(
    logits: Tensor, labels: Tensor, loss: str = "cross_entropy", label_smoothing: float = 0.0
) -> Tensor:
    """Mean loss over the images of a batch.

    Args:
        logits: float (N, C).
        labels: int64 (N,).
        loss: `cross_entropy` in nats, or `mse` between softmax and one-hot targets.
        label_smoothing: share of the target spread over all classes (cross_entropy only).

    Returns:
        Scalar of dtype float32.
    """
    if loss == "mse":
        targets = F.one_hot(labels, logits.shape[1]).float()
        return F.mse_loss(logits.float().softmax(dim=1), targets)
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def predict_logits(
    model: nn.Module,
    images: Tensor,
    preprocessing: Preprocessing,
    *,
    batch_size: int = EVAL_BATCH_SIZE,
    precision: str = "fp32",
    channels_last: bool = False,
) -> Tensor:
    """Run the model in eval mode without gradients; its mode is put back afterwards.

    Args:
        model: from float32 (N, 1, H, W) to logits (N, C), on the images' device.
        images: uint8 (N, 1, H, W).
        preprocessing: the one of training.
        batch_size: images per forward pass.
        precision: with "bf16" through autocast; for "tf32" see `device.numeric_mode`.
        channels_last: lay the batch out channels-last.

    Returns:
        float32 (N, C) on the images' device.
    """
    was_training = model.training
    model.eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    try:
        with (
            torch.inference_mode(),
            torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            batches = [
                model(preprocessing(batch).contiguous(memory_format=memory_format)).float()
                for batch in torch.split(images, batch_size)
            ]
        return torch.cat(batches)
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    loss: str = "cross_entropy",
    batch_size: int = EVAL_BATCH_SIZE,
    precision: str = "fp32",
    channels_last: bool = False,
    tta_pixels: int = 0,
    ranks: Ranks = ONE,
) -> EvalResult:
    """Score a model on every image of a split, once, in eval mode.

    Args:
        model: on the split's device.
        split: images and labels.
        preprocessing: the one of training.
        loss: see `compute_loss`; without label smoothing.
        batch_size: images per forward pass.
        precision: see `predict_logits`.
        channels_last: lay the batch out channels-last.
        tta_pixels: test-time augmentation: the probabilities are the mean over each image and its
            four shifts by so many pixels; 0 is none.
        ranks: the processes that share the images; each gets the scores of all of them.

    Returns:
        Loss (a true mean over images), probabilities and everything that follows from them.
    """
    views = []
    for across, down in _views(tta_pixels):
        logits = predict_logits(
            model,
            _shift(ranks.part(split.images), across, down),
            preprocessing,
            batch_size=batch_size,
            precision=precision,
            channels_last=channels_last,
        )
        views.append(ranks.gather(logits, len(split)))
    logits = views[0] if len(views) == 1 else _mean_prediction(views)
    return EvalResult(
        loss=float(compute_loss(logits, split.labels, loss)),
        probabilities=logits.softmax(dim=1).cpu().numpy(),
        labels=split.labels.cpu().numpy(),
        ids=split.ids.numpy(),
        class_names=split.class_names,
        shortcut_agrees=(None if split.shortcut_agrees is None else split.shortcut_agrees.numpy()),
    )


def _views(pixels: int) -> list[tuple[int, int]]:
    """(across, down) of each view of an image; the first is the image itself."""
    shifts = [(pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)] if pixels else []
    return [(0, 0), *shifts]


def _shift(images: Tensor, across: int, down: int) -> Tensor:
    """Move images (N, 1, H, W) by whole pixels; what comes in is black."""
    if (across, down) == (0, 0):
        return images
    return F.pad(images, (across, -across, down, -down))  # negative padding cuts off


def _mean_prediction(views: Sequence[Tensor]) -> Tensor:
    """Logits float32 (N, C) whose softmax is the mean of the views' probabilities."""
    logs = torch.stack([logits.log_softmax(dim=1) for logits in views])
    return logs.logsumexp(dim=0) - math.log(len(views))


@dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Attributes:
        label, confidence: most probable class and its probability.
        runner_up, runner_up_confidence: the second one.
    """

    label: str
    confidence: float
    runner_up: str
    runner_up_confidence: float


def evaluate_checkpoint(
    path: Path,
    *,
    split: str,
    data_dir: Path,
    override: Callable[[RunConfig], RunConfig] = lambda config: config,
    tta_pixels: int = 0,
) -> tuple[EvalResult, RunConfig]:
    """Score a checkpoint on the data of its configuration.

    Args:
        path: checkpoint file.
        split: `val` or `test`.
        data_dir: data folder where the configuration does not name one.
        override: changes the configuration first (another data set, another device).
        tta_pixels: see `evaluate`.

    Returns:
        The scores and the configuration used.

    Raises:
        CheckpointError: the file is no checkpoint, or its model does not fit the data.
    """
    if split not in ("val", "test"):
        raise ConfigError(f"split: got {split!r}, allowed: val, test")
    checkpoint = load_checkpoint(path)
    config = override(checkpoint.config)
    _check_overrides(checkpoint.config, config)
    plan = choose_plan(config)
    splits = load_dataset(config.data, data_dir=data_dir, device=plan.device)
    if splits.image_shape != checkpoint.image_shape:
        raise CheckpointError(
            f"{path}: was trained on images {checkpoint.image_shape}, the data set"
            f" {config.data.dataset} has {splits.image_shape}"
        )
    if splits.class_names != checkpoint.class_names:
        raise CheckpointError(
            f"{path}: was trained on the classes {', '.join(checkpoint.class_names)}, the data set"
            f" {config.data.dataset} has {', '.join(splits.class_names)}"
        )
    same_data = config.data == checkpoint.config.data
    if same_data and splits.fingerprint != checkpoint.data_fingerprint:
        log.warning("%s: the data are not those of its training any more", path)
    with numeric_mode(plan, deterministic=config.training.deterministic):
        result = evaluate(
            checkpoint.build_model().to(plan.device),
            splits.val if split == "val" else splits.test,
            checkpoint.preprocessing,
            loss=config.training.loss,
            precision=plan.precision,
            channels_last=plan.channels_last,
            tta_pixels=tta_pixels,
        )
    return result, config


def _check_overrides(trained: RunConfig, config: RunConfig) -> None:
    """Refuse overrides without effect, and other splits: their images may have been trained on."""
    fields = ("dataset", "dir", "shortcut")
    data = {field: getattr(config.data, field) for field in fields}
    training = {"precision": config.training.precision, "loss": config.training.loss}
    allowed = trained.model_copy(
        update={
            "device": config.device,
            "data": trained.data.model_copy(update=data),
            "training": trained.training.model_copy(update=training),
        }
    )
    if config != allowed:
        raise ConfigError(
            "evaluate: the model is trained already; allowed overrides: data.dataset, data.dir,"
            " data.shortcut, device, training.precision, training.loss"
        )


def predict_pictures(
    path: Path, files: Sequence[Path], *, preprocess: bool = True
) -> list[Prediction]:
    """Classify one or more picture files with a checkpoint; see `pictures.read_picture`.

    Raises:
        CheckpointError, DatasetError: a file is not what it should be.
    """
    checkpoint = load_checkpoint(path)
    # An image folder was read as it is; what was done to its pictures is not known.
    styles = {"fashion_mnist": "object", "image_folder": "as_is"}
    style = styles.get(checkpoint.config.data.dataset, "digit") if preprocess else "as_is"
    images = torch.from_numpy(np.stack([read_picture(file, style=style) for file in files]))
    # A picture has no shortcut: the rows below it are black.
    images = F.pad(images, (0, 0, 0, checkpoint.image_shape[1] - IMAGE_SIZE))
    return predict_images(checkpoint, images[:, None])


def predict_images(checkpoint: Checkpoint, images: Tensor) -> list[Prediction]:
    """Classify single images.

    Args:
        checkpoint: see `load_checkpoint`.
        images: uint8 (N, 1, H, W), light on black.
    """
    logits = predict_logits(checkpoint.build_model(), images, checkpoint.preprocessing)
    top = logits.softmax(dim=1).topk(2, dim=1)
    names = checkpoint.class_names
    return [
        Prediction(names[first], first_share, names[second], second_share)
        for (first, second), (first_share, second_share) in zip(
            top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]
