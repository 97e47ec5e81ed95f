"""What the templates show of a model's robustness."""

from typing import Any

from cifar.evaluate.corruptions import GROUPS
from cifar.evaluate.robustness import CorruptionResult, Robustness
from cifar.report import page


def view(robustness: Robustness) -> dict[str, Any]:
    """The values of `section` in robustness.html."""
    groups = {name: [one for one in robustness.corruptions if one.group == name] for name in GROUPS}
    clean = robustness.clean_accuracy
    columns = zip(*(one.cells for one in robustness.corruptions), strict=True)
    means = [sum(cell.accuracy for cell in column) / len(column) for column in columns]
    return {
        "count": robustness.count,
        "seed": robustness.seed,
        "seconds": robustness.seconds,
        "clean": clean,
        "clean_ci95": robustness.clean_accuracy_ci95,
        "mean": robustness.mean_accuracy,
        "standard_error": robustness.standard_error,
        "verdict": _verdict(robustness),
        "groups": {name: [_row(one, clean) for one in found] for name, found in groups.items()},
        "means": [{"accuracy": mean, "lost": _lost(mean, clean)} for mean in [*means, robustness.mean_accuracy]],
        "label": robustness.label,
        "original": robustness.original.prediction,
        "strips": [
            {
                "title": title(one.name),
                "predictions": [(example.strength, example.prediction) for example in one.examples],
                "source": page.strip([example.image for example in (robustness.original, *one.examples)]),
                "count": 1 + len(one.examples),
            }
            for one in robustness.corruptions
        ],
    }


def title(name: str) -> str:
    """A corruption's name as the paper writes it."""
    return name.replace("_", " ").capitalize().replace("Jpeg", "JPEG")


def _verdict(robustness: Robustness) -> str:
    """Which corruption hurts most?"""
    worst, clean = robustness.worst, robustness.clean_accuracy
    name, strongest = title(worst.name), worst.cells[-1]
    if worst.mean_accuracy >= clean:
        return "No corruption lowers the accuracy on this sample."
    return (
        f"{name} hurts most: {page.percent(worst.mean_accuracy)} of the images are classified correctly in the mean "
        f"over its strengths, {page.percent(strongest.accuracy)} at strength {strongest.strength}."
    )


def _row(result: CorruptionResult, clean: float) -> dict[str, Any]:
    return {
        "title": title(result.name),
        "cells": [
            {"accuracy": cell.accuracy, "ci95": cell.ci95, "lost": _lost(cell.accuracy, clean)} for cell in result.cells
        ],
        "mean": result.mean_accuracy,
        "standard_error": result.standard_error,
        "lost": _lost(result.mean_accuracy, clean),
    }


def _lost(accuracy: float, clean: float) -> float:
    """The share of the undamaged images' accuracy that is gone, 0 to 1."""
    return min(max(1 - accuracy / clean, 0.0), 1.0) if clean else 0.0
