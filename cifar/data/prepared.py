"""The prepared set on disk: verified, decoded, square images in Parquet, and the manifest that describes them.

Rows have the columns `image` (fixed-size binary: S*S*3 bytes, row-major RGB uint8), `label` int64, `index` int64 (the
row's number in the source) and `id` string. Paths may be local or URIs that pyarrow.fs opens (file://, s3://, gs://).
"""

import dataclasses
import json
import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cifar.config import ConfigError
from cifar.data.remote import StorageFailed, open_store

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"
IMBALANCED = 3.0
"""The largest class over the smallest, from where on the user hears of `--balance`."""
UPLOADED = "/working_dir_files/"
"""Part of the path of a working folder that Ray unpacked."""


class Arrays(NamedTuple):
    images: np.ndarray
    """uint8 (N,S,S,3)."""
    labels: np.ndarray
    """int64 (N,)."""
    indices: np.ndarray
    """int64 (N,)."""


class Quarantined(NamedTuple):
    """A bad row."""

    id: str
    path: str
    """Of the file, absolute."""
    label: str | None
    """As the source gives it."""
    reason: str


class Part(NamedTuple):
    """One Parquet file of a split."""

    name: str
    rows: int
    bytes: int


class RowRange(NamedTuple):
    """Consecutive rows of one part."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    path: str
    """Folder or URI."""
    fingerprint: str
    """Hex digest of the source's content and of the DataConfig fields that shape the rows."""
    classes: tuple[str, ...]
    image_size: int
    counts: dict[str, int]
    """Rows per split."""
    class_counts: dict[str, list[int]]
    """Per split, rows per class."""
    mean: tuple[float, float, float]
    """Of each channel over all pixels of train, in 0..255."""
    std: tuple[float, float, float]
    """Of each channel over all pixels of train, in 0..255; not a mean of per-image deviations."""
    quarantined: int
    """Bad rows, listed in `quarantine.parquet`; no split counts them."""
    source: str
    """What the user named; for `auto` what was taken."""
    parts: dict[str, list[Part]] = field(repr=False)
    group_rows: int
    """Rows of a row group; the last one of a part may have fewer."""
    duplicates: dict[str, Any] = field(repr=False)
    """`within_train`: train rows whose pixels came before in train; `train_test`: test rows whose pixels are in train;
    `pairs`: the first of either as [id, id]."""
    source_stats: dict[str, Any] = field(repr=False)
    """Of the images as found: `shapes` [[width, height, count], ...] (most frequent), `num_shapes`, `short_sides`
    (least, median and greatest, in pixels; older sets lack them), `modes` {name: count}; `value_range` [low, high] of
    the prepared train pixels."""

    @property
    def imbalance(self) -> float:
        """Train images of the largest class over those of the smallest that has any."""
        counts = [count for count in self.class_counts["train"] if count]
        return max(counts) / min(counts)

    @property
    def imbalance_advice(self) -> str:
        """One line for who does not know yet that classes are of very unequal size; empty if they are not."""
        if self.imbalance < IMBALANCED:
            return ""
        return (
            f"imbalanced: the largest class has {self.imbalance:.0f} times as many train images as the smallest; "
            f"with --balance logits a network learns all classes alike"
        )

    @classmethod
    def load(cls, path: str) -> "Prepared":
        """Read the manifest and check that all files are there in full; ConfigError if not."""
        path = absolute(path)
        files, root = filesystem(path)
        listed = files.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        sizes = {os.path.relpath(info.path, root): info.size for info in listed}
        if MANIFEST not in sizes:
            raise ConfigError(f"{path}: no prepared set here (no {MANIFEST}); make one with jobs/prepare.py")
        with files.open_input_stream(f"{root}/{MANIFEST}") as stream:
            manifest = json.loads(stream.read())
        version = manifest.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(f"{path}: prepared by another version of cifar (format {version}); prepare it again")
        manifest["parts"] = {split: [Part(*part) for part in parts] for split, parts in manifest["parts"].items()}
        for part in (part for parts in manifest["parts"].values() for part in parts):
            if sizes.get(part.name) != part.bytes:
                raise ConfigError(f"{path}: {part.name} is missing or cut short; delete the folder and prepare again")
        for name in ("classes", "mean", "std"):
            manifest[name] = tuple(manifest[name])
        return cls(path=path, **manifest)

    def save(self) -> None:
        """Write the manifest: the last step, the set does not exist for readers before it."""
        values = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        del values["path"]
        write_file(join(self.path, MANIFEST), json.dumps(values, indent=1).encode())

    def quarantine(self) -> list[Quarantined]:
        """The bad rows, in the order of the source."""
        if not self.quarantined:
            return []
        files, path = filesystem(join(self.path, QUARANTINE))
        with files.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
            return [Quarantined(**row) for row in file.read().to_pylist()]

    def files(self, split: str) -> list[str]:
        """Paths or URIs of the split's Parquet files, in order."""
        return [join(self.path, part.name) for part in self.parts[split]]

    def num_bytes(self, split: str) -> int:
        """Bytes of the split's decoded images."""
        return self.counts[split] * self.image_size**2 * 3

    def table(self, split: str, columns: list[str] | None = None) -> pa.Table:
        """The whole split in memory, in file order."""
        return pa.concat_tables(self.read(RowRange(part.name, 0, part.rows), columns) for part in self.parts[split])

    def batches(self, split: str, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Arrays]:
        """The rank's share of the split in file order, in bounded memory: a row group and a batch.

        Shares are runs of consecutive rows, disjoint and complete over the ranks, and differ by one row at most. Every
        batch but the last is full.
        """
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank}, world_size {world_size}: out of range")
        start, stop = (self.counts[split] * place // world_size for place in (rank, rank + 1))
        first = 0  # row of the split at which the row group begins
        pending: list[pa.Table] = []
        num_pending = 0
        for name, low, high in self.row_groups(split):
            begin, end = low + max(start - first, 0), min(high, low + stop - first)
            first += high - low
            if begin >= end:
                continue
            pending.append(self.read(RowRange(name, begin, end), ["image", "label", "index"]))
            num_pending += end - begin
            if num_pending >= batch_size:
                ready = pa.concat_tables(pending)
                full = num_pending - num_pending % batch_size
                for offset in range(0, full, batch_size):
                    yield to_arrays(ready.slice(offset, batch_size))
                pending, num_pending = [ready.slice(full)], num_pending - full
        if num_pending:
            yield to_arrays(pa.concat_tables(pending))

    def row_groups(self, split: str) -> list[RowRange]:
        """The split's row groups in order: what can be read at a time without waste. Opens no file."""
        return [
            RowRange(part.name, start, min(start + self.group_rows, part.rows))
            for part in self.parts[split]
            for start in range(0, part.rows, self.group_rows)
        ]

    def read(self, rows: RowRange, columns: list[str] | None = None) -> pa.Table:
        """These rows of one part; reads the row groups that hold them."""
        files, root = filesystem(self.path)
        first = rows.start // self.group_rows
        groups = range(first, -(-rows.stop // self.group_rows))
        # Not pq.read_table, which imports pyarrow.dataset (0.3 s).
        with files.open_input_file(f"{root}/{rows.name}") as source, pq.ParquetFile(source) as file:
            table = file.read_row_groups(list(groups), columns=columns)
        return table.slice(rows.start - first * self.group_rows, rows.stop - rows.start)


def to_arrays(table: pa.Table) -> Arrays:
    """The columns `image`, `label` and `index` as arrays; without a copy where the table is one chunk."""
    column = table.column("image")
    width = column.type.byte_width
    side = math.isqrt(width // 3)
    chunks = []
    for chunk in column.chunks:
        pixels = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width :][: len(chunk) * width]
        chunks.append(pixels.reshape(-1, side, side, 3))
    images = chunks[0] if len(chunks) == 1 else np.concatenate([np.empty((0, side, side, 3), np.uint8), *chunks])
    return Arrays(images, table.column("label").to_numpy(), table.column("index").to_numpy())


def absolute(path: str) -> str:
    """A path that means the same in every process, whatever its working folder; URIs already do.

    The working folder of `ray job submit` is a copy that Ray deletes. A relative path that is not in it is one of
    $CIFAR_STORAGE, a folder or URI, or of ~/cifar.
    """
    if "://" in path:
        return path
    path = os.path.expanduser(path)
    if UPLOADED in os.getcwd() and not os.path.isabs(path) and not os.path.exists(path):
        return join(absolute(os.environ.get("CIFAR_STORAGE") or "~/cifar"), os.path.normpath(path))
    return os.path.abspath(path)


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The file system that holds a path or URI, and the path within it."""
    if "://" not in path:
        return fs.LocalFileSystem(), absolute(path)
    try:
        files, root = open_store(path)
    except StorageFailed:
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ConfigError(f"{path}: cannot be opened ({error}); use a path or an s3:// or gs:// URI") from error
    return files, root.rstrip("/")


def join(path: str, name: str) -> str:
    """`name` under a path or URI; the query of a URI, such as ?endpoint_override=, stays at the end."""
    base, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def parent(path: str) -> str:
    """The folder that holds a path or URI."""
    path = absolute(path)
    base, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return f"{base.rstrip('/').rpartition('/')[0]}{mark}{query}"


def exists(path: str) -> bool:
    """Is there a file or folder of this path or URI? ConfigError if its storage does not say."""
    files, root = filesystem(path)
    try:
        return files.get_file_info(root).type != fs.FileType.NotFound
    except StorageFailed:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}); check its address and your access") from error


def read_file(path: str) -> bytes | None:
    """A small file; None if there is none."""
    files, source = filesystem(path)
    try:
        with files.open_input_stream(source) as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_object(path: str, remedy: str) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file. ConfigError with the remedy if it holds anything else."""
    data = read_file(path)
    if data is None:
        return None
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: damaged (no object, but {type(values).__name__}); {remedy}")
    return values


def write_file(path: str, data: bytes) -> None:
    """Write a small file so that no reader sees half of it."""
    files, target = filesystem(path)
    # Object stores show a file when it is closed, and need no folders; locally the rename shows it.
    local = isinstance(files, fs.LocalFileSystem)
    temporary = f"{target}.{uuid.uuid4().hex}.tmp" if local else target
    if local:
        files.create_dir(os.path.dirname(target))
    try:
        with files.open_output_stream(temporary) as stream:
            stream.write(data)
        if local:
            files.move(temporary, target)
    except OSError:
        if local and exists(temporary):
            files.delete_file(temporary)
        raise
