"""The encoded images of a piece of the source, row by row, from image files or Parquet."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cifar.config import ConfigError
from cifar.data.decode import EMPTY, FILE_TOO_LARGE, MAX_BYTES, BadImage
from cifar.data.prepared import filesystem, join
from cifar.data.remote import StorageFailed

_READ_BYTES = 16 << 20
_READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows that are read together."""

    number: int
    source: str
    """Folder or URI that `names` are relative to."""
    names: list[str]
    """An image file per row; or the one Parquet file that holds the rows."""
    column: str | None
    """Image column of the Parquet file; None for image files."""
    first: int
    """Row of the Parquet file at which the piece begins."""
    row_bytes: int
    """Encoded bytes of a row, on average."""
    indices: np.ndarray
    """int64 (N,), row numbers over the whole source."""


def read_piece(piece: Piece) -> Iterator[tuple[str, str, bytes | BadImage]]:
    """Id, path and bytes of each row, in bounded memory; ConfigError when a Parquet file cannot be read."""
    try:
        yield from _file_rows(piece) if piece.column is None else _parquet_rows(piece, piece.column)
    except StorageFailed:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{piece.source}: cannot be read: {error}") from error


def _file_rows(piece: Piece) -> Iterator[tuple[str, str, bytes | BadImage]]:
    files, root = filesystem(piece.source)

    def read(name: str) -> bytes | BadImage:
        try:
            with files.open_input_file(f"{root}/{name}") as stream:
                return stream.read() if stream.size() <= MAX_BYTES else BadImage(FILE_TOO_LARGE)
        except (FileNotFoundError, PermissionError):
            return BadImage("cannot be read")

    at_once = max(1, min(64, _READ_BYTES // piece.row_bytes))
    # Threads hide the latency of an object store; on a disk they only cost.
    with ThreadPoolExecutor(1 if isinstance(files, fs.LocalFileSystem) else _READ_THREADS) as pool:
        for start in range(0, len(piece.names), at_once):
            names = piece.names[start : start + at_once]
            for name, data in zip(names, pool.map(read, names), strict=True):
                yield name, join(piece.source, name), data


def _parquet_rows(piece: Piece, column: str) -> Iterator[tuple[str, str, bytes | BadImage]]:
    files, root = filesystem(piece.source)
    (name,) = piece.names
    path = join(piece.source, name)
    at_once = max(1, min(1024, _READ_BYTES // piece.row_bytes))
    first, last = piece.first, piece.first + len(piece.indices)
    # Without a buffer size a whole column chunk is read at once, which may be gigabytes.
    with files.open_input_file(f"{root}/{name}") as stream, pq.ParquetFile(stream, buffer_size=1 << 20) as file:
        ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        groups = np.flatnonzero((ends > first) & (np.r_[0, ends[:-1]] < last))
        row = int(np.r_[0, ends][groups[0]])
        batches = file.iter_batches(at_once, row_groups=groups.tolist(), columns=[column], use_threads=False)
        for batch in batches:
            low, high = max(first - row, 0), min(last - row, len(batch))
            if low < high:
                for place, value in enumerate(batch.column(0).slice(low, high - low).to_pylist(), start=row + low):
                    data, inner = (value["bytes"], value.get("path")) if isinstance(value, dict) else (value, None)
                    yield inner or f"{name}#{place}", path, data if data else BadImage(EMPTY)
            row += len(batch)
            if row >= last:
                return
