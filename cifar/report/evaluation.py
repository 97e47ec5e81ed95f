"""The report of a model on a labelled split: report.html, report.json and its figures as PNG."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar.evaluate import Evaluation, Mistake, Slice, to_dict
from cifar.evaluate.label_errors import LabelReview, review_to_dict
from cifar.evaluate.robustness import Robustness
from cifar.machine import cpu_model, usable_cpus
from cifar.report import figures, label_errors, page
from cifar.report.history import Row, verdict
from cifar.report.robustness import view

HEAT = (255, 120, 0)
"""Colour of the pixels that sway an answer most."""


def write_report(
    folder: str | Path,
    evaluation: Evaluation,
    *,
    history: Sequence[Row] = (),
    command: str = "",
    robustness: Robustness | None = None,
    label_review: LabelReview | None = None,
) -> Path:
    """Write the report into `folder` and return the path of report.html.

    Beside it: report.json, figures/confusion.png, figures/reliability.png, with a `history` (the rows of metrics.jsonl,
    see `read_history`) curves.png, and with a `label_review` label_errors.csv. `command` is what a reader types to get
    the numbers again.
    """
    folder = Path(folder)
    learning = verdict(history) if history else None
    facts = {
        "command": command,
        "versions": page.versions(),
        "machine": f"{usable_cpus()} cores of {cpu_model()}",
        "config": evaluation.model.config.to_dict(),
        "learning": asdict(learning) if learning else None,
    }
    page.write(folder / "figures/confusion.png", _confusion_png(evaluation))
    panel = figures.reliability(evaluation.reliability, evaluation.ece)
    page.write(folder / "figures/reliability.png", figures.png([panel], (5, 4.5)))
    coverage = figures.coverage(evaluation.coverage, _accepted(evaluation))
    if history:
        panels = [figures.curve(history, key) for key in ("loss", "accuracy")]
        page.write(folder / "curves.png", figures.png(panels, (10, 4)))
    deeper: dict[str, Any] = {}
    if robustness:
        deeper["robustness"] = robustness.to_dict()
    if label_review:
        deeper["label_errors"] = review_to_dict(label_review)
        label_errors.write_csv(folder, label_review)
    page.write_json(folder / "report.json", to_dict(evaluation) | facts | deeper)
    html = page.render(
        "evaluation.html",
        evaluation=evaluation,
        correct=round(evaluation.accuracy * evaluation.count),
        per_class=sorted(evaluation.per_class.items(), key=lambda item: item[1]["f1"]),
        matrix=_matrix(evaluation),
        heatmap=None if _annotated(evaluation) else _heatmap(evaluation),
        reliability=figures.svg(panel, (5, 4.5), "Reliability diagram: accuracy over confidence"),
        calibration=calibration_sentence(evaluation),
        coverage=figures.svg(coverage, (5, 4.5), "Accuracy of the share of images that the model is surest of"),
        slices=_slices(evaluation),
        robust=view(robustness) if robustness else None,
        mistakes=[
            {
                "it": mistake,
                "strip": page.strip(_pictures(mistake)),
                "count": len(_pictures(mistake)),
                "neighbours": page.strip([one.image for one in mistake.neighbours]) if mistake.neighbours else "",
            }
            for mistake in evaluation.mistakes
        ],
        label_errors=label_errors.section(label_review) if label_review else None,
        history=history,
        curves=[
            figures.svg(figures.curve(history, key), (5, 3.6), f"Learning curve: {key} of train and val by epoch")
            for key in (("loss", "accuracy") if history else ())
        ],
        **facts,
    )
    return page.write(folder / "report.html", html)


def calibration_sentence(evaluation: Evaluation) -> str:
    """Is the model surer than it is right?"""
    confidence = sum(b.count * b.confidence for b in evaluation.reliability) / evaluation.count
    gap = confidence - evaluation.accuracy
    means = f"its mean confidence is {page.percent(confidence)}, its accuracy {page.percent(evaluation.accuracy)}"
    if abs(gap) < 0.005:
        return f"On the whole the model is as sure as it is right: {means}."
    return f"The model is {'over' if gap > 0 else 'under'}confident: {means}."


def _pictures(mistake: Mistake) -> list[NDArray[np.uint8]]:
    """The image, and, where there is a saliency map, once more in grey with the map in orange."""
    if mistake.saliency is None:
        return [mistake.image]
    strength = mistake.saliency[..., None]
    grey = mistake.image.mean(2, keepdims=True) * 0.5 + 64
    shown = grey * (1 - strength) + np.array(HEAT, np.float32) * strength
    return [mistake.image, shown.round().astype(np.uint8)]


def _accepted(evaluation: Evaluation) -> tuple[float, float] | None:
    """Share and accuracy at the threshold; None where nothing abstains, or everything."""
    if not evaluation.calibration.threshold or evaluation.accepted_accuracy is None:
        return None
    return evaluation.accepted / evaluation.count, evaluation.accepted_accuracy


def _slices(evaluation: Evaluation) -> dict[str, list[Slice]]:
    """By property, where the images differ in it."""
    names = dict.fromkeys(one.by for one in evaluation.slices)
    found = {name: [one for one in evaluation.slices if one.by == name] for name in names}
    return {name: parts for name, parts in found.items() if len(parts) > 1}


def _annotated(evaluation: Evaluation) -> bool:
    return len(evaluation.classes) <= figures.MOST_ANNOTATED


def _matrix(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Rows of the table: the label and its cells; none where it would be too large to read."""
    if not _annotated(evaluation):
        return []
    shares = figures.row_shares(evaluation.confusion_matrix)
    return [
        {
            "label": name,
            "cells": [
                {"count": int(count), "share": float(share), "right": row == column}
                for column, (count, share) in enumerate(zip(evaluation.confusion_matrix[row], shares[row], strict=True))
            ],
        }
        for row, name in enumerate(evaluation.classes)
    ]


def _heatmap(evaluation: Evaluation) -> str:
    title = f"Confusion matrix of {len(evaluation.classes)} classes: share of each label's images by prediction"
    return figures.svg(figures.confusion(evaluation, normalized=True), (7, 6.6), title)


def _confusion_png(evaluation: Evaluation) -> bytes:
    side = min(4.5 + 0.25 * len(evaluation.classes), 8.0)
    panels = [figures.confusion(evaluation, normalized) for normalized in (False, True)]
    return figures.png(panels, (2 * side, side))
