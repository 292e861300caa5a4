"""Every setting of a run: default, bounds, unit and one line of documentation.

`load_config` puts the layers (preset or file, sweep parameters, command line) together and
validates the result completely; nothing here imports torch or touches a run folder.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from mnist_wandb.errors import ConfigError
from mnist_wandb.layers import (
    KeyPath,
    Layer,
    describe_value,
    merge_into,
    parse_overrides,
    read_sweep_parameters,
    read_yaml,
)

PRESETS_DIR = Path(__file__).parent / "configs"
DEFAULT_PRESET = "quickstart"
IMAGE_SIZE = 28
"""Height and width in pixels of every data set's images (a shortcut row adds one to the height)."""


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent conversions, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# A whole number stays one in the dump, so that `epochs: 10` does not come back as `10.0`.
Number = Annotated[float, PlainSerializer(lambda v: int(v) if v == int(v) else v)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Activation = Literal["relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "sigmoid"]


# ── data ─────────────────────────────────────────────────────────────────────────────────────


class AugmentConfig(Section):
    """Random changes to each training image, drawn anew each time it is used; 0 is off."""

    rotation_degrees: float = Field(0.0, ge=0, le=180, description="Largest turn, either way.")
    translate_pixels: int = Field(0, ge=0, le=14, description="Largest shift along each axis.")
    zoom: float = Field(0.0, ge=0, le=0.9, description="Largest relative change in size.")
    shear_degrees: float = Field(0.0, ge=0, le=60, description="Largest slant, either way.")
    erase_fraction: float = Field(
        0.0, ge=0, le=0.5, description="Share of the area of one erased rectangle."
    )
    elastic: float = Field(
        0.0, ge=0, le=10, description="Typical displacement of an elastic distortion, in pixels."
    )


class DataConfig(Section):
    """Which images, how they are split and what is done to them."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "kmnist", "qmnist"] = Field(
        "mnist", description="Data set; `digits` is embedded and needs no download."
    )
    dir: str | None = Field(
        None, min_length=1, description="Data folder; default: MNIST_WANDB_DATA_DIR, else ./data."
    )
    train_size: int | None = Field(
        None, ge=1, description="Use only this many training images, balanced over the classes."
    )
    val_fraction: float = Field(
        0.1, gt=0, le=0.9, description="Share of the source split that validates (stratified)."
    )
    val_from: Literal["train", "test"] = Field(
        "train", description="Split to take validation images from; the test score uses the rest."
    )
    split_seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of split and subset; apart from `seed`, so that seeds share one split.",
    )
    scaling: Literal["unit", "symmetric", "standardize"] = Field(
        "standardize",
        description="unit [0,1], symmetric [-1,1], or mean 0 and std 1 of the training split.",
    )
    augment: AugmentConfig = Field(
        default_factory=AugmentConfig, description="Random changes to the training images."
    )


# ── model ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ZooRow:
    """A named architecture: its family, what it sets, and where it is from."""

    family: str
    fields: Mapping[str, Any]
    source: str


def _conv(channels: int, kernel_size: int, **fields: Any) -> dict[str, Any]:
    return {"channels": channels, "kernel_size": kernel_size, **fields}


ZOO: dict[str, ZooRow] = {
    "linear": ZooRow("linear", {}, "Softmax regression; LeCun et al. 1998, table 1"),
    "mlp_128": ZooRow("mlp", {"hidden_sizes": [128]}, "TensorFlow quickstart tutorial"),
    "mlp_64x3": ZooRow("mlp", {"hidden_sizes": [64, 64, 64]}, "MNIST lab, three narrow layers"),
    "mlp_dropout": ZooRow(
        "mlp",
        {"hidden_sizes": [256, 128], "dropout": [0.4, 0.3]},
        "MNIST lab; dropout after Srivastava et al. 2014",
    ),
    "mlp_pyramid": ZooRow("mlp", {"hidden_sizes": [256, 128, 64]}, "MNIST lab, narrowing layers"),
    "mlp_small": ZooRow("mlp", {"hidden_sizes": [512, 512]}, "PyTorch quickstart tutorial"),
    "mlp_large": ZooRow(
        "mlp",
        {"hidden_sizes": [2048, 2048, 1024, 512]},
        "Deep MLP after Ciresan et al. 2010",
    ),
    "cnn_small": ZooRow(
        "cnn",
        {"blocks": [_conv(16, 5, pool=2), _conv(32, 5, pool=2)]},
        "Two 5x5 convolutions after LeNet; LeCun et al. 1998",
    ),
    "cnn_large": ZooRow(
        "cnn",
        {"blocks": [_conv(32, 5, pool=2), _conv(64, 5, pool=2), *[_conv(64, 5)] * 4]},
        "Six 5x5 convolutions, MNIST lab",
    ),
    "cnn_valid": ZooRow(
        "cnn",
        {
            "blocks": [_conv(32, 3, padding=0), _conv(64, 3, padding=0, pool=2)],
            "hidden_sizes": [128],
        },
        "PyTorch and Keras MNIST examples",
    ),
    "cnn_batchnorm": ZooRow(
        "cnn",
        {"blocks": [_conv(c, 3, batch_norm=True, pool=2) for c in (32, 64, 128)]},
        "Batch normalisation after Ioffe & Szegedy 2015",
    ),
    "resnet": ZooRow("resnet", {}, "ResNet after He et al. 2016 (CIFAR form, 3x3 stem)"),
}


class _ModelSection(Section):
    """A family's fields; a zoo name fills in what is not said."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_zoo(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("name"), str):
            row = ZOO.get(values["name"])
            return {**row.fields, **values} if row else values
        return values


def _model_name(family: str) -> Any:
    names = [family, *(n for n, row in ZOO.items() if row.family == family and n != family)]
    return Field(
        family,
        description="A zoo name (`mnist-wandb models`) or the family.",
        json_schema_extra={"enum": list(names)},
    )


class LinearConfig(_ModelSection):
    """Softmax regression: one linear layer on the pixels."""

    name: str = _model_name("linear")


class MlpConfig(_ModelSection):
    """Multi-layer perceptron: (linear, batch norm, activation, dropout) × layers, linear."""

    name: str = _model_name("mlp")
    hidden_sizes: tuple[Width, ...] = Field(
        (128,), strict=False, min_length=1, max_length=64, description="Units of each hidden layer."
    )
    dropout: Annotated[
        tuple[Probability, ...],
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                    {"type": "array", "items": {"type": "number"}},
                ]
            }
        ),
    ] = Field(
        (),
        strict=False,
        description="Dropout after each hidden layer: one number, or one per layer.",
    )
    activation: Activation = Field("relu", description="Activation function.")
    batch_norm: bool = Field(False, description="Batch normalisation before each activation.")

    @model_validator(mode="before")
    @classmethod
    def _spread_dropout(cls, values: Any) -> Any:
        """One number stands for every hidden layer; the resolved config names each."""
        if not isinstance(values, Mapping):
            return values
        row = ZOO.get(str(values.get("name")))
        values = {**(row.fields if row and row.family == "mlp" else {}), **values}
        sizes, dropout = values.get("hidden_sizes", (128,)), values.get("dropout", 0.0)
        if isinstance(dropout, int | float) and not isinstance(dropout, bool):
            layers = len(sizes) if isinstance(sizes, list | tuple) else 1
            values["dropout"] = [dropout] * layers
        return values

    @model_validator(mode="after")
    def _check_dropout(self) -> MlpConfig:
        if len(self.dropout) != len(self.hidden_sizes):
            raise ValueError(
                f"dropout has {len(self.dropout)} values for {len(self.hidden_sizes)} hidden"
                " layers; give one number, or one per layer"
            )
        return self


class ConvBlock(Section):
    """Convolution, then batch norm, activation and max pooling."""

    channels: Width = Field(description="Output channels.")
    kernel_size: int = Field(3, ge=1, le=28, description="Height and width of the kernel.")
    padding: int | None = Field(
        None, ge=0, le=14, description="Zeros at each side; null keeps the size (odd kernels)."
    )
    pool: int | None = Field(None, ge=2, le=14, description="Max-pooling size; null is none.")
    batch_norm: bool = Field(False, description="Batch normalisation after the convolution.")

    def output_size(self, size: int) -> int:
        """Height or width in pixels after this block, for an input of `size` pixels."""
        padding = self.kernel_size // 2 if self.padding is None else self.padding
        size = size + 2 * padding - self.kernel_size + 1
        return size // self.pool if self.pool and size > 0 else size


class CnnConfig(_ModelSection):
    """Convolutional network: blocks, then a head of linear layers."""

    name: str = _model_name("cnn")
    blocks: tuple[ConvBlock, ...] = Field(
        (
            ConvBlock(channels=16, kernel_size=5, pool=2),
            ConvBlock(channels=32, kernel_size=5, pool=2),
        ),
        strict=False,
        min_length=1,
        max_length=64,
        description="Convolution blocks, first to last.",
    )
    hidden_sizes: tuple[Width, ...] = Field(
        (), strict=False, max_length=64, description="Units of the head's hidden layers."
    )
    dropout: Probability = Field(0.0, description="Dropout before each linear layer of the head.")
    activation: Activation = Field("relu", description="Activation function.")

    @model_validator(mode="after")
    def _check_sizes(self) -> CnnConfig:
        size = IMAGE_SIZE
        for index, block in enumerate(self.blocks):
            if block.padding is None and block.kernel_size % 2 == 0:
                raise ValueError(
                    f"blocks.{index}: an even kernel_size ({block.kernel_size}) needs a padding"
                )
            previous, size = size, block.output_size(size)
            if size < 1:
                raise ValueError(
                    f"blocks.{index}: nothing is left of a {previous}×{previous} input"
                    f" (kernel_size {block.kernel_size}, pool {block.pool}); pool less"
                )
        return self


class ResnetConfig(_ModelSection):
    """Residual network of basic blocks; each stage after the first halves the image."""

    name: str = _model_name("resnet")
    blocks_per_stage: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(
        (2, 2, 2),
        strict=False,
        min_length=1,
        max_length=5,
        description="Residual blocks of each stage.",
    )
    widths: tuple[Width, ...] = Field(
        (64, 128, 256),
        strict=False,
        min_length=1,
        max_length=5,
        description="Channels of each stage.",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> ResnetConfig:
        if len(self.blocks_per_stage) != len(self.widths):
            raise ValueError(
                f"blocks_per_stage has {len(self.blocks_per_stage)} stages, widths"
                f" {len(self.widths)}; give one number per stage in both"
            )
        return self


# ── optimizer and schedule ───────────────────────────────────────────────────────────────────


class _OptimizerSection(Section):
    name: str
    lr: float = Field(1e-3, gt=0, le=1e3, description="Learning rate; the schedule's peak.")
    weight_decay: float = Field(0.0, ge=0, le=10, description="Weight decay (L2 unless adamw).")


class SgdConfig(_OptimizerSection):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum; 0 is plain SGD.")
    nesterov: bool = Field(True, description="Nesterov momentum.")

    @model_validator(mode="after")
    def _check_nesterov(self) -> SgdConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0; set nesterov: false for plain SGD")
        return self


class RmspropConfig(_OptimizerSection):
    """RMSprop (Hinton 2012)."""

    name: Literal["rmsprop"] = "rmsprop"
    alpha: float = Field(0.99, gt=0, lt=1, description="Decay of the squared-gradient mean.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum.")
    eps: float = Field(1e-8, gt=0, le=1, description="Added to the denominator.")


class AdagradConfig(_OptimizerSection):
    """Adagrad (Duchi et al. 2011)."""

    name: Literal["adagrad"] = "adagrad"
    eps: float = Field(1e-10, gt=0, le=1, description="Added to the denominator.")


class _AdamFamily(_OptimizerSection):
    betas: tuple[Probability, Probability] = Field(
        (0.9, 0.999), strict=False, description="Decay of the gradient mean and of its square."
    )
    eps: float = Field(1e-8, gt=0, le=1, description="Added to the denominator.")


class AdamConfig(_AdamFamily):
    """Adam (Kingma & Ba 2015)."""

    name: Literal["adam"] = "adam"


class AdamwConfig(_AdamFamily):
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    weight_decay: float = Field(0.01, ge=0, le=10, description="Decoupled weight decay.")


class NadamConfig(_AdamFamily):
    """NAdam: Adam with Nesterov momentum (Dozat 2016)."""

    name: Literal["nadam"] = "nadam"


class ConstantConfig(Section):
    """The same learning rate throughout."""

    name: Literal["constant"] = "constant"


class StepConfig(Section):
    """The learning rate falls by `gamma` every so many epochs."""

    name: Literal["step"] = "step"
    every_epochs: int = Field(2, ge=1, le=100_000, description="Epochs between two falls.")
    gamma: float = Field(0.75, gt=0, le=1, description="Factor of each fall.")


class CosineConfig(Section):
    """Linear warm-up, then half a cosine (Loshchilov & Hutter 2017, without restarts)."""

    name: Literal["cosine"] = "cosine"
    warmup_fraction: float = Field(0.0, ge=0, lt=1, description="Share of the steps to warm up.")
    final_fraction: Fraction = Field(0.0, description="Last learning rate, as a share of lr.")


class OneCycleConfig(Section):
    """Up to lr, then down to almost nothing (Smith & Topin 2018)."""

    name: Literal["one_cycle"] = "one_cycle"
    warmup_fraction: float = Field(0.3, gt=0, lt=1, description="Share of the steps going up.")
    start_fraction: Fraction = Field(0.04, description="First learning rate, as a share of lr.")
    final_fraction: Fraction = Field(4e-6, description="Last learning rate, as a share of lr.")
    anneal: Literal["cosine", "linear"] = Field("cosine", description="Form of both slopes.")


# ── training, tracking ───────────────────────────────────────────────────────────────────────


class EarlyStoppingConfig(Section):
    """Stop when the validation accuracy has stopped rising."""

    patience: int = Field(3, ge=1, le=100_000, description="Epochs without a gain to wait.")
    min_delta: Fraction = Field(0.0, description="Smallest rise in accuracy that counts.")


def _three_way(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("expected true, false or auto")


class TrainingConfig(Section):
    """How long and how to train."""

    epochs: Number = Field(
        10, gt=0, le=100_000, description="Passes over the training split; may be a fraction."
    )
    batch_size: int = Field(256, ge=1, le=1_000_000, description="Images per optimizer step.")
    loss: Literal["cross_entropy", "mse"] = Field(
        "cross_entropy", description="mse is on one-hot targets (the lesson why not)."
    )
    label_smoothing: Probability = Field(
        0.0, description="Share of the target spread over all classes."
    )
    grad_clip_norm: float | None = Field(
        None, gt=0, le=1e6, description="Largest norm of the gradient; null is off."
    )
    early_stopping: EarlyStoppingConfig | None = Field(None, description="Stop early; null is off.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 on CUDA devices that have it, else fp32."
    )
    compile: Annotated[Literal[True, False, "auto"], BeforeValidator(_three_way)] = Field(
        "auto", description="torch.compile; auto: only where it pays."
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Score an exponential mean of the weights; null is off."
    )
    deterministic: bool = Field(True, description="Same seed, same numbers, bit for bit.")

    @model_validator(mode="after")
    def _check_loss(self) -> TrainingConfig:
        if self.loss == "mse" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to cross_entropy; set it to 0 with loss: mse")
        return self


_WandbName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\x00-\x1f]+$")]


class TrackingConfig(Section):
    """What goes to Weights & Biases."""

    project: _WandbName | None = Field(
        None, description="W&B project; default: WANDB_PROJECT, else mnist-wandb."
    )
    entity: _WandbName | None = Field(
        None, description="W&B user or team; default: WANDB_ENTITY, else the key's owner."
    )
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: WANDB_MODE, else online when a key is found, else offline."
    )
    group: _WandbName | None = Field(None, description="Group of runs in the W&B app.")
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        (), strict=False, max_length=64, description="Tags in the W&B app."
    )
    notes: str | None = Field(None, max_length=10_000, description="Free text.")
    job_type: _WandbName = Field("train", description="W&B job type.")
    log_every_steps: int = Field(
        50, ge=1, le=1_000_000, description="Steps between two training points."
    )
    sample_predictions: int = Field(
        64, ge=0, le=10_000, description="Pictures in each of the two W&B tables; 0 is none."
    )
    log_model: Literal["best", "every_epoch"] | None = Field(
        "best", description="Model artifact; null is none."
    )
    watch: bool = Field(False, description="Histograms of gradients (slow).")
    alerts: bool = Field(True, description="Alert when a run has finished or diverged.")


def _tag_of(value: Any) -> str:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    if isinstance(name, str) and name in ZOO:
        return ZOO[name].family
    return name if isinstance(name, str) else ""


ModelConfig = Annotated[
    Annotated[LinearConfig, Tag("linear")]
    | Annotated[MlpConfig, Tag("mlp")]
    | Annotated[CnnConfig, Tag("cnn")]
    | Annotated[ResnetConfig, Tag("resnet")],
    Discriminator(_tag_of),
]
OptimizerConfig = Annotated[
    SgdConfig | RmspropConfig | AdagradConfig | AdamConfig | AdamwConfig | NadamConfig,
    Field(discriminator="name"),
]
ScheduleConfig = Annotated[
    ConstantConfig | StepConfig | CosineConfig | OneCycleConfig, Field(discriminator="name")
]

VARIANTS: dict[str, dict[str, type[Section]]] = {
    "model": {"linear": LinearConfig, "mlp": MlpConfig, "cnn": CnnConfig, "resnet": ResnetConfig},
    "optimizer": {
        cls.model_fields["name"].default: cls
        for cls in (SgdConfig, RmspropConfig, AdagradConfig, AdamConfig, AdamwConfig, NadamConfig)
    },
    "schedule": {
        cls.model_fields["name"].default: cls
        for cls in (ConstantConfig, StepConfig, CosineConfig, OneCycleConfig)
    },
}
"""The sections whose fields depend on their `name`, and the fields' owner for each name."""


class RunConfig(Section):
    """Everything that decides what one run does."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")] | None = (
        Field(None, description="Run name; default: from data set and model.")
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, batches and dropout.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,3}|mps)$",
        description="auto | cpu | cuda | cuda:N | mps.",
    )
    data: DataConfig = Field(default_factory=DataConfig, description=str(DataConfig.__doc__))
    model: ModelConfig = Field(
        default_factory=lambda: CnnConfig(name="cnn_large"), description="Architecture."
    )
    optimizer: OptimizerConfig = Field(default_factory=AdamwConfig, description="Optimizer.")
    schedule: ScheduleConfig = Field(
        default_factory=OneCycleConfig, description="Learning rate over time."
    )
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description=str(TrainingConfig.__doc__)
    )
    tracking: TrackingConfig = Field(
        default_factory=TrackingConfig, description=str(TrackingConfig.__doc__)
    )

    @property
    def run_name(self) -> str:
        """The given name, or one made from data set and model."""
        return self.name or f"{self.data.dataset}-{self.model.name}"


# ── loading ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ResolvedConfig:
    """A validated configuration and where each of its values comes from.

    Attributes:
        config: the configuration.
        preset: name of the preset, or path of the file, that it started from.
        origins: label of the deciding layer, by dotted path ("default" where none spoke).
    """

    config: RunConfig
    preset: str
    origins: Mapping[str, str]


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def find_config(source: str) -> Path:
    """Find a file of one's own, else a shipped preset by name (with or without `.yaml`).

    Raises:
        ConfigError: neither exists; names the nearest presets.
    """
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return path
        is_directory = path.is_dir()
    except (OSError, ValueError):
        is_directory = False
    if is_directory and path.name != source:
        raise ConfigError(f"--config {source}: is a folder, expected a YAML file")
    names = preset_names()
    name = source.removesuffix(".yaml")
    if name in names:
        return PRESETS_DIR / f"{name}.yaml"
    if "/" in source or "\\" in source:
        raise ConfigError(f"--config {source}: no such file")
    raise ConfigError(
        f"--config {source}: no such preset or file{_suggest(name, names, 3)};"
        " `mnist-wandb configs` lists the presets"
    )


def load_config(
    source: str | None = None,
    overrides: Sequence[str] = (),
    *,
    sweep_parameters: Path | None = None,
) -> RunConfig:
    """Resolve and validate a configuration.

    Args:
        source: preset name or YAML file; default: the preset `quickstart`.
        overrides: `section.field=value` texts, see `layers.parse_overrides`.
        sweep_parameters: file written by `wandb agent`; lies between `source` and `overrides`.

    Returns:
        The complete configuration; `load_config` of its dump gives an equal one.

    Raises:
        ConfigError: with one line for each problem.
    """
    return resolve_config(source, overrides, sweep_parameters=sweep_parameters).config


def resolve_config(
    source: str | None = None,
    overrides: Sequence[str] = (),
    *,
    sweep_parameters: Path | None = None,
) -> ResolvedConfig:
    """Like `load_config`, and say where each value comes from."""
    command_line = parse_overrides(overrides)
    later = [read_sweep_parameters(sweep_parameters)] if sweep_parameters else []
    for layer in (*later, command_line):  # a sweep may vary the preset itself
        chosen = layer.values.pop("config", None)
        if chosen is not None and not isinstance(chosen, str):
            raise ConfigError(f"{layer.label}: config: expected a preset name")
        source = chosen or source
    path = find_config(source or DEFAULT_PRESET)
    is_preset = path.parent == PRESETS_DIR
    preset = path.stem if is_preset else str(path)
    layers = [read_yaml(path, path.name if is_preset else str(path)), *later, command_line]
    merged, owners = _merge_layers(layers)
    config = validate(merged, owners)
    return ResolvedConfig(config, preset, _origins(config, owners))


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A configuration with some values replaced; see `layers.parse_overrides`.

    Raises:
        ConfigError: with one line for each problem.
    """
    layers = [Layer("checkpoint", config.model_dump(mode="json")), parse_overrides(overrides)]
    return validate(*_merge_layers(layers))


def validate(values: Mapping[str, Any], owners: Mapping[KeyPath, Layer] | None = None) -> RunConfig:
    """Validate a nested mapping.

    Raises:
        ConfigError: with one line for each problem, naming the layer that said it.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(details, values, owners or {}) for details in error.errors()]
        raise ConfigError("\n".join(line for line in dict.fromkeys(lines) if line)) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}") from None


def _merge_layers(layers: Iterable[Layer]) -> tuple[dict[str, Any], dict[KeyPath, Layer]]:
    """Merge deeply, later wins; a new variant drops what does not fit it (DESIGN, section 3)."""
    merged: dict[str, Any] = {s: {"name": _default_name(s)} for s in VARIANTS}
    owners: dict[KeyPath, Layer] = {}
    for layer in layers:
        for section in VARIANTS:
            said = layer.values.get(section)
            if isinstance(said, Mapping) and isinstance(said.get("name"), str):
                _drop_misfits(section, said["name"], merged, owners)
        for path in list(owners):  # a section replaced by a scalar or null: nothing below is left
            if any(
                not isinstance(_get(layer.values, path[:i]), Mapping) for i in range(1, len(path))
            ):
                del owners[path]
        merge_into(merged, layer.values)
        for path in _leaves(layer.values):
            owners[path] = layer
    return merged, owners


def _default_name(section: str) -> str:
    return str(RunConfig().model_dump()[section]["name"])


def _drop_misfits(
    section: str, name: str, merged: dict[str, Any], owners: dict[KeyPath, Layer]
) -> None:
    earlier = merged.get(section)
    if not isinstance(earlier, dict) or earlier.get("name") == name:
        return
    variant = VARIANTS[section].get(name)
    for key in list(earlier):
        if section == "model" or (variant is not None and key not in variant.model_fields):
            del earlier[key]
            for path in [p for p in owners if p[:2] == (section, key)]:
                del owners[path]


def _get(values: Any, path: KeyPath) -> Any:
    """The value under a path; an empty mapping where nothing is said."""
    for part in path:
        if not isinstance(values, Mapping):
            return values
        if part not in values:
            return {}
        values = values[part]
    return values


def _leaves(values: Mapping[str, Any], path: KeyPath = ()) -> Iterable[KeyPath]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)


def _origins(config: RunConfig, owners: Mapping[KeyPath, Layer]) -> dict[str, str]:
    origins = {}
    for path in _leaves(config.model_dump(mode="json")):
        owner = next(
            (owners[path[:i]] for i in range(len(path), 0, -1) if path[:i] in owners), None
        )
        origin = owner.label if owner else "default"
        zoo_row = ZOO.get(config.model.name)
        if owner is None and path[0] == "model" and zoo_row and path[1] in zoo_row.fields:
            origin = f"zoo {config.model.name}"
        origins[".".join(map(str, path))] = origin
    return origins


def to_yaml(config: RunConfig, origins: Mapping[str, str] | None = None) -> str:
    """Write a configuration as YAML that `load_config` reads back as an equal one.

    Args:
        config: the configuration.
        origins: where given, a comment behind each value says where it comes from.
    """
    lines: list[tuple[str, str]] = []

    def write(values: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for key, value in values.items():
            below = (*path, key)
            indent = "  " * len(path)
            if isinstance(value, Mapping):
                lines.append((f"{indent}{key}:", ""))
                write(value, below)
            else:
                text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
                text = text.removesuffix("\n").removesuffix("\n...").strip()
                lines.append((f"{indent}{key}: {text}", (origins or {}).get(".".join(below), "")))

    write(config.model_dump(mode="json"), ())
    width = min(60, max(len(text) for text, _ in lines))
    return "".join(f"{text:<{width}}  # {why}\n" if why else f"{text}\n" for text, why in lines)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors (completion, documentation, checks)."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "mnist-wandb run configuration"
    return schema


# ── messages ─────────────────────────────────────────────────────────────────────────────────


def _suggest(word: str, known: Iterable[str], n: int = 1) -> str:
    near = difflib.get_close_matches(word, list(known), n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


def _explain(details: Any, values: Mapping[str, Any], owners: Mapping[KeyPath, Layer]) -> str:
    """One line for one pydantic error: where, what was found, what is allowed."""
    path: KeyPath = tuple(details["loc"])
    if len(path) > 1 and path[0] in VARIANTS and path[1] in VARIANTS[str(path[0])]:
        path = (path[0], *path[2:])  # pydantic names the variant in between
    kind, context = details["type"], details.get("ctx", {})
    dotted = ".".join(map(str, path)) or "configuration"
    where = _where(path, owners)
    got = details["input"]
    if kind == "extra_forbidden":
        return f"{where}{dotted}: {_explain_unknown(path, values)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        names = _variant_names(str(path[0]))
        if not isinstance(got, Mapping):
            return f"{where}{dotted}: got {describe_value(got)}, {_section_hint(dotted)}"
        found = got.get("name")
        hint = _suggest(found, names) if isinstance(found, str) else ""
        where = _where((*path, "name"), owners)
        return (
            f"{where}{dotted}.name: got {describe_value(found)}, allowed: {', '.join(names)}{hint}"
        )
    if kind == "value_error":
        found = "" if isinstance(got, Mapping | BaseModel) else f"got {describe_value(got)}, "
        return f"{where}{dotted}: {found}{context['error']}"
    if kind == "missing":
        return f"{where}{dotted}: is missing"
    if kind == "literal_error" and isinstance(got, str):
        options = [w.strip("'") for w in context["expected"].replace(" or ", ", ").split(", ")]
        return (
            f"{where}{dotted}: got {describe_value(got)}, allowed: {', '.join(options)}"
            f"{_suggest(got, options)}"
        )
    if path[0] in VARIANTS and len(path) == 1 and not isinstance(got, Mapping):
        kind = "variant_type"
    if kind == "too_short" and got:  # its items are wrong, and have a line each
        return ""
    message = details["msg"].replace("Input should be ", "expected ")
    message = {
        "variant_type": _section_hint(dotted),
        "too_short": "expected at least one item",
        "model_type": "expected a section (key: value)",
        "model_attributes_type": "expected a section (key: value)",
        "dict_type": "expected a section (key: value)",
        "finite_number": "expected a finite number",
        "int_type": "expected a whole number",
        "float_type": "expected a number",
        "bool_type": "expected true or false",
        "string_type": "expected text (put it in quotes)",
        "tuple_type": "expected a list like [a, b]",
        "string_pattern_mismatch": f"allowed: {_pattern_hint(path, context)}",
    }.get(kind, message[0].lower() + message[1:])
    return f"{where}{dotted}: got {describe_value(got)}, {message}"


def _section_hint(section: str) -> str:
    return f"expected a section; write {section}.name=…"


def _pattern_hint(path: KeyPath, context: Mapping[str, Any]) -> str:
    if path == ("device",):
        return "auto, cpu, cuda, cuda:N, mps"
    return "text without control characters" + (" or / \\ # ? % :" if path[0] == "tracking" else "")


def _where(path: KeyPath, owners: Mapping[KeyPath, Layer]) -> str:
    for end in range(len(path), 0, -1):
        for owned, layer in reversed(list(owners.items())):
            if owned[:end] == path[:end]:
                return f"{layer.where(path)}: "
    return ""


def _variant_names(section: str) -> list[str]:
    names = list(VARIANTS[section])
    return [*ZOO, *(n for n in names if n not in ZOO)] if section == "model" else names


def _explain_unknown(path: KeyPath, values: Mapping[str, Any]) -> str:
    section, key = (str(path[0]) if len(path) > 1 else ""), str(path[-1])
    schema: Any = RunConfig
    if section in VARIANTS and len(path) == 2:
        name = _get(values, (section, "name"))
        row = ZOO.get(name) if section == "model" else None
        known = list(VARIANTS[section][row.family if row else name].model_fields)
        owners = [n for n, cls in VARIANTS[section].items() if key in cls.model_fields]
        if owners:
            return (
                f"{section} {name!r} has no such field (it belongs to {', '.join(owners)});"
                f" {name} has: {', '.join(known)}"
            )
    else:
        for part in path[:-1]:
            if isinstance(part, int):
                continue
            schema = _section_class(schema, str(part), values)
        known = list(schema.model_fields) if schema else []
    hint = _suggest(key, known)
    if not hint and len(path) == 1:
        homes = [
            f"{name}.{key}"
            for name in RunConfig.model_fields
            for cls in VARIANTS.get(name, {"": _section_class(RunConfig, name, values)}).values()
            if cls is not None and key in cls.model_fields
        ]
        hint = f"; did you mean {homes[0]!r}?" if homes else ""
    return f"unknown key{hint}; known: {', '.join(known)}"


def _section_class(owner: type[BaseModel] | None, key: str, values: Any) -> type[BaseModel] | None:
    """The class behind a nested field, looking through `| None` and lists."""
    if owner is None or key not in owner.model_fields:
        return None
    if owner is RunConfig and key in VARIANTS:
        tag = _tag_of(_get(values, (key,)) or {})
        return VARIANTS[key].get(tag)
    text = json.dumps(owner.model_json_schema()["properties"][key])
    for cls in (*_all_sections(Section),):
        if f'"#/$defs/{cls.__name__}"' in text:
            return cls
    return None


def _all_sections(root: type[Section]) -> list[type[Section]]:
    return [c for sub in root.__subclasses__() for c in (sub, *_all_sections(sub))]
