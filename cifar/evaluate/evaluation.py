"""A Predictor and labelled images to numbers. What scikit-learn computes is left to scikit-learn."""

import heapq
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from cifar.calibration import Calibration
from cifar.config import ConfigError
from cifar.data.prepared import Arrays, Prepared
from cifar.model_dir import LoadedModel, ModelInfo
from cifar.predictor import Predictor

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue (ITU-R BT.601)."""
NUM_BINS = 15
NUM_MISTAKES = 24
NUM_PAIRS = 10
NUM_POINTS = 50
NUM_SLICES = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bin:
    """One bar of the reliability diagram: the images whose confidence lies in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Slice:
    """A fifth of the images, by brightness, contrast or confidence."""

    by: str
    low: float
    high: float
    count: int
    accuracy: float
    accuracy_ci95: tuple[float, float]
    confidence: float
    """Mean."""


@dataclass(frozen=True)
class ConfusedPair:
    label: str
    prediction: str
    count: int
    share: float
    """Of the images of class `label`."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A training image that the network takes for similar."""

    index: int
    id: str = ""
    label: str
    similarity: float
    """Cosine of the features."""
    image: NDArray[np.uint8] = field(repr=False)
    """(S,S,3)."""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    index: int
    """Of the row in the prepared set."""
    id: str = ""
    """Of the image in its source: a path, or file and row."""
    label: str
    prediction: str
    confidence: float
    loss: float
    image: NDArray[np.uint8] = field(repr=False)
    """(S,S,3)."""
    saliency: NDArray[np.float32] | None = field(default=None, repr=False)
    """(S,S) in 0..1: how much each pixel sways the answer; None: not asked for."""
    neighbours: list[Neighbour] = field(default_factory=list)
    """Nearest first; none if not asked for."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model does on one split. Shares and accuracies are in 0..1, the loss is in nats."""

    data: str
    split: str
    fingerprint: str
    classes: tuple[str, ...]
    count: int
    accuracy: float
    accuracy_ci95: tuple[float, float]
    """Wilson's score interval."""
    loss: float
    """Mean cross-entropy, without label smoothing."""
    macro_f1: float
    """Mean over the classes that occur among labels or predictions."""
    per_class: dict[str, dict[str, float]]
    """`precision`, `recall`, `f1`, `support`; 0 where a class is never predicted or never occurs."""
    confusion_matrix: NDArray[np.int64]
    """(C,C): rows are labels, columns predictions."""
    top5_accuracy: float
    """Of the first min(5, C) predictions."""
    ece: float
    """Expected calibration error over 15 bins of equal width (Guo 2017, arXiv 1706.04599)."""
    calibration: Calibration
    """What the answers are calibrated by."""
    ece_uncalibrated: float
    """Of the network's own probabilities."""
    accepted: int
    """Images whose confidence reaches the calibration's threshold."""
    accepted_accuracy: float | None
    """Of these; None if there are none."""
    accepted_ci95: tuple[float, float] | None
    slices: list[Slice]
    coverage: list[tuple[float, float]]
    """Accuracy of the share of images that the model is surest of: pairs (share, accuracy)."""
    reliability: list[Bin]
    """The bins that hold images."""
    confused_pairs: list[ConfusedPair]
    mistakes: list[Mistake] = field(repr=False)
    """The wrong answers of the highest loss, worst first."""
    device: str
    images_per_second: float
    """Of reading and predicting together."""
    train_seconds: float | None
    """From the model folder's metrics, when they have it."""
    model: ModelInfo = field(repr=False)
    members: dict[str, float] = field(default_factory=dict)
    """Of an ensemble, the accuracy of each model by itself on the same images."""


class Rows(NamedTuple):
    """What is kept of each image: 41 bytes, whatever its size."""

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    confidences: NDArray[np.float32]
    losses: NDArray[np.float64]
    in_top5: NDArray[np.bool_]
    uncalibrated: NDArray[np.float32]
    """Confidences of the network's own probabilities."""
    brightness: NDArray[np.float32]
    """Mean luma, 0..255."""
    contrast: NDArray[np.float32]
    """Standard deviation of the luma."""


def evaluate(predictor: Predictor, prepared: Prepared, split: str = "test") -> Evaluation:
    """Predict every image of the split once, in bounded memory.

    ConfigError when the model's classes or image size are not the data's, or the split holds no images.
    """
    check_data(predictor, prepared, split)
    logger.info("evaluating %s images of %s on %s", f"{prepared.counts[split]:,}", split, predictor.device)
    started_at = time.perf_counter()
    worst = Worst(NUM_MISTAKES, prepared.classes)
    rows = _score_all(predictor, prepared.batches(split, predictor.batch_size), worst)
    seconds = time.perf_counter() - started_at

    return assess(
        rows,
        worst.mistakes(prepared, split),
        predictor,
        data=prepared.source,
        split=split,
        fingerprint=prepared.fingerprint,
        device=str(predictor.device),
        seconds=seconds,
    )


def assess(
    rows: Rows,
    mistakes: list[Mistake],
    model: LoadedModel | Predictor,
    *,
    data: str,
    split: str,
    fingerprint: str,
    device: str,
    seconds: float,
) -> Evaluation:
    """The numbers of at least one scored row, wherever and in how many pieces they were predicted in `seconds`."""
    classes = model.info.classes
    numbers = range(len(classes))
    correct = rows.labels == rows.predictions
    matrix = confusion_matrix(rows.labels, rows.predictions, labels=numbers)
    zero: Any = 0  # what scikit-learn's hints leave out, as they do what comes back
    scores: Any = precision_recall_fscore_support(rows.labels, rows.predictions, labels=numbers, zero_division=zero)
    reliability = reliability_bins(rows.confidences, correct)
    accepted = correct[rows.confidences >= model.calibration.threshold]
    return Evaluation(
        data=data,
        split=split,
        fingerprint=fingerprint,
        classes=classes,
        count=len(correct),
        accuracy=float(correct.mean()),
        accuracy_ci95=wilson_interval(int(correct.sum()), len(correct)),
        loss=float(rows.losses.mean()),
        macro_f1=float(f1_score(rows.labels, rows.predictions, average="macro", zero_division=zero)),
        per_class={
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for name, p, r, f, s in zip(classes, *scores, strict=True)
        },
        confusion_matrix=matrix,
        top5_accuracy=float(rows.in_top5.mean()),
        ece=calibration_error(reliability),
        calibration=model.calibration,
        ece_uncalibrated=calibration_error(reliability_bins(rows.uncalibrated, correct)),
        accepted=len(accepted),
        accepted_accuracy=float(accepted.mean()) if len(accepted) else None,
        accepted_ci95=wilson_interval(int(accepted.sum()), len(accepted)) if len(accepted) else None,
        slices=quantile_slices(rows, correct),
        coverage=coverage_curve(rows.confidences, correct),
        reliability=reliability,
        confused_pairs=confused_pairs(matrix, classes),
        mistakes=mistakes,
        device=device,
        images_per_second=len(correct) / seconds,
        train_seconds=_seconds(model.metrics.get("train_seconds")),
        model=model.info,
    )


def check_data(predictor: Predictor, prepared: Prepared, split: str) -> None:
    """ConfigError when the model's classes or image size are not the data's, or the split holds no images."""
    if not prepared.counts.get(split):
        known = ", ".join(name for name, count in prepared.counts.items() if count)
        raise ConfigError(f"--split {split}: {prepared.source} has no images there; it has {known}")
    if predictor.image_size != prepared.image_size:
        raise ConfigError(
            f"--data {prepared.source}: prepared at {prepared.image_size} pixels, but the model takes "
            f"{predictor.image_size}; prepare it with --image-size {predictor.image_size}"
        )
    if predictor.classes != prepared.classes:
        raise ConfigError(
            f"--data {prepared.source}: its classes ({_names(prepared.classes)}) are not the model's "
            f"({_names(predictor.classes)}); name the data set that the model was trained for"
        )


def _seconds(value: Any) -> float | None:
    """A duration if it is one: the metrics of a model folder may come from anyone."""
    return float(value) if type(value) in (int, float) and 0 <= value < 1e9 else None


def _names(classes: tuple[str, ...], most: int = 10) -> str:
    return ", ".join(classes[:most]) + (f" and {len(classes) - most} more" if len(classes) > most else "")


def _score_all(predictor: Predictor, batches: Iterable[Arrays], worst: "Worst") -> Rows:
    scored: list[Rows] = []
    for batch in batches:
        rows = score(predictor.logits(batch.images), batch, predictor.calibration.temperature)
        worst.offer(batch, rows)
        scored.append(rows)
    return Rows(*map(np.concatenate, zip(*scored, strict=True)))


def score(logits: NDArray[np.float32], batch: Arrays, temperature: float) -> Rows:
    """logits (N,C), calibrated by `temperature`, of a batch of N images to what is kept of each image."""
    log_probabilities = torch.from_numpy(logits).double().log_softmax(1)
    top = log_probabilities.topk(min(5, logits.shape[1]), dim=1)
    targets = torch.tensor(batch.labels).view(-1, 1)
    luma = batch.images.reshape(len(logits), -1, 3) @ LUMA
    return Rows(
        labels=batch.labels,
        predictions=top.indices[:, 0].numpy(),
        confidences=top.values[:, 0].exp().float().numpy(),
        losses=-log_probabilities.gather(1, targets)[:, 0].numpy(),
        in_top5=(top.indices == targets).any(1).numpy(),
        uncalibrated=(torch.from_numpy(logits).double() * temperature).softmax(1).amax(1).float().numpy(),
        brightness=luma.mean(1),
        contrast=luma.std(1),
    )


class Worst:
    """The `size` mistakes of the highest loss seen so far, with their pixels."""

    def __init__(self, size: int, classes: tuple[str, ...]):
        self.size = size
        self.classes = classes
        self._heap: list[tuple[float, int, Mistake]] = []  # the number breaks ties, so that mistakes are not compared

    def offer(self, batch: Arrays, rows: Rows) -> None:
        losses = np.where(rows.labels == rows.predictions, -np.inf, rows.losses)
        for row in np.argsort(-losses, kind="stable")[: self.size]:
            full = len(self._heap) == self.size
            if losses[row] == -np.inf or (full and losses[row] <= self._heap[0][0]):
                break
            mistake = Mistake(
                index=int(batch.indices[row]),
                label=self.classes[rows.labels[row]],
                prediction=self.classes[rows.predictions[row]],
                confidence=float(rows.confidences[row]),
                loss=float(rows.losses[row]),
                image=batch.images[row].copy(),
            )
            (heapq.heapreplace if full else heapq.heappush)(self._heap, (mistake.loss, -mistake.index, mistake))

    def found(self) -> list[Mistake]:
        """Worst first, without their ids."""
        return [mistake for _, _, mistake in sorted(self._heap, reverse=True)]

    def mistakes(self, prepared: Prepared, split: str) -> list[Mistake]:
        """Worst first, with their ids."""
        found = self.found()
        ids = ids_of(prepared, split, [mistake.index for mistake in found])
        return [replace(mistake, id=ids[mistake.index]) for mistake in found]


def ids_of(prepared: Prepared, split: str, indices: list[int]) -> dict[int, str]:
    """By row number."""
    if not indices:
        return {}
    table = prepared.table(split, columns=["index", "id"])
    table = table.filter(pa.array(np.isin(table.column("index").to_numpy(), indices)))
    return dict(zip(table.column("index").to_pylist(), table.column("id").to_pylist(), strict=True))


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927); 95 % by default. Unlike the normal one it stays within 0..1."""
    share = correct / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def reliability_bins(
    confidences: NDArray[np.floating], correct: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> list[Bin]:
    """Group by confidence in `num_bins` intervals (low, high] of equal width over 0..1; empty ones are left out."""
    edges = np.linspace(0, 1, num_bins + 1)
    places = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, num_bins - 1)
    bins = []
    for place in np.unique(places):
        inside = places == place
        low, high = float(edges[place]), float(edges[place + 1])
        mean = float(confidences[inside].mean(dtype=np.float64))
        bins.append(Bin(low, high, int(inside.sum()), mean, float(correct[inside].mean())))
    return bins


def calibration_error(bins: list[Bin]) -> float:
    """Mean distance of accuracy and confidence over all images (Guo 2017, equation 3)."""
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / sum(b.count for b in bins)


def coverage_curve(
    confidences: NDArray[np.floating], correct: NDArray[np.bool_], points: int = NUM_POINTS
) -> list[tuple[float, float]]:
    """Accuracy of the surest share of the images, at up to `points` shares (Geifman and El-Yaniv 2017)."""
    right = np.cumsum(correct[np.argsort(-confidences, kind="stable")])
    counts = np.unique(np.linspace(len(right) / points, len(right), points).round().astype(int).clip(min=1))
    return [(int(count) / len(right), int(right[count - 1]) / int(count)) for count in counts]


def quantile_slices(rows: Rows, correct: NDArray[np.bool_]) -> list[Slice]:
    """The images in up to five parts of equal size by each property, lowest first; equal ones stay together."""
    found = []
    for name, values in (
        ("brightness", rows.brightness),
        ("contrast", rows.contrast),
        ("confidence", rows.confidences),
    ):
        edges = np.unique(np.quantile(values, np.linspace(0, 1, NUM_SLICES + 1)[1:-1], method="lower"))
        places = np.searchsorted(edges, values, side="left")
        for place in np.unique(places):
            inside = places == place
            found.append(
                Slice(
                    by=name,
                    low=float(values[inside].min()),
                    high=float(values[inside].max()),
                    count=int(inside.sum()),
                    accuracy=float(correct[inside].mean()),
                    accuracy_ci95=wilson_interval(int(correct[inside].sum()), int(inside.sum())),
                    confidence=float(rows.confidences[inside].mean(dtype=np.float64)),
                )
            )
    return found


def confused_pairs(matrix: NDArray[np.int64], classes: tuple[str, ...], most: int = NUM_PAIRS) -> list[ConfusedPair]:
    """The largest counts off the diagonal of a confusion matrix (C,C), largest first."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    supports = matrix.sum(1)
    places = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(places, wrong.shape), strict=True)
    return [
        ConfusedPair(classes[row], classes[column], int(wrong[row, column]), float(wrong[row, column] / supports[row]))
        for row, column in pairs
        if wrong[row, column]
    ]


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """JSON types for report.json: everything but the pixels and the model's own description."""
    return {
        "data": evaluation.data,
        "split": evaluation.split,
        "fingerprint": evaluation.fingerprint,
        "count": evaluation.count,
        "accuracy": evaluation.accuracy,
        "accuracy_ci95": list(evaluation.accuracy_ci95),
        "loss": evaluation.loss,
        "macro_f1": evaluation.macro_f1,
        "top5_accuracy": evaluation.top5_accuracy,
        "ece": evaluation.ece,
        "ece_uncalibrated": evaluation.ece_uncalibrated,
        "calibration": asdict(evaluation.calibration),
        "accepted": evaluation.accepted,
        "accepted_accuracy": evaluation.accepted_accuracy,
        "accepted_ci95": evaluation.accepted_ci95 and list(evaluation.accepted_ci95),
        "slices": [asdict(one) for one in evaluation.slices],
        "coverage": [list(point) for point in evaluation.coverage],
        "train_seconds": evaluation.train_seconds,
        "images_per_second": evaluation.images_per_second,
        "device": evaluation.device,
        "classes": list(evaluation.classes),
        "per_class": evaluation.per_class,
        "confusion_matrix": evaluation.confusion_matrix.tolist(),
        "confused_pairs": [asdict(pair) for pair in evaluation.confused_pairs],
        "reliability": [asdict(bar) for bar in evaluation.reliability],
        "mistakes": [
            without_pixels(mistake) | {"neighbours": [without_pixels(one) for one in mistake.neighbours]}
            for mistake in evaluation.mistakes
        ],
        "members": evaluation.members,
    }


def without_pixels(described: Mistake | Neighbour) -> dict[str, Any]:
    return {name: value for name, value in vars(described).items() if name not in ("image", "saliency")}
