"""One part: read and decode its rows, predict them, write them. Runs in any process, on any node, in any order."""

import csv
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cifar.batch.settings import Format
from cifar.batch.source import Part
from cifar.data.decode import BadImage, decode_row
from cifar.data.prepared import Arrays, join, write_file
from cifar.data.read import read_piece
from cifar.evaluate import NUM_MISTAKES, Mistake, Rows, Worst, score, without_pixels
from cifar.predictor import Predictor

STATE = ".parts"
"""Folder of what is known of each finished part, until the job is."""


class BadRow(NamedTuple):
    id: str
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A part's pixels, and what is known of each row."""

    number: int
    images: np.ndarray
    """uint8 (N,S,S,3)."""
    ids: list[str]
    indices: np.ndarray
    """int64 (N,), row numbers over the whole source."""
    labels: np.ndarray | None
    """int64 (N,), or -1; None where the source has no labels."""
    bad: list[BadRow]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is said of each row, and where."""

    output: str
    format: Format
    top_k: int
    threshold: float
    version: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the driver keeps of a part."""

    number: int
    name: str
    """Of its file in the output folder."""
    rows: int
    abstained: int
    size: int
    """In bytes."""
    sha256: str
    bad: list[BadRow]
    seconds: float
    """Of predicting and writing."""
    device: str
    scored: Rows | None
    """Of the rows with a label; None where the source has none."""
    mistakes: list[Mistake]
    """The worst."""

    def to_bytes(self) -> bytes:
        """As an npz file without any pickle."""
        known = {key: value for key, value in vars(self).items() if key not in ("scored", "mistakes")}
        known["mistakes"] = [without_pixels(one) for one in self.mistakes]
        arrays = {} if self.scored is None else self.scored._asdict()
        arrays |= {f"image_{place}": one.image for place, one in enumerate(self.mistakes)}
        sink = io.BytesIO()
        np.savez(sink, known=np.frombuffer(json.dumps(known).encode(), np.uint8), **arrays)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Summary":
        """Inverse of `to_bytes`."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            known = json.loads(arrays["known"].tobytes())
            known["bad"] = [BadRow(*row) for row in known["bad"]]
            known["mistakes"] = [
                Mistake(**one, image=arrays[f"image_{place}"]) for place, one in enumerate(known["mistakes"])
            ]
            scored = Rows(*(arrays[name] for name in Rows._fields)) if Rows._fields[0] in arrays else None
        return cls(**known, scored=scored)


def state_name(number: int) -> str:
    return f"{STATE}/{number:05d}.npz"


def decode_part(part: Part) -> Decoded:
    """All rows that can be read, and the others with the reason."""
    ids: list[str] = []
    places: list[int] = []
    bad: list[BadRow] = []
    images = np.empty((len(part.indices), part.image_size**2 * 3), np.uint8)
    for place, (row_id, path, data) in enumerate(read_piece(part)):
        try:
            if isinstance(data, BadImage):
                raise data
            pixels = decode_row(data, part.image_size, part.resize).pixels
        except BadImage as error:
            bad.append(BadRow(row_id, path, str(error)))
            continue
        images[len(ids)] = np.frombuffer(pixels, np.uint8)
        ids.append(row_id)
        places.append(place)
    return Decoded(
        number=part.number,
        images=images[: len(ids)].reshape(-1, part.image_size, part.image_size, 3),
        ids=ids,
        indices=part.indices[places],
        labels=None if part.labels is None else part.labels[places].astype(np.int64),
        bad=bad,
    )


class PartPredictor:
    """Predicts and writes decoded parts. While one thread writes, another may predict."""

    def __init__(self, predictor: Predictor, target: Target):
        self.predictor = predictor
        self.target = target
        self._lock = threading.Lock()

    def __call__(self, decoded: Decoded) -> Summary:
        started_at = time.perf_counter()
        with self._lock:
            logits = self.predictor.logits(decoded.images)
        table = tabulate(decoded, logits, self.predictor.classes, self.target)
        data = ENCODERS[self.target.format](table)
        name = f"predictions/part-{decoded.number:05d}.{self.target.format}"
        write_file(join(self.target.output, name), data)
        scored, mistakes = _score(decoded, logits, self.predictor)
        summary = Summary(
            number=decoded.number,
            name=name,
            rows=len(table),
            abstained=int(table.column("abstained").to_numpy().sum()),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            bad=decoded.bad,
            seconds=time.perf_counter() - started_at,
            device=str(self.predictor.device),
            scored=scored,
            mistakes=mistakes,
        )
        # Last: what makes the part a finished one.
        write_file(join(self.target.output, state_name(decoded.number)), summary.to_bytes())
        return summary


def _score(decoded: Decoded, logits: np.ndarray, predictor: Predictor) -> tuple[Rows | None, list[Mistake]]:
    if decoded.labels is None:
        return None, []
    known = decoded.labels >= 0
    labels = decoded.labels[known]
    batch = Arrays(decoded.images[known], labels, np.flatnonzero(known))
    rows = score(logits[known], batch, predictor.calibration.temperature)
    worst = Worst(NUM_MISTAKES, predictor.classes)
    worst.offer(batch, rows)
    found = worst.found()
    named = [replace(one, id=decoded.ids[one.index], index=int(decoded.indices[one.index])) for one in found]
    return rows, named


def tabulate(decoded: Decoded, logits: np.ndarray, classes: tuple[str, ...], target: Target) -> pa.Table:
    """The rows of a file of predictions. What is said of an image is what `Predictor.answers` says."""
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : target.top_k]
    highest = np.take_along_axis(probabilities, order, axis=1)
    names, count = pa.array(classes, pa.string()), len(decoded.ids)
    top = pa.StructArray.from_arrays([names.take(pa.array(order.ravel())), pa.array(highest.ravel())], TOP_K_FIELDS)
    columns = {
        "id": pa.array(decoded.ids, pa.string()),
        "label": names.take(pa.array(order[:, 0])),
        "probability": pa.array(highest[:, 0]),
        "abstained": pa.array(highest[:, 0].astype(np.float64) < target.threshold),
        "top_k": pa.ListArray.from_arrays(_offsets(count, order.shape[1]), top),
        "probabilities": pa.ListArray.from_arrays(_offsets(count, len(classes)), pa.array(probabilities.ravel())),
        "version": pa.array([target.version] * count, pa.string()),
    }
    if decoded.labels is not None:
        columns["true_label"] = names.take(pa.array(decoded.labels, mask=decoded.labels < 0))
    return pa.table(columns)


TOP_K_FIELDS = ["label", "probability"]


def _offsets(count: int, width: int) -> pa.Array:
    return pa.array(np.arange(count + 1, dtype=np.int32) * width)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _csv(table: pa.Table) -> bytes:
    """Lists as JSON; nothing for a label that is not known."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(table.column_names)
    nested = [pa.types.is_list(kind) for kind in table.schema.types]
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        writer.writerow([_json(value) if inner else value for value, inner in zip(row, nested, strict=True)])
    return sink.getvalue().encode()


def _jsonl(table: pa.Table) -> bytes:
    return "".join(_json(row) + "\n" for row in table.to_pylist()).encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


ENCODERS: dict[Format, Callable[[pa.Table], bytes]] = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl}
