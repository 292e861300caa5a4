"""Checkpoints: one file with the weights and all that is needed to use or to continue them."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnist_wandb.config import RunConfig
from mnist_wandb.data import Preprocessing, Splits
from mnist_wandb.errors import CheckpointError, ConfigError, RunError
from mnist_wandb.loading import validate
from mnist_wandb.models import build_model

FORMAT = "mnist-wandb checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A model with what it needs to be used, and optionally to be trained on.

    Attributes:
        config: the run's configuration.
        class_names: C names.
        image_shape: (channels, height, width) of the input.
        preprocessing: from pixels to input.
        data_fingerprint: SHA-256 of the data that it was trained on.
        weights: state dict of the model to score (the averaged weights where EMA is on).
        step: optimizer steps done.
        epoch: epochs done, a whole number between epochs.
        metrics: scores at that point, by metric name.
        training: optimizer, RNG and position, or None where there is nothing to continue.
    """

    config: RunConfig
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    data_fingerprint: str
    weights: dict[str, Tensor]
    step: int
    epoch: float
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] | None = None

    def build_model(self) -> nn.Module:
        """The model in eval mode, on the CPU.

        Raises:
            CheckpointError: the weights are not those of the configured model.
        """
        with torch.device("meta"):
            model = build_model(self.config.model, self.image_shape, len(self.class_names))
        try:
            model.load_state_dict(self.weights, assign=True)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the weights do not belong to the model {self.config.model.name!r}:"
                f" {' '.join(str(error).split())[:200]}"
            ) from None
        return model.eval()


def describe_data(splits: Splits, preprocessing: Preprocessing) -> dict[str, Any]:
    """The fields of a checkpoint that come from the data."""
    return {
        "class_names": splits.class_names,
        "image_shape": splits.image_shape,
        "preprocessing": preprocessing,
        "data_fingerprint": splits.fingerprint,
    }


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write to a temporary name, flush to the disk, rename: a reader never sees half a file.

    Raises:
        RunError: the file cannot be written (disk full, read-only folder).
    """
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "config": checkpoint.config.model_dump(mode="json"),
        "class_names": list(checkpoint.class_names),
        "image_shape": list(checkpoint.image_shape),
        "preprocessing": [checkpoint.preprocessing.scale, checkpoint.preprocessing.shift],
        "data_fingerprint": checkpoint.data_fingerprint,
        "weights": checkpoint.weights,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "metrics": checkpoint.metrics,
        "training": checkpoint.training,
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise RunError(f"{path}: cannot be written: {reason}") from None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; unpickles tensors and plain values only.

    Raises:
        CheckpointError: missing, truncated, of another kind, or from a newer version.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: a PyTorch file, but not a checkpoint of mnist-wandb; expected best.pt or"
            " last.pt of a run folder"
        )
    if content.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {content.get('version')}, this program reads version"
            f" {FORMAT_VERSION}; use the release of mnist-wandb that wrote it"
        )
    try:
        return Checkpoint(
            config=validate(content["config"]),
            class_names=tuple(content["class_names"]),
            image_shape=tuple(content["image_shape"]),
            preprocessing=Preprocessing(*content["preprocessing"]),
            data_fingerprint=content["data_fingerprint"],
            weights=content["weights"],
            step=content["step"],
            epoch=content["epoch"],
            metrics=content["metrics"],
            training=content["training"],
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: its configuration is not valid here: {error}") from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__} {error}") from None


def _read(path: Path) -> Any:
    try:
        if not zipfile.is_zipfile(path) and path.is_file():
            raise CheckpointError(
                f"{path}: not a checkpoint, or truncated; expected best.pt or last.pt of a run"
                " folder"
            )
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself does not look at the checksums
        if damaged is not None:
            raise CheckpointError(f"{path}: damaged ({damaged} has a wrong checksum)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        LookupError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason}") from None
