"""The rows of a run's metrics.jsonl, and one sentence on what its learning curves say."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.config import ConfigError
from cifar.data.prepared import filesystem
from cifar.report.page import percent

Row = Mapping[str, Any]

NEEDED = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
NUMBERS = (*NEEDED, "lr", "images_per_second", "seconds")
MIN_EPOCHS = 4
LOSS_MARGIN = 0.05
GAP = 0.10


@dataclass(frozen=True)
class Verdict:
    kind: str
    """`short`, `overfitting`, `underfitting` or `balanced`."""
    text: str


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """One row per epoch, in order; of an epoch that was run again after a crash the last. [] without the file.

    `path` may be a URI. ConfigError when the file is damaged, or when one of `NUMBERS` is none.
    """
    files, name = filesystem(str(path))
    try:
        with files.open_input_stream(name) as stream:
            lines = stream.read().decode().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        by_epoch = {row["epoch"]: row for row in rows}
        for row, key in itertools.product(rows, NUMBERS):
            if type(row.get(key, 0)) not in (int, float):
                raise ValueError(f"{key} is {row[key]!r}")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a run's metrics, {error!r}; delete it or name another run") from error
    return [by_epoch[epoch] for epoch in sorted(by_epoch) if all(key in by_epoch[epoch] for key in NEEDED)]


def verdict(history: Sequence[Row]) -> Verdict:
    """Does the run over- or underfit? The first rule that holds:

    1. short: fewer than 4 epochs.
    2. overfitting: the val loss ended more than 5 % above its lowest value, while the train loss went on falling.
    3. overfitting: the train accuracy ended more than 10 points above the val accuracy.
    4. underfitting: the last quarter of the epochs still lowered the val loss by more than 5 %, and the train accuracy
       is below 95 %.
    5. balanced: none of these.

    Train figures are measured on augmented, perhaps mixed or smoothed batches while the weights still change, so train
    and val loss are each compared with themselves only. A rate that falls to zero makes a last drop of the loss, which
    is why rule 4 asks for room below 100 % as well.
    """
    if len(history) < MIN_EPOCHS:
        return Verdict("short", f"{len(history)} epochs are too few to tell over- from underfitting.")
    last = history[-1]
    best = min(history, key=lambda row: row["val_loss"])
    rise = last["val_loss"] / max(best["val_loss"], 1e-12) - 1
    if rise > LOSS_MARGIN and last["train_loss"] < best["train_loss"]:
        return Verdict(
            "overfitting",
            f"Overfitting: after epoch {best['epoch']} the val loss rose by {percent(rise, 0)} "
            f"(from {best['val_loss']:.3f} to {last['val_loss']:.3f}) while the train loss went on falling. "
            "Stronger augmentation, weight decay or fewer epochs would help.",
        )
    gap = last["train_accuracy"] - last["val_accuracy"]
    accuracies = f"{percent(last['train_accuracy'])} of the train and {percent(last['val_accuracy'])} of the val images"
    if gap > GAP:
        return Verdict(
            "overfitting",
            f"Overfitting: the run ended at {accuracies}, {100 * gap:.0f} points apart. "
            "Stronger augmentation, weight decay or more data would help.",
        )
    quarter = max(1, len(history) // 4)
    before = min(row["val_loss"] for row in history[:-quarter])
    after = min(row["val_loss"] for row in history[-quarter:])
    drop = 1 - after / max(before, 1e-12)
    if drop > LOSS_MARGIN and last["train_accuracy"] < 0.95:
        return Verdict(
            "underfitting",
            f"Underfitting: the val loss still fell by {percent(drop, 0)} over the last {_epochs(quarter)}, and only "
            f"{accuracies} are right. More epochs or a larger network would probably help.",
        )
    return Verdict(
        "balanced", f"Well fitted: the run ended at {accuracies}, and the val loss stayed near its lowest value."
    )


def _epochs(count: int) -> str:
    return "epoch" if count == 1 else f"{count} epochs"
