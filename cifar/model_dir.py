"""The self-describing model folder: config.json, model.safetensors, metrics.json, README.md, and calibration.json.

Only JSON and safetensors are read, never a pickle: a folder from a stranger can be wrong, but it runs no code.
"""

import json
import os
import platform
import re
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import cifar
from cifar.calibration import CALIBRATION, Calibration
from cifar.config import Config, ConfigError
from cifar.models import Classifier, build_model
from cifar.models.empty import EmptyParameters

FORMAT = 2
MAX_CLASSES = 100_000


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model needs to be used and understood without its data: goes to config.json."""

    config: Config
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    """Of the training images, per channel, in 0..255."""
    std: tuple[float, float, float]
    fingerprint: str
    """Of the prepared data set."""
    source: str
    """The data set as the user named it."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    model: Classifier
    """In evaluation mode, on the CPU."""
    info: ModelInfo
    metrics: dict[str, Any]
    calibration: Calibration = field(default_factory=Calibration)


def save_model(folder: Path, model: Classifier, info: ModelInfo, metrics: dict[str, Any]) -> None:
    """Write the folder whole: a reader sees all of it or none. An older folder of that name is replaced."""
    config = info.config.to_dict()
    del config["run"]  # where a run was kept is not the model's business, and nobody's to whom it goes
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    description = {
        "format": FORMAT,
        "architecture": info.config.model.model,
        "classes": list(info.classes),
        "image_size": info.config.data.image_size,
        "normalisation": {"mean": list(info.mean), "std": list(info.std)},
        "data": {"source": info.source, "fingerprint": info.fingerprint},
        "versions": {"cifar": cifar.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "config": config,
    }
    (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (partial / "README.md").write_text(model_card(info, metrics), encoding="utf-8")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial / "model.safetensors")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def load_model(folder: str | Path) -> LoadedModel:
    """Read a model folder; ConfigError names the file when it is missing, damaged or of another version.

    Nothing is allocated for a network before the weights prove to be its own.
    """
    folder = Path(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    description = _read_json(path)
    if description.get("format") != FORMAT:
        raise ConfigError(f"{path}: format {description.get('format')!r}, this cifar reads {FORMAT}; train it again")
    try:
        info = _info(description)
    except Exception as error:  # a stranger's values can be of any type and size
        raise ConfigError(f"{path}: not a model's description, {error!r}; save the model again") from error
    try:
        model = _empty_model(info, _shapes(weights))
        types = {name: value.dtype for name, value in model.state_dict().items()}
        # Copies: what is read lies in pages of the file, and may be of half precision.
        tensors = {name: value.to(types[name], copy=True) for name, value in load_file(weights).items()}
        model.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{weights}: not the weights that config.json describes: {error}") from error
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return LoadedModel(
        model=model.eval(),
        info=info,
        metrics=_read_json(folder / "metrics.json"),
        calibration=_calibration(folder / CALIBRATION),
    )


def _info(description: dict[str, Any]) -> ModelInfo:
    classes, data = description["classes"], description["data"]
    texts = [*classes, data["fingerprint"], data["source"]]
    if type(classes) is not list or not all(type(text) is str for text in texts):
        raise ValueError("class names, fingerprint and source must be strings")
    if not 1 <= len(set(classes)) == len(classes) <= MAX_CLASSES:
        raise ValueError(f"there must be 1 to {MAX_CLASSES:,} classes of different names")
    return ModelInfo(
        config=Config.from_dict(description["config"]),
        classes=tuple(classes),
        mean=_channels(description["normalisation"]["mean"]),
        std=_channels(description["normalisation"]["std"]),
        fingerprint=data["fingerprint"],
        source=data["source"],
    )


def _calibration(path: Path) -> Calibration:
    if not path.exists():
        return Calibration()
    try:
        return Calibration.from_dict(_read_json(path))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: not a calibration ({error!r}); delete it, or save the model again") from error


def _channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    if not all(type(value) in (int, float) and 0 <= value <= 255 for value in (red, green, blue)):  # NaN is not
        raise ValueError("mean and std must be numbers from 0 to 255")
    return float(red), float(green), float(blue)


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """From the header alone."""
    with safe_open(weights, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dict


def _empty_model(info: ModelInfo, shapes: dict[str, tuple[int, ...]]) -> Classifier:
    """The network without memory for its weights; ValueError if they have not these shapes."""
    with EmptyParameters():
        model = build_model(info.config, len(info.classes), info.mean, info.std)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(f"{name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'none')}")
    return model


def model_card(info: ModelInfo, metrics: dict[str, Any]) -> str:
    """Markdown for people: what the model is, what it was trained on, what it reaches."""
    source, classes = _escape(info.source), ", ".join(map(_escape, info.classes))
    numbers = "\n".join(
        f"| {name} | {value} |" for name, value in metrics.items() if not isinstance(value, dict | list)
    )
    return (
        f"# {info.config.model.model} on {source}\n\n"
        f"Classifies RGB images of {info.config.data.image_size} x {info.config.data.image_size} pixels into "
        f"{len(info.classes)} classes: {classes}.\n\n"
        f"Input is uint8; normalisation is inside. Trained by cifar {cifar.__version__} with seed "
        f"{info.config.train.seed} on data `{info.fingerprint}`; `config.json` holds every setting.\n\n"
        f"| metric | value |\n|---|---|\n{numbers}\n"
    )


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line; without control characters."""
    return re.sub(r"[\\`*_\[\]<>|~&#$]", r"\\\g<0>", "".join(c if c.isprintable() else " " for c in text))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not found; name a model folder, such as runs/NAME/model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected an object, found {type(values).__name__}")
    return values
