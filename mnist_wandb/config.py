"""Every setting of a run: default, bounds, unit and one line of documentation.

`loading.load_config` makes a `RunConfig` from files and overrides; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    WithJsonSchema,
    field_serializer,
    model_validator,
)

IMAGE_SIZE = 28
"""Height and width in pixels of every data set's images (a shortcut row adds one to the height)."""


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent conversions, finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )


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


class ShortcutConfig(Section):
    """How often the extra row of pixels of `shortcut_mnist` tells an image's own class."""

    train_match: Fraction = Field(0.9, description="Share of training images (and validation).")
    test_match: Fraction = Field(0.1, description="Share of test images.")


SHORTCUT_DATASET = "shortcut_mnist"
"""The data set with a `data.shortcut` section."""
DEFAULT_METRIC = "best/val_accuracy"
"""What chooses between runs: a value of the validation split, never of the test split."""


class DataConfig(Section):
    """Which images, how they are split and what is done to them."""

    dataset: Literal[
        "digits",
        "mnist",
        "fashion_mnist",
        "kmnist",
        "qmnist",
        "image_folder",
        "shortcut_mnist",
    ] = Field("mnist", description="Data set; `digits` is embedded and needs no download.")
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
    shortcut: ShortcutConfig | None = Field(
        None,
        description="shortcut_mnist only: {train_match: 0.9, test_match: 0.1}, how often it tells"
        " the class.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_shortcut(cls, values: Any) -> Any:
        """The section's defaults for the data set that has it."""
        if (
            isinstance(values, Mapping)
            and values.get("dataset") == SHORTCUT_DATASET
            and values.get("shortcut") is None
        ):
            return {**values, "shortcut": {}}
        return values

    @model_validator(mode="after")
    def _check_shortcut(self) -> DataConfig:
        if self.shortcut is not None and self.dataset != SHORTCUT_DATASET:
            raise ValueError(
                f"shortcut belongs to dataset {SHORTCUT_DATASET}, not to {self.dataset}; remove it"
            )
        return self


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
                    {
                        "type": "array",
                        "items": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                    },
                ]
            }
        ),
    ] = Field(
        (0.0,),
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

    @field_serializer("dropout")
    def _join_dropout(self, values: tuple[float, ...]) -> float | list[float]:
        """One number where all are equal, so that other hidden_sizes still fit it."""
        return values[0] if len(set(values)) == 1 else list(values)

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
    pool_first: bool = Field(
        False, description="Pool before batch normalisation, which then has less to do."
    )

    @model_validator(mode="after")
    def _check_order(self) -> ConvBlock:
        if self.pool_first and not (self.pool and self.batch_norm):
            raise ValueError("pool_first is about the order of pool and batch_norm; turn both on")
        return self

    def output_size(self, size: int) -> int:
        """Height or width in pixels after this block, for an input of `size` pixels."""
        padding = self.kernel_size // 2 if self.padding is None else self.padding
        size = size + 2 * padding - self.kernel_size + 1
        return size // self.pool if self.pool and size > 0 else size


class CnnConfig(_ModelSection):
    """Convolutional network: blocks, then a head of linear layers."""

    name: str = _model_name("cnn")
    blocks: tuple[ConvBlock, ...] = Field(
        (  # not validated here: that would build the validator, with each start of the program
            ConvBlock.model_construct(channels=16, kernel_size=5, pool=2),
            ConvBlock.model_construct(channels=32, kernel_size=5, pool=2),
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

    name: Literal["sgd"] = Field("sgd", description="Optimizer.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum; 0 is plain SGD.")
    nesterov: bool = Field(True, description="Nesterov momentum.")

    @model_validator(mode="after")
    def _check_nesterov(self) -> SgdConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0; set nesterov: false for plain SGD")
        return self


class RmspropConfig(_OptimizerSection):
    """RMSprop (Hinton 2012)."""

    name: Literal["rmsprop"] = Field("rmsprop", description="Optimizer.")
    alpha: float = Field(0.99, gt=0, lt=1, description="Decay of the squared-gradient mean.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum.")
    eps: float = Field(1e-8, gt=0, le=1, description="Added to the denominator.")


class AdagradConfig(_OptimizerSection):
    """Adagrad (Duchi et al. 2011)."""

    name: Literal["adagrad"] = Field("adagrad", description="Optimizer.")
    eps: float = Field(1e-10, gt=0, le=1, description="Added to the denominator.")


class _AdamFamily(_OptimizerSection):
    betas: tuple[Probability, Probability] = Field(
        (0.9, 0.999), strict=False, description="Decay of the gradient mean and of its square."
    )
    eps: float = Field(1e-8, gt=0, le=1, description="Added to the denominator.")


class AdamConfig(_AdamFamily):
    """Adam (Kingma & Ba 2015)."""

    name: Literal["adam"] = Field("adam", description="Optimizer.")


class AdamwConfig(_AdamFamily):
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = Field("adamw", description="Optimizer.")
    weight_decay: float = Field(0.01, ge=0, le=10, description="Decoupled weight decay.")


class NadamConfig(_AdamFamily):
    """NAdam: Adam with Nesterov momentum (Dozat 2016)."""

    name: Literal["nadam"] = Field("nadam", description="Optimizer.")


class ConstantConfig(Section):
    """The same learning rate throughout."""

    name: Literal["constant"] = Field("constant", description="Form of the curve.")


class StepConfig(Section):
    """The learning rate falls by `gamma` every so many epochs."""

    name: Literal["step"] = Field("step", description="Form of the curve.")
    every_epochs: int = Field(2, ge=1, le=100_000, description="Epochs between two falls.")
    gamma: float = Field(0.75, gt=0, le=1, description="Factor of each fall.")


class CosineConfig(Section):
    """Linear warm-up, then half a cosine (Loshchilov & Hutter 2017, without restarts)."""

    name: Literal["cosine"] = Field("cosine", description="Form of the curve.")
    warmup_fraction: float = Field(0.0, ge=0, lt=1, description="Share of the steps to warm up.")
    final_fraction: Fraction = Field(0.0, description="Last learning rate, as a share of lr.")


class OneCycleConfig(Section):
    """Up to lr, then down to almost nothing (Smith & Topin 2018)."""

    name: Literal["one_cycle"] = Field("one_cycle", description="Form of the curve.")
    warmup_fraction: float = Field(0.3, ge=0, lt=1, description="Share of the steps going up.")
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
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto", description="auto: bf16 or tf32, by the net, on CUDA devices with both; else fp32."
    )
    compile: Annotated[Literal[True, False, "auto"], BeforeValidator(_three_way)] = Field(
        "auto", description="torch.compile; auto is off: no preset gains by it."
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
        32, ge=0, le=10_000, description="Pictures in each of the two W&B tables; 0 is none."
    )
    log_model: Literal["best", "every_epoch"] | None = Field(
        "best", description="Model artifact; null is none."
    )
    log_dataset: bool = Field(
        False, description="Upload the images too, not only the data set's fingerprint."
    )
    save_code: bool = Field(
        False, description="Upload the program's code, the git commit and uncommitted changes."
    )
    watch: bool = Field(False, description="Histograms of gradients (slow).")
    upload_timeout_seconds: float = Field(
        60, gt=0, le=86_400, description="Longest wait for the W&B server at the end of a run."
    )
    alerts: bool = Field(True, description="Alert when a run has finished or diverged.")


def tag_of(value: Any) -> str:
    """The variant that a section's values are of: its name, or the family of a zoo name."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    if isinstance(name, str) and name in ZOO:
        return ZOO[name].family
    return name if isinstance(name, str) else ""


ModelConfig = Annotated[
    Annotated[LinearConfig, Tag("linear")]
    | Annotated[MlpConfig, Tag("mlp")]
    | Annotated[CnnConfig, Tag("cnn")]
    | Annotated[ResnetConfig, Tag("resnet")],
    Discriminator(tag_of),
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
        description="One of auto, cpu, cuda, cuda:N, mps.",
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

    @model_validator(mode="after")
    def _check_watch(self) -> RunConfig:
        if self.tracking.watch and self.training.compile is True:
            raise ValueError("tracking.watch does not work with training.compile; turn one off")
        return self

    @property
    def run_name(self) -> str:
        """The given name, or one made from data set and model."""
        return self.name or f"{self.data.dataset}-{self.model.name}"
