"""One chunk of the source: read, decode, write its part files. Runs in any process, on any node, in any order."""

import hashlib
import pickle
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar.config import Resize
from cifar.data.decode import BadImage, decode_row
from cifar.data.prepared import SPLITS, Part, filesystem
from cifar.data.read import Piece, read_piece
from cifar.data.splits import TEST, TRAIN

MISSING, OUT_OF_RANGE = -1, -2
LABEL_REASONS = {MISSING: "label missing", OUT_OF_RANGE: "label out of range"}


@dataclass(frozen=True, kw_only=True)
class Chunk(Piece):
    labels: np.ndarray
    """int32 (N,), classes, or MISSING or OUT_OF_RANGE."""
    splits: np.ndarray
    """int8 (N,), codes of cifar.data.splits."""
    target: str
    image_size: int
    resize: Resize


class BadRow(NamedTuple):
    number: int
    id: str
    path: str
    reason: str


@dataclass(kw_only=True)
class SplitSummary:
    part: Part
    class_rows: np.ndarray
    """int64: rows per class, as far as the largest label at hand."""
    hashes: np.ndarray
    """uint64 (rows,): of the prepared pixels."""
    pixel_sum: np.ndarray
    """int64 (3,), as is `pixel_square_sum`."""
    pixel_square_sum: np.ndarray
    value_range: tuple[int, int]


@dataclass(kw_only=True)
class Summary:
    number: int
    rows: int
    splits: dict[int, SplitSummary] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)


def group_rows(image_size: int) -> int:
    """Rows of a row group: 12 MiB of pixels, 4,096 at 32 px."""
    return max(1, min(4096, (12 << 20) // (image_size**2 * 3)))


def convert_chunk(chunk: Chunk) -> Summary:
    """Decode the chunk's rows into `target`/<split>/part-<number>.parquet. Bad rows are returned, not written."""
    summary = Summary(number=chunk.number, rows=len(chunk.labels))
    writers: dict[int, _PartWriter] = {}
    columns = zip(chunk.indices.tolist(), chunk.labels.tolist(), chunk.splits.tolist(), read_piece(chunk), strict=True)
    for index, label, split, (row_id, path, data) in columns:
        try:
            if label < 0:
                raise BadImage(LABEL_REASONS[label])
            if isinstance(data, BadImage):
                raise data
            decoded = decode_row(data, chunk.image_size, chunk.resize)
        except BadImage as error:
            summary.bad.append(BadRow(index, row_id, path, str(error)))
            continue
        summary.shapes[decoded.size] += 1
        summary.modes[decoded.mode] += 1
        if split not in writers:
            writers[split] = _PartWriter(chunk, SPLITS[split])
        writers[split].add(decoded.pixels, label, index, row_id)
    summary.splits = {split: writer.close() for split, writer in writers.items()}
    for split in summary.splits.keys() - {TRAIN, TEST}:
        summary.splits[split].hashes = np.empty(0, np.uint64)
    return summary


class _PartWriter:
    """Writes one part file, a row group at a time, and sums up what it wrote."""

    def __init__(self, chunk: Chunk, split: str) -> None:
        self.width = chunk.image_size**2 * 3
        self.group_rows = group_rows(chunk.image_size)
        self.name = f"{split}/part-{chunk.number:05d}.parquet"
        self.schema = pa.schema(
            {"image": pa.binary(self.width), "label": pa.int64(), "index": pa.int64(), "id": pa.string()}
        )
        files, root = filesystem(chunk.target)
        self.stream = files.open_output_stream(f"{root}/{self.name}")
        self.writer = pq.ParquetWriter(
            self.stream, self.schema, compression="none", use_dictionary=False, write_statistics=False
        )
        self.rows: list[tuple[bytes, int, int, str]] = []
        self.num_rows = 0
        self.hashes: list[bytes] = []
        self.class_rows: Counter[int] = Counter()
        self.sums = np.zeros((2, 3), np.int64)
        self.low, self.high = 255, 0

    def add(self, pixels: bytes, label: int, index: int, row_id: str) -> None:
        self.rows.append((pixels, label, index, row_id))
        if len(self.rows) == self.group_rows:
            self._flush()

    def _flush(self) -> None:
        pixels, labels, indices, ids = zip(*self.rows, strict=True)
        data = b"".join(pixels)
        columns = [
            _array(pa.binary(self.width), len(pixels), data),
            _array(pa.int64(), len(pixels), np.array(labels, np.int64)),
            _array(pa.int64(), len(pixels), np.array(indices, np.int64)),
            _strings(ids),
        ]
        self.writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))
        self.num_rows += len(pixels)
        self.class_rows.update(labels)
        self.hashes.extend(hashlib.blake2b(image, digest_size=8).digest() for image in pixels)
        values = np.frombuffer(data, np.uint8).reshape(len(pixels), self.width)
        # Sums over rows first: contiguous and vectorised, 10 times faster than over channels.
        sums = values.sum(axis=0, dtype=np.int64), np.square(values, dtype=np.uint16).sum(axis=0, dtype=np.int64)
        self.sums += np.stack(sums).reshape(2, -1, 3).sum(axis=1)
        self.low, self.high = min(self.low, int(values.min())), max(self.high, int(values.max()))
        self.rows = []

    def close(self) -> SplitSummary:
        if self.rows:
            self._flush()
        self.writer.close()
        size = self.stream.tell()
        self.stream.close()
        class_rows = np.zeros(max(self.class_rows) + 1, np.int64)
        class_rows[list(self.class_rows)] = list(self.class_rows.values())
        return SplitSummary(
            part=Part(self.name, self.num_rows, size),
            class_rows=class_rows,
            hashes=np.frombuffer(b"".join(self.hashes), np.uint64),
            pixel_sum=self.sums[0],
            pixel_square_sum=self.sums[1],
            value_range=(self.low, self.high),
        )


# pa.array would import pandas into each worker process (0.2 s), even for a list.
def _array(kind: pa.DataType, length: int, values: bytes | np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(kind, length, [None, pa.py_buffer(values)])


def _strings(values: Sequence[str]) -> pa.Array:
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def try_convert(chunk: Chunk) -> Summary | Exception:
    """`convert_chunk` with its error as a value, which crosses process boundaries unwrapped."""
    try:
        return convert_chunk(chunk)
    except Exception as error:
        return error


def serve() -> None:
    """Main of a local worker process: pickled chunks on stdin, `try_convert` of each pickled on stdout."""
    while True:
        try:
            chunk: Chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(try_convert(chunk), sys.stdout.buffer)
        sys.stdout.buffer.flush()
