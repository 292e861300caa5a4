from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnist_wandb.config import VARIANTS, ZOO, Activation, ModelConfig
from mnist_wandb.loading import validate
from mnist_wandb.models import (
    ACTIVATIONS,
    FAMILIES,
    build_model,
    count_parameters,
    summarize_model,
    zoo_model,
    zoo_table,
)

PARAMETERS = {
    "linear": 7_850,
    "mlp_128": 101_770,
    "mlp_64x3": 59_210,
    "mlp_dropout": 235_146,
    "mlp_pyramid": 242_762,
    "mlp_small": 669_706,
    "mlp_large": 8_432_138,
    "cnn_small": 28_938,
    "cnn_large": 493_322,
    "cnn_valid": 1_199_882,
    "cnn_batchnorm": 104_650,
    "resnet": 2_776_522,
}
"""The table in DESIGN.md, section 5."""

ACTIVATION_FUNCTIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def section(name: str, **fields: object) -> ModelConfig:
    return validate({"model": {"name": name, **fields}}).model


def layer_names(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.modules() if not list(m.children())]


def images(count: int = 4, height: int = 28) -> torch.Tensor:
    return torch.randn(count, 1, height, 28, generator=torch.Generator().manual_seed(2))


# ── the tables ───────────────────────────────────────────────────────────────────────────────


def test_every_zoo_model_is_in_the_design_table() -> None:
    assert ZOO.keys() == PARAMETERS.keys()


def test_every_family_of_the_configuration_has_a_module() -> None:
    assert set(FAMILIES) == set(VARIANTS["model"].values())
    assert {row.family for row in ZOO.values()} == VARIANTS["model"].keys()


def test_every_activation_of_the_configuration_has_a_module() -> None:
    assert set(get_args(Activation)) == set(ACTIVATIONS) == set(ACTIVATION_FUNCTIONS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_zoo_model_has_the_documented_number_of_parameters(name: str) -> None:
    assert count_parameters(zoo_model(name)) == PARAMETERS[name]
    assert sum(p.numel() for p in build_model(section(name)).parameters()) == PARAMETERS[name]


def test_zoo_table_lists_every_model_with_family_size_and_source() -> None:
    table = zoo_table()
    assert {name: parameters for name, _, parameters, _ in table} == PARAMETERS
    assert all(ZOO[name].family == family for name, family, _, _ in table)
    assert all(len(source) > 10 for *_, source in table)


def test_parameters_that_do_not_train_are_not_counted() -> None:
    model = zoo_model("mlp_128")
    next(model.parameters()).requires_grad_(False)
    assert count_parameters(model) == PARAMETERS["mlp_128"] - 784 * 128


# ── shapes and gradients ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*PARAMETERS, "mlp", "cnn"])
@pytest.mark.parametrize(
    ("image_shape", "num_classes"), [((1, 28, 28), 10), ((1, 29, 28), 10), ((3, 28, 28), 47)]
)
def test_every_model_maps_images_to_one_logit_per_class(
    name: str, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    with torch.device("meta"):
        model = build_model(section(name), image_shape, num_classes)
        assert model(torch.empty(5, *image_shape)).shape == (5, num_classes)


@pytest.mark.parametrize("height", [28, 29])
@pytest.mark.parametrize("name", ["linear", "mlp_128", "cnn_small", "cnn_batchnorm", "resnet"])
def test_one_step_of_every_family_lowers_the_loss(name: str, height: int) -> None:
    model = build_model(section(name), (1, height, 28))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs, labels = images(height=height), torch.tensor([3, 1, 4, 1])
    losses = []
    for _ in range(2):
        logits = model(inputs)
        losses.append(F.cross_entropy(logits, labels))
        optimizer.zero_grad()
        losses[-1].backward()
        for path, parameter in model.named_parameters():
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path
            assert parameter.grad.any(), path
        optimizer.step()
    assert losses[1] < losses[0]
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "mlp_small", "cnn_large", "resnet"])
def test_models_return_logits_not_probabilities(name: str) -> None:
    logits = build_model(section(name)).eval()(images(16) * 3)
    assert logits.min() < 0
    assert not torch.allclose(logits.exp().sum(1), torch.ones(16), atol=0.1)


# ── what the layers compute ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["cnn_small", "cnn_large", "cnn_valid", "cnn_batchnorm"])
def test_cnn_computes_convolution_norm_relu_pool_as_documented(name: str) -> None:
    config = section(name)
    model = build_model(config)
    expected = images()
    layers = iter(copy.deepcopy(model).modules())

    def following(kind: type[nn.Module]) -> nn.Module:
        return next(layer for layer in layers if isinstance(layer, kind))

    for block in config.blocks:
        convolution = following(nn.Conv2d)
        padding = block.kernel_size // 2 if block.padding is None else block.padding
        expected = F.conv2d(expected, convolution.weight, convolution.bias, padding=padding)
        if block.batch_norm:
            expected = following(nn.BatchNorm2d)(expected)
        expected = F.relu(expected)  # the model pools first, which is the same
        if block.pool:
            expected = F.max_pool2d(expected, block.pool)
    expected = expected.flatten(1)
    for _ in config.hidden_sizes:
        expected = F.relu(following(nn.Linear)(expected))
    torch.testing.assert_close(model(images()), following(nn.Linear)(expected))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cnn_applies_each_activation_before_pooling_and_in_the_head(activation: str) -> None:
    block = {"channels": 4, "kernel_size": 3, "pool": 2}
    model = build_model(section("cnn", blocks=[block], hidden_sizes=[8], activation=activation))
    convolution, hidden, last = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    act = ACTIVATION_FUNCTIONS[activation]
    pooled = F.max_pool2d(act(convolution(images())), 2)
    torch.testing.assert_close(model(images()), last(act(hidden(pooled.flatten(1)))))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_computes_linear_layers_with_each_activation(activation: str) -> None:
    model = build_model(section("mlp", hidden_sizes=[16, 12], activation=activation))
    first, second, last = (m for m in model.modules() if isinstance(m, nn.Linear))
    act = ACTIVATION_FUNCTIONS[activation]
    expected = last(act(second(act(first(images().flatten(1))))))
    torch.testing.assert_close(model(images()), expected)


def test_linear_model_is_one_matrix() -> None:
    model = build_model(section("linear"))
    weight, bias = model.parameters()
    torch.testing.assert_close(model(images()), images().flatten(1) @ weight.T + bias)


def test_residual_network_adds_the_input_back() -> None:
    model = build_model(section("resnet", blocks_per_stage=[1], widths=[8])).eval()
    for parameter in model.stages.parameters():
        parameter.data.zero_()  # the block's own path gives nothing
    stem = model.stem(images())
    torch.testing.assert_close(model.stages(stem), stem)
    expected = model.head[-1](stem.mean((2, 3)))
    torch.testing.assert_close(model(images()), expected)


def test_residual_network_halves_the_image_in_each_later_stage() -> None:
    rows = summarize_model(section("resnet"), (1, 28, 28), 10)
    shapes = list(dict.fromkeys(row.output_shape for row in rows if len(row.output_shape) == 3))
    assert shapes == [(64, 28, 28), (128, 14, 14), (256, 7, 7), (256, 1, 1)]


# ── dropout and batch normalisation ──────────────────────────────────────────────────────────


def test_mlp_has_dropout_after_each_hidden_layer() -> None:
    model = build_model(section("mlp_dropout"))
    hidden = ["Linear", "ReLU", "Dropout"]
    assert layer_names(model) == ["Flatten", *hidden, *hidden, "Linear"]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.4, 0.3]


def test_mlp_has_batch_norm_before_each_activation_and_no_idle_dropout() -> None:
    model = build_model(
        section("mlp", hidden_sizes=[8, 8], dropout=[0, 0.5], batch_norm=True, activation="tanh")
    )
    hidden = ["Linear", "BatchNorm1d", "Tanh"]
    assert layer_names(model) == ["Flatten", *hidden, *hidden, "Dropout", "Linear"]


def test_cnn_has_dropout_before_each_linear_layer_of_the_head() -> None:
    model = build_model(section("cnn_valid", dropout=0.5))
    assert layer_names(model.head) == ["Flatten", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert "Dropout" not in layer_names(build_model(section("cnn_valid")))


def test_cnn_has_batch_norm_only_where_asked() -> None:
    blocks = [
        {"channels": 4, "kernel_size": 3, "batch_norm": True},
        {"channels": 6, "kernel_size": 3},
    ]
    model = build_model(section("cnn", blocks=blocks))
    assert layer_names(model.blocks) == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "ReLU"]


def test_cnn_pools_before_batch_norm_where_asked() -> None:
    block = {"channels": 4, "kernel_size": 3, "batch_norm": True, "pool": 2, "pool_first": True}
    model = build_model(section("cnn", blocks=[block]))
    assert layer_names(model.blocks) == ["Conv2d", "MaxPool2d", "BatchNorm2d", "ReLU"]
    model = build_model(section("cnn", blocks=[block], activation="gelu"))
    assert layer_names(model.blocks) == ["Conv2d", "MaxPool2d", "BatchNorm2d", "GELU"]


@pytest.mark.parametrize(
    ("name", "fields"), [("mlp_dropout", {}), ("cnn_valid", {"dropout": 0.5}), ("resnet", {})]
)
def test_scoring_is_the_same_twice_and_per_image(name: str, fields: dict[str, object]) -> None:
    model = build_model(section(name, **fields)).eval()
    together = model(images())
    assert torch.equal(model(images()), together)
    torch.testing.assert_close(model(images()[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


# ── weights ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["linear", "mlp_dropout", "cnn_batchnorm", "resnet"])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    first = build_model(section(name), seed=3).state_dict()
    torch.rand(7)
    state = torch.get_rng_state()
    again = build_model(section(name), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = build_model(section(name), seed=4).state_dict()
    drawn = [key for key in first if first[key].dim() > 1]
    assert drawn
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


# ── summary ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(("image_shape", "num_classes"), [((1, 28, 28), 10), ((1, 29, 28), 7)])
def test_summary_accounts_for_every_parameter(
    name: str, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    rows = summarize_model(section(name), image_shape, num_classes)
    with torch.device("meta"):
        model = build_model(section(name), image_shape, num_classes)
    assert sum(row.num_parameters for row in rows) == count_parameters(model)
    assert rows[-1].output_shape == (num_classes,)
    assert len({row.path for row in rows}) == len(rows)
    modules = dict(model.named_modules())
    assert all(type(modules[row.path]).__name__ == row.kind for row in rows)


def test_summary_shows_each_layer_in_order() -> None:
    rows = summarize_model(section("cnn_small"), (1, 28, 28), 10)
    assert [(row.kind, row.output_shape, row.num_parameters) for row in rows] == [
        ("Conv2d", (16, 28, 28), 416),
        ("MaxPool2d", (16, 14, 14), 0),
        ("ReLU", (16, 14, 14), 0),
        ("Conv2d", (32, 14, 14), 12_832),
        ("MaxPool2d", (32, 7, 7), 0),
        ("ReLU", (32, 7, 7), 0),
        ("Flatten", (1568,), 0),
        ("Linear", (10,), 15_690),
    ]
