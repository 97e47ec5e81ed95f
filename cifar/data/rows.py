"""The rows of a source before any image is read: their labels, classes and splits, and the chunks they fall into."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar.config import ConfigError, DataConfig
from cifar.data.convert import MISSING, OUT_OF_RANGE, Chunk
from cifar.data.prepared import filesystem
from cifar.data.sources import SPLIT_FOLDERS, Source, parquet_split
from cifar.data.splits import TRAIN, cut_missing

_IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
_MAX_CLASSES = 100_000
_CHUNK_ROWS = 8192
_CHUNK_PIXEL_BYTES = 64 << 20
_CHUNK_ENCODED_BYTES = 128 << 20
_MIN_CHUNK_ROWS = 256
_MAX_CHUNK_ROWS = 49_152

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FileRows:
    rows: int
    column: str
    largest_group: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    source: Source
    classes: tuple[str, ...]
    labels: np.ndarray
    """int32 (N,): class, or MISSING or OUT_OF_RANGE."""
    splits: np.ndarray
    """int8 (N,), codes of cifar.data.splits."""
    odd_labels: dict[int, str]
    """By row number, the labels that are out of range."""
    files: list[FileRows]
    """Of a Parquet source, beside source.files."""

    def label_name(self, row: int) -> str | None:
        """What the source gives as the row's label."""
        label = int(self.labels[row])
        return self.classes[label] if label >= 0 else self.odd_labels.get(row)


def read_rows(source: Source, config: DataConfig, bad: Sequence[int] = ()) -> Rows:
    """Labels and splits of all rows; of a Parquet source only footers and label columns are read.

    The rows `bad`, whose images are known to be unreadable, are not cut for val or test.
    """
    values, splits, names, files = _parquet_labels(source, config.label) if source.parquet else _folder_labels(source)
    if not (splits == TRAIN).any():
        raise ConfigError(f"--data {source.name}: no training images; give class folders, or a train split")
    codes, uniques = values
    in_train = [uniques[code] for code in np.unique(codes[(splits == TRAIN) & (codes >= 0)])]
    if names is None:
        known = sorted(value for value in in_train if isinstance(value, str) or value >= 0)
        classes = tuple(str(value) for value in known)
    else:
        by_name = any(isinstance(value, str) for value in uniques)
        known, classes = (names if by_name else list(range(len(names)))), tuple(names)
    if len(known) < 2:
        raise ConfigError(f"--data {source.name}: {len(known)} classes with training images; at least two are needed")
    position = {value: label for label, value in enumerate(known)}
    # The last entry serves code -1.
    table = np.array([*(position.get(value, OUT_OF_RANGE) for value in uniques), MISSING], np.int32)
    labels = table[codes]
    odd = {int(row): str(uniques[codes[row]]) for row in np.flatnonzero(labels == OUT_OF_RANGE)}
    readable = labels.copy()
    readable[list(bad)] = MISSING
    splits = cut_missing(splits, readable, config, classes)
    return Rows(source=source, classes=classes, labels=labels, splits=splits, odd_labels=odd, files=files)


Labels = tuple[tuple[np.ndarray, list[Any]], np.ndarray, list[str] | None, list[FileRows]]
"""(codes int64 (N,), the distinct values they point to; -1 is missing), splits int8 (N,), class names, files."""


def _folder_labels(source: Source) -> Labels:
    paths = [file.name.split("/") for file in source.files]
    by_split = any(len(path) > 2 and path[0].lower() == "train" for path in paths)
    if by_split:
        beside = sorted({path[0] for path in paths if path[0].lower() not in SPLIT_FOLDERS and len(path) > 1})
        if beside:
            raise ConfigError(
                f"--data {source.name}: {', '.join(beside)}: unknown beside train/; "
                f"folders are train, val and test, or a class each"
            )
    splits = np.array([SPLIT_FOLDERS.get(path[0].lower(), TRAIN) if by_split else TRAIN for path in paths], np.int8)
    depth = 1 if by_split else 0
    names = [path[depth] if len(path) > depth + 1 else None for path in paths]
    uniques = sorted({name for name in names if name is not None})
    if not uniques:
        raise ConfigError(
            f"--data {source.name}: no class folders with images; use CLASS/image.jpg or train/CLASS/image.jpg"
        )
    if len(uniques) > _MAX_CLASSES:
        raise ConfigError(f"--data {source.name}: more than {_MAX_CLASSES:,} class folders; give fewer classes")
    code = {name: place for place, name in enumerate(uniques)} | {None: -1}
    return (np.array([code[name] for name in names], np.int64), uniques), splits, None, []


def _parquet_labels(source: Source, label_column: str) -> Labels:
    filesystem_, root = filesystem(source.path)
    codes, splits, files = [], [], []
    names: list[str] | None = None
    uniques: dict[Any, int] = {}
    split_of = [parquet_split(source, file) for file in source.files]
    if None in split_of and any(split is not None for split in split_of):
        odd = source.files[split_of.index(None)].name
        raise ConfigError(f"--data {source.name}: {odd}: no split in its name; name it train-, val- or test-...")
    for file, split in zip(source.files, split_of, strict=True):
        where = f"--data {source.name}: {file.name}"
        try:
            with filesystem_.open_input_file(f"{root}/{file.name}") as stream, pq.ParquetFile(stream) as parquet:
                image, label = _columns(parquet.schema_arrow, label_column, where)
                names = agreed(names, class_names(parquet.schema_arrow, label), where)
                column = parquet.read([label]).column(0)
                groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{where}: not a readable Parquet file: {error}") from error
        codes.append(encode_labels(column, uniques, where))
        if max(len(uniques), len(names or ())) > _MAX_CLASSES:
            raise ConfigError(f"{where}: column {label} holds more than {_MAX_CLASSES:,} classes; are they labels?")
        splits.append(np.full(len(column), TRAIN if split is None else split, np.int8))
        files.append(FileRows(rows=len(column), column=image, largest_group=max(groups, default=0)))
    return (np.concatenate(codes), list(uniques)), np.concatenate(splits), names, files


def _columns(schema: pa.Schema, wanted: str, where: str) -> tuple[str, str]:
    image = find_image_column(schema, where)
    label = find_label_column(schema, wanted)
    if label is None:
        raise ConfigError(
            f"{where}: needs a column {wanted or LABEL_COLUMNS[0]} beside {image}; it has {', '.join(schema.names)}; "
            f"name the one with the classes by --label"
        )
    return image, label


def find_label_column(schema: pa.Schema, wanted: str) -> str | None:
    """The column `wanted`, or, if that is empty, the first of `LABEL_COLUMNS` that there is."""
    return next((name for name in ((wanted,) if wanted else LABEL_COLUMNS) if name in schema.names), None)


def find_image_column(schema: pa.Schema, where: str) -> str:
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise ConfigError(f"{where}: needs a column img or image; it has {', '.join(schema.names) or 'none'}")
    kind = schema.field(image).type
    binary = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(binary) or pa.types.is_large_binary(binary)):
        raise ConfigError(
            f"{where}: column {image} is {kind}; it must hold encoded images, as bytes or struct of bytes"
        )
    return image


def class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """As Hugging Face's datasets writes them into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] or None


def agreed(names: list[str] | None, found: list[str] | None, where: str) -> list[str] | None:
    """Class names of all files: labels are places in this one list. A file may leave it out."""
    if found is None:
        return names
    if len(set(found)) < len(found):
        name, _ = Counter(found).most_common(1)[0]
        raise ConfigError(f"{where}: two of its classes are named {name!r}; rename one")
    if names is not None and names != found:
        raise ConfigError(f"{where}: its class names are not those of the files before; make them alike")
    return found


def encode_labels(column: pa.ChunkedArray, uniques: dict[Any, int], where: str) -> np.ndarray:
    """Codes int64 (N,) into `uniques`, which grows; -1 for null and for the empty string."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    encoded = column.combine_chunks()
    encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
    kind = encoded.type.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ConfigError(f"{where}: column label is {kind}; it must be integers or strings")
    values = encoded.dictionary.to_pylist()
    if len({type(value) for value in (*values, *uniques)} - {type(None)}) > 1:
        raise ConfigError(f"{where}: its labels are {kind}, those of another file are not; make them alike")
    table = [-1 if value is None or value == "" else uniques.setdefault(value, len(uniques)) for value in values]
    return np.array([*table, -1], np.int64)[encoded.indices.fill_null(len(table)).to_numpy(zero_copy_only=False)]


def plan_chunks(rows: Rows, config: DataConfig, target: str) -> list[Chunk]:
    """The work in pieces. Depends on the source and the config alone, so that the part files do, too."""
    chunks = []
    for names, column, first, row_bytes, indices in _pieces(rows, config):
        chunk = Chunk(
            number=len(chunks),
            source=rows.source.path,
            names=names,
            column=column,
            first=first,
            row_bytes=row_bytes,
            indices=indices,
            labels=rows.labels[indices],
            splits=rows.splits[indices],
            target=target,
            image_size=config.image_size,
            resize=config.resize,
        )
        chunks.append(chunk)
    return chunks


def _pieces(rows: Rows, config: DataConfig) -> Iterator[tuple[list[str], str | None, int, int, np.ndarray]]:
    source = rows.source
    if not source.parquet:
        # Sorted by class on disk; a stream has to come shuffled.
        order = np.random.default_rng(config.split_seed).permutation(len(rows.labels))
        row_bytes = 1 + sum(file.size for file in source.files) // len(order)
        for indices in np.array_split(order, -(-len(order) // _chunk_rows(config, row_bytes))):
            yield [source.files[row].name for row in indices], None, 0, row_bytes, indices
        return
    start = 0
    for file, parquet in zip(source.files, rows.files, strict=True):
        row_bytes = 1 + file.size // max(1, parquet.rows)
        size = _chunk_rows(config, row_bytes)
        # A chunk in a huge row group reads what stands before it in the group, too: fewer, larger chunks.
        size = max(size, min(parquet.largest_group // 16, size * _MAX_CHUNK_ROWS // _CHUNK_ROWS))
        for part in np.array_split(np.arange(parquet.rows), -(-parquet.rows // size)) if parquet.rows else []:
            yield [file.name], parquet.column, int(part[0]), row_bytes, start + part
        start += parquet.rows


def _chunk_rows(config: DataConfig, row_bytes: int) -> int:
    """Rows of a chunk: a bounded size of its files and a bounded time to decode."""
    by_pixels = _CHUNK_PIXEL_BYTES // (config.image_size**2 * 3)
    return max(16, min(_CHUNK_ROWS, by_pixels, max(_MIN_CHUNK_ROWS, _CHUNK_ENCODED_BYTES // row_bytes)))
