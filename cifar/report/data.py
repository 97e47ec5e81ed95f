"""The report of a prepared set: data_report.html and data_report.json."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar.config import AugmentConfig
from cifar.data.prepared import IMBALANCED, Prepared
from cifar.report import page, views

FREQUENT, FEWEST_SHAPES = 0.01, 5
"""Shapes that have at least this share of the images are listed, and so many in any case."""
MOST_PER_CLASS, MOST_SAMPLES = 10, 500
MOST_BAD_ROWS = 50


def write_data_report(
    folder: str | Path, prepared: Prepared, augment: AugmentConfig, *, command: str = "", seed: int = 0
) -> Path:
    """Write data_report.html and data_report.json into `folder`; return the path of the page.

    Every augmentation is shown, each alone and at last those of `augment` together, drawn with `seed`. Reads the train
    split until each class has its samples, ten or fewer, in bounded memory.
    """
    folder = Path(folder)
    bad = prepared.quarantine()
    reasons = dict(Counter(row.reason for row in bad).most_common())
    facts = {
        "data": prepared.source,
        "path": prepared.path,
        "fingerprint": prepared.fingerprint,
        "image_size": prepared.image_size,
        "classes": list(prepared.classes),
        "counts": prepared.counts,
        "class_counts": prepared.class_counts,
        "imbalance": prepared.imbalance,
        "mean": list(prepared.mean),
        "std": list(prepared.std),
        "source_stats": prepared.source_stats,
        "quarantined": prepared.quarantined,
        "quarantine_reasons": reasons,
        "duplicates": prepared.duplicates,
        "augment": dataclasses.asdict(augment),
        "command": command,
        "versions": page.versions(),
    }
    page.write_json(folder / "data_report.json", facts)
    samples = find_samples(prepared, max(1, min(MOST_PER_CLASS, MOST_SAMPLES // len(prepared.classes))))
    html = page.render(
        "data.html",
        **facts,
        most=max(max(counts, default=1) for counts in prepared.class_counts.values()) or 1,
        smallest=_extreme(prepared, min),
        largest=_extreme(prepared, max),
        shapes=_frequent(prepared.source_stats["shapes"], sum(prepared.counts.values())),
        imbalanced=prepared.imbalance >= IMBALANCED,
        samples=[
            {"name": name, "strip": page.strip([image for image, _ in found]), "count": len(found)}
            for name, found in zip(prepared.classes, samples, strict=True)
            if found
        ],
        views=views.rows([found[0] for found in samples if found], augment, seed),
        num_views=views.NUM_VIEWS,
        bad=bad[:MOST_BAD_ROWS],
    )
    return page.write(folder / "data_report.html", html)


def _frequent(shapes: list[list[int]], images: int) -> list[list[int]]:
    return [shape for place, shape in enumerate(shapes) if place < FEWEST_SHAPES or shape[2] >= FREQUENT * images]


def find_samples(prepared: Prepared, most: int) -> list[list[tuple[NDArray[np.uint8], int]]]:
    """For each class its first `most` train images (S,S,3) with their index."""
    samples: list[list[tuple[NDArray[np.uint8], int]]] = [[] for _ in prepared.classes]
    missing = sum(min(most, count) for count in prepared.class_counts["train"])
    for images, labels, indices in prepared.batches("train", 1000):
        for label in np.unique(labels):
            room = most - len(samples[label])
            rows = np.flatnonzero(labels == label)[:room]
            samples[label] += [(images[row].copy(), int(indices[row])) for row in rows]
            missing -= len(rows)
        if not missing:
            break
    return samples


def _extreme(prepared: Prepared, which: Any) -> tuple[str, int]:
    """The class with the fewest or most train images, and their number."""
    counts = prepared.class_counts["train"]
    count = which(counts)
    return prepared.classes[counts.index(count)], count
