"""A named source becomes a prepared set in the cache, once."""

import hashlib
import logging
import math
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cifar.config import ConfigError, DataConfig
from cifar.data.convert import BadRow, Summary, group_rows
from cifar.data.execute import convert
from cifar.data.named import cache_folder
from cifar.data.prepared import (
    FORMAT_VERSION,
    QUARANTINE,
    SPLITS,
    Prepared,
    Quarantined,
    RowRange,
    filesystem,
    join,
    read_file,
    write_file,
)
from cifar.data.remote import StorageFailed
from cifar.data.rows import Rows, plan_chunks, read_rows
from cifar.data.sources import Source, content_key, find, listing_key
from cifar.data.splits import TEST, TRAIN

_NAMED_BAD_ROWS = 5
_NAMED_SHAPES = 20
_NAMED_PAIRS = 20
_PROGRESS_SECONDS = 5
_STALE_SECONDS = 24 * 3600

logger = logging.getLogger(__name__)


class _ClassLost(ConfigError):
    """All images of a class in a split are bad; elsewhere there may be good ones."""

    def __init__(self, message: str, bad: list[BadRow]) -> None:
        super().__init__(message)
        self.bad = [row.number for row in bad]


def prepare(config: DataConfig, start_ray: Callable[[], object] = lambda: None) -> Prepared:
    """The prepared set of `config.data`: from the cache, or made now.

    Large sets are converted by Ray Data, after a call of `start_ray`.

    Bad rows are quarantined; ConfigError if their share is above `config.max_bad`, or if the source is unusable. The
    cache is $CIFAR_CACHE, a folder or URI that every node must see, or ~/.cache/cifar.
    """
    source = find(config.data)
    try:
        prepared = _cached_or_made(source, config, start_ray)
        if prepared.quarantined:
            total = sum(prepared.counts.values()) + prepared.quarantined
            _check_bad(prepared.quarantine(), prepared.quarantined, total, config)
            where = join(prepared.path, QUARANTINE)
            logger.warning("%d of %d rows are bad and left out, see %s", prepared.quarantined, total, where)
    except StorageFailed:
        raise
    except OSError as error:
        raise ConfigError(f"$CIFAR_CACHE {cache_folder()}: {error}; name a folder with room to write") from error
    return replace(prepared, source=source.name)


def _cached_or_made(source: Source, config: DataConfig, start_ray: Callable[[], object]) -> Prepared:
    # What is known of a listing spares reading the files again to fingerprint their content.
    listing = join(cache_folder(), f"known/{_key(listing_key(source), source, config)}")
    known = (read_file(listing) or b"").decode()
    prepared = _load(_set_path(known)) if known else None
    if prepared is None:
        fingerprint = _key(content_key(source), source, config)
        prepared = _load(_set_path(fingerprint)) or _make(source, config, fingerprint, start_ray)
        write_file(listing, fingerprint.encode())
    return prepared


def _key(content: str, source: Source, config: DataConfig) -> str:
    """The fields of DataConfig that shape rows; not max_bad, which only decides whether they are accepted."""
    shape = config.image_size, config.resize, config.val_fraction, config.test_fraction, config.split_seed
    shape += (config.label,) if config.label else ()
    return hashlib.blake2b(repr((content, source.single, shape, FORMAT_VERSION)).encode(), digest_size=16).hexdigest()


def _set_path(fingerprint: str) -> str:
    return join(cache_folder(), f"prepared/{fingerprint}")


def _load(path: str) -> Prepared | None:
    try:
        return Prepared.load(path)
    except ConfigError:
        return None


def _make(source: Source, config: DataConfig, fingerprint: str, start_ray: Callable[[], object]) -> Prepared:
    rows = read_rows(source, config)
    train_labels = rows.labels[rows.splits == TRAIN]
    if source.parquet and (np.diff(train_labels) >= 0).all():
        logger.warning(
            "--data %s: rows come sorted by class; a streamed run, and one of several workers or with --accumulate, "
            "learns better from shuffled files",
            source.name,
        )
    try:
        return _make_of(rows, config, fingerprint, start_ray)
    except _ClassLost as lost:
        logger.warning("%s: cutting again without the bad rows", str(lost).partition(";")[0])
        return _make_of(read_rows(source, config, lost.bad), config, fingerprint, start_ray)


def _make_of(rows: Rows, config: DataConfig, fingerprint: str, start_ray: Callable[[], object]) -> Prepared:
    with _new_folder(_set_path(fingerprint)) as folder:
        summaries = _convert_all(rows, config, folder, start_ray)
        bad = sorted(row for summary in summaries for row in summary.bad)
        _write_quarantine(join(folder, QUARANTINE), bad, rows)
        prepared = _merge(summaries, rows, config, folder, fingerprint, bad)
        prepared = replace(prepared, duplicates=_duplicates(summaries, prepared))
        prepared.save()
    return replace(prepared, path=_set_path(fingerprint))


@contextmanager
def _new_folder(path: str) -> Iterator[str]:
    """A folder to fill, which becomes `path` at the end and vanishes on an error.

    Object stores know no renames: there it is `path` from the start, and nobody reads it before its manifest.
    """
    files, target = filesystem(path)
    local = isinstance(files, fs.LocalFileSystem)
    folder = f"{os.path.dirname(target)}/.building-{uuid.uuid4().hex}" if local else path
    if local:
        _remove_stale(os.path.dirname(target))
        for split in SPLITS:
            os.makedirs(f"{folder}/{split}")
    try:
        yield folder
        if local and _load(path):  # another process was faster, and its readers may be at work
            shutil.rmtree(folder)
        elif local:
            shutil.rmtree(target, ignore_errors=True)
            os.rename(folder, target)
    except BaseException:
        if local:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            files.delete_dir_contents(target, missing_dir_ok=True)
        raise


def _remove_stale(parent: str) -> None:
    """What killed processes left behind."""
    if os.path.isdir(parent):
        for entry in os.scandir(parent):
            if entry.name.startswith(".building-") and entry.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(entry.path, ignore_errors=True)


def _convert_all(rows: Rows, config: DataConfig, folder: str, start_ray: Callable[[], object]) -> list[Summary]:
    summaries: list[Summary] = []
    total, done = len(rows.labels), 0
    bad: list[BadRow] = []
    last_said = time.monotonic()
    with closing(convert(plan_chunks(rows, config, folder), start_ray)) as converted:
        for summary in converted:
            summaries.append(summary)
            done += summary.rows
            bad += summary.bad
            if len(bad) > config.max_bad * total:
                _check_bad(sorted(bad), len(bad), total, config, at_least=done < total)
            if time.monotonic() - last_said > _PROGRESS_SECONDS:
                last_said = time.monotonic()
                logger.info("prepared %d of %d rows", done, total)
    return sorted(summaries, key=lambda summary: summary.number)


def _check_bad(
    bad: Sequence[BadRow | Quarantined], count: int, total: int, config: DataConfig, at_least: bool = False
) -> None:
    if count <= config.max_bad * total:
        return
    first = "; ".join(
        f"{row.path if row.path.endswith(row.id) else row.id}: {row.reason}" for row in bad[:_NAMED_BAD_ROWS]
    )
    raise ConfigError(
        f"--max-bad {config.max_bad}: {'at least ' * at_least}{count} of {total} rows of --data {config.data} are bad "
        f"({first}{'; ...' * (count > _NAMED_BAD_ROWS)}); mend them or allow more with --max-bad"
    )


def _write_quarantine(path: str, bad: list[BadRow], rows: Rows) -> None:
    columns = {
        "id": [row.id for row in bad],
        "path": [row.path for row in bad],
        "label": [rows.label_name(row.number) for row in bad],
        "reason": [row.reason for row in bad],
    }
    schema = pa.schema({name: pa.string() for name in columns})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema), sink)
    write_file(path, sink.getvalue().to_pybytes())


def _merge(
    summaries: list[Summary], rows: Rows, config: DataConfig, folder: str, fingerprint: str, bad: list[BadRow]
) -> Prepared:
    class_counts = np.zeros((len(SPLITS), len(rows.classes)), np.int64)
    parts = {name: [] for name in SPLITS}
    pixel_sum, pixel_square_sum = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for summary in summaries:
        for split, found in summary.splits.items():
            parts[SPLITS[split]].append(found.part)
            class_counts[split, : len(found.class_rows)] += found.class_rows
            if split == TRAIN:
                pixel_sum += found.pixel_sum
                pixel_square_sum += found.pixel_square_sum
    counts = class_counts.sum(axis=1)
    for name, count in zip(SPLITS, counts.tolist(), strict=True):
        if not count:
            raise ConfigError(f"--data {config.data}: no readable image in {name}; give more images")
    _check_classes(class_counts, rows, config, bad)
    pixels = int(counts[TRAIN]) * config.image_size**2
    # Exact integers: the usual cancellation of a square mean minus a squared mean does not occur.
    variances = [(int(q) * pixels - int(s) ** 2) / pixels**2 for s, q in zip(pixel_sum, pixel_square_sum, strict=True)]
    mean, std = [int(s) / pixels for s in pixel_sum], [math.sqrt(variance) for variance in variances]
    return Prepared(
        path=folder,
        fingerprint=fingerprint,
        classes=rows.classes,
        image_size=config.image_size,
        counts=dict(zip(SPLITS, counts.tolist(), strict=True)),
        class_counts=dict(zip(SPLITS, class_counts.tolist(), strict=True)),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        quarantined=len(bad),
        source=rows.source.name,
        parts=parts,
        group_rows=group_rows(config.image_size),
        duplicates={},
        source_stats=_source_stats(summaries),
    )


def _check_classes(class_counts: np.ndarray, rows: Rows, config: DataConfig, bad: list[BadRow]) -> None:
    """A class whose few images in a split are all bad would go unnoticed there."""
    for code, name in enumerate(SPLITS):
        labels = rows.labels[(rows.splits == code) & (rows.labels >= 0)]
        given = np.bincount(labels, minlength=len(rows.classes))
        for label in np.flatnonzero((given > 0) & (class_counts[code] == 0)):
            files = ", ".join(row.id for row in bad if rows.labels[row.number] == label)
            raise _ClassLost(
                f"--data {config.data}: none of the images of {rows.classes[label]} in {name} is readable ({files}); "
                f"mend them, add others, or leave the class out",
                bad,
            )


def _source_stats(summaries: Iterable[Summary]) -> dict[str, Any]:
    shapes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    ranges = []
    for summary in summaries:
        shapes.update(summary.shapes)
        modes.update(summary.modes)
        ranges += [summary.splits[TRAIN].value_range] if TRAIN in summary.splits else []
    sides, counts = zip(*sorted((min(shape), count) for shape, count in shapes.items()), strict=True)
    middle = int(np.searchsorted(np.cumsum(counts), (shapes.total() + 1) // 2))
    return {
        "shapes": [[width, height, count] for (width, height), count in shapes.most_common(_NAMED_SHAPES)],
        "num_shapes": len(shapes),
        "short_sides": [sides[0], sides[middle], sides[-1]],
        "modes": dict(modes.most_common()),
        "value_range": [min(low for low, _ in ranges), max(high for _, high in ranges)],
    }


def _duplicates(summaries: list[Summary], prepared: Prepared) -> dict[str, Any]:
    """Rows with the same pixels, by a 64-bit hash: 2 million rows fit 16 MB, one false pair is expected in 10 million
    such sets."""

    def hashes(split: int) -> np.ndarray:
        return np.concatenate([summary.splits[split].hashes for summary in summaries if split in summary.splits])

    train, test = hashes(TRAIN), hashes(TEST)
    unique, first = np.unique(train, return_index=True)
    again = np.setdiff1d(np.arange(len(train)), first, assume_unique=True)
    place = np.minimum(np.searchsorted(unique, test), len(unique) - 1)
    leaked = np.flatnonzero(unique[place] == test)
    again_of = first[np.searchsorted(unique, train[again])]
    pairs = [
        [_row_id(prepared, "train", one), _row_id(prepared, split, other)]
        for split, ones, others in (("test", first[place[leaked]], leaked), ("train", again_of, again))
        for one, other in zip(ones[:_NAMED_PAIRS].tolist(), others[:_NAMED_PAIRS].tolist(), strict=True)
    ]
    return {
        "train_test": len(leaked),
        "within_train": len(again),
        "pairs": pairs[:_NAMED_PAIRS],
    }


def _row_id(prepared: Prepared, split: str, row: int) -> str:
    """Read back from the part files: the ids of millions of rows would not fit the driver comfortably."""
    for part in prepared.parts[split]:
        if row < part.rows:
            return prepared.read(RowRange(part.name, row, row + 1), ["id"]).column("id")[0].as_py()
        row -= part.rows
    raise IndexError(row)
