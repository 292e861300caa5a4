"""A trained model as an ONNX file, checked against the checkpoint it is made from."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnist_wandb.checkpoint import Checkpoint, load_checkpoint
from mnist_wandb.errors import CheckpointError, ConfigError, RunError

INPUT, OUTPUT = "images", "logits"
CHECKED_BATCHES = (1, 2, 33)
"""Batch sizes with which the file is run before it gets its name."""
TOLERANCE = 1e-3
"""Largest difference of a logit; float32 rounding in another order gives about 1e-5."""


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file: path, size, opset, its metadata, and the largest difference of a logit."""

    path: Path
    num_bytes: int
    opset: int
    metadata: Mapping[str, str]
    largest_difference: float


def export_onnx(checkpoint_path: Path, out: Path) -> ExportedModel:
    """Write a checkpoint's model as ONNX and run it to see that it gives the same logits.

    The model takes `images`, float32 (N, 1, H, W) with any N, and gives `logits` float32 (N, C).
    Its metadata say how pixels become input (input = pixel · scale + shift) and name the classes.

    Args:
        checkpoint_path: see `load_checkpoint`.
        out: file to write; it gets its name when it is complete and checked.

    Raises:
        ConfigError: the packages of the extra `onnx` are not installed.
        CheckpointError: no checkpoint, or the file does not give the checkpoint's own outputs.
        RunError: the file cannot be written.
    """
    onnx, runtime = _import_packages()
    checkpoint = load_checkpoint(checkpoint_path)
    model = checkpoint.build_model()
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # known before the work, not after it
        metadata = _describe(checkpoint)
        opset = _write(onnx, model, checkpoint, metadata, temporary)
        difference = _compare(runtime, model, checkpoint, temporary)
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{checkpoint_path}: the exported model differs from the checkpoint by"
                f" {difference:.2g} in a logit; nothing was written"
            )
        size = temporary.stat().st_size
        temporary.replace(out)
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return ExportedModel(out, size, opset, metadata, difference)


def _import_packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ConfigError(
            f"export to ONNX needs packages that are not installed ({error.name});"
            " install them with: pip install 'mnist-wandb[onnx]'"
        ) from None
    return onnx, onnxruntime


def _describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What goes into the file's metadata; texts, as ONNX wants them."""
    return {
        "class_names": json.dumps(checkpoint.class_names, ensure_ascii=False),
        "image_shape": json.dumps(checkpoint.image_shape),
        "input": "pixel * scale + shift, pixels from 0 (black) to 255 (white)",
        "scale": repr(checkpoint.preprocessing.scale),
        "shift": repr(checkpoint.preprocessing.shift),
        "model": checkpoint.config.model.name,
        "dataset": checkpoint.config.data.dataset,
        "data_fingerprint": checkpoint.data_fingerprint,
        "scores": json.dumps(checkpoint.metrics),
    }


def _write(
    onnx: Any, model: nn.Module, checkpoint: Checkpoint, metadata: dict[str, str], path: Path
) -> int:
    """Write the file; returns its opset."""
    example = torch.zeros(2, *checkpoint.image_shape)
    with _quiet():
        program = torch.onnx.export(
            model,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        proto = program.model_proto
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.checker.check_model(proto)
    onnx.save_model(proto, str(path))
    return int(next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")))


def _compare(runtime: Any, model: nn.Module, checkpoint: Checkpoint, path: Path) -> float:
    """Largest difference of a logit over batches of noise of several sizes."""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in CHECKED_BATCHES:
        pixels: Tensor = torch.randint(0, 256, (size, *checkpoint.image_shape), generator=generator)
        images = checkpoint.preprocessing(pixels)
        with torch.inference_mode():
            expected = model(images)
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        largest = max(largest, float((torch.from_numpy(logits) - expected).abs().max()))
    return largest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
