from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mnist_wandb.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mnist_wandb.config import RunConfig
from mnist_wandb.data import Preprocessing, load_dataset
from mnist_wandb.errors import CheckpointError, RunError
from mnist_wandb.loading import validate
from mnist_wandb.models import build_model
from mnist_wandb.train import CheckpointReady, Event, train

MLP = {"name": "mlp", "hidden_sizes": [12], "batch_norm": True, "dropout": 0.2}


def config_with(**model: Any) -> RunConfig:
    return validate({"data": {"dataset": "digits"}, "model": model, "device": "cpu"})


@pytest.fixture
def checkpoint() -> Checkpoint:
    """A small untrained model with made-up scores and training state."""
    config = config_with(**MLP)
    return Checkpoint(
        config=config,
        class_names=tuple("0123456789"),
        image_shape=(1, 28, 28),
        preprocessing=Preprocessing(0.012345678901234567, -0.4),
        data_fingerprint="f" * 64,
        weights=build_model(config.model, seed=3).state_dict(),
        step=17,
        epoch=2.4,
        metrics={"val/accuracy": 0.9, "val/loss": 0.1 + 0.2},
        training={"step": 17, "rng": torch.get_rng_state(), "pending_sizes": [4, 4]},
    )


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(checkpoint, tmp_path / "best.pt")
    return tmp_path / "best.pt"


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of a checkpoint file."""
    content = torch.load(path, weights_only=True)
    torch.save(change(content), path)


# ── round trip ───────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_comes_back_as_it_was_saved(checkpoint: Checkpoint, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    for part in fields(Checkpoint):
        found, expected = getattr(loaded, part.name), getattr(checkpoint, part.name)
        if part.name == "weights":
            found, expected = dict(found), dict(expected)
        if part.name in ("weights", "training"):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        else:
            assert found == expected, part.name
    assert not list(saved.parent.glob(".best.pt*"))


def test_the_loaded_model_is_in_eval_mode_and_gives_the_same_logits(
    checkpoint: Checkpoint, saved: Path
) -> None:
    model = build_model(checkpoint.config.model, seed=3).eval()
    images = torch.rand(5, 1, 28, 28)
    loaded = load_checkpoint(saved).build_model()
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(images), model(images))
    assert next(loaded.parameters()).device.type == "cpu"


def test_building_a_model_leaves_the_random_state_alone(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    before = torch.get_rng_state()
    loaded.build_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_of_another_image_shape_and_number_of_classes_is_rebuilt(tmp_path: Path) -> None:
    config = config_with(name="cnn_small")
    shape, names = (1, 29, 28), ("a", "b", "c")
    model = build_model(config.model, shape, 3, seed=1).eval()
    stored = Checkpoint(config, names, shape, Preprocessing(1, 0), "", model.state_dict(), 0, 0)
    save_checkpoint(stored, tmp_path / "x.pt")
    images = torch.rand(2, *shape)
    assert torch.equal(load_checkpoint(tmp_path / "x.pt").build_model()(images), model(images))


def test_a_checkpoint_of_a_run_with_ema_holds_the_averaged_weights(tmp_path: Path) -> None:
    training = {"epochs": 1, "batch_size": 25, "ema_decay": 0.9}
    data = {"dataset": "digits", "train_size": 100}
    config = validate({"data": data, "model": {"name": "linear"}, "training": training})
    stored: list[Checkpoint] = []

    def emit(event: Event) -> None:
        if isinstance(event, CheckpointReady):
            save_checkpoint(event.checkpoint, tmp_path / "last.pt")
            stored.append(load_checkpoint(tmp_path / "last.pt"))

    scored = build_model(config.model)
    train(scored, load_dataset(config.data), config, emit=emit)
    assert stored[-1].training is not None
    latest = stored[-1].training["model"]
    rebuilt = stored[-1].build_model().state_dict()
    for name, value in scored.state_dict().items():
        assert torch.equal(rebuilt[name], value)
        assert not torch.equal(latest[name], value)


def test_saving_replaces_the_previous_checkpoint(checkpoint: Checkpoint, saved: Path) -> None:
    save_checkpoint(replace(checkpoint, step=18), saved)
    assert load_checkpoint(saved).step == 18


# ── writing that fails ───────────────────────────────────────────────────────────────────────


def test_saving_into_a_missing_folder_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "best.pt"
    with pytest.raises(RunError, match=r"nowhere/best\.pt: cannot be written: No such file or"):
        save_checkpoint(checkpoint, path)
    assert not path.parent.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
@pytest.mark.parametrize("hidden", [1, 2000])
def test_a_full_disk_leaves_the_previous_checkpoint_as_it_was(
    hidden: int, checkpoint: Checkpoint, saved: Path
) -> None:
    before = saved.read_bytes()
    (saved.parent / ".best.pt.tmp").symlink_to("/dev/full")
    config = config_with(name="mlp", hidden_sizes=[hidden])
    larger = replace(
        checkpoint, config=config, weights=build_model(config.model).state_dict(), step=99
    )
    with pytest.raises(RunError, match=r"best\.pt: cannot be written: \S"):
        save_checkpoint(larger, saved)
    assert saved.read_bytes() == before
    assert load_checkpoint(saved).step == 17
    assert not list(saved.parent.glob(".best.pt*"))


@pytest.mark.parametrize("name", [".best.pt.tmp", "best.pt"])
def test_a_folder_in_the_way_is_an_error(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()  # what cannot be written to cannot be cleaned up either
    with pytest.raises(RunError, match=r"best\.pt: cannot be written: (Is a directory|\S+)"):
        save_checkpoint(checkpoint, tmp_path / "best.pt")
    assert (tmp_path / name / "mine").exists()


# ── reading what is no checkpoint ────────────────────────────────────────────────────────────


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best\.pt: no such file"):
        load_checkpoint(tmp_path / "best.pt")


def test_a_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"epochs: 10\n", pickle.dumps({"format": "mnist-wandb checkpoint"}), b"\0" * 999],
    ids=["empty", "two bytes", "text", "plain pickle", "zeros"],
)
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best\.pt: not a checkpoint, or truncated; expect"):
        load_checkpoint(path)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(share: float, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"best\.pt: not a checkpoint, or truncated"):
        load_checkpoint(saved)


@pytest.mark.parametrize("position", [0.3, 0.5, 0.7])
def test_a_checkpoint_with_a_damaged_middle_is_refused(position: float, saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[int(len(content) * position)] ^= 0x10
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best\.pt: damaged \(\S+ has a wrong checksum\)"):
        load_checkpoint(saved)


def test_another_zip_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError, match=r"x\.pt: not a readable checkpoint: "):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content",
    [nn.Linear(3, 2).state_dict(), torch.zeros(3), [1, 2], {"format": "another"}],
    ids=["state dict", "tensor", "list", "dict"],
)
def test_another_pytorch_file_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="a PyTorch file, but not a checkpoint of mnist-wand"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("version", [2, 99, None])
def test_a_checkpoint_of_another_version_says_which(version: int | None, saved: Path) -> None:
    rewrite(saved, lambda content: {**content, "version": version})
    text = f"checkpoint version {version}, this program reads version 1; use the release"
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(saved)


@pytest.mark.parametrize("key", ["weights", "preprocessing", "config", "training", "step"])
def test_a_checkpoint_that_lacks_a_part_is_damaged(key: str, saved: Path) -> None:
    rewrite(saved, lambda content: {k: v for k, v in content.items() if k != key})
    with pytest.raises(CheckpointError, match=f"best.pt: damaged: KeyError '{key}'"):
        load_checkpoint(saved)


def test_a_configuration_that_is_not_valid_here_is_explained(saved: Path) -> None:
    def change(content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "config": {**content["config"], "sede": 1}}

    rewrite(saved, change)
    with pytest.raises(CheckpointError, match="its configuration is not valid here: sede: unknown"):
        load_checkpoint(saved)


@pytest.mark.parametrize("other", [{"name": "cnn_small"}, {"name": "mlp", "hidden_sizes": [13]}])
def test_weights_of_another_model_are_refused(other: dict[str, Any], saved: Path) -> None:
    weights: dict[str, Tensor] = build_model(config_with(**other).model).state_dict()
    rewrite(saved, lambda content: {**content, "weights": weights})
    with pytest.raises(CheckpointError, match="the weights do not belong to the model 'mlp': "):
        load_checkpoint(saved).build_model()


@pytest.mark.parametrize("weights", [[1], None, "x", {}, {"a": 1}, {1: torch.zeros(1)}], ids=str)
def test_weights_of_another_form_are_refused(weights: Any, saved: Path) -> None:
    rewrite(saved, lambda content: {**content, "weights": weights})
    with pytest.raises(CheckpointError, match="the weights do not belong to the model 'mlp': "):
        load_checkpoint(saved).build_model()


class Malicious:
    """Unpickling this makes a folder."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("owned",)


def test_a_malicious_checkpoint_is_refused_without_running_its_code(
    tmp_path: Path, saved: Path
) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "metrics": Malicious()}, saved)
    with pytest.raises(CheckpointError, match=r"best\.pt: not a readable checkpoint: "):
        load_checkpoint(saved)
    assert not Path("owned").exists()
    torch.load(saved, weights_only=False)  # the trap does work
    assert Path("owned").exists()
    shutil.rmtree("owned")
