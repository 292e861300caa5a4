from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import FAST, Finished

from mnist_wandb import onnx_export
from mnist_wandb.checkpoint import Checkpoint, save_checkpoint
from mnist_wandb.data import Preprocessing, Splits
from mnist_wandb.errors import CheckpointError
from mnist_wandb.loading import load_config
from mnist_wandb.models import build_model
from mnist_wandb.onnx_export import export_onnx

Cli = Callable[..., Finished]


def checkpoint_of(path: Path, *overrides: str) -> Checkpoint:
    """An untrained model as a checkpoint file."""
    config = load_config("quickstart", overrides)
    shape = (1, 29, 28)
    checkpoint = Checkpoint(
        config=config,
        class_names=("cat", "dog", "öwl"),
        image_shape=shape,
        preprocessing=Preprocessing(0.01, -0.4),
        data_fingerprint="f" * 64,
        weights=build_model(config.model, shape, 3).state_dict(),
        step=0,
        epoch=0,
    )
    save_checkpoint(checkpoint, path)
    return checkpoint


def run(path: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    return np.asarray(logits)


def test_exported_run_predicts_like_the_run_with_its_own_metadata_alone(
    cli: Cli, digits: Splits
) -> None:
    done = cli("run", "--json", "-q", *FAST)
    folder = Path(json.loads(done.out)["run_dir"])
    done = cli("export", "latest", "--format", "onnx", "--json")
    assert (done.code, done.err) == (0, "")
    facts = json.loads(done.out)
    assert Path(facts["path"]) == folder / "model.onnx"
    assert facts["largest_difference"] < 1e-4
    model = onnx.load(facts["path"])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata == facts["metadata"]
    assert json.loads(metadata["class_names"]) == list(digits.class_names)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert (shape[0].dim_param, [d.dim_value for d in shape[1:]]) == ("batch", [1, 28, 28])
    pixels = digits.test.images.numpy().astype(np.float32)
    images = pixels * float(metadata["scale"]) + float(metadata["shift"])
    with np.load(folder / "predictions.npz") as stored:
        for count in (1, 17, len(images)):
            logits = run(folder / "model.onnx", images[:count].astype(np.float32))
            probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
            assert np.allclose(probabilities, stored["probabilities"][:count], atol=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.name=mlp_dropout", "model.batch_norm=true", "model.activation=gelu"),
        ("model.name=resnet", "model.widths=[8, 16]", "model.blocks_per_stage=[1, 1]"),
    ],
)
def test_every_family_can_be_exported(overrides: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model.pt", *overrides)
    exported = export_onnx(tmp_path / "model.pt", tmp_path / "new" / "out.onnx")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.onnx"]
    assert json.loads(exported.metadata["class_names"]) == ["cat", "dog", "öwl"]
    images = torch.randn(5, 1, 29, 28, generator=torch.manual_seed(0))
    with torch.inference_mode():
        expected = checkpoint.build_model()(images).numpy()
    assert np.allclose(run(exported.path, images.numpy()), expected, atol=1e-4)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_extra_export_says_how_to_install_it(
    package: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_of(Path("model.pt"), "model.name=linear")
    monkeypatch.setitem(sys.modules, package, None)
    done = cli("export", "model.pt")
    assert (done.code, done.out) == (2, "")
    assert f"not installed ({package}); install them with: pip install 'mnist-w" in done.err
    assert [p.name for p in Path.cwd().iterdir()] == ["model.pt"]


@pytest.mark.parametrize("difference", [0.5, math.nan])
def test_a_file_that_gives_other_outputs_is_not_kept(
    difference: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_of(tmp_path / "model.pt", "model.name=linear")
    monkeypatch.setattr(onnx_export, "_compare", lambda *_: difference)
    with pytest.raises(CheckpointError, match=r"differs from the checkpoint by (0\.5|nan)"):
        export_onnx(tmp_path / "model.pt", tmp_path / "out" / "model.onnx")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_input_of_export_is_one_line(cli: Cli) -> None:
    checkpoint_of(Path("model.pt"), "model.name=linear")
    Path("file").write_text("")
    for arguments, message in (
        (("latest",), "latest: no run folder of that path, name or id"),
        (("model.pt", "--format", "tflite"), "--format: got 'tflite', allowed: onnx"),
        (("file",), "file: not a checkpoint, or truncated"),
        (("model.pt", "-o", "file/model.onnx"), "file/model.onnx: cannot be written: File exists"),
    ):
        done = cli("export", *arguments)
        assert (done.code, done.out) == (2, "")
        assert f"error: {message}" in done.err
