"""The section on likely wrong labels: what the page shows of a review, and the CSV of all images."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from cifar.evaluate.label_errors import LabelReview
from cifar.report import page

CSV = "label_errors.csv"
COLUMNS = (
    *("id", "split", "index", "label", "suggested_label"),
    *("label_probability", "suggested_probability", "likely_error"),
)


def write_csv(folder: Path, review: LabelReview) -> Path:
    """One row for each image, the least fitting label first."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(COLUMNS)
    found = review.found
    others = review.probabilities[np.arange(len(review.labels)), found.suggested]
    places = [review.rows.column(name).to_pylist() for name in ("id", "split", "index")]
    for row in found.order.tolist():
        writer.writerow(
            (
                *(column[row] for column in places),
                *(review.classes[which[row]] for which in (review.labels, found.suggested)),
                *(f"{values[row]:.6g}" for values in (found.scores, others)),
                int(found.likely[row]),
            )
        )
    return page.write(folder / CSV, content.getvalue())


def section(review: LabelReview) -> dict[str, Any]:
    """What the template `label_errors.html` takes."""
    return {
        "review": review,
        "file": CSV,
        "suspects": [(suspect, page.strip([suspect.image])) for suspect in review.suspects],
    }
