"""The model families as modules, and what a model looks like from outside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnist_wandb.config import (
    ZOO,
    CnnConfig,
    ConvBlock,
    LinearConfig,
    MlpConfig,
    ModelConfig,
    ResnetConfig,
)
from mnist_wandb.loading import validate

ImageShape = tuple[int, int, int]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def build_model(
    config: ModelConfig,
    image_shape: ImageShape = (1, 28, 28),
    num_classes: int = 10,
    *,
    seed: int = 0,
) -> nn.Module:
    """Build a model with freshly drawn weights, on the CPU.

    Args:
        config: the `model` section.
        image_shape: (channels, height, width) of the input.
        num_classes: C.
        seed: of the weights; the same seed gives the same weights whatever was drawn before.

    Returns:
        A module from float32 (N, channels, height, width) to logits float32 (N, C).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's only; others are left alone
        model: nn.Module = FAMILIES[type(config)](config, image_shape, num_classes)
    return model


class Linear(nn.Sequential):
    """Softmax regression on the pixels."""

    def __init__(self, _config: LinearConfig, image_shape: ImageShape, num_classes: int) -> None:
        super().__init__(_head(_numel(image_shape), (), num_classes))


class Mlp(nn.Sequential):
    """Fully connected layers with an activation and dropout after each hidden one."""

    def __init__(self, config: MlpConfig, image_shape: ImageShape, num_classes: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = _numel(image_shape)
        for units, dropout in zip(config.hidden_sizes, config.dropout, strict=True):
            layers.append(nn.Linear(inputs, units))
            if config.batch_norm:
                layers.append(nn.BatchNorm1d(units))
            layers.append(ACTIVATIONS[config.activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
            inputs = units
        super().__init__(*layers, nn.Linear(inputs, num_classes))


class Cnn(nn.Sequential):
    """Convolution blocks and a head of linear layers."""

    def __init__(self, config: CnnConfig, image_shape: ImageShape, num_classes: int) -> None:
        channels, height, width = image_shape
        blocks: list[nn.Module] = []
        for block in config.blocks:
            blocks.append(_conv_block(channels, block, config.activation))
            channels = block.channels
            height, width = block.output_size(height), block.output_size(width)
        head = _head(
            channels * height * width,
            config.hidden_sizes,
            num_classes,
            config.activation,
            config.dropout,
        )
        super().__init__(OrderedDict(blocks=nn.Sequential(*blocks), head=head))


class Resnet(nn.Sequential):
    """Stem, stages of residual blocks, global average pooling, linear.

    Source: He et al. 2016, "Deep Residual Learning", section 4.2 (the CIFAR form).
    """

    def __init__(self, config: ResnetConfig, image_shape: ImageShape, num_classes: int) -> None:
        width = config.widths[0]
        stem = nn.Sequential(
            nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        stages: list[nn.Module] = []
        for stage, (count, channels) in enumerate(
            zip(config.blocks_per_stage, config.widths, strict=True)
        ):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                stages.append(ResidualBlock(width, channels, stride))
                width = channels
        super().__init__(
            OrderedDict(
                stem=stem,
                stages=nn.Sequential(*stages),
                pool=nn.AdaptiveAvgPool2d(1),
                head=_head(width, (), num_classes),
            )
        )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Map float (N, inputs, H, W) to float (N, outputs, H / stride, W / stride)."""
        return torch.relu(self.convolutions(images) + self.shortcut(images))


FAMILIES: dict[type, Any] = {
    LinearConfig: Linear,
    MlpConfig: Mlp,
    CnnConfig: Cnn,
    ResnetConfig: Resnet,
}
"""The module of each model section."""


def _numel(image_shape: ImageShape) -> int:
    channels, height, width = image_shape
    return channels * height * width


def _conv_block(inputs: int, block: ConvBlock, activation: str) -> nn.Sequential:
    padding = block.kernel_size // 2 if block.padding is None else block.padding
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, block.channels, block.kernel_size, padding=padding)
    ]
    pool = [nn.MaxPool2d(block.pool)] if block.pool else []
    if block.pool_first:
        layers += pool
        pool = []
    if block.batch_norm:
        layers.append(nn.BatchNorm2d(block.channels))
    # max(relu(x)) = relu(max(x)): pooling first leaves the activation a quarter of the pixels.
    if activation == "relu":
        return nn.Sequential(*layers, *pool, nn.ReLU())
    return nn.Sequential(*layers, ACTIVATIONS[activation](), *pool)


def _head(
    inputs: int,
    hidden_sizes: Sequence[int],
    num_classes: int,
    activation: str = "relu",
    dropout: float = 0.0,
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for units in hidden_sizes:
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Linear(inputs, units), ACTIVATIONS[activation]()]
        inputs = units
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(inputs, num_classes))


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def zoo_model(name: str) -> nn.Module:
    """Build a zoo model for MNIST-shaped images by its name, without drawing real weights."""
    config = validate({"model": {"name": name}}).model
    with torch.device("meta"):
        return build_model(config)


@dataclass(frozen=True)
class LayerRow:
    """One layer of a model summary: its path, type, output shape (N left out) and parameters."""

    path: str
    kind: str
    output_shape: tuple[int, ...]
    num_parameters: int


def summarize_model(
    config: ModelConfig, image_shape: ImageShape, num_classes: int
) -> list[LayerRow]:
    """Run one image through the model without computing and list what each layer gives."""
    rows: list[LayerRow] = []

    def hook(path: str) -> Any:
        def note(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            kind = type(module).__name__
            rows.append(LayerRow(path, kind, tuple(output.shape[1:]), count_parameters(module)))

        return note

    with torch.device("meta"), torch.no_grad():
        model = build_model(config, image_shape, num_classes).eval()
        for path, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(hook(path))
        model(torch.empty(1, *image_shape))
    return rows


def zoo_table() -> list[tuple[str, str, int, str]]:
    """(name, family, parameters on MNIST, source) of each zoo model."""
    return [
        (name, row.family, count_parameters(zoo_model(name)), row.source)
        for name, row in ZOO.items()
    ]
