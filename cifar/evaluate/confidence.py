"""Temperature and threshold of a model, fitted on val, so that its probabilities can be taken at their word."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from cifar.calibration import Calibration
from cifar.data.prepared import Prepared
from cifar.evaluate.evaluation import wilson_interval
from cifar.predictor import Predictor

TARGET = 0.98
"""Accuracy of what is accepted."""
PRIOR = 0.5
"""Standard deviation of the temperature's logarithm. Fitted to 40 of CIFAR-10's val images the loss of the others was
0.211 in the mean of 40 draws, with 1.0 it was 0.226, without 0.800; of 320 images all were 0.204."""
LOG_RANGE = 4.0
"""Of the temperature's logarithm, either way."""


def calibrate(predictor: Predictor, prepared: Prepared, split: str = "val", target: float = TARGET) -> Calibration:
    """Fit to the split's images, which the network was not trained on, and set what `predictor` answers by.

    Val chose the epoch, so that the model is a little better there than elsewhere: fitted probabilities are too high by
    that. A split without images leaves the answers as they are.
    """
    predictor.calibration = Calibration()
    if not prepared.counts.get(split):
        return predictor.calibration
    scored = [(predictor.logits(batch.images), batch.labels) for batch in prepared.batches(split, predictor.batch_size)]
    logits, labels = (np.concatenate(column) for column in zip(*scored, strict=True))
    fitted = fit_calibration(logits, labels, target)
    predictor.calibration = replace(fitted, split=split)
    return predictor.calibration


def fit_calibration(logits: NDArray[np.float32], labels: NDArray[np.int64], target: float = TARGET) -> Calibration:
    """logits (N,C) of images that the network was not trained on, and labels (N,)."""
    temperature = fit_temperature(logits, labels)
    probabilities = (torch.from_numpy(logits).double() / temperature).softmax(1).numpy()
    confidences, correct = probabilities.max(1).astype(np.float32), probabilities.argmax(1) == labels
    return Calibration(
        temperature=temperature,
        threshold=find_threshold(confidences, correct, target),
        target=target,
        count=len(labels),
    )


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The one that is likeliest by the labels (Guo 2017, arXiv 1706.04599, section 4.2): it lets all answers stand.

    Its logarithm is taken for normal around 0 beforehand, with `PRIOR`: of a few images that are all right the labels
    alone would make every other answer certain.
    """
    values, targets = torch.from_numpy(logits).double(), torch.from_numpy(labels)

    def loss(log_temperature: float) -> float:
        of_labels = torch.nn.functional.cross_entropy(values / np.exp(log_temperature), targets, reduction="sum")
        return of_labels.item() + (log_temperature / PRIOR) ** 2 / 2

    found = minimize_scalar(loss, bounds=(-LOG_RANGE, LOG_RANGE), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def find_threshold(confidences: NDArray[np.float32], correct: NDArray[np.bool_], target: float) -> float:
    """The lowest confidence from which on at least `target` of the answers are right, by the lower end of the 95 %
    interval: on other images, too, in 97.5 of 100 cases. 0 if there is none, as among fewer than 189 images at 0.98.
    """
    order = np.argsort(-confidences, kind="stable")
    right = np.cumsum(correct[order])
    # Only where the next one is less sure: those of one confidence are accepted together.
    last = np.flatnonzero(np.diff(confidences[order], append=-1.0))
    for place in last[::-1]:
        if wilson_interval(int(right[place]), int(place) + 1)[0] >= target:
            return float(confidences[order[place]])
    return 0.0
