"""What `--input` names: its rows, their labels as far as the model knows them, and the parts they fall into."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cifar.config import ConfigError, DataConfig, Resize
from cifar.data.prepared import absolute, filesystem
from cifar.data.read import Piece
from cifar.data.rows import agreed, class_names, encode_labels, find_image_column, find_label_column
from cifar.data.sources import SPLIT_FOLDERS, Source, folder, single_file

_PART_ROWS = 4096
_MIN_PART_ROWS = 256
_PART_HELD_BYTES = 64 << 20
_PART_ENCODED_BYTES = 64 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part(Piece):
    """The rows of one file of predictions."""

    labels: np.ndarray | None
    """int32 (N,): class of the model, or -1; None where the source has no labels."""
    image_size: int
    resize: Resize


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The rows of a source, without their images."""

    source: Source
    counts: list[int]
    """Of each file."""
    columns: list[str | None]
    """Of each file the image column; None for an image."""
    labels: np.ndarray | None
    """int32 (N,): class of the model, or -1 where the row has none; None where the source has no labels."""

    @property
    def total(self) -> int:
        return sum(self.counts)


def is_picture(path: str) -> bool:
    """Is it one file that is no Parquet file? ConfigError if there is nothing."""
    files, root = filesystem(path)
    try:
        kind = files.get_file_info(root).type
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be looked up: {error}") from error
    if kind not in (fs.FileType.File, fs.FileType.Directory):
        raise ConfigError(f"--input {path}: does not exist; name an image, a folder or a Parquet path")
    return kind == fs.FileType.File and not root.endswith(".parquet")


def list_rows(path: str, classes: tuple[str, ...], label: str = "") -> Listing:
    """The rows of a folder or of a Parquet file, for a model of these classes. Reads no image.

    `label` is the column that holds them, where the model was trained on one of that name; empty: as in training.
    """
    where = absolute(path)
    files, root = filesystem(where)
    try:
        info = files.get_file_info(root)
        source = single_file(path, where, info) if info.type == fs.FileType.File else folder(path, where)
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be listed: {error}") from error
    listing = _parquet_rows(source, classes, label) if source.parquet else _image_rows(source, classes)
    if not listing.total:
        raise ConfigError(f"--input {path}: holds no images; name a folder of images, or Parquet files")
    return listing


def _image_rows(source: Source, classes: tuple[str, ...]) -> Listing:
    names = [_class_folder(file.name, classes) for file in source.files]
    labels = _positions(names, classes, source.name) if any(names) else None
    return Listing(source=source, counts=[1] * len(names), columns=[None] * len(names), labels=labels)


def _class_folder(name: str, classes: tuple[str, ...]) -> str | None:
    """The first folder of a file's path, after that of its split."""
    folders = name.split("/")[:-1]
    if folders and folders[0].lower() in SPLIT_FOLDERS and folders[0] not in classes:
        folders = folders[1:]
    return folders[0] if folders else None


def _positions(names: list[str | None], classes: tuple[str, ...], where: str) -> np.ndarray | None:
    unknown = sorted({name for name in names if name is not None} - set(classes))
    if unknown:
        _say_unlabelled(where, "its folders", unknown[0])
        return None
    position: dict[str | None, int] = {name: place for place, name in enumerate(classes)} | {None: -1}
    return np.array([position[name] for name in names], np.int32)


def _parquet_rows(source: Source, classes: tuple[str, ...], label_column: str) -> Listing:
    files, root = filesystem(source.path)
    counts: list[int] = []
    columns: list[str | None] = []
    codes: list[np.ndarray] = []
    names: list[str] | None = None
    uniques: dict[Any, int] = {}
    for file in source.files:
        where = f"--input {source.name}: {file.name}"
        try:
            with files.open_input_file(f"{root}/{file.name}") as stream, pq.ParquetFile(stream) as parquet:
                schema, count = parquet.schema_arrow, parquet.metadata.num_rows
                columns.append(find_image_column(schema, where))
                label = find_label_column(schema, label_column) or find_label_column(schema, "")
                if label is None or not _can_label(schema.field(label).type):
                    codes.append(np.full(count, -1))
                else:
                    names = agreed(names, class_names(schema, label), where)
                    codes.append(encode_labels(parquet.read([label]).column(0), uniques, where))
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{where}: not a readable Parquet file: {error}") from error
        counts.append(count)
    table = _class_of(list(uniques), names, classes, source.name)
    # The last entry serves code -1.
    labels = None if table is None else np.array([*table, -1], np.int32)[np.concatenate(codes)]
    return Listing(source=source, counts=counts, columns=columns, labels=labels)


def _can_label(kind: pa.DataType) -> bool:
    """A column `label` of another type means something else."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    return any(check(kind) for check in checks)


def _class_of(values: list[Any], names: list[str] | None, classes: tuple[str, ...], where: str) -> list[int] | None:
    """The model's class of each distinct label, -1 for none; None if there is no label or one that is no class.

    An integer is a place in the source's class names; without these it is a class's name if all are, else a place in
    the model's classes.
    """
    position = {one: place for place, one in enumerate(classes)}

    def name(value: Any) -> str:
        return names[value] if names and isinstance(value, int) and value < len(names) else str(value)

    known = [value for value in values if isinstance(value, str) or value >= 0]  # the hub's sets give -1 for unknown
    unknown = [value for value in known if name(value) not in position]
    if unknown and names is None and all(isinstance(value, int) and value < len(classes) for value in known):
        return [max(value, -1) for value in values]
    if unknown:
        _say_unlabelled(where, "its labels", name(unknown[0]))
    return [position.get(name(value), -1) for value in values] if known and not unknown else None


def _say_unlabelled(where: str, what: str, unknown: str) -> None:
    logger.warning("--input %s: %s are not the model's classes (%s is none): not evaluated", where, what, unknown)


def plan_parts(listing: Listing, config: DataConfig, num_classes: int) -> list[Part]:
    """The work in parts. Depends on the listing and the shape of the model alone: so do the files of predictions."""
    held_bytes = config.image_size**2 * 3 + num_classes * 4
    return [
        Part(
            number=number,
            source=listing.source.path,
            names=names,
            column=column,
            first=first,
            row_bytes=row_bytes,
            indices=indices,
            labels=None if listing.labels is None else listing.labels[indices],
            image_size=config.image_size,
            resize=config.resize,
        )
        for number, (names, column, first, row_bytes, indices) in enumerate(_pieces(listing, held_bytes))
    ]


def _pieces(listing: Listing, held_bytes: int) -> Iterator[tuple[list[str], str | None, int, int, np.ndarray]]:
    files = listing.source.files
    if not listing.source.parquet:
        row_bytes = 1 + sum(file.size for file in files) // len(files)
        for indices in _cut(len(files), held_bytes, row_bytes):
            yield [files[row].name for row in indices], None, 0, row_bytes, indices
        return
    start = 0
    for file, count, column in zip(files, listing.counts, listing.columns, strict=True):
        row_bytes = 1 + file.size // max(1, count)
        for places in _cut(count, held_bytes, row_bytes):
            yield [file.name], column, int(places[0]), row_bytes, start + places
        start += count


def _cut(count: int, held_bytes: int, row_bytes: int) -> list[np.ndarray]:
    """0 to count - 1 in runs of about equal length, each of bounded size as files, and as pixels and answers."""
    size = max(
        16, min(_PART_ROWS, _PART_HELD_BYTES // held_bytes, max(_MIN_PART_ROWS, _PART_ENCODED_BYTES // row_bytes))
    )
    return np.array_split(np.arange(count), -(-count // size)) if count else []


def inside(path: str, folder: str) -> bool:
    """Does a local path lie in a local folder, or is it that?"""
    if "://" in path or "://" in folder:
        return False
    first, other = os.path.realpath(absolute(path)), os.path.realpath(absolute(folder))
    return os.path.commonpath([first, other]) == other
