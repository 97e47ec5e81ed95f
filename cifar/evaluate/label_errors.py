"""Likely wrong labels, by confident learning (Northcutt, Jiang and Chuang 2021, arXiv 1911.00068).

Its input is what networks say of images that they were not trained on. Nothing here asks how they were trained.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cifar.data.prepared import Prepared, to_arrays
from cifar.evaluate.evaluation import wilson_interval

NUM_SUSPECTS = 24
NUM_PAIRS = 10
NOBODY = -1
"""In place of a class: none reaches its threshold."""


@dataclass(frozen=True, kw_only=True)
class LabelErrors:
    """What the probabilities say of N labels of C classes."""

    thresholds: NDArray[np.float64]
    """(C,): the mean probability of a class over the images that are labelled so; infinite where none is."""
    joint: NDArray[np.int64]
    """(C,C), the confident joint: images by their label (row) and the likeliest class that reaches its threshold
    (column); those where none does are not counted."""
    estimated: NDArray[np.float64]
    """(C,C): images by label (row) and true class (column). The confident joint, scaled so that each row has as many
    images as have the label."""
    scores: NDArray[np.float32]
    """(N,): how well the label fits, 0..1, as `label_scores` has it."""
    suggested: NDArray[np.int64]
    """(N,): the class that the confident joint counts a likely error for; of other images the likeliest."""
    likely: NDArray[np.bool_]
    """(N,): the confident joint counts it off the diagonal, for another class than its label."""
    order: NDArray[np.int64]
    """(N,): all images, the least fitting label first; of equals the earlier one."""

    @property
    def errors(self) -> float:
        """Wrong labels, as `estimated` has them."""
        return float(self.estimated.sum() - np.trace(self.estimated))

    @property
    def errors_ci95(self) -> tuple[float, float]:
        """95 % interval of `errors` for the chance in the counts alone, the probabilities and thresholds as they are.

        Wilson's interval of each label's share of errors, added up by the squares of their halves (MOVER; Zou and
        Donner 2008, Statistics in Medicine 27).
        """
        labelled, counted = self.estimated.sum(1), self.joint.sum(1)
        wrong = counted - np.diag(self.joint)
        below = above = 0.0
        for size, error, count in zip(labelled, wrong, counted, strict=True):
            if count:
                low, high = wilson_interval(int(error), int(count))
                below += (size * (error / count - low)) ** 2
                above += (size * (high - error / count)) ** 2
        return max(self.errors - below**0.5, 0.0), min(self.errors + above**0.5, float(labelled.sum()))


def find_label_errors(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> LabelErrors:
    """Confident learning on out-of-sample probabilities (N,C) of images with these labels (N,), 0..C-1.

    ValueError for other shapes, for labels out of range, and for values that are no probabilities.
    """
    check(probabilities, labels)
    classes = probabilities.shape[1]
    thresholds = class_thresholds(probabilities, labels)
    confident = confident_classes(probabilities, thresholds)
    counted = confident != NOBODY
    joint = np.bincount(labels[counted] * classes + confident[counted], minlength=classes**2).reshape(classes, classes)
    likely = counted & (confident != labels)
    scores = label_scores(probabilities, labels)
    return LabelErrors(
        thresholds=thresholds,
        joint=joint,
        estimated=calibrated(joint, np.bincount(labels, minlength=classes)),
        scores=scores,
        suggested=np.where(likely, confident, probabilities.argmax(1)),
        likely=likely,
        order=np.argsort(scores, kind="stable"),
    )


def check(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not probabilities.size:
        raise ValueError(f"probabilities {probabilities.shape} and labels {labels.shape} must be (N, C) and (N,)")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"labels must be 0 to {probabilities.shape[1] - 1}")
    if not np.allclose(probabilities.sum(1), 1, atol=1e-3) or probabilities.min() < 0:
        raise ValueError("the probabilities of an image must be 0 or more, and their sum 1")


def class_thresholds(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """t_j of the paper's equation 2, (C,): how sure the networks are of a class, on average, where it is the label."""
    own = probabilities[np.arange(len(labels)), labels]
    classes = probabilities.shape[1]
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.full(classes, np.inf)
    thresholds[counts > 0] = sums[counts > 0] / counts[counts > 0]
    return thresholds


def confident_classes(probabilities: NDArray[np.float32], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """(N,): of the classes that reach their threshold the likeliest, or NOBODY; equation 1 of the paper."""
    reached = np.where(probabilities >= thresholds, probabilities, np.float32(-1))
    best = reached.argmax(1)
    return np.where(reached.max(1) < 0, NOBODY, best)


def calibrated(joint: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The confident joint (C,C) with rows that add up to `counts` (C,): equation 3 of the paper, times the images.

    A label of which no image is counted is taken to be right.
    """
    estimated = np.diag(counts.astype(np.float64))
    for row, total in enumerate(joint.sum(1)):
        if total:
            estimated[row] = joint[row] / total * counts[row]
    return estimated


def label_scores(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """(N,): the probability of the label, 0..1: its self-confidence.

    Chosen on CIFAR-10's train with 200 labels changed at random (one draw, three folds of recipe `fast`). Of these the
    400 lowest held 177; by the margin to the likeliest other class they held 136, by probability over entropy 158, by
    probability minus the class's threshold 127 and over it 176, and with the likely errors before all others 140.
    """
    return probabilities[np.arange(len(labels)), labels]


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """An image whose label is likely wrong."""

    index: int
    """Of the row in the source."""
    split: str
    id: str
    """Of the image in its source: a path, or file and row."""
    label: str
    suggested: str
    label_probability: float
    suggested_probability: float
    likely: bool
    image: NDArray[np.uint8] = field(repr=False)
    """(S,S,3)."""


@dataclass(frozen=True, kw_only=True)
class ErrorPair:
    """Images of one label that are likely of another class."""

    label: str
    suggested: str
    likely: int
    """Images that the confident joint counts so."""
    estimated: float
    ci95: tuple[float, float]
    """As `LabelErrors.errors_ci95`."""


@dataclass(frozen=True, kw_only=True)
class LabelReview:
    """The labels of a data set's train and val, looked through."""

    data: str
    classes: tuple[str, ...]
    folds: int
    found: LabelErrors = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    """(N,)."""
    probabilities: NDArray[np.float32] = field(repr=False)
    """(N,C), each row by a network that was not trained on the image."""
    rows: pa.Table = field(repr=False)
    """Where the N images are from: the columns `id`, `split` and `index`."""
    suspects: list[Suspect] = field(repr=False)
    """The first of `found.order`."""
    path: str
    """Folder or URI of the trainings."""

    @property
    def accuracy(self) -> float:
        """Share of the images whose label is the likeliest class."""
        return float((self.probabilities.argmax(1) == self.labels).mean())

    @property
    def pairs(self) -> list[ErrorPair]:
        """Label and suggested class, the most frequent of the likely errors first."""
        joint, estimated = self.found.joint, self.found.estimated
        counted, labelled = joint.sum(1), estimated.sum(1)
        wrong = joint - np.diag(np.diag(joint))
        found = []
        for place in np.argsort(-wrong, axis=None, kind="stable")[:NUM_PAIRS]:
            row, column = divmod(int(place), len(joint))
            if wrong[row, column]:
                low, high = wilson_interval(int(wrong[row, column]), int(counted[row]))
                found.append(
                    ErrorPair(
                        label=self.classes[row],
                        suggested=self.classes[column],
                        likely=int(wrong[row, column]),
                        estimated=float(estimated[row, column]),
                        ci95=(low * labelled[row], high * labelled[row]),
                    )
                )
        return found


def review(
    prepared: Prepared,
    table: pa.Table,
    probabilities: NDArray[np.float32],
    splits: Sequence[str],
    folds: int,
    path: str,
) -> LabelReview:
    """The review of the images of `splits`, in this order: `table` has their columns `image`, `label` and `index`."""
    labels = table.column("label").to_numpy()
    found = find_label_errors(probabilities, labels)
    ids = pa.chunked_array([chunk for split in splits for chunk in prepared.table(split, ["id"]).column("id").chunks])
    names = np.repeat(np.array(splits), [prepared.counts[split] for split in splits])
    rows = pa.table({"id": ids, "split": pa.array(names), "index": table.column("index")})
    first = found.order[:NUM_SUSPECTS]
    images = to_arrays(table.take(first)).images
    suspects = [
        Suspect(
            **place,
            label=prepared.classes[labels[row]],
            suggested=prepared.classes[found.suggested[row]],
            label_probability=float(found.scores[row]),
            suggested_probability=float(probabilities[row, found.suggested[row]]),
            likely=bool(found.likely[row]),
            image=image,
        )
        for row, image, place in zip(first, images, rows.take(first).to_pylist(), strict=True)
    ]
    return LabelReview(
        data=prepared.source,
        classes=prepared.classes,
        folds=folds,
        found=found,
        labels=labels,
        probabilities=probabilities,
        rows=rows,
        suspects=suspects,
        path=path,
    )


def review_to_dict(review: LabelReview) -> dict[str, Any]:
    """JSON types for report.json, without what the CSV has of each image."""
    found = review.found
    return {
        "data": review.data,
        "folds": review.folds,
        "path": review.path,
        "count": len(review.labels),
        "out_of_fold_accuracy": review.accuracy,
        "likely_errors": int(found.likely.sum()),
        "estimated_errors": found.errors,
        "estimated_errors_ci95": list(found.errors_ci95),
        "thresholds": [value if np.isfinite(value) else None for value in found.thresholds.tolist()],
        "confident_joint": found.joint.tolist(),
        "pairs": [asdict(pair) for pair in review.pairs],
        "suspects": [
            {key: value for key, value in asdict(suspect).items() if key != "image"} for suspect in review.suspects
        ],
    }
