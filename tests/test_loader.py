"""Both loaders give every row once an epoch, in an order that only (seed, epoch, rank, workers) decide."""

from collections.abc import Generator, Iterable

import numpy as np
import pyarrow as pa
import pytest
import torch

from cifar.augment import augment
from cifar.config import AugmentConfig, Config, ConfigError
from cifar.data import Prepared, loader
from cifar.data.loader import Batch, Loader, ResidentLoader, StreamingLoader, in_batches, read_stream
from cifar.data.prepared import RowRange, to_arrays
from cifar.data.shares import share
from cifar.data.stream import augment_table

COLUMNS = ["image", "label", "index"]


def make(
    prepared: Prepared, kind: str, rank: int = 0, world_size: int = 1, batch_size: int = 44, micro_batches: int = 1
) -> Loader:
    common = {
        "batch_size": batch_size,
        "seed": 3,
        "rank": rank,
        "world_size": world_size,
        "device": torch.device("cpu"),
    }
    if kind == "streaming":
        return StreamingLoader(prepared, read_stream(prepared), epochs=5, **common)
    total = prepared.counts["train"]
    start, stop = share(total, rank, world_size, micro_batches)
    table = prepared.table("train", COLUMNS).slice(start, stop - start)
    return ResidentLoader(table, total=total, micro_batches=micro_batches, **common)


def indices(batches: Iterable[Batch]) -> list[int]:
    return [index for batch in batches for index in batch.indices.tolist()]


def split_finely(prepared: Prepared, split: str) -> list[RowRange]:
    """Row groups of 30 rows."""
    (part,) = prepared.parts[split]
    return [RowRange(part.name, start, min(start + 30, part.rows)) for start in range(0, part.rows, 30)]


kinds = pytest.mark.parametrize("kind", ["resident", "streaming"])


@kinds
def test_an_epoch_has_every_row_once_with_its_own_image_and_label(prepared: Prepared, kind: str) -> None:
    arrays = to_arrays(prepared.table("train", COLUMNS))
    row_of = {index: row for row, index in enumerate(arrays.indices.tolist())}
    loader = make(prepared, kind)
    seen = []
    for batch in loader.epoch(0):
        assert batch.images.shape == (44, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for image, label, index in zip(*batch[:3], strict=True):
            row = row_of[int(index)]
            assert label == arrays.labels[row]
            assert (image.permute(1, 2, 0).numpy() == arrays.images[row]).all()
            seen.append(int(index))
    assert sorted(seen) == sorted(row_of)


@kinds
def test_the_order_changes_with_the_epoch_and_repeats_with_the_seed(prepared: Prepared, kind: str) -> None:
    first, again = make(prepared, kind), make(prepared, kind)
    orders = [indices(first.epoch(epoch)) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert [indices(again.epoch(epoch)) for epoch in range(3)] == orders


@kinds
def test_starting_in_the_middle_gives_the_rest(prepared: Prepared, kind: str) -> None:
    whole = indices(make(prepared, kind).epoch(2))
    assert indices(make(prepared, kind).epoch(2, start=4)) == whole[4 * 44 :]


def test_an_epoch_of_chosen_images_has_no_others(prepared: Prepared) -> None:
    """In the order that the whole epoch has them in, in full batches alone."""
    wanted = {index for index in indices(make(prepared, "resident").epoch(2)) if index % 3}

    def choose(found: torch.Tensor) -> torch.Tensor:
        return found % 3 > 0

    whole = [index for index in indices(make(prepared, "resident").epoch(2)) if index in wanted]
    chosen = list(make(prepared, "resident").epoch(2, choose=choose))
    assert [len(batch.labels) for batch in chosen] == [44] * (len(wanted) // 44)
    assert indices(chosen) == whole[: len(wanted) // 44 * 44]
    assert indices(make(prepared, "resident").epoch(2, 3, choose)) == indices(chosen)[3 * 44 :]


@kinds
def test_workers_get_equal_disjoint_shares(prepared: Prepared, kind: str) -> None:
    shares = [make(prepared, kind, rank, 2) for rank in range(2)]
    seen = [indices(loader.epoch(1)) for loader in shares]
    assert len(seen[0]) == len(seen[1]) == 198
    assert len({*seen[0], *seen[1]}) == 396


@kinds
def test_a_batch_larger_than_the_data_is_refused(prepared: Prepared, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"--batch-size 400.*396 images.*--batch-size 396"):
        make(prepared, kind, batch_size=400)


def test_streaming_mixes_rows_of_different_groups(prepared: Prepared) -> None:
    """With a window as large as the set, neighbours in the file do not stay neighbours."""
    order = torch.tensor(indices(make(prepared, "streaming").epoch(0)))
    assert (order.diff().abs() == 1).float().mean() < 0.05


def test_streaming_with_a_small_window_gives_full_batches_and_every_row(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for large images, of which few fit the window; and with many streams to an epoch, as for large sets."""
    monkeypatch.setattr(loader, "SHUFFLE_BYTES", 1)
    monkeypatch.setattr(loader, "STREAM_BYTES", 70 * 3 * 16**2)
    monkeypatch.setattr(Prepared, "row_groups", split_finely)
    for batch_size in (44, 132, 396):
        found = make(prepared, "streaming", batch_size=batch_size)
        for epoch in range(2):
            batches = list(found.epoch(epoch))
            assert [len(batch.labels) for batch in batches] == [batch_size] * (396 // batch_size)
            assert len(set(indices(batches))) == 396


def test_a_stream_left_early_starts_afresh(prepared: Prepared) -> None:
    loader = make(prepared, "streaming")
    whole = indices(make(prepared, "streaming").epoch(1))
    next(iter(loader.epoch(0)))
    assert indices(loader.epoch(1)) == whole


def test_close_ends_the_stream_in_use_and_the_one_opened_ahead(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "STREAM_BYTES", 70 * 3 * 16**2)
    monkeypatch.setattr(Prepared, "row_groups", split_finely)
    read, opened, closed = read_stream(prepared), [], []

    def open_stream(ahead: list[tuple[int, RowRange]]) -> Generator[pa.Table]:
        opened.append(ahead)
        try:
            yield from read(ahead)
        finally:
            closed.append(ahead)

    found = StreamingLoader(
        prepared, open_stream, epochs=5, batch_size=44, seed=3, rank=0, world_size=1, device=torch.device("cpu")
    )
    next(iter(found.epoch(0)))
    found.close()
    assert len(opened) >= 2
    assert sorted(opened) == sorted(closed)


def test_evaluation_batches_hold_every_row_in_order(prepared: Prepared) -> None:
    table = prepared.table("val", COLUMNS)
    assert [i for batch in in_batches(table) for i in batch.indices] == table.column("index").to_pylist()


def test_augmented_by_the_data_stage_or_by_the_worker_is_the_same(prepared: Prepared, config: Config) -> None:
    every = AugmentConfig(cutout=4, rotate=10, shift=0.1, shear=5, zoom=0.1, policy="trivial")
    table = prepared.table("train", COLUMNS).slice(3, 50)
    changed = to_arrays(augment_table(table, every, seed=7, epoch=2))
    for batch in make(prepared, "resident").epoch(2):
        expected = augment(batch.images, batch.indices, every, seed=7, epoch=2)
        for image, index in zip(expected, batch.indices.tolist(), strict=True):
            (rows,) = (changed.indices == index).nonzero()
            for row in rows:
                assert (image.permute(1, 2, 0).numpy() == changed.images[row]).all()


@pytest.mark.parametrize("fewer", [False, True])
def test_workers_take_the_micro_batches_of_one_worker(prepared: Prepared, fewer: bool) -> None:
    """Also where an epoch leaves images out."""

    def choose(of: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros(len(of), dtype=torch.bool)
        chosen[(of % 7).argsort(stable=True)[:50]] = True
        return chosen

    def micro_batches(workers: int) -> list[list[list[int]]]:
        parts = 4 // workers
        loaders = [make(prepared, "resident", rank, workers, micro_batches=parts) for rank in range(workers)]
        epochs = [list(loader.epoch(1, 1, choose if fewer else None)) for loader in loaders]
        batches = [torch.cat([batch.indices for batch in step]) for step in zip(*epochs, strict=True)]
        return [batch.view(4, 11).tolist() for batch in batches]

    assert len(micro_batches(1)) == (50 // 11 if fewer else 9) - 1
    assert micro_batches(1) == micro_batches(2) == micro_batches(4)


def test_a_loader_of_some_rows_gives_these_alone(prepared: Prepared) -> None:
    """A fold of cross-validation, whose images lie among the others'."""
    table = prepared.table("train", COLUMNS)
    rows = np.arange(0, len(table), 3)
    common = {"batch_size": 44, "seed": 3, "rank": 0, "world_size": 1, "device": torch.device("cpu")}
    loader = ResidentLoader(table, total=len(rows), rows=rows, **common)
    arrays = to_arrays(table)
    assert loader.num_batches == 3
    for batch in loader.epoch(1):
        for image, label, index in zip(*batch[:3], strict=True):
            (row,) = np.flatnonzero(arrays.indices == int(index))
            assert row % 3 == 0
            assert label == arrays.labels[row]
            assert torch.equal(image, torch.tensor(arrays.images[row]).permute(2, 0, 1))
    assert torch.equal(loader.sample(2), torch.tensor(arrays.images[[0, 3]]).permute(0, 3, 1, 2))
    found = list(in_batches(table, rows))
    assert np.array_equal(np.concatenate([batch.labels for batch in found]), arrays.labels[rows])


def test_images_in_memory_are_not_copied(prepared: Prepared) -> None:
    """Many trials of a sweep map one block of the object store."""
    table = prepared.table("train", COLUMNS).combine_chunks()
    loader = ResidentLoader(
        table, total=len(table), batch_size=44, seed=3, rank=0, world_size=1, device=torch.device("cpu")
    )
    chunk = table.column("image").chunk(0)
    assert loader._images.data_ptr() == chunk.buffers()[1].address + chunk.offset * chunk.type.byte_width
