"""What a run says of the test images: a small Parquet file in its folder, with `index`, `label` and `prediction`."""

import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cifar.config import ConfigError
from cifar.data.prepared import Arrays, join, read_file, write_file

FILE = "answers.parquet"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of one run, in the order of the images' indices."""

    indices: NDArray[np.int64]
    """(N,): of the images in the prepared set."""
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    fingerprint: str
    """Of the prepared set."""
    seconds: float
    """Of predicting alone, in the run's own process beside those that ran then."""

    @property
    def correct(self) -> NDArray[np.bool_]:
        return self.labels == self.predictions


def answer(predict: Callable[[NDArray[np.uint8]], NDArray[np.int64]], batches: Iterable[Arrays], data: str) -> Answers:
    """Ask `predict` about images (B,S,S,3) until there are no more; `data` is their fingerprint."""
    found: list[tuple[NDArray[np.int64], ...]] = []
    seconds = 0.0
    for batch in batches:
        started_at = time.perf_counter()
        predictions = predict(batch.images)
        seconds += time.perf_counter() - started_at
        found.append((batch.indices, batch.labels, predictions))
    indices, labels, predictions = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(indices, kind="stable")
    return Answers(
        indices=indices[order],
        labels=labels[order],
        predictions=predictions[order],
        fingerprint=data,
        seconds=seconds,
    )


def write_answers(folder: str, answers: Answers) -> None:
    facts = {"fingerprint": answers.fingerprint, "seconds": answers.seconds}
    columns = {"index": answers.indices, "label": answers.labels, "prediction": answers.predictions}
    table = pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()})
    content = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"cifar": json.dumps(facts)}), content)
    write_file(join(folder, FILE), content.getvalue())


def read_answers(folder: str, fingerprint: str) -> Answers | None:
    """None if there are none; ConfigError if they are damaged, or of other images."""
    file = join(folder, FILE)
    if (content := read_file(file)) is None:
        return None
    try:
        table = pq.read_table(pa.BufferReader(content))
        facts = json.loads((table.schema.metadata or {})[b"cifar"])
        indices, labels, predictions = (table.column(name).to_numpy() for name in ("index", "label", "prediction"))
        answers = Answers(indices=indices, labels=labels, predictions=predictions, **facts)
    except (pa.ArrowInvalid, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged ({error}); delete it, and the same command asks again") from error
    if answers.fingerprint != fingerprint:
        raise ConfigError(f"{file}: answers about other images; delete it, and the same command asks again")
    return answers
