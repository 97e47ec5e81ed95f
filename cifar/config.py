"""The one type from the command line to the checkpoint.

Small frozen dataclasses, validated once at construction: a value that passes here is trusted everywhere else. Field
names are unique over all groups, because the command line flattens them (`--image-size`, not `--data.image-size`).
"""

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

Resize = Literal["crop", "pad", "stretch"]
Flip = Literal["none", "random", "alternating"]
Policy = Literal["none", "trivial", "rand"]
Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "muon"]
Schedule = Literal["constant", "step", "cosine", "onecycle", "linear"]
Average = Literal["none", "ema", "lookahead"]
TestTimeAugmentation = Literal["none", "mirror", "shift"]
Precision = Literal["auto", "fp32", "bf16"]
LoaderKind = Literal["auto", "resident", "streaming"]
Balance = Literal["none", "sampling", "loss", "logits"]

FREE_SPACE = "free some space and give the same command again, which goes on"
"""The remedy on a full disk."""
LARGEST_BATCH, FEWEST_STEPS = 500, 8
"""Of `--batch-size 0`: 500 was as accurate as 250 on CIFAR-10 and 8 % faster; an epoch of few images has 8 steps."""


class ConfigError(ValueError):
    """A value that the user can mend; the message names the flag and the remedy."""


class RunFailed(RuntimeError):
    """A run broke off, and to repeat it would not help; the message says why and what to change."""

    result: dict[str, Any] | None = None
    """What the job prints for --json all the same."""


def _require(condition: bool, flag: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"--{flag} {value}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    data: str = "cifar10"
    """Named set (cifar10, cifar100, digits, auto), folder of class folders, Parquet file or folder, or such a URI."""
    label: str = ""
    """Column of Parquet files that holds the classes, such as coarse_label for the 20 superclasses of cifar100. Empty:
    label, or else fine_label."""
    image_size: int = 32
    """Side in pixels of the square images that the network gets."""
    resize: Resize = "crop"
    """How other shapes become square: fill it and crop the centre, fit into it and pad, or stretch."""
    val_fraction: float = 0.1
    """Share of train that becomes val, stratified by class, when the source brings no val split."""
    test_fraction: float = 0.1
    """Share that becomes test, stratified by class, when the source brings no test split."""
    split_seed: int = 0
    """Seed of the stratified cuts."""
    max_bad: float = 0.01
    """Largest share of unreadable rows before the job stops instead of quarantining them."""

    def __post_init__(self) -> None:
        _require(bool(self.data), "data", repr(self.data), "name a data set, a folder or a Parquet path")
        _require(8 <= self.image_size <= 1024, "image-size", self.image_size, "use 8 to 1024 pixels")
        _require(0 < self.val_fraction < 1, "val-fraction", self.val_fraction, "use a share between 0 and 1")
        _require(0 < self.test_fraction < 1, "test-fraction", self.test_fraction, "use a share between 0 and 1")
        _require(self.split_seed >= 0, "split-seed", self.split_seed, "use 0 or more")
        _require(0 <= self.max_bad <= 1, "max-bad", self.max_bad, "use a share from 0 to 1, such as 0.01 for 1 %")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    flip: Flip = "alternating"
    """Horizontal flip: a coin per image and epoch, or each image flipped every other epoch (Jordan 2024)."""
    crop_padding: int = 2
    """Pixels of padding on each side before a random crop to the old size; 0 switches it off."""
    crop_fill: Literal["reflect", "zero"] = "reflect"
    """What the padding holds."""
    cutout: int = 0
    """Side in pixels of one square per image that is set to zero (DeVries and Taylor 2017); 0 switches it off."""
    rotate: float = 0.0
    """Largest rotation in degrees, either way."""
    shift: float = 0.0
    """Largest shift along each axis, as a share of the side."""
    shear: float = 0.0
    """Largest shear in degrees, either way."""
    zoom: float = 0.0
    """Largest zoom, in or out, as a share of the side."""
    policy: Policy = "none"
    """TrivialAugment or RandAugment, from torchvision."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution (Zhang 2018); 0 switches it off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution (Yun 2019); 0 switches it off."""
    augment_on: Literal["device", "data"] = "device"
    """Where: on the training device, or as a Ray Data stage that CPU nodes can run. The pixels are the same."""

    def __post_init__(self) -> None:
        _require(0 <= self.crop_padding <= 512, "crop-padding", self.crop_padding, "use 0 to 512 pixels")
        _require(self.cutout >= 0, "cutout", self.cutout, "use 0 or more pixels")
        _require(0 <= self.rotate <= 180, "rotate", self.rotate, "use 0 to 180 degrees")
        _require(0 <= self.shift < 1, "shift", self.shift, "use a share from 0 to below 1")
        _require(0 <= self.shear < 90, "shear", self.shear, "use 0 to below 90 degrees")
        _require(0 <= self.zoom < 1, "zoom", self.zoom, "use a share from 0 to below 1")
        _require(self.mixup >= 0, "mixup", self.mixup, "use 0 or a positive alpha")
        _require(self.cutmix >= 0, "cutmix", self.cutmix, "use 0 or a positive alpha")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model: str = "cnn"
    """`cnn`: small and fast, patch-whitening first layer. `notebook`: conv-conv-pool-dropout blocks, dense head. Or a
    classification network of torchvision, such as resnet18, mobilenet_v2, convnext_tiny, vit_b_16. Or one of timm, an
    extra, as timm/NAME."""
    stem: Literal["auto", "small", "original"] = "auto"
    """First layers of torchvision's networks: their own, or one 3x3 convolution without pooling (smaller patches, where
    they cut patches), as images of up to 64 pixels get with `auto`."""
    widths: tuple[int, ...] = (64, 256, 256)
    """Channels of each convolution group of `cnn` and `notebook`."""
    depths: tuple[int, ...] = (2,)
    """Convolutions of each group of `cnn`, or one number for all; 3 and more come with a shortcut around them."""
    dropout: float = 0.0
    """Dropout share: after each block of `notebook` (rising by 0.1 a block), before the head of the others."""
    head_norm: bool = False
    """Batch norm before the head of torchvision's networks."""
    tta: TestTimeAugmentation = "none"
    """What an answer is the mean over, where the network is unsure: the image, with its mirror image, or both also
    shifted by a pixel (Jordan 2024). Validation during training does without."""

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"\w{1,60}|timm/[\w.]{1,100}", self.model) is not None,
            "model",
            repr(self.model),
            "use cnn, notebook, or a name of torchvision's, such as resnet18, or of timm's, such as timm/resnet18",
        )
        _require(
            1 <= len(self.widths) <= 8 and all(1 <= width <= 8192 for width in self.widths),
            "widths",
            " ".join(map(str, self.widths)),
            "give one channel count, 1 to 8192, for each of 1 to 8 groups, such as --widths 64 256 256",
        )
        _require(
            len(self.depths) in (1, len(self.widths)) and all(1 <= depth <= 100 for depth in self.depths),
            "depths",
            " ".join(map(str, self.depths)),
            f"give one count, 1 to 100, or one for each of the {len(self.widths)} groups of --widths",
        )
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "use a share from 0 to below 1")

    @property
    def from_zoo(self) -> bool:
        """Whether another library has the network."""
        return self.model not in ("cnn", "notebook")

    @property
    def draws(self) -> bool:
        """Whether the network draws random numbers when it trains, as those of other libraries may."""
        return self.dropout > 0 or self.from_zoo


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    pretrained: bool = False
    """Start from torchvision's weights of ImageNet, with their normalisation; fetched once into torch's hub cache."""
    weights: str = ""
    """Start from the weights in this file or model folder, a path or URI, as far as they fit: safetensors, or what
    torch.save wrote if it holds tensors alone."""
    train_blocks: int = -1
    """How many blocks before the head train with it; the others are frozen, their batch norm's statistics too. 0: the
    head alone, a linear probe; -1: all."""
    unfreeze_epochs: int = 0
    """Gradual unfreezing (Howard and Ruder 2018): begin with the head alone, and let one more block train after each so
    many epochs; 0: all that train do so at once."""
    layer_decay: float = 1.0
    """Learning rate of each block over that of the block after it (Clark 2020); 1: the same for all."""

    def __post_init__(self) -> None:
        _require(
            not (self.pretrained and self.weights), "weights", self.weights, "is another start than --pretrained's"
        )
        _require(self.train_blocks >= -1, "train-blocks", self.train_blocks, "use a count, or -1 for all")
        _require(self.unfreeze_epochs >= 0, "unfreeze-epochs", self.unfreeze_epochs, "use 0 or more")
        _require(0 < self.layer_decay <= 1, "layer-decay", self.layer_decay, "use a share above 0, up to 1")

    @property
    def starts(self) -> bool:
        """Whether there are weights to start from."""
        return self.pretrained or bool(self.weights)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    teacher: str = ""
    """Learn also from this model's answers (Hinton 2015): a published NAME, NAME@ALIAS or NAME/VERSION, or the folder
    or URI of a run or a model; every node must be able to read it."""
    teacher_store: str = "./models"
    """Folder or URI of the published models."""
    teacher_weight: float = 0.9
    """Share of the loss that comes from the teacher; the rest comes from the labels."""
    teacher_temperature: float = 2.0
    """What both networks' logits are divided by before they are compared: more shows more of the unlikely classes."""

    def __post_init__(self) -> None:
        _require(0 < self.teacher_weight <= 1, "teacher-weight", self.teacher_weight, "use a share above 0, up to 1")
        _require(
            0.1 <= self.teacher_temperature <= 100, "teacher-temperature", self.teacher_temperature, "use 0.1 to 100"
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    optimizer: Optimizer = "muon"
    """Muon takes the filters; what Muon does not fit (biases, norms, head) gets SGD with Nesterov momentum."""
    lr: float = 0.0
    """Peak learning rate of the main parameter group; 0 takes one that suits the optimizer."""
    head_lr: float = 0.0
    """Peak learning rate of the head under Muon; 0 takes airbench's, in proportion to the batch size."""
    momentum: float = 0.6
    """Momentum of SGD, and of what Muon makes orthogonal."""
    weight_decay: float = 0.0
    """Decoupled for AdamW and Muon, L2 elsewhere; none for biases, norms, and Muon's filters that a norm follows."""
    schedule: Schedule = "linear"
    """Learning rate over the run, after the warm-up."""
    warmup: float = 0.0
    """Share of all steps in which the learning rate rises linearly from zero."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes (Szegedy 2016)."""
    clip_norm: float = 0.0
    """Largest norm of all gradients together; 0 switches clipping off."""
    accumulate: int = 1
    """Micro-batches per optimizer step; the batch size is that of the step. As many workers take the same steps."""
    average: Average = "none"
    """Averaged weights for evaluation: exponential moving average, or lookahead (Zhang 2019)."""
    average_decay: float = 0.99
    """Decay per step of the average; for lookahead the share of the slow weights kept at each pull."""

    def __post_init__(self) -> None:
        _require(self.lr >= 0 and math.isfinite(self.lr), "lr", self.lr, "use a positive number, or 0 for the default")
        _require(self.head_lr >= 0 and math.isfinite(self.head_lr), "head-lr", self.head_lr, "use 0 or more")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "use a number from 0 to below 1")
        _require(self.weight_decay >= 0, "weight-decay", self.weight_decay, "use 0 or more")
        _require(0 <= self.warmup < 1, "warmup", self.warmup, "use a share from 0 to below 1")
        _require(0 <= self.label_smoothing < 1, "label-smoothing", self.label_smoothing, "use 0 to below 1")
        _require(self.clip_norm >= 0, "clip-norm", self.clip_norm, "use 0 or more")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, "use 1 or more")
        _require(0 < self.average_decay < 1, "average-decay", self.average_decay, "use a number between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    epochs: int = 8
    """Passes over the training split."""
    batch_size: int = 0
    """Images per optimizer step, over all workers together; 0 takes 500, or an eighth of train where that is less."""
    seed: int = 0
    """Seed of weights, order and augmentation; every draw is derived from it, none is carried."""
    scales: tuple[float, ...] = (1.0,)
    """Progressive resizing: side as a share of image-size, for equal parts of the epochs, such as 0.75 1."""
    max_minutes: float = 0.0
    """Time budget of training; at its end the run stops cleanly with a model. 0: none."""
    patience: int = 0
    """Stop after this many epochs without a better val accuracy. 0: never."""
    precision: Precision = "auto"
    """`auto` takes bf16 autocast where the processor computes it natively."""
    compile: bool = False
    """Compile the network with torch.compile; pays on a GPU and in long runs. Neither the seconds that are reported nor
    max-minutes count it."""
    checkpoint_steps: int = 0
    """Also write a checkpoint every so many optimizer steps; one per epoch is always written."""
    skip_easy: float = 0.0
    """Share of the images that most epochs leave out: those of lowest loss when last seen. A stream leaves none out."""
    balance: Balance = "none"
    """Let all classes count alike, however many images they have: `sampling` draws images of small ones more often,
    `loss` weighs their loss more, `logits` adds the logarithm of their sizes to the logits in training alone (Menon
    2021). The best epoch is then the one of the lowest val loss, as a mean over the classes."""
    loader: LoaderKind = "auto"
    """Training data in memory or streamed; `auto` measures the split against the memory."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "use 1 or more")
        _require(self.batch_size >= 0, "batch-size", self.batch_size, "use 1 or more, or 0 for what suits the data")
        _require(
            bool(self.scales) and all(0.25 <= scale <= 1 for scale in self.scales),
            "scales",
            " ".join(map(str, self.scales)),
            "use shares from 0.25 to 1",
        )
        _require(self.max_minutes >= 0, "max-minutes", self.max_minutes, "use 0 or more")
        _require(self.patience >= 0, "patience", self.patience, "use 0 or more")
        _require(0 <= self.skip_easy < 1, "skip-easy", self.skip_easy, "use a share from 0 to below 1")
        _require(self.checkpoint_steps >= 0, "checkpoint-steps", self.checkpoint_steps, "use 0 or more")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    storage: str = "./runs"
    """Folder or s3:// or gs:// URI that holds the runs; every node must be able to write it."""
    name: str = ""
    """Name of the run's folder; the same name resumes. Empty: data, network and a digest of all settings."""
    workers: str = "auto"
    """Training processes: N, 0 for this process, A:B for elastic; `auto` takes what suits the machine."""
    gpu: bool = False
    """Insist on a GPU per worker. Without the flag GPUs are used where there are any."""
    verbose: bool = False
    """Show all of Ray's logs."""

    def __post_init__(self) -> None:
        _require(
            self.workers == "auto" or re.fullmatch(r"0|[1-9]\d*(:[1-9]\d*)?", self.workers) is not None,
            "workers",
            self.workers,
            "use a count such as 2, 0 for this process, a range such as 1:4, or auto",
        )
        low, _, high = self.workers.partition(":")
        _require(not high or int(low) <= int(high), "workers", self.workers, "put the smaller count first")
        _require(
            re.fullmatch(r"[\w.\-]*", self.name) is not None and self.name not in {".", ".."},
            "name",
            repr(self.name),
            "use letters, digits, dots, dashes and underscores",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. Immutable: derive another with `dataclasses.replace`."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _require(
            self.train.batch_size % self.optim.accumulate == 0,
            "batch-size",
            self.train.batch_size,
            f"make it a multiple of --accumulate {self.optim.accumulate}",
        )
        _require(
            self.augment.crop_padding < self.data.image_size,
            "crop-padding",
            self.augment.crop_padding,
            f"use less than --image-size {self.data.image_size}",
        )

        _require(
            self.model.tta == "none" or self.augment.flip != "none",
            "tta",
            self.model.tta,
            "asks about mirror images, which --flip none never shows to the network; add --tta none",
        )
        _require(
            not (self.train.loader == "resident" and self.augment.augment_on == "data"),
            "loader",
            "resident",
            "--augment-on data streams; use --loader auto",
        )
        _require(
            not (self.run.workers == "0" and self.augment.augment_on == "data"),
            "augment-on",
            "data",
            "needs Ray Data; use --workers 1, or --augment-on device",
        )
        _require(
            not self.transfer.pretrained or self.model.from_zoo,
            "pretrained",
            "",
            f"there are no weights of ImageNet for {self.model.model}; use a --model of torchvision's, or --weights",
        )
        _require(
            self.optim.optimizer != "muon" or (self.transfer.layer_decay == 1 and not self.transfer.unfreeze_epochs),
            "optimizer",
            "muon",
            "sets the size of its steps itself; with --layer-decay or --unfreeze-epochs use adamw or sgd",
        )
        _require(
            self.train.balance != "sampling" or self.augment.augment_on == "device",
            "balance",
            "sampling",
            "--augment-on data changes an image once in an epoch, however often it is drawn; use --balance loss",
        )
        if self.model.model == "notebook":
            _require(
                self.train.scales == (1.0,),
                "scales",
                " ".join(map(str, self.train.scales)),
                "the dense layer of notebook takes one size; use --scales 1, or --recipe notebook",
            )
            _require(
                self.model.depths == (2,),
                "depths",
                " ".join(map(str, self.model.depths)),
                "every block of notebook has 2 convolutions; use --depths 2, or --model cnn",
            )
            _require(
                self.data.image_size >> len(self.model.widths) >= 1,
                "widths",
                " ".join(map(str, self.model.widths)),
                f"every group halves --image-size {self.data.image_size}; use fewer groups",
            )
        for workers in dict.fromkeys((*self._worker_range[:1], *self._worker_range[-1:])):
            _require(
                self._divides_among(workers),
                "batch-size",
                self.train.batch_size,
                f"does not divide among {workers} workers{' times --accumulate' * (self.optim.accumulate > 1)}; "
                f"use --batch-size {self._divisible_batch_size()}",
            )

    @property
    def worker_counts(self) -> list[int]:
        """The counts of workers that the run may have, of its range those that share a batch evenly; empty for `auto`
        and for this process."""
        return [count for count in self._worker_range if self._divides_among(count)]

    @property
    def _worker_range(self) -> range:
        if self.run.workers in ("auto", "0"):
            return range(0)
        low, _, high = self.run.workers.partition(":")
        return range(int(low), int(high or low) + 1)

    def _divides_among(self, workers: int) -> bool:
        return self.train.batch_size % (workers * self.optim.accumulate) == 0

    def with_batch_size(self, rows: int) -> "Config":
        """For `--batch-size 0` the config with the batch size that suits `rows` training images; else this one."""
        if self.train.batch_size:
            return self
        wanted = min(LARGEST_BATCH, rows // FEWEST_STEPS)
        batch_size = max(wanted // self._shares, 1) * self._shares
        return dataclasses.replace(self, train=dataclasses.replace(self.train, batch_size=batch_size))

    def _divisible_batch_size(self) -> int:
        """The nearest batch size that is not refused."""
        return max(round(self.train.batch_size / self._shares), 1) * self._shares

    @property
    def _shares(self) -> int:
        """What the batch size is best a multiple of: all counts, or, if that is too much, the first and the last."""
        shares = math.lcm(*self._worker_range) * self.optim.accumulate
        if shares > LARGEST_BATCH:
            shares = math.lcm(*self._worker_range[:1], *self._worker_range[-1:]) * self.optim.accumulate
        return shares

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def identity(self) -> dict[str, dict[str, Any]]:
        """What a run computes, whatever version wrote it down: by group the settings that are not the defaults, without
        those that say where and by how many."""
        own, default = self.to_dict(), Config().to_dict()
        return {
            group: {name: value for name, value in values.items() if value != default[group][name]}
            for group, values in own.items()
            if group != "run"
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Inverse of `to_dict`; an unknown key is a ConfigError.

        A key that is missing was no setting yet when the config was written: it gets its default, which is why a new
        setting's default has to mean what was done before.
        """
        return _build(cls, values, "config")


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - hints.keys()):
        raise ConfigError(
            f"{where}: written by a newer version of cifar, which knows {', '.join(unknown)}; update cifar"
        )
    return cls(**{key: _coerce(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """JSON knows no tuples and writes 1.0 as 1; anything else of the wrong type is an error."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(_coerce(typing.get_args(hint)[0], item, where) for item in value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if origin is Literal and value in typing.get_args(hint):
        return value
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: {value!r} is not of type {hint}")
