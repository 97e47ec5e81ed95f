"""Sources become prepared sets: splits, labels, quarantine, duplicates, cache."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar.config import ConfigError, DataConfig
from cifar.data import Prepared, execute, prepare
from cifar.data.prepared import SPLITS, to_arrays
from tests.images import bad_images, encode, noise, png, write_folder, write_parquet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CIFAR10_DIR", "CIFAR100_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CIFAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(path: object, **fields: object) -> DataConfig:
    return DataConfig(**{"data": str(path), "image_size": 32} | fields)  # pyright: ignore[reportArgumentType]


def ids(prepared: Prepared, split: str) -> list[str]:
    return prepared.table(split, ["id"]).column("id").to_pylist()


def labels(prepared: Prepared, split: str) -> list[int]:
    return prepared.table(split, ["label"]).column("label").to_pylist()


def quarantine(prepared: Prepared) -> dict[str, tuple[str | None, str]]:
    return {row.id: (row.label, row.reason) for row in prepared.quarantine()}


def test_folder_pixels_labels_and_ids_are_the_files(tmp_path: Path):
    write_folder(tmp_path / "set", classes=2, per_class=10)
    prepared = prepare(config(tmp_path / "set"))
    assert prepared.classes == ("class_0", "class_1")
    assert prepared.counts == {"train": 16, "val": 2, "test": 2}
    indices = []
    for split in SPLITS:
        table = prepared.table(split)
        arrays = to_arrays(table)
        for name, image, label in zip(ids(prepared, split), arrays.images, arrays.labels, strict=True):
            np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / "set" / name)))
            assert prepared.classes[label] == name.split("/")[0]
        indices += arrays.indices.tolist()
    assert sorted(indices) == list(range(20))


def test_statistics_are_those_of_the_train_pixels(tmp_path: Path):
    write_folder(tmp_path / "set")
    prepared = prepare(config(tmp_path / "set"))
    pixels = to_arrays(prepared.table("train")).images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(prepared.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(prepared.std, pixels.std(axis=0), rtol=1e-12)
    for split in SPLITS:
        assert prepared.class_counts[split] == np.bincount(labels(prepared, split), minlength=2).tolist()
        assert prepared.num_bytes(split) == to_arrays(prepared.table(split)).images.nbytes


def test_source_stats_tell_shapes_and_modes_as_found(tmp_path: Path):
    write_folder(tmp_path / "set", side=40)
    (tmp_path / "set/class_0/grey.png").write_bytes(encode(Image.new("L", (50, 20), 9)))
    stats = prepare(config(tmp_path / "set")).source_stats
    assert stats["shapes"] == [[40, 40, 20], [50, 20, 1]]
    assert stats["num_shapes"] == 2
    assert stats["short_sides"] == [20, 40, 40]
    assert stats["modes"] == {"RGB": 20, "L": 1}
    assert stats["value_range"] == [0, 255]


def test_folder_rows_come_shuffled_by_seed(tmp_path: Path):
    write_folder(tmp_path / "set", per_class=30)
    one, again, other = (ids(prepare(config(tmp_path / "set", split_seed=seed)), "train") for seed in (0, 0, 1))
    assert one == again != other
    assert one != sorted(one)


def test_users_splits_are_respected(tmp_path: Path):
    for split, seed in (("Train", 0), ("validation", 100), ("test", 200)):
        write_folder(tmp_path / "set" / split, per_class=5, seed=seed)
    prepared = prepare(config(tmp_path / "set"))
    assert prepared.counts == {"train": 10, "val": 10, "test": 10}
    for split, folder in (("train", "Train"), ("val", "validation"), ("test", "test")):
        assert {name.split("/")[0] for name in ids(prepared, split)} == {folder}


def test_missing_val_is_cut_from_train_beside_a_users_test(tmp_path: Path):
    write_folder(tmp_path / "set/train", per_class=20)
    write_folder(tmp_path / "set/test", per_class=3, seed=100)
    prepared = prepare(config(tmp_path / "set", val_fraction=0.25))
    assert prepared.class_counts == {"train": [15, 15], "val": [5, 5], "test": [3, 3]}


def test_a_class_named_train_is_a_class(tmp_path: Path):
    write_folder(tmp_path / "set")
    (tmp_path / "set/class_0").rename(tmp_path / "set/train")
    assert prepare(config(tmp_path / "set")).classes == ("class_1", "train")


def make_folder_with_bad_rows(root: Path) -> dict[str, str]:
    """200 files, 14 bad: two of each kind, with their reasons."""
    write_folder(root / "train", classes=2, per_class=93)
    expected = {}
    for kind, (data, reason) in bad_images().items():
        for label in range(2):
            name = f"train/class_{label}/bad_{kind}.png"
            (root / name).write_bytes(data)
            expected[name] = reason
    (root / "train/stray.png").write_bytes(png(900))
    (root / "test/class_9").mkdir(parents=True)
    (root / "test/class_9/unknown.png").write_bytes(png(901))
    return expected | {"train/stray.png": "label missing", "test/class_9/unknown.png": "label out of range"}


def test_bad_rows_are_quarantined_with_the_right_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    expected = make_folder_with_bad_rows(tmp_path / "set")
    write_folder(tmp_path / "set/test", per_class=10, seed=500)
    prepared = prepare(config(tmp_path / "set", max_bad=0.2))
    assert {name: reason for name, (_, reason) in quarantine(prepared).items()} == expected
    assert sum(prepared.counts.values()) == 186 + 20
    assert prepared.quarantined == len(expected)
    assert f"{len(expected)} of 220 rows are bad" in caplog.text
    assert quarantine(prepared)["test/class_9/unknown.png"] == ("class_9", "label out of range")
    assert quarantine(prepared)["train/stray.png"][0] is None
    assert all(Path(row.path).exists() for row in prepared.quarantine())


def test_pipes_and_sockets_in_a_class_folder_are_passed_by(tmp_path: Path):
    """Opening one would wait for ever."""
    write_folder(tmp_path / "set")
    before = prepare(config(tmp_path / "set"))
    os.mkfifo(tmp_path / "set/class_0/pipe.png")
    os.symlink("/dev/zero", tmp_path / "set/class_0/zero.png")
    assert prepare(config(tmp_path / "set")) == before


def test_a_huge_file_is_quarantined_unread(tmp_path: Path):
    write_folder(tmp_path / "set")
    with open(tmp_path / "set/class_0/huge.png", "wb") as file:
        file.truncate((256 << 20) + 1)
    assert quarantine(prepare(config(tmp_path / "set", max_bad=0.1))) == {
        "class_0/huge.png": ("class_0", "file too large")
    }


def test_too_many_bad_rows_stop_with_names_and_leave_nothing(tmp_path: Path, cache: Path):
    make_folder_with_bad_rows(tmp_path / "set")
    write_folder(tmp_path / "set/test", per_class=10, seed=500)
    with pytest.raises(ConfigError, match=r"--max-bad 0.01: .* of 220 rows .*bad_\w+.png: \w.*--max-bad"):
        prepare(config(tmp_path / "set"))
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert list((cache / "prepared").iterdir()) == []


def test_max_bad_holds_for_a_cached_set_too(tmp_path: Path):
    write_folder(tmp_path / "set")
    (tmp_path / "set/class_0/broken.png").write_bytes(b"broken")
    assert prepare(config(tmp_path / "set", max_bad=0.1)).quarantined == 1
    with pytest.raises(ConfigError, match=r"1 of 21 rows .*broken.png: not an image"):
        prepare(config(tmp_path / "set"))


def test_second_call_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "set")
    first = prepare(config(tmp_path / "set"))
    for name in ("_make", "content_key"):
        monkeypatch.setattr(f"cifar.data.preparation.{name}", lambda *_: pytest.fail("not from the cache"))
    assert prepare(config(tmp_path / "set", max_bad=0.5)) == first


def test_fingerprint_follows_content_and_shaping_fields_not_the_place(tmp_path: Path):
    write_folder(tmp_path / "set")
    first = prepare(config(tmp_path / "set")).fingerprint
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert prepare(config(tmp_path / "copy")).fingerprint == first
    fields: list[dict[str, object]] = [{"image_size": 16}, {"resize": "pad"}, {"val_fraction": 0.2}, {"split_seed": 1}]
    others = [prepare(config(tmp_path / "set", **field)).fingerprint for field in fields]
    data = (tmp_path / "set/class_0/0000.png").read_bytes()
    changed = data[:100] + bytes([data[100] ^ 1]) + data[101:]  # same name and size
    (tmp_path / "set/class_0/0000.png").write_bytes(changed)
    others.append(prepare(config(tmp_path / "set", max_bad=1)).fingerprint)
    assert len({first, *others}) == 6


def test_a_damaged_set_is_made_again(tmp_path: Path):
    write_folder(tmp_path / "set")
    first = prepare(config(tmp_path / "set"))
    with open(first.files("train")[0], "r+b") as file:
        file.truncate(100)
    with pytest.raises(ConfigError, match=r"part-00000\.parquet is missing or cut short"):
        Prepared.load(first.path)
    assert prepare(config(tmp_path / "set")) == first
    assert len(ids(first, "train")) == 16


def test_another_format_version_is_refused(tmp_path: Path):
    write_folder(tmp_path / "set")
    path = Path(prepare(config(tmp_path / "set")).path) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 0}))
    with pytest.raises(ConfigError, match="another version"):
        Prepared.load(str(path.parent))


def test_duplicates_are_counted_and_named(tmp_path: Path):
    """A copy in another encoding has the same pixels."""
    write_folder(tmp_path / "set/train", per_class=10)
    write_folder(tmp_path / "set/val", per_class=2, seed=300)
    write_folder(tmp_path / "set/test", per_class=5, seed=100)
    folder = tmp_path / "set"
    shutil.copy(folder / "train/class_0/0003.png", folder / "test/class_1/leak.png")
    (folder / "train/class_0/twin.bmp").write_bytes(encode(Image.fromarray(noise(4)), "bmp"))
    found = prepare(config(folder)).duplicates
    assert (found["train_test"], found["within_train"]) == (1, 1)
    assert found["pairs"][0] == ["train/class_0/0003.png", "test/class_1/leak.png"]
    assert sorted(found["pairs"][1]) == ["train/class_0/0004.png", "train/class_0/twin.bmp"]


def hub(*names: str) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}


HUB = hub("cat", "dog")


def test_class_names_may_stand_in_one_file_alone(tmp_path: Path):
    write_parquet(tmp_path / "set/test-0.parquet", [png(seed) for seed in range(50, 60)], [0, 1] * 5)
    write_parquet(tmp_path / "set/train-0.parquet", [png(seed) for seed in range(20)], [0, 1] * 10, HUB)
    assert prepare(config(tmp_path / "set")).classes == ("cat", "dog")


def test_parquet_in_the_hubs_layout(tmp_path: Path):
    images = [png(seed) for seed in range(40)]
    write_parquet(tmp_path / "set/train-00000-of-00002.parquet", [*images[:15]], [i % 2 for i in range(15)], HUB)
    write_parquet(tmp_path / "set/train-00001-of-00002.parquet", [*images[15:30]], [i % 2 for i in range(15)], HUB)
    write_parquet(tmp_path / "set/test-00000-of-00001.parquet", [*images[30:]], [i % 2 for i in range(10)], HUB)
    prepared = prepare(config(tmp_path / "set"))
    assert prepared.classes == ("cat", "dog")
    assert prepared.counts == {"train": 27, "val": 3, "test": 10}
    assert ids(prepared, "test") == [f"test-00000-of-00001.parquet#{row}" for row in range(10)]
    np.testing.assert_array_equal(to_arrays(prepared.table("test")).images[4], noise(34))
    train = prepared.table("train")
    order = [10 + 15 * ("00001" in name.split("-of")[0]) + int(name.split("#")[1]) for name in train["id"].to_pylist()]
    assert train["index"].to_pylist() == order == sorted(order)


def test_bad_parquet_rows_are_named_one_by_one(tmp_path: Path):
    images: list[bytes | None] = [png(seed) for seed in range(30)]
    given: list[int | None] = [seed % 2 for seed in range(30)]
    images[3], images[17], given[8], given[9], given[10] = None, b"", None, 2, -1
    write_parquet(tmp_path / "set/all.parquet", images, given, HUB)
    prepared = prepare(config(tmp_path / "set", max_bad=0.2))
    assert quarantine(prepared) == {
        "all.parquet#3": ("dog", "empty file"),
        "all.parquet#8": (None, "label missing"),
        "all.parquet#9": ("2", "label out of range"),
        "all.parquet#10": ("-1", "label out of range"),
        "all.parquet#17": ("dog", "empty file"),
    }
    assert sum(prepared.counts.values()) == 25


def test_parquet_with_plain_bytes_string_labels_and_split_folders(tmp_path: Path):
    for split, start in (("train", 0), ("val", 50), ("test", 60)):
        path = tmp_path / "set" / split / "0.parquet"
        path.parent.mkdir(parents=True)
        names = pa.array(["b", "a"] * 5).dictionary_encode() if split == "train" else pa.array(["a", "b"] * 5)
        pq.write_table(pa.table({"image": [png(start + row) for row in range(10)], "label": names}), path)
    prepared = prepare(config(tmp_path / "set"))
    assert prepared.classes == ("a", "b")
    assert prepared.counts == {"train": 10, "val": 10, "test": 10}
    assert labels(prepared, "train")[:2] == [1, 0]
    assert labels(prepared, "test")[:2] == [0, 1]


def test_inner_paths_are_the_ids(tmp_path: Path):
    rows = [{"bytes": png(row), "path": f"photo_{row}.png"} for row in range(20)]
    pq.write_table(pa.table({"img": rows, "label": [0, 1] * 10}), tmp_path / "x.parquet")
    assert ids(prepare(config(tmp_path / "x.parquet")), "train")[0].startswith("photo_")


def test_one_huge_row_group_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cifar.data.rows._CHUNK_ROWS", 16)
    monkeypatch.setattr("cifar.data.rows._MIN_CHUNK_ROWS", 16)
    images = [png(seed, 8) for seed in range(300)]
    pq.write_table(pa.table({"img": images, "label": [0, 1] * 150}), tmp_path / "x.parquet")
    prepared = prepare(config(tmp_path / "x.parquet", image_size=8))
    assert len(prepared.parts["train"]) > 10
    assert sum(prepared.counts.values()) == 300
    for split in SPLITS:
        arrays = to_arrays(prepared.table(split))
        for image, index in zip(arrays.images, arrays.indices, strict=True):
            np.testing.assert_array_equal(image, noise(int(index), 8))


def test_rows_sorted_by_class_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_parquet(tmp_path / "set/x.parquet", [png(seed) for seed in range(20)], [0] * 10 + [1] * 10)
    prepare(config(tmp_path / "set"))
    assert "sorted by class" in caplog.text


@pytest.fixture
def inline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """A set of seven chunks prepared in this process; the cache is then another, empty one."""
    make_folder_with_bad_rows(tmp_path / "set")
    write_folder(tmp_path / "set/test", per_class=10, seed=500)
    monkeypatch.setattr("cifar.data.rows._CHUNK_ROWS", 32)
    prepared = prepare(config(tmp_path / "set", max_bad=0.2))
    assert len(prepared.parts["train"]) == 7
    monkeypatch.setenv("CIFAR_CACHE", str(tmp_path / "other"))
    return prepared


def assert_same_files(one: Prepared, two: Prepared) -> None:
    assert one.parts == two.parts
    assert one.path != two.path
    for split in SPLITS:
        for left, right in zip(one.files(split), two.files(split), strict=True):
            assert Path(left).read_bytes() == Path(right).read_bytes()
    assert quarantine(one) == quarantine(two)


def test_processes_write_the_same_files(inline: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(execute, "_INLINE_ROWS", 0)
    monkeypatch.setattr(execute, "usable_cpus", lambda: 2)
    assert_same_files(prepare(config(tmp_path / "set", max_bad=0.2)), inline)


def test_an_early_stop_ends_the_processes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
):
    """The first of many chunks decides; the others are being written at that moment."""
    write_folder(tmp_path / "set", per_class=100)
    for number in range(100):
        (tmp_path / f"set/class_0/bad_{number}.png").write_bytes(b"bad")
    monkeypatch.setattr("cifar.data.rows._CHUNK_ROWS", 16)
    monkeypatch.setattr(execute, "_INLINE_ROWS", 0)
    monkeypatch.setattr(execute, "usable_cpus", lambda: 2)
    with pytest.raises(ConfigError, match="at least"):
        prepare(config(tmp_path / "set"))
    assert list((cache / "prepared").iterdir()) == []


@pytest.mark.ray
def test_ray_writes_the_same_files_and_gives_the_same_errors(inline: Prepared, tmp_path: Path) -> None:
    """In a process of its own: Ray may end the one that used it, up to a minute after `ray.shutdown()`."""
    process = multiprocessing.get_context("spawn").Process(target=prepare_on_ray, args=(inline, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0


def prepare_on_ray(inline: Prepared, folder: Path) -> None:
    import ray

    environment = {"env_vars": {"PYTHONPATH": ":".join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cifar.data.rows._CHUNK_ROWS", 32)
        patch.setattr(execute, "_LOCAL_ROWS", 0)
        assert_same_files(prepare(config(folder / "set", max_bad=0.2)), inline)
        write_parquet(folder / "x.parquet", [png(seed) for seed in range(40)], [0, 1] * 20)
        patch.setattr("cifar.data.preparation.convert", damage_then(execute.convert, folder / "x.parquet"))
        with pytest.raises(ConfigError, match=r"x\.parquet|cannot be read"):
            prepare(config(folder / "x.parquet"))
    ray.shutdown()


def damage_then(convert: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """`convert` of a file that is spoilt after its labels were read."""

    def spoilt(chunks: Any, start_ray: Any) -> Any:
        path.write_bytes(b"spoilt" * 100)
        return convert(chunks, start_ray)

    return spoilt


def test_a_dead_worker_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    write_folder(tmp_path / "set")
    monkeypatch.setattr(execute, "_INLINE_ROWS", 0)
    monkeypatch.setattr("cifar.data.rows._CHUNK_ROWS", 16)
    monkeypatch.setattr(execute, "usable_cpus", lambda: 2)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="worker process died"):
        prepare(config(tmp_path / "set"))
    assert list((cache / "prepared").iterdir()) == []


def test_uris_for_source_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "set")
    local = prepare(config(tmp_path / "set"))
    monkeypatch.setenv("CIFAR_CACHE", f"file://{tmp_path}/far")
    far = prepare(config(f"file://{tmp_path}/set"))
    assert far.path.startswith("file://")
    assert far.fingerprint == local.fingerprint
    assert far.table("train").equals(local.table("train"))
    assert Prepared.load(far.path) == prepare(config(f"file://{tmp_path}/set", max_bad=0.9))
    write_parquet(tmp_path / "x.parquet/x.parquet", [png(seed) for seed in range(20)], [0, 1] * 10)
    assert prepare(config(f"file://{tmp_path}/x.parquet/x.parquet")).counts["train"] == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist; named sets are cifar10"),
        (lambda root: root.mkdir(), "no class folders"),
        (lambda root: root.write_text("text"), "no folder and no Parquet file"),
        (lambda root: (root.mkdir(), (root / "a.png").write_bytes(png(0))), "no class folders"),
        (lambda root: write_folder(root, classes=1), "1 classes with training images"),
        (
            lambda root: write_folder(root, classes=2, per_class=1),
            r"too few images: class_0 \(1\), class_1",
        ),
        (lambda root: (write_folder(root / "train"), write_folder(root / "extra")), "extra: unknown beside train/"),
        (lambda root: (root.mkdir(), pq.write_table(pa.table({"a": [1]}), root / "a.parquet")), "needs a column img"),
        (
            lambda root: (root.mkdir(), pq.write_table(pa.table({"img": [1], "label": [1]}), root / "a.parquet")),
            "must hold encoded images",
        ),
        (
            lambda root: (root.mkdir(), pq.write_table(pa.table({"img": [b""], "label": [1.5]}), root / "a.parquet")),
            "must be integers or strings",
        ),
        (lambda root: (root.mkdir(), (root / "a.parquet").write_bytes(b"x" * 50)), "not a readable Parquet file"),
        (
            lambda root: (
                write_parquet(root / "test-0.parquet", [png(0)], [0]),
                write_parquet(root / "rest.parquet", [png(0)], [0]),
            ),
            "rest.parquet: no split in its name",
        ),
        (lambda root: write_parquet(root / "test-0.parquet", [png(0)], [0]), "no training images"),
        (
            lambda root: (
                write_parquet(root / "train-0.parquet", [png(0)], [0], HUB),
                write_parquet(root / "train-1.parquet", [png(0)], [0], hub("dog", "cat")),
            ),
            "train-1.parquet: its class names are not those of the files before",
        ),
        (
            lambda root: write_parquet(root / "train-0.parquet", [png(0)], [0], hub("cat", "dog", "cat")),
            "train-0.parquet: two of its classes are named 'cat'",
        ),
        (
            lambda root: write_parquet(root / "train-0.parquet", [b""] * 100_001, list(range(100_001))),
            "train-0.parquet: column label holds more than 100,000 classes",
        ),
    ],
)
def test_unusable_sources_are_one_clear_error(tmp_path: Path, make, message: str):
    make(tmp_path / "set")
    with pytest.raises(ConfigError, match=message):
        prepare(config(tmp_path / "set"))


def test_more_class_folders_than_a_model_takes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cifar.data.rows._MAX_CLASSES", 2)
    write_folder(tmp_path / "set", classes=3)
    with pytest.raises(ConfigError, match="more than 2 class folders"):
        prepare(config(tmp_path / "set"))


def test_unknown_schemes_are_a_clear_error():
    with pytest.raises(ConfigError, match="nowhere://x: cannot be opened"):
        prepare(config("nowhere://x"))


@pytest.mark.parametrize("size", [8, 32])
def test_digits_are_sklearns_upscaled(size: int):
    from sklearn.datasets import load_digits

    prepared = prepare(config("digits", image_size=size))
    assert prepared.classes == tuple("0123456789")
    assert sum(prepared.counts.values()) == 1797
    assert prepared.source == "digits"
    if size == 8:
        arrays = to_arrays(prepared.table("train"))
        originals = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)
        expected = np.round(originals[arrays.indices] * 255 / 16)
        for channel in range(3):
            np.testing.assert_array_equal(arrays.images[..., channel], expected)


class FakeCifar:
    """Stands for torchvision's data set class, which downloads."""

    calls: tuple[str, ...] = ()
    error: Exception | None = None
    base_folder = "cifar-100-python"

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert download
        type(self).calls = (*self.calls, root)
        if self.error:
            raise self.error
        self.data = np.stack([noise(seed) for seed in (range(40) if train else range(100, 110))])
        self.targets = [row % 2 for row in range(len(self.data))]
        self.classes = ["cat", "dog"]
        # What the archive of CIFAR-100 leaves beside: the superclasses, of which torchvision's class says nothing.
        folder = Path(root) / self.base_folder
        folder.mkdir(exist_ok=True)
        coarse = [row % 3 for row in range(len(self.data))]
        (folder / ("train" if train else "test")).write_bytes(pickle.dumps({"coarse_labels": coarse}))
        (folder / "meta").write_bytes(pickle.dumps({"coarse_label_names": ["fish", "trees", "people"]}))


@pytest.fixture
def fake_cifar(monkeypatch: pytest.MonkeyPatch) -> type[FakeCifar]:
    fake = type("Fake", (FakeCifar,), {})
    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(CIFAR10=fake, CIFAR100=fake)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return fake


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_download_is_converted_once(fake_cifar: type[FakeCifar], name: str, cache: Path):
    prepared = prepare(config(name))
    assert prepared.counts == {"train": 36, "val": 4, "test": 10}
    assert prepared.classes == ("cat", "dog")
    np.testing.assert_array_equal(to_arrays(prepared.table("test")).images[3], noise(103))
    assert prepare(config(name, split_seed=1)).counts == prepared.counts
    assert len(fake_cifar.calls) == 2
    assert not Path(fake_cifar.calls[0]).exists()
    assert sorted(path.name for path in (cache / "sources" / name).iterdir()) == ["test.parquet", "train.parquet"]


def test_a_download_of_cifar100_knows_its_superclasses_too(fake_cifar: type[FakeCifar]):
    prepared = prepare(config("cifar100", label="coarse_label"))
    assert prepared.classes == ("fish", "trees", "people")
    assert prepared.class_counts["test"] == [4, 3, 3]
    assert prepare(config("cifar100")).classes == ("cat", "dog")
    assert len(fake_cifar.calls) == 2, "one download serves both"


def write_cifar100(folder: Path) -> None:
    """In the hub's schema: `img`, `fine_label` of 100 names, `coarse_label` of 20."""
    names = {"fine_label": [f"fine {i:02}" for i in range(100)], "coarse_label": [f"coarse {i:02}" for i in range(20)]}
    features: dict[str, object] = {"img": {"_type": "Image"}}
    features |= {column: {"names": of_it, "_type": "ClassLabel"} for column, of_it in names.items()}
    for split, each in (("train", 3), ("test", 1)):
        fine = np.random.default_rng(each).permutation(np.repeat(np.arange(100), each))
        write_parquet(folder / f"{split}.parquet", [png(int(f) + 100 * each) for f in fine], fine.tolist())
        table = pq.read_table(folder / f"{split}.parquet").rename_columns({"label": "fine_label"})
        table = table.append_column("coarse_label", pa.array(fine // 5))
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        (folder / f"{split}.parquet").rename(folder / f"{split}-00000-of-00001.parquet")
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"{split}-00000-of-00001.parquet")


def test_cifar100_as_published_with_fine_and_coarse_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_cifar100(tmp_path / "hub")
    monkeypatch.setenv("CIFAR100_DIR", str(tmp_path / "hub"))
    fine, coarse = prepare(config("cifar100")), prepare(config("cifar100", label="coarse_label"))
    assert (fine.classes[7], coarse.classes[7]) == ("fine 07", "coarse 07")
    assert (len(fine.classes), len(coarse.classes)) == (100, 20)
    assert fine.fingerprint != coarse.fingerprint
    for prepared, size in ((fine, 1), (coarse, 5)):
        for split in ("train", "val", "test"):
            assert min(prepared.class_counts[split]) >= 1
        assert prepared.class_counts["test"] == [size] * len(prepared.classes)
    labels = [dict(zip(ids(one, "test"), to_arrays(one.table("test")).labels, strict=True)) for one in (fine, coarse)]
    assert all(labels[1][row] == label // 5 for row, label in labels[0].items())
    with pytest.raises(
        ConfigError, match=r"needs a column colour beside img; it has img, fine_label, coarse_label; .*--label"
    ):
        prepare(config("cifar100", label="colour"))


def test_no_network_names_the_remedies(fake_cifar: type[FakeCifar]):
    fake_cifar.error = OSError("Name or service not known")
    with pytest.raises(ConfigError, match=r"Name or service.*CIFAR10_DIR.*--data digits"):
        prepare(config("cifar10"))


def test_auto_falls_back_to_digits_loudly(fake_cifar: type[FakeCifar], caplog: pytest.LogCaptureFixture):
    fake_cifar.error = OSError("Name or service not known")
    assert prepare(config("auto", image_size=8)).source == "digits"
    assert [record.levelno for record in caplog.records if "FALLING BACK TO DIGITS" in record.message] == [
        logging.WARNING
    ]


def test_environment_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_parquet(tmp_path / "hub/train-0.parquet", [png(seed) for seed in range(20)], [0, 1] * 10, HUB)
    write_parquet(tmp_path / "hub/test-0.parquet", [png(seed) for seed in range(50, 60)], [0, 1] * 5, HUB)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "hub"))
    prepared = prepare(config("auto"))
    assert (prepared.source, prepared.counts["test"]) == ("cifar10", 10)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"\$CIFAR10_DIR is .*nowhere, which does not exist"):
        prepare(config("cifar10"))


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Workers run in other folders."""
    write_folder(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFAR_CACHE", "near")
    prepared = prepare(config("set"))
    monkeypatch.chdir("/")
    assert len(ids(prepared, "train")) == 16
    assert prepared.source == "set"


def test_an_unwritable_cache_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CIFAR_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="CIFAR_CACHE"):
        prepare(config(tmp_path / "set"))


@pytest.mark.parametrize("count", [2, 3, 9])
def test_bad_files_of_a_small_class_leave_the_good_ones_to_the_splits(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
):
    """Whichever was drawn for val or test; of too few good ones the class is named."""
    write_folder(tmp_path / "set", classes=2, per_class=40)
    (tmp_path / "set/rare").mkdir()
    for number in range(count):
        (tmp_path / f"set/rare/{number}.png").write_bytes(png(number + 500))
    for number in range(count, 12):
        (tmp_path / f"set/rare/{number}.png").write_bytes(b"")
    if count < 3:
        with pytest.raises(ConfigError, match=r"too few images: rare \(2\); each needs 3"):
            prepare(config(tmp_path / "set", max_bad=0.5))
        return
    prepared = prepare(config(tmp_path / "set", max_bad=0.5))
    assert [prepared.class_counts[split][2] for split in ("train", "val", "test")] == [count - 2, 1, 1]
    assert prepared.quarantined == 12 - count
    if count == 3:
        assert "cutting again without the bad rows" in caplog.text


def test_a_class_all_of_whose_images_in_a_given_split_are_bad_is_an_error(tmp_path: Path):
    write_folder(tmp_path / "set/train")
    write_folder(tmp_path / "set/test", per_class=1, seed=500)
    (tmp_path / "set/test/class_1/0000.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"none of the images of class_1 in test is readable \(.*0000.png\)"):
        prepare(config(tmp_path / "set", max_bad=0.5))
