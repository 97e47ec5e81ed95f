"""A prepared set can be read whole, by row group, and in disjoint shares."""

from pathlib import Path

import numpy as np
import pytest

import cifar.data.rows
from cifar.config import ConfigError, DataConfig
from cifar.data import Prepared, prepare
from cifar.data.prepared import RowRange, to_arrays
from tests.images import png


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """163 train rows in several parts of several row groups each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("set")
    pq.write_table(pa.table({"img": [png(row, 8) for row in range(201)], "label": [0, 1, 2] * 67}), root / "x.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_CACHE", str(root / "cache"))
        patch.setattr("cifar.data.convert.group_rows", lambda _: 7)
        patch.setattr("cifar.data.preparation.group_rows", lambda _: 7)
        patch.setattr(cifar.data.rows, "_CHUNK_ROWS", 32)
        patch.setattr(cifar.data.rows, "_MIN_CHUNK_ROWS", 32)
        return prepare(DataConfig(data=str(root / "x.parquet"), image_size=8))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 5, 64, 1000])
def test_batches_over_ranks_are_disjoint_complete_and_in_order(prepared: Prepared, world_size: int, batch_size: int):
    whole = to_arrays(prepared.table("train"))
    shares = [list(prepared.batches("train", batch_size, rank, world_size)) for rank in range(world_size)]
    sizes = [sum(len(batch.labels) for batch in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for share in shares:
        assert all(len(batch.labels) == batch_size for batch in share[:-1])
    for found, expected in zip(zip(*(batch for share in shares for batch in share), strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(found), expected)


def test_more_ranks_than_rows(prepared: Prepared):
    shares = [list(prepared.batches("val", 4, rank, 50)) for rank in range(50)]
    assert sum(len(batch.labels) for share in shares for batch in share) == prepared.counts["val"]


def test_row_groups_cover_the_split(prepared: Prepared):
    groups = prepared.row_groups("train")
    assert len({group.name for group in groups}) > 3
    assert {group.stop - group.start for group in groups[:-1]} > {7}
    found = np.concatenate([to_arrays(prepared.read(group)).indices for group in groups])
    np.testing.assert_array_equal(found, to_arrays(prepared.table("train")).indices)


def test_any_row_range_can_be_read(prepared: Prepared):
    part = prepared.parts["train"][1]
    whole = prepared.read(RowRange(part.name, 0, part.rows))
    for start, stop in ((0, 1), (6, 8), (3, part.rows), (7, 14)):
        assert prepared.read(RowRange(part.name, start, stop)).equals(whole.slice(start, stop - start))


def test_arrays_have_the_documented_types(prepared: Prepared):
    arrays = to_arrays(prepared.table("train"))
    assert [(array.dtype.name, array.shape[1:]) for array in arrays] == [
        ("uint8", (8, 8, 3)),
        ("int64", ()),
        ("int64", ()),
    ]
    assert len(to_arrays(prepared.table("train").slice(0, 0)).images) == 0


def test_impossible_ranks_are_refused(prepared: Prepared):
    with pytest.raises(ValueError, match="rank 2"):
        next(prepared.batches("train", 4, 2, 2))


def test_a_folder_without_a_manifest_is_no_prepared_set(tmp_path: Path):
    with pytest.raises(ConfigError, match="no prepared set here"):
        Prepared.load(str(tmp_path))
    with pytest.raises(ConfigError, match="no prepared set here"):
        Prepared.load(str(tmp_path / "missing"))
