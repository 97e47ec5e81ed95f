"""Store: versions are whole or absent, aliases move at once, and nothing that was tampered with is opened."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar.config import Config, ConfigError, DataConfig, ModelConfig
from cifar.data.prepared import filesystem, join, write_file
from cifar.data.remote import StorageFailed
from cifar.model_dir import ModelInfo, load_model, save_model
from cifar.models import build_model
from cifar.predictor import Predictor
from cifar.store import BOX, MANIFEST, Store, find_model, halved
from jobs import models


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: a model and a report."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    torch.manual_seed(0)
    config = Config(data=DataConfig(image_size=16), model=ModelConfig(widths=(8, 8)))
    mean, std = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
    model = build_model(config, 3, mean, std)
    info = ModelInfo(config=config, classes=("a", "b", "c"), mean=mean, std=std, fingerprint="f", source="digits")
    save_model(folder / "model", model, info, {"val_accuracy": 0.5})
    (folder / "report.json").write_text(json.dumps({"split": "test", "accuracy": 0.25, "count": 8}))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def folder_of(store: Store, version: object) -> Path:
    return Path(store.path) / str(version)


def test_a_published_model_answers_as_the_run_did(store: Store, run: Path) -> None:
    version = store.publish(str(run), "digits")
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    with store.open(version) as folder:
        found = Predictor(folder, "cpu").predict(images)
        assert json.loads((folder / "report.json").read_text())["accuracy"] == 0.25
    np.testing.assert_array_equal(found, Predictor(run / "model", "cpu").predict(images))
    assert not folder.exists()


def test_in_half_precision_it_takes_half_of_the_space_and_counts_as_exactly(store: Store, run: Path) -> None:
    whole, half = store.publish(str(run), "digits"), store.publish(str(run / "model"), "digits", half=True)
    assert half.files["model.safetensors"]["bytes"] < 0.6 * whole.files["model.safetensors"]["bytes"]
    with store.open(half) as folder:
        found = load_model(folder).model.state_dict()
    for name, value in load_model(run / "model").model.state_dict().items():
        assert found[name].dtype == value.dtype
        exact = "running" in name or "normalize" in name or "num_batches" in name
        torch.testing.assert_close(found[name], value if exact else value.half().float(), rtol=0, atol=0)


def test_a_reference_is_a_name_an_alias_or_a_part_of_a_version(store: Store, run: Path) -> None:
    first, second = (store.publish(str(run), "digits") for _ in range(2))
    assert store.versions("digits") == [first, second]
    assert store.resolve("digits") == second
    store.promote(first)
    assert store.resolve("digits") == store.resolve("digits@champion") == first
    assert store.resolve(str(second)) == second
    assert store.resolve(f"digits/{second.version[-6:]}") == second
    for wrong, message in (
        ("flowers", "there are: digits"),
        ("digits@canary", "no alias canary; there are: champion"),
        ("digits/2", "several versions match"),
        ("digits/nothing", first.version),
        ("digits@", "NAME@ALIAS"),
        ("../digits", "not a version|use letters"),
    ):
        with pytest.raises(ConfigError, match=message):
            store.resolve(wrong)


def test_publishers_at_the_same_moment_all_succeed(store: Store, run: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: store.publish(str(run), "digits"), range(16)))
    assert len({version.version for version in versions}) == 16
    assert set(map(str, store.versions("digits"))) == set(map(str, versions))


def test_what_is_not_whole_is_not_there(store: Store, run: Path) -> None:
    version = store.publish(str(run), "digits")
    (folder_of(store, version) / MANIFEST).unlink()
    assert store.versions("digits") == store.names() == []
    with pytest.raises(ConfigError, match="no published model"):
        store.resolve("digits")


def test_a_model_that_does_not_load_is_not_published(store: Store, run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    weights = broken / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"model\.safetensors: not the weights"):
        store.publish(str(broken), "digits")
    with pytest.raises(ConfigError, match="name the folder of a run or of a model"):
        store.publish(str(tmp_path), "digits")
    assert store.names() == []


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "report.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "not what was published"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not what was published"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["changed", "cut", "gone"],
)
def test_damage_is_noticed_before_anything_is_read(
    store: Store, run: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    version = store.publish(str(run), "digits")
    damage(folder_of(store, version) / file)
    with pytest.raises(ConfigError, match=f"{file}.*{message}"), store.open(version):
        pass


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["files"].update({"../../x": {"sha256": "0", "bytes": 0}}),
        lambda values: values["files"].pop("config.json"),
        lambda values: values.update(version="other"),
        lambda values: values.update(files=[]),
        lambda values: values.update(more=1),
        lambda values: values["files"]["config.json"].update(bytes="9"),
    ],
)
def test_a_strangers_manifest_is_refused(store: Store, run: Path, change: Callable[[dict], object]) -> None:
    version = store.publish(str(run), "digits")
    path = folder_of(store, version) / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"manifest\.json: not a manifest"):
        store.versions("digits")


def test_roll_back_returns_through_what_still_exists(store: Store, run: Path) -> None:
    first, second, third = (store.publish(str(run), "digits") for _ in range(3))
    for version in (first, second, third):
        store.promote(version)
    store.promote(third)  # again: nothing to return to twice
    store.delete(second)
    assert store.roll_back("digits") == first
    assert store.resolve("digits@champion") == first
    with pytest.raises(ConfigError, match="named no other version"):
        store.roll_back("digits")


def test_a_version_in_use_is_not_deleted(store: Store, run: Path) -> None:
    first, second = (store.publish(str(run), "digits") for _ in range(2))
    store.promote(first, "canary")
    with pytest.raises(ConfigError, match="is canary"):
        store.delete(first)
    store.promote(second, "canary")
    store.delete(first)
    assert store.versions("digits") == [second]
    assert not folder_of(store, first).exists()


def test_the_alias_is_whole_at_every_moment(store: Store, run: Path) -> None:
    """One thread moves it to and fro, another reads it."""
    pair = [store.publish(str(run), "digits") for _ in range(2)]
    store.promote(pair[0])
    with ThreadPoolExecutor(1) as pool:
        moving = pool.submit(lambda: [store.promote(pair[number % 2]) for number in range(200)])
        while not moving.done():
            assert store.resolve("digits@champion") in pair


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "aliases"])
def test_a_name_that_would_leave_its_folder_is_refused(store: Store, run: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="use letters"):
        store.publish(str(run), name)


def test_halved_weights_that_would_overflow_stay_whole() -> None:
    from safetensors.torch import load, save

    found = load(
        halved(save({"norm.running_var": torch.tensor([1e6]), "conv.weight": torch.tensor([0.5])}), {"conv.weight"})
    )
    assert found["norm.running_var"].item() == 1e6
    assert found["conv.weight"].dtype == torch.float16


def test_the_job_publishes_shows_compares_promotes_and_deletes(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(*argv: str) -> str:
        assert models.main([*argv, "--store", str(tmp_path / "s")]) == 0
        return capsys.readouterr().out

    def published(text: str) -> str:
        return text.split()[1].rstrip(",")

    assert "publish one" in job("list")
    first = published(job("publish", str(run), "--name", "digits", "--promote", "champion"))
    second = published(job("publish", str(run / "model"), "--name", "digits"))
    assert job("list").splitlines() == [
        f"{first}  val_accuracy 0.5000  test_accuracy 0.2500  @champion",
        f"{second}  val_accuracy 0.5000",
    ]
    assert "test_accuracy: 0.25" in job("show", "digits")
    assert "test_accuracy: 0.25 | None" in job("compare", "digits", second)
    damaged = tmp_path / "s" / published(job("publish", str(run), "--name", "digits")) / "metrics.json"
    damaged.write_text("{}")
    assert [line.split()[1] for line in job("list").splitlines()] == ["val_accuracy", "val_accuracy", "damaged:"]
    job("delete", damaged.parent.relative_to(tmp_path / "s").as_posix())
    job("promote", "digits")  # the newest
    assert f"version: {second}" in job("show", "digits")
    job("roll-back", "digits")
    assert f"version: {first}" in job("show", "digits")
    assert models.main(["delete", "digits", "--store", str(tmp_path / "s")]) == 2
    assert "NAME/VERSION" in capsys.readouterr().err
    source = ["publish", str(run), "--name", "digits"]
    assert models.main([*source, "--promote", "a b", "--store", str(tmp_path / "s")]) == 2
    assert "alias 'a b'" in capsys.readouterr().err
    assert len(job("list").splitlines()) == 2
    assert job("delete", second).strip() == f"deleted: {second}"
    assert models.main(["delete", first, "--store", str(tmp_path / "s")]) == 2
    assert "is champion" in capsys.readouterr().err


def test_a_model_is_found_by_folder_and_by_published_name(store: Store, run: Path) -> None:
    version = store.publish(str(run), "digits")
    for reference in (str(run), str(run / "model")):
        with find_model(reference, store.path) as found:
            assert (found.name, found.version) == ("r", str(run / "model"))
            load_model(found.folder)
    for reference in ("digits", str(version)):
        with find_model(reference, store.path) as found:
            assert (found.name, found.version) == ("digits", str(version))
            load_model(found.folder)
    with (
        pytest.raises(ConfigError, match=r"--model flowers: no folder of a run or a model.*there are: digits"),
        find_model("flowers", store.path),
    ):
        pass


def test_the_model_in_the_box_is_whole_small_and_says_what_it_reaches() -> None:
    with find_model("", "./no/such/store") as found:
        predictor = Predictor(found.folder, "cpu")
        card, report = (found.folder / "README.md").read_text(), json.loads((found.folder / "report.json").read_text())
        assert (found.folder / "model.safetensors").stat().st_size < 5_000_000
    assert found.version == str(Store(str(BOX)).resolve("cifar10@champion"))
    assert len(predictor.classes) == 10
    assert report["count"] == 10_000
    for text in (f"{report['accuracy']:.4f}", "jobs/train.py --recipe", "with seed", "Machine: ", "half precision"):
        assert text in card


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["bucket/models", "bucket"])
def test_an_s3_bucket_is_a_store_too(folder: str, s3_server: str, run: Path) -> None:
    """Object stores have no folders: what names none of its files is not there."""
    store = Store(f"s3://{folder}{s3_server}")
    assert store.names() == store.versions("digits") == []
    first, second = (store.publish(str(run), "digits") for _ in range(2))
    assert (store.names(), store.versions("digits")) == (["digits"], [first, second])
    assert store.promote(first) is None
    assert store.promote(second) == first.version
    assert store.resolve("digits@champion") == second
    assert store.roll_back("digits") == first
    assert store.describe(first)["aliases"] == ["champion"]
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    expected = Predictor(run / "model", "cpu").predict(images)
    uri = join(store.path, str(second))
    for reference, version in (("digits", str(first)), (str(second), str(second)), (uri, uri)):
        with find_model(reference, store.path) as found:
            assert found.version == version
            np.testing.assert_array_equal(Predictor(found.folder, "cpu").predict(images), expected)
    copy = store.publish(uri, "copy")
    assert copy.files["model.safetensors"] == second.files["model.safetensors"]
    with pytest.raises(ConfigError, match="is champion"):
        store.delete(first)
    store.delete(second)
    store.delete(copy)
    assert (store.names(), store.versions("digits")) == (["digits"], [first])
    files, root = filesystem(uri)
    with pytest.raises(ConfigError, match=r"config\.json.*: not found"):
        store.publish(uri, "digits")
    write_file(join(store.path, f"{first}/metrics.json"), b"{}")
    with pytest.raises(ConfigError, match=r"metrics\.json.*: not what was published"), store.open(first):
        pass
    files.delete_file(f"{root.rpartition('/')[0]}/{first.version}/metrics.json")
    with pytest.raises(ConfigError, match=r"metrics\.json.*: missing"), store.open(first):
        pass


@pytest.mark.slow
def test_storage_that_refuses_is_one_clear_error(
    s3_server: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nobody = "?endpoint_override=http%3A%2F%2F127.0.0.1%3A9&scheme=http"
    (tmp_path / "file").write_text("")
    for argv, message in (
        (["publish", str(run), "--name", "d", "--store", f"s3://nothing/x{s3_server}"], "NO_SUCH_BUCKET"),
        (["publish", str(run), "--name", "d", "--store", str(tmp_path / "file")], "cannot be written"),
        (["list", "--store", str(tmp_path / "file")], "cannot be listed"),
        (["list", "--store", "s3://bucket/x?nonsense=1"], "nonsense"),
    ):
        assert models.main(argv) == 2, argv
        shown = capsys.readouterr().err
        assert message in shown
        assert "Traceback" not in shown
    monkeypatch.setattr("cifar.data.remote.PATIENCE_SECONDS", 1.0)
    with pytest.raises(StorageFailed, match="has not answered"), find_model(f"s3://bucket/x{nobody}", str(tmp_path)):
        pass
