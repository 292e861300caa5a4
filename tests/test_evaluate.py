from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mnist_wandb.checkpoint import Checkpoint, describe_data, save_checkpoint
from mnist_wandb.config import RunConfig
from mnist_wandb.data import Preprocessing, Split, Splits, load_dataset
from mnist_wandb.errors import CheckpointError, ConfigError, DatasetError
from mnist_wandb.evaluate import (
    Prediction,
    compute_loss,
    evaluate,
    evaluate_checkpoint,
    predict_images,
    predict_logits,
    predict_pictures,
)
from mnist_wandb.loading import override_config, validate
from mnist_wandb.models import build_model
from mnist_wandb.train import train

UNIT = Preprocessing.fit("unit", 0.0, 1.0)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return validate(
        {
            "device": "cpu",
            "data": {"dataset": "digits"},
            "model": {"name": "mlp", "hidden_sizes": [64], "dropout": 0.2, "batch_norm": True},
            "optimizer": {"name": "adamw", "lr": 0.01},
            "training": {"epochs": 6, "batch_size": 64},
        }
    )


@pytest.fixture(scope="module")
def splits(config: RunConfig) -> Splits:
    return load_dataset(config.data)


@pytest.fixture(scope="module")
def trained(
    config: RunConfig, splits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Path]:
    """A quickly trained model and its checkpoint."""
    model = build_model(config.model, seed=0)
    train(model, splits, config)
    preprocessing = Preprocessing.fit(config.data.scaling, splits.mean, splits.std)
    checkpoint = Checkpoint(
        config=config,
        **describe_data(splits, preprocessing),
        weights=model.state_dict(),
        step=1,
        epoch=1,
    )
    path = tmp_path_factory.mktemp("trained") / "best.pt"
    save_checkpoint(checkpoint, path)
    return model.eval(), path


def logits_by_hand(model: nn.Module, split: Split, splits: Splits) -> Tensor:
    with torch.no_grad():
        return model((split.images.double() / 255 - splits.mean).div(splits.std).float())


# ── loss ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_negative_log_probability(smoothing: float) -> None:
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.arange(9) % 4
    log_p = logits.double().log_softmax(1)
    truth = log_p[torch.arange(9), labels]
    expected = -((1 - smoothing) * truth + smoothing * log_p.mean(1)).mean()
    found = compute_loss(logits, labels, label_smoothing=smoothing)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_mse_is_the_mean_squared_distance_to_one_hot_targets() -> None:
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.arange(9) % 4
    expected = F.mse_loss(logits.softmax(1), torch.eye(4)[labels])
    torch.testing.assert_close(compute_loss(logits, labels, "mse"), expected)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_loss_of_bf16_logits_is_computed_in_float32(loss: str) -> None:
    logits, labels = torch.tensor([[12.0, 0.0, -7.0]], dtype=torch.bfloat16), torch.tensor([0])
    found = compute_loss(logits, labels, loss)
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(float(compute_loss(logits.float(), labels, loss)))


# ── scores of a split ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_scores_are_true_means_over_all_images(
    loss: str,
    batch_size: int,
    config: RunConfig,
    splits: Splits,
    trained: tuple[nn.Module, Path],
) -> None:
    model, split = trained[0], splits.val
    assert len(split) % 7 != 0
    preprocessing = Preprocessing.fit(config.data.scaling, splits.mean, splits.std)
    result = evaluate(model, split, preprocessing, loss=loss, batch_size=batch_size)
    logits = logits_by_hand(model, split, splits)
    if loss == "mse":
        expected = F.mse_loss(logits.softmax(1), torch.eye(10)[split.labels])
    else:
        expected = F.cross_entropy(logits, split.labels)
    assert result.loss == pytest.approx(float(expected), rel=1e-4)
    hits = logits.argmax(1) == split.labels
    assert result.accuracy == pytest.approx(hits.double().mean().item(), abs=1e-12)
    np.testing.assert_allclose(result.probabilities, logits.softmax(1), atol=1e-5)
    assert result.probabilities.dtype == np.float32
    assert result.labels.tolist() == split.labels.tolist()
    assert result.ids.tolist() == split.ids.tolist()
    assert result.class_names == tuple("0123456789")


def test_bf16_scores_are_close_and_come_as_float32(
    config: RunConfig, splits: Splits, trained: tuple[nn.Module, Path]
) -> None:
    model = trained[0]
    images = splits.val.images[:50]
    exact = predict_logits(model, images, UNIT)
    rounded = predict_logits(model, images, UNIT, precision="bf16", channels_last=True)
    assert rounded.dtype is torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_runs_in_eval_mode_and_puts_the_mode_back(
    training: bool, config: RunConfig, splits: Splits
) -> None:
    model = build_model(config.model).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = splits.val.images[:20]
    first, second = predict_logits(model, images, UNIT), predict_logits(model, images, UNIT)
    assert torch.equal(first, second)  # no dropout
    assert {module.training for module in model.modules()} == {training}
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_after_an_error_too(training: bool, config: RunConfig) -> None:
    model = build_model(config.model).train(training)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        predict_logits(model, torch.zeros(2, 1, 5, 5, dtype=torch.uint8), UNIT)
    assert {module.training for module in model.modules()} == {training}


# ── scores of a checkpoint ───────────────────────────────────────────────────────────────────


def test_test_time_augmentation_is_the_mean_over_the_image_and_four_shifts(
    trained: tuple[nn.Module, Path], splits: Splits
) -> None:
    model, _ = trained
    preprocessing = Preprocessing.fit("standardize", splits.mean, splits.std)
    images = splits.test.images
    black = np.zeros((len(images), 1, 32, 32), np.uint8)
    black[:, :, 2:-2, 2:-2] = images.numpy()
    total = np.zeros((len(images), 10))
    for top, left in ((2, 2), (2, 0), (2, 4), (0, 2), (4, 2)):
        view = torch.from_numpy(black[:, :, top : top + 28, left : left + 28].copy())
        total += predict_logits(model, view, preprocessing).softmax(dim=1).numpy()
    result = evaluate(model, splits.test, preprocessing, tta_pixels=2)
    np.testing.assert_allclose(result.probabilities, total / 5, atol=1e-6)
    truth = (total / 5)[np.arange(len(images)), splits.test.labels]
    assert result.loss == pytest.approx(-np.log(truth).mean(), rel=1e-5)
    plain = evaluate(model, splits.test, preprocessing)
    assert not np.allclose(plain.probabilities, result.probabilities, atol=1e-3)


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluate_checkpoint_scores_the_split_of_its_configuration(
    split: str,
    config: RunConfig,
    splits: Splits,
    trained: tuple[nn.Module, Path],
    tmp_path: Path,
) -> None:
    model, path = trained
    result, used = evaluate_checkpoint(path, split=split, data_dir=tmp_path)
    assert used == config
    chosen: Split = getattr(splits, split)
    assert result.ids.tolist() == chosen.ids.tolist()
    logits = logits_by_hand(model, chosen, splits)
    assert result.loss == pytest.approx(F.cross_entropy(logits, chosen.labels).item(), rel=1e-4)
    assert result.accuracy > 0.9


def override(*texts: str) -> Callable[[RunConfig], RunConfig]:
    return lambda config: override_config(config, texts)


@pytest.mark.parametrize(
    "text", ["data.split_seed=5", "data.val_fraction=0.3", "data.scaling=unit", "seed=3"]
)
def test_overrides_that_leak_or_do_nothing_are_refused(
    trained: tuple[nn.Module, Path], tmp_path: Path, text: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"the model is trained already; allowed overrides: data\.dat"
    ):
        evaluate_checkpoint(trained[1], split="val", data_dir=tmp_path, override=override(text))


def test_another_data_set_of_the_same_shape_can_be_scored(
    mnist_like: Path, trained: tuple[nn.Module, Path]
) -> None:
    result, used = evaluate_checkpoint(
        trained[1], split="test", data_dir=mnist_like, override=override("data.dataset=mnist")
    )
    assert used.data.dataset == "mnist"
    assert len(result.labels) == 100
    assert result.accuracy < 0.4  # noise


def test_a_data_set_that_does_not_fit_the_model_is_refused(
    splits: Splits, config: RunConfig, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(
        config, tuple("01234"), (1, 29, 28), UNIT, "", build_model(config.model).state_dict(), 1, 1
    )
    save_checkpoint(checkpoint, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        evaluate_checkpoint(tmp_path / "x.pt", split="test", data_dir=tmp_path)
    assert str(caught.value).endswith(
        "x.pt: was trained on images (1, 29, 28), the data set digits has (1, 28, 28)"
    )
    save_checkpoint(replace(checkpoint, image_shape=(1, 28, 28)), tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"trained on the classes 0, 1, 2, 3, 4, the data set"
    ):
        evaluate_checkpoint(tmp_path / "x.pt", split="test", data_dir=tmp_path)


def test_an_override_that_is_not_valid_is_refused(
    trained: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.dataset: got the text 'digit', .*did you mean 'digits'"
    ):
        evaluate_checkpoint(
            trained[1], split="val", data_dir=tmp_path, override=override("data.dataset=digit")
        )


def test_the_training_split_is_not_scored(trained: tuple[nn.Module, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^split: got 'train', allowed: val, test$"):
        evaluate_checkpoint(trained[1], split="train", data_dir=tmp_path)


# ── single pictures ──────────────────────────────────────────────────────────────────────────


def test_pictures_of_digits_are_labelled(
    splits: Splits, trained: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, path = trained
    probabilities = logits_by_hand(model, splits.test, splits).softmax(1)
    sure = (probabilities.max(1).values > 0.95) & (probabilities.argmax(1) == splits.test.labels)
    positions = [int((sure & (splits.test.labels == label)).nonzero()[0]) for label in range(10)]
    files = [tmp_path / f"{label}.png" for label in range(10)]
    for position, file in zip(positions, files, strict=True):
        Image.fromarray(splits.test.images[position, 0].numpy()).save(file)
    as_they_are = predict_pictures(path, files, preprocess=False)
    assert [p.label for p in as_they_are] == list("0123456789")
    for prediction, position in zip(as_they_are, positions, strict=True):
        top = probabilities[position].topk(2)
        assert prediction.confidence == pytest.approx(float(top.values[0]), abs=1e-5)
        assert prediction.runner_up == str(int(top.indices[1]))
        assert prediction.runner_up_confidence == pytest.approx(float(top.values[1]), abs=1e-5)


def test_pictures_brought_into_mnists_form_are_labelled_mostly_right(
    splits: Splits, trained: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    files = [tmp_path / f"{position}.png" for position in range(60)]
    for position, file in enumerate(files):
        Image.fromarray(splits.test.images[position, 0].numpy()).save(file)
    found = predict_pictures(trained[1], files)
    truth = splits.test.labels.tolist()
    assert sum(p.label == str(t) for p, t in zip(found, truth, strict=False)) > 0.7 * 60


def test_a_dark_digit_on_white_is_read_like_a_light_one_on_black(
    splits: Splits, trained: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    pixels = splits.test.images[0, 0].numpy()
    Image.fromarray(pixels).save(tmp_path / "light.png")
    Image.fromarray(255 - pixels).save(tmp_path / "dark.png")
    light, dark = predict_pictures(trained[1], [tmp_path / "light.png", tmp_path / "dark.png"])
    assert light == dark


def test_predict_images_orders_the_two_most_probable_classes(config: RunConfig) -> None:
    linear = validate({"model": {"name": "linear"}, "data": {"dataset": "digits"}})
    model = build_model(linear.model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    weights = model.state_dict()
    bias = next(v for v in weights.values() if v.ndim == 1)
    bias[2], bias[0] = 3.0, 1.0
    checkpoint = Checkpoint(linear, tuple("abcdefghij"), (1, 28, 28), UNIT, "", weights, 0, 0)
    (found,) = predict_images(checkpoint, torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    p = bias.softmax(0)
    expected = Prediction("c", float(p[2]), "a", float(p[0]))
    assert (found.label, found.runner_up) == (expected.label, expected.runner_up)
    assert found.confidence == pytest.approx(expected.confidence)
    assert found.runner_up_confidence == pytest.approx(expected.runner_up_confidence)


def test_a_file_that_is_no_picture_is_named(
    trained: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(DatasetError, match=r"notes\.png: not a picture"):
        predict_pictures(trained[1], [tmp_path / "notes.png"])
