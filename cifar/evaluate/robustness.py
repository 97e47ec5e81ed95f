"""How much of its accuracy a model keeps under the 15 common corruptions at 5 strengths."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cifar.config import ConfigError
from cifar.data.prepared import Arrays, Prepared, to_arrays
from cifar.evaluate.corruptions import CORRUPTIONS, GROUPS, STRENGTHS, corrupt
from cifar.evaluate.evaluation import check_data, wilson_interval
from cifar.predictor import Predictor
from cifar.statistics import statistics

EXAMPLE_STRENGTHS = (1, 3, 5)
LARGEST_EXAMPLE = 96
"""Side in pixels above which an example is shrunk."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image of the sample, the same for all corruptions, and what the model takes it for.

    It is the first that the model knows undamaged, if there is one.
    """

    strength: int
    """0: as it is."""
    prediction: str
    confidence: float
    image: NDArray[np.uint8] = field(repr=False)
    """(S,S,3), S at most 96."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One corruption at one strength."""

    strength: int
    accuracy: float
    ci95: tuple[float, float]
    """Wilson's score interval."""


@dataclass(frozen=True, kw_only=True)
class CorruptionResult:
    name: str
    group: str
    """`noise`, `blur`, `weather` or `digital`."""
    cells: tuple[Cell, ...]
    """By strength, 1 to 5."""
    mean_accuracy: float
    """Over the strengths."""
    standard_error: float | None
    """Of `mean_accuracy`, over the images; None for one image."""
    examples: tuple[Example, ...] = field(repr=False)
    """At strengths 1, 3 and 5."""


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Accuracies on the same images, in 0..1. Draws are the same for all strengths and all models."""

    data: str
    split: str
    fingerprint: str
    """Of the prepared set."""
    seed: int
    count: int
    """Images in the sample."""
    clean_accuracy: float
    """On the sample as it is."""
    clean_accuracy_ci95: tuple[float, float]
    """Wilson's score interval."""
    corruptions: tuple[CorruptionResult, ...]
    """In the paper's order."""
    mean_accuracy: float
    """Over corruptions and strengths: 1 less the mean corruption error, here not divided by another network's."""
    standard_error: float | None
    """Of `mean_accuracy`, over the images; None for one image."""
    label: str
    """Of the image in the examples."""
    original: Example = field(repr=False)
    seconds: float
    """Of corrupting and predicting."""

    @property
    def worst(self) -> CorruptionResult:
        """The corruption of the lowest mean accuracy."""
        return min(self.corruptions, key=lambda result: result.mean_accuracy)

    def to_dict(self) -> dict[str, Any]:
        """JSON types: everything but the pixels."""
        return {
            "data": self.data,
            "split": self.split,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "count": self.count,
            "clean_accuracy": self.clean_accuracy,
            "clean_accuracy_ci95": list(self.clean_accuracy_ci95),
            "mean_corruption_accuracy": self.mean_accuracy,
            "mean_corruption_accuracy_standard_error": self.standard_error,
            "worst": self.worst.name,
            "seconds": self.seconds,
            "corruptions": {
                result.name: {
                    "group": result.group,
                    "accuracy": [cell.accuracy for cell in result.cells],
                    "accuracy_ci95": [list(cell.ci95) for cell in result.cells],
                    "mean_accuracy": result.mean_accuracy,
                    "standard_error": result.standard_error,
                }
                for result in self.corruptions
            },
        }


def robustness(
    predictor: Predictor, prepared: Prepared, split: str, *, sample: int = 1000, seed: int = 0
) -> Robustness:
    """Predict a stratified sample of the split as it is and under each corruption at each strength.

    Sample and damage hang on `seed` alone; a `sample` of the split's size or more takes all of it. In memory are the
    sample and one damaged batch. ConfigError when the model's classes or image size are not the data's, the split holds
    no images, or the sample is below 1.
    """
    check_data(predictor, prepared, split)
    if sample < 1:
        raise ConfigError(f"--sample {sample}: must be at least 1")
    drawn = draw_sample(prepared, split, sample, seed)
    total = len(drawn.labels) * len(STRENGTHS) * len(CORRUPTIONS)
    logger.info("robustness: %s damaged images of %s on %s", f"{total:,}", split, predictor.device)

    started_at = time.perf_counter()
    probabilities = _predict(predictor, drawn, "", 0, seed)
    clean = probabilities.argmax(1) == drawn.labels
    shown = int(clean.argmax())
    original = _example(predictor, drawn, "", 0, seed, shown, probabilities)
    results, correct = [], []
    for group, names in GROUPS.items():
        for name in names:
            answers = {strength: _predict(predictor, drawn, name, strength, seed) for strength in STRENGTHS}
            right = {strength: answer.argmax(1) == drawn.labels for strength, answer in answers.items()}
            cells = [Cell(strength=k, accuracy=float(row.mean()), ci95=_interval(row)) for k, row in right.items()]
            examples = [_example(predictor, drawn, name, k, seed, shown, answers[k]) for k in EXAMPLE_STRENGTHS]
            correct += right.values()
            mean, standard_error = _mean(right.values())
            results.append(
                CorruptionResult(
                    name=name,
                    group=group,
                    cells=tuple(cells),
                    mean_accuracy=mean,
                    standard_error=standard_error,
                    examples=tuple(examples),
                )
            )
    mean, standard_error = _mean(correct)
    return Robustness(
        data=prepared.source,
        split=split,
        fingerprint=prepared.fingerprint,
        seed=seed,
        count=len(clean),
        clean_accuracy=float(clean.mean()),
        clean_accuracy_ci95=_interval(clean),
        corruptions=tuple(results),
        mean_accuracy=mean,
        standard_error=standard_error,
        label=prepared.classes[drawn.labels[shown]],
        original=original,
        seconds=time.perf_counter() - started_at,
    )


def draw_sample(prepared: Prepared, split: str, count: int, seed: int) -> Arrays:
    """`count` images of the split, all if it has fewer, each class in proportion within one; in the split's order.

    Every image is as likely as any other. Beyond the sample, the labels and a row group are in memory.
    """
    labels = prepared.table(split, ["label"]).column("label").to_numpy()
    total = len(labels)
    count = min(count, total)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(total)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # Systematic: every (total / count)-th of the rows by class, from a random start.
    chosen = np.sort(by_class[(np.arange(count) * total + generator.integers(total)) // count])
    found, first = [], 0
    for rows in prepared.row_groups(split):
        size = rows.stop - rows.start
        inside = chosen[(chosen >= first) & (chosen < first + size)] - first
        first += size
        if len(inside):
            arrays = to_arrays(prepared.read(rows, ["image", "label", "index"]))
            found.append([column[inside] for column in arrays])
    return Arrays(*map(np.concatenate, zip(*found, strict=True)))


def _predict(predictor: Predictor, drawn: Arrays, name: str, strength: int, seed: int) -> NDArray[np.float32]:
    """Probabilities (N,C) of the sample, damaged."""
    size = predictor.batch_size
    starts = range(0, len(drawn.labels), size)
    batches = (_damaged(drawn, slice(start, start + size), name, strength, seed) for start in starts)
    return np.concatenate([predictor.predict(batch) for batch in batches])


def _damaged(drawn: Arrays, rows: slice, name: str, strength: int, seed: int) -> Tensor:
    """uint8 (B,3,S,S); as they are at strength 0."""
    images = torch.from_numpy(drawn.images[rows]).permute(0, 3, 1, 2).contiguous()
    return corrupt(images, name, strength, seed, torch.from_numpy(drawn.indices[rows])) if strength else images


def _example(
    predictor: Predictor,
    drawn: Arrays,
    name: str,
    strength: int,
    seed: int,
    row: int,
    probabilities: NDArray[np.float32],
) -> Example:
    """The image of the row and what was said of it."""
    image = _damaged(drawn, slice(row, row + 1), name, strength, seed)[0].permute(1, 2, 0).numpy()
    if len(image) > LARGEST_EXAMPLE:
        side = LARGEST_EXAMPLE, LARGEST_EXAMPLE
        image = np.asarray(Image.fromarray(image).resize(side, Image.Resampling.LANCZOS))
    best = int(probabilities[row].argmax())
    return Example(
        strength=strength,
        prediction=predictor.classes[best],
        confidence=float(probabilities[row, best]),
        image=np.ascontiguousarray(image),
    )


def _interval(correct: NDArray[np.bool_]) -> tuple[float, float]:
    return wilson_interval(int(correct.sum()), len(correct))


def _mean(correct: Iterable[NDArray[np.bool_]]) -> tuple[float, float | None]:
    """Mean accuracy and its standard error, of rows (N,) about the same images.

    An image's answers under several corruptions are not independent: its share of correct ones counts once.
    """
    found = statistics(np.mean(list(correct), axis=0).tolist())
    return found["mean"], found["standard_error"]
