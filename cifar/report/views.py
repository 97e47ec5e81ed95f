"""Augmented views of a few images: what training would see over successive epochs."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar.augment import augment, mix
from cifar.config import AugmentConfig
from cifar.report import page

NUM_VIEWS = 8

NOTHING = AugmentConfig(flip="none", crop_padding=0)


class ViewRow(NamedTuple):
    name: str
    flags: list[str]
    strip: str
    """Data URI: the image itself, then its view in each epoch."""


def examples(size: int) -> dict[str, dict[str, Any]]:
    """Each augmentation alone, at a strength that the eye sees, as fields of AugmentConfig."""
    padding = max(2, size // 8)
    warp = {"rotate": 20.0, "shift": 0.15, "shear": 20.0, "zoom": 0.25}
    return {
        "Flip, by a coin": {"flip": "random"},
        "Flip, alternating": {"flip": "alternating"},
        "Crop, reflected border": {"crop_padding": padding, "crop_fill": "reflect"},
        "Crop, black border": {"crop_padding": padding, "crop_fill": "zero"},
        "Cutout": {"cutout": 3 * size // 8},
        **{name.capitalize(): {name: value} for name, value in warp.items()},
        "All four as one warp": warp,
        "TrivialAugment": {"policy": "trivial"},
        "RandAugment": {"policy": "rand"},
        "Mixup": {"mixup": 1.0},
        "CutMix": {"cutmix": 1.0},
    }


def rows(samples: list[tuple[NDArray[np.uint8], int]], config: AugmentConfig, seed: int) -> list[ViewRow]:
    """One row per example, and the last one for `config`. Samples are images (S,S,3) with their index.

    All rows show the sample that differs most from its mirror image, on which a flip is seen.
    """
    samples = sorted(samples, key=lambda sample: _asymmetry(sample[0]), reverse=True)
    size = len(samples[0][0])
    shown = {name: replace(NOTHING, **fields) for name, fields in examples(size).items()}
    own = {name: value for name, value in vars(config).items() if value != getattr(NOTHING, name)}
    described = [*examples(size).values(), own]
    shown["This configuration"] = config
    return [
        ViewRow(name, _flags(fields), page.strip(_views(samples, shown[name], seed)))
        for name, fields in zip(shown, described, strict=True)
    ]


def _flags(fields: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')} {value}" for name, value in fields.items()] or ["none"]


def _views(samples: list[tuple[NDArray[np.uint8], int]], config: AugmentConfig, seed: int) -> list[NDArray[np.uint8]]:
    """The first sample, then its views in epochs 0 to 7; where images are mixed, with another sample each time."""
    views = [samples[0][0]]
    for epoch in range(NUM_VIEWS):
        partner = samples[(1 + epoch % (len(samples) - 1)) if len(samples) > 1 else 0]
        batch, indices = _batch([samples[0], partner])
        batch = augment(batch, indices, config, seed=seed, epoch=epoch)
        if config.mixup or config.cutmix:
            batch, _ = mix(batch, torch.tensor([0, 1]), config, 2, seed=seed, epoch=epoch, step=0)
        views.append(batch[0].round().to(torch.uint8).permute(1, 2, 0).numpy())
    return views


def _asymmetry(image: NDArray[np.uint8]) -> float:
    return float(np.abs(image.astype(np.int16) - image[:, ::-1]).mean())


def _batch(samples: list[tuple[NDArray[np.uint8], int]]) -> tuple[Tensor, Tensor]:
    """uint8 (B,3,S,S) and int64 (B,)."""
    images = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([index for _, index in samples])
