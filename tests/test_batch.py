"""Batch prediction: every row once, the same files whatever happens on the way, and refusals that say what to do."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar.batch import execute, source
from cifar.batch.execute import make_plan
from cifar.batch.part import PartPredictor
from cifar.batch.run import predict_all
from cifar.batch.settings import BatchConfig
from cifar.config import ConfigError
from cifar.model_dir import save_model
from cifar.predictor import Predictor
from cifar.store import find_model
from jobs import evaluate, predict
from tests.images import bad_images, encode, png, write_parquet
from tests.processes import below, wait_for
from tests.test_predictor import loaded_model

ROOT = Path(__file__).parent.parent
CLASSES = ("0", "1", "2", "3")
PART_ROWS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "m"
    loaded = loaded_model(classes=CLASSES)
    save_model(folder, loaded.model, loaded.info, loaded.metrics)
    return str(folder)


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_PART_ROWS", PART_ROWS)


def write_images(folder: Path, count: int = 40) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(png(number, 16 + number % 3))
    return folder


def run(given: str | Path, output: str | Path, model: str, **flags: Any) -> dict[str, Any]:
    """The manifest."""
    config = BatchConfig(input=str(given), output=str(output), model=model, **flags)
    with find_model(model, "") as found:
        return predict_all(config, found, start_ray=lambda: pytest.fail("a small job started Ray")).manifest


def files(folder: Path) -> dict[str, bytes]:
    """What an undisturbed run writes and a disturbed one has to write just so; reports say when they were made."""
    kept = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in kept.items() if not name.startswith(("report", "figures", ".lock"))}


def table(output: str | Path) -> pa.Table:
    paths = sorted(Path(output).glob("predictions/*.parquet"))
    return pa.concat_tables(pq.read_table(path) for path in paths)


def test_rows_say_what_the_predictor_says(tmp_path: Path, model: str) -> None:
    folder = write_images(tmp_path / "in", 5)
    run(folder, tmp_path / "out", model, top_k=2, threshold=0.26)
    rows = table(tmp_path / "out").to_pylist()
    predictor = Predictor(model, "cpu")
    images = np.stack([predictor.decode(path.read_bytes()) for path in sorted(folder.iterdir())])
    probabilities = predictor.predict(images)
    answers = predictor.answers(probabilities, 2, 0.26)
    assert {row["abstained"] for row in rows} == {True, False}
    for row, answer, expected in zip(rows, answers, probabilities.tolist(), strict=True):
        assert row["label"] == answer.label
        assert row["probability"] == answer.probability
        assert row["abstained"] == answer.abstained
        assert [(one["label"], one["probability"]) for one in row["top_k"]] == answer.top_k
        assert row["probabilities"] == expected
        assert row["version"] == model
    assert [row["id"] for row in rows] == [path.name for path in sorted(folder.iterdir())]
    assert table(tmp_path / "out").schema.field("probabilities").type == pa.list_(pa.float32())


@pytest.mark.usefixtures("_small_parts")
def test_parts_are_bounded_complete_and_the_same_each_time(tmp_path: Path, parquet: Path, model: str) -> None:
    config = loaded_model().info.config.data
    listing = source.list_rows(str(parquet), CLASSES)
    first, again = (source.plan_parts(listing, config, 4) for _ in range(2))
    assert [len(part.indices) for part in first] == [len(part.indices) for part in again]
    assert np.concatenate([part.indices for part in first]).tolist() == list(range(500))
    assert max(len(part.indices) for part in first) <= PART_ROWS
    # Large images, or many classes, make smaller parts.
    assert len(source.plan_parts(listing, replace(config, image_size=1024), 4)[0].indices) <= 21
    assert len(source.plan_parts(listing, config, 1_000_000)[0].indices) <= 16
    for name in ("one", "two"):
        run(parquet, tmp_path / name, model)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.usefixtures("_small_parts")
def test_the_manifest_counts_every_row_and_its_sums_verify(tmp_path: Path, model: str) -> None:
    folder = write_images(tmp_path / "in")
    (folder / "bad.png").write_bytes(b"no image")
    manifest = run(folder, tmp_path / "out", model)
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["rows"], manifest["predicted"], manifest["quarantined"]) == (41, 40, 1)
    assert len(manifest["parts"]) == 3
    assert sum(part["rows"] for part in manifest["parts"]) == 40
    for part in manifest["parts"]:
        data = (tmp_path / "out" / part["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (part["bytes"], part["sha256"])
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == [".lock", "manifest.json", "predictions", "quarantine.parquet"]


def test_what_cannot_be_read_is_quarantined_with_its_reason(tmp_path: Path, model: str) -> None:
    folder = write_images(tmp_path / "in", 3)
    for name, (data, _) in bad_images().items():
        (folder / f"{name}.png").write_bytes(data)
    run(folder, tmp_path / "out", model)
    rows = pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    expected = {f"{name}.png": reason for name, (_, reason) in bad_images().items()}
    assert {row["id"]: row["reason"] for row in rows} == expected
    assert all(row["path"] == str(folder / row["id"]) for row in rows)
    assert table(tmp_path / "out").column("id").to_pylist() == ["000.png", "001.png", "002.png"]


def test_too_many_bad_images_stop_the_job_and_more_may_be_allowed_later(tmp_path: Path, model: str) -> None:
    folder = write_images(tmp_path / "in", 3)
    (folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"--max-bad 0\.2: .*1 of 4 .*bad\.png: not an image.*--max-bad"):
        run(folder, tmp_path / "out", model, max_bad=0.2)
    assert not (tmp_path / "out/manifest.json").exists()
    assert run(folder, tmp_path / "out", model)["quarantined"] == 1


def test_a_job_without_one_readable_image_fails(tmp_path: Path, model: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"none of its 1 images can be read \(bad\.png: empty file\)"):
        run(tmp_path / "in", tmp_path / "out", model)


@pytest.mark.usefixtures("_small_parts")
def test_csv_and_jsonl_hold_what_parquet_holds(tmp_path: Path, parquet: Path, model: str) -> None:
    for kind in ("parquet", "csv", "jsonl"):
        run(parquet / "test-00000-of-00001.parquet", tmp_path / kind, model, format=kind)
    expected = table(tmp_path / "parquet").to_pylist()
    lines = [path.read_text().splitlines() for path in sorted(tmp_path.glob("jsonl/predictions/*.jsonl"))]
    assert [json.loads(line) for part in lines for line in part] == expected
    found = []
    for path in sorted(tmp_path.glob("csv/predictions/*.csv")):
        with path.open(newline="") as stream:
            found += list(csv.DictReader(stream))
    assert len(found) == 60
    for row, one in zip(found, expected, strict=True):
        read = row | {name: json.loads(row[name]) for name in ("top_k", "probabilities", "probability")}
        assert read | {"abstained": row["abstained"] == "True"} == one


@pytest.mark.usefixtures("_small_parts")
def test_labelled_rows_are_evaluated_as_the_evaluate_job_does(
    tmp_path: Path, parquet: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", model, "--output", str(tmp_path / "report"), "--data", str(parquet), "--json"]
    assert evaluate.main(flags) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    manifest = run(parquet / "test-00000-of-00001.parquet", tmp_path / "out", model)
    found = json.loads((tmp_path / "out/report.json").read_text())
    for name in ("count", "accuracy", "accuracy_ci95", "macro_f1", "per_class", "confusion_matrix", "classes"):
        assert found[name] == expected[name], name
    for name in ("loss", "ece", "top5_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    one, other = ([(m["label"], m["prediction"], m["loss"]) for m in each["mistakes"]] for each in (found, expected))
    assert one == [(label, prediction, pytest.approx(loss, rel=1e-6)) for label, prediction, loss in other]
    assert manifest["evaluation"]["accuracy"] == expected["accuracy"]
    assert (tmp_path / "out/figures/confusion.png").exists()
    rows = table(tmp_path / "out").to_pylist()
    assert np.mean([row["label"] == row["true_label"] for row in rows]) == pytest.approx(expected["accuracy"])


def test_class_folders_are_labels_if_the_model_knows_them_all(tmp_path: Path, model: str) -> None:
    for name in ("known/train/1", "known/3", "other/1", "other/cats"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(png(0))
    (tmp_path / "known/flat.png").write_bytes(png(1))
    (tmp_path / "known/.hidden.png").write_bytes(png(2))
    manifest = run(tmp_path / "known", tmp_path / "k", model)
    assert manifest["evaluation"]["count"] == 2
    found = {row["id"]: row["true_label"] for row in table(tmp_path / "k").to_pylist()}
    assert found == {"3/a.png": "3", "flat.png": None, "train/1/a.png": "1"}
    assert "evaluation" not in run(tmp_path / "other", tmp_path / "o", model)
    assert "true_label" not in table(tmp_path / "o").column_names


@pytest.mark.parametrize(
    ("labels", "names", "classes", "expected"),
    [
        ([0, 2, -1], None, ("a", "b", "c"), ["a", "c", None]),
        (["c", "a", None], None, ("a", "b", "c"), ["c", "a", None]),
        ([1, 0, 1], ["b", "a"], ("a", "b", "c"), ["a", "b", "a"]),
        ([7, 3, 7], None, ("3", "5", "7"), ["7", "3", "7"]),
        ([0, 3, 1], None, ("a", "b", "c"), None),
        ([0, 1, 1], ["x", "y"], ("a", "b", "c"), None),
        ([0.5, 1.0, 2.0], None, ("a", "b", "c"), None),
        ([-1, -1, -1], None, ("a", "b", "c"), None),
    ],
    ids=[
        "places",
        "names",
        "the source's names",
        "numbers as names",
        "out of range",
        "unknown names",
        "floats",
        "none",
    ],
)
def test_a_label_column_is_read_as_the_models_classes(
    tmp_path: Path, labels: list[Any], names: list[str] | None, classes: tuple[str, ...], expected: list[str] | None
) -> None:
    features = {"info": {"features": {"label": {"names": names}}}}
    metadata = {"huggingface": json.dumps(features)} if names else None
    write_parquet(tmp_path / "a.parquet", [png(0)] * 3, labels, metadata)
    found = source.list_rows(str(tmp_path / "a.parquet"), classes).labels
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert [classes[label] if label >= 0 else None for label in found] == expected


def test_images_as_plain_bytes_without_labels_are_predicted(tmp_path: Path, model: str) -> None:
    pq.write_table(pa.table({"image": [png(0), png(1)]}), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "out", model)["predicted"] == 2
    assert table(tmp_path / "out").column("id").to_pylist() == ["a.parquet#0", "a.parquet#1"]


class Broken(Exception):
    pass


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_job_goes_on_and_ends_as_an_undisturbed_one(
    tmp_path: Path, parquet: Path, model: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = parquet / "test-00000-of-00001.parquet"
    run(given, tmp_path / "whole", model)
    predicted: list[int] = []
    plain = PartPredictor.__call__

    def counted(self: PartPredictor, decoded: Any) -> Any:
        if len(predicted) == after:
            raise Broken
        predicted.append(decoded.number)
        return plain(self, decoded)

    with monkeypatch.context() as patch:
        patch.setattr(PartPredictor, "__call__", counted)
        with pytest.raises(Broken):
            run(given, tmp_path / "out", model)
        done, after = predicted.copy(), 99
        predicted.clear()
        run(given, tmp_path / "out", model)
    assert sorted(done + predicted) == [0, 1, 2, 3]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "whole"))
    for name in ("accuracy", "loss", "ece", "mistakes", "confusion_matrix"):
        assert one[name] == other[name]


@pytest.mark.usefixtures("_small_parts")
def test_a_part_that_was_cut_short_is_done_again(
    tmp_path: Path, parquet: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(parquet, tmp_path / "whole", model)
    with monkeypatch.context() as patch:
        patch.setattr("cifar.batch.output.Output.finish", lambda *_: None)
        run(parquet, tmp_path / "out", model)
    for damaged in ("predictions/part-00001.parquet", ".parts/00002.npz"):
        (tmp_path / "out" / damaged).write_bytes(b"PAR1")
    left_behind = tmp_path / f"out/predictions/part-00003.parquet.{'a' * 32}.tmp"
    left_behind.write_bytes(b"half")
    run(parquet, tmp_path / "out", model)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_finished_job_says_so_and_does_nothing(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--input", str(write_images(tmp_path / "in", 3)), "--output", str(tmp_path / "out"), "--model", model]
    assert predict.main(flags) == 0
    assert "start-up" in capsys.readouterr().out
    monkeypatch.setattr(PartPredictor, "__call__", lambda *_: pytest.fail("predicted again"))
    assert predict.main([*flags, "--json"]) == 0
    shown = capsys.readouterr().out
    assert "finished before" in shown
    assert "3 images predicted" in shown
    assert json.loads(shown.splitlines()[-1])["now"] == 0


def test_another_job_in_the_same_folder_is_refused_with_the_remedy(tmp_path: Path, model: str) -> None:
    folder = write_images(tmp_path / "in", 3)
    run(folder, tmp_path / "out", model)
    other = loaded_model(classes=("w", "x", "y", "z"))
    save_model(tmp_path / "other", other.model, other.info, {})
    refused = {
        "model": lambda: run(folder, tmp_path / "out", str(tmp_path / "other")),
        "format": lambda: run(folder, tmp_path / "out", model, format="csv"),
        "top_k": lambda: run(folder, tmp_path / "out", model, top_k=1),
        "input": lambda: run(write_images(tmp_path / "in2", 3), tmp_path / "out", model),
    }
    for name, again in refused.items():
        with pytest.raises(ConfigError, match=rf"out: holds predictions of another {name}.*; give another --output"):
            again()
    (folder / "000.png").write_bytes(png(77))
    with pytest.raises(ConfigError, match=r"another fingerprint"):
        run(folder, tmp_path / "out", model)


def test_predictions_of_an_unknown_job_are_left_alone(tmp_path: Path, model: str) -> None:
    folder = write_images(tmp_path / "in", 3)
    run(folder, tmp_path / "out", model)
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(ConfigError, match="not known; give another --output"):
        run(folder, tmp_path / "out", model)


def test_a_second_process_is_refused_while_the_first_writes(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "in", 3)
    plain = PartPredictor.__call__

    def meanwhile(self: PartPredictor, decoded: Any) -> Any:
        with pytest.raises(ConfigError, match="another process writes its predictions here"):
            run(folder, tmp_path / "out", model)
        return plain(self, decoded)

    monkeypatch.setattr(PartPredictor, "__call__", meanwhile)
    assert run(folder, tmp_path / "out", model)["predicted"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "nowhere"], "--input nowhere: does not exist"),
        (["--input", "empty"], "--input empty: holds no images"),
        (["--input", "notes.txt"], "--input notes.txt: not an image; name an image"),
        (["--input", "odd.parquet"], "odd.parquet: needs a column img or image; it has a"),
        (["--input", "torn.parquet"], "torn.parquet: not a readable Parquet file"),
        (["--input", "in", "--output", "notes.txt"], "notes.txt: cannot be written"),
        (["--input", "in", "--output", "in/out"], "--output in/out: lies in --input in"),
        (["--input", "in/000.png", "--output", "in"], "would replace the image"),
        (["--input", "in", "--device", "nonsense"], "--device nonsense"),
        (["--input", "in", "--model", "nobody"], "--model nobody"),
        (["--input", "in", "--top-k", "0"], "--top-k 0: use 1 or more"),
        (["--input", "in", "--threshold", "2"], "--threshold 2: use a probability"),
        (["--input", "in", "--max-bad", "2"], "--max-bad 2: use a share"),
        (["--input", "in", "--format", "xml"], "--format"),
        ([], "--input"),
    ],
)
def test_bad_usage_is_one_clear_error_and_exit_2(
    tmp_path: Path,
    model: str,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "in", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing to see")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "odd.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    assert predict.main(["--model", model, *flags]) == 2
    shown = capsys.readouterr()
    assert message in " ".join(shown.err.split())
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("size", "orientation", "shown_size"),
    [((16, 16), 1, (16, 16)), ((300, 40), 1, (300, 40)), ((700, 900), 1, (700, 900)), ((90, 60), 6, (60, 90))],
    ids=["tiny", "wide", "large", "turned by EXIF"],
)
def test_one_picture_is_answered_and_shown_in_its_own_shape(
    tmp_path: Path,
    model: str,
    size: tuple[int, int],
    orientation: int,
    shown_size: tuple[int, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.write_bytes(encode(Image.new("RGB", size, (200, 30, 30)), "jpeg", exif=exif))
    flags = ["--input", str(photo), "--output", str(tmp_path / "out"), "--model", model, "--top-k", "3", "--json"]
    assert predict.main(flags) == 0
    shown = capsys.readouterr().out.splitlines()
    found = json.loads(shown[-1])
    predictor = Predictor(model, "cpu")
    (expected,) = predictor.answers(predictor.predict(predictor.decode(photo.read_bytes())[None]), 3)
    assert shown[0] == expected.label == found["label"]
    assert [tuple(one) for one in found["top_k"]] == expected.top_k
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["photo.png"]
    picture = np.asarray(Image.open(tmp_path / "out/photo.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero(np.abs(picture - (200, 30, 30)).sum(2) < 20)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert width > 250
    assert height / width == pytest.approx(shown_size[1] / shown_size[0], rel=0.03)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A URI of a bucket on a local server; {} stands for the path in it."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    query = f"?endpoint_override=http://{host}:{port}&scheme=http&allow_bucket_creation=true"
    files, root = fs.FileSystem.from_uri(f"s3://photos{query}")
    files.create_dir(root)
    yield "s3://photos/{}" + query
    patch.undo()
    server.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("_small_parts")
def test_an_object_store_holds_input_and_output(tmp_path: Path, parquet: Path, model: str, bucket: str) -> None:
    from cifar.data.prepared import read_file, write_file

    local = parquet / "test-00000-of-00001.parquet"
    folder = write_images(tmp_path / "in", 20)
    write_file(bucket.format("data/test.parquet"), local.read_bytes())
    for path in folder.iterdir():
        write_file(bucket.format(f"images/{path.name}"), path.read_bytes())
    for given, here in (("data/test.parquet", local), ("images", folder)):
        uri, kept = bucket.format(f"out-{given}"), tmp_path / given
        manifest = run(bucket.format(given), uri, model)
        expected = run(here, kept, model)
        assert [part["rows"] for part in manifest["parts"]] == [part["rows"] for part in expected["parts"]]
        base, query = uri.split("?")
        for part in manifest["parts"]:
            data = read_file(f"{base}/{part['name']}?{query}")
            assert data is not None
            assert hashlib.sha256(data).hexdigest() == part["sha256"]
            found, wanted = pq.read_table(pa.BufferReader(data)), pq.read_table(kept / part["name"])
            assert found.drop(["id"]) == wanted.drop(["id"])
        assert read_file(f"{base}/.parts/job.json?{query}") is None
        assert run(bucket.format(given), uri, model) == manifest


@pytest.mark.parametrize(
    ("nodes", "device", "expected"),
    [
        ([{"CPU": 1}], "auto", (1, 0.5, 0, 0.5)),
        ([{"CPU": 2}], "auto", (2, 0.5, 0, 1)),
        ([{"CPU": 8}, {"CPU": 8}], "auto", (8, 0.01, 0, 1)),
        ([{}, {"CPU": 1}, {"CPU": 1}], "auto", (2, 0.01, 0, 0.5)),
        ([{"CPU": 16, "GPU": 4}], "auto", (4, 1, 1, 1)),
        ([{"CPU": 2, "GPU": 4}], "auto", (4, 0.25, 1, 1)),
        ([{"CPU": 16, "GPU": 4}], "cpu", (4, 3, 0, 1)),
    ],
)
def test_a_plan_leaves_every_node_the_cpu_to_decode(
    nodes: list[dict[str, float]], device: str, expected: tuple[float, ...]
) -> None:
    plan = make_plan(nodes, device, parts=100)
    assert (plan.actors, plan.actor_cpus, plan.actor_gpus, plan.decode_cpus) == expected
    assert make_plan(nodes, device, parts=1).actors == 1


def test_a_gpu_that_no_node_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device cuda: the cluster has no GPU"):
        make_plan([{"CPU": 4}], "cuda", parts=9)


SMALL_PARTS = """
import sys, time
from cifar.batch import execute, source
source._PART_ROWS = 16
execute.HERE_PIXEL_BYTES = {here}
decode = execute.decode_part
def slowly(part):
    time.sleep(0.1)
    return decode(part)
if {here}:
    execute.decode_part = slowly
from jobs import predict
sys.exit(predict.main(sys.argv[1:]))
"""


class Job:
    """`jobs/predict.py` with small parts in a process of its own, here or on Ray."""

    def __init__(self, given: Path, output: Path, model: str, on_ray: bool):
        code = SMALL_PARTS.format(here=0 if on_ray else 1 << 40)
        flags = ["--input", str(given), "--output", str(output), "--model", model]
        self._command = [sys.executable, "-c", code, *flags]
        self.output = output

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=ROOT, start_new_session=True)

    def done(self) -> int:
        return len(list(self.output.glob(".parts/*.npz")))


@pytest.fixture(scope="module")
def undisturbed(parquet: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """32 parts, predicted in one process."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert Job(parquet, output, model, on_ray=False).start().wait(240) == 0
    return files(output)


@pytest.mark.slow
def test_a_driver_that_is_killed_twice_changes_no_byte(
    tmp_path: Path, parquet: Path, model: str, undisturbed: dict[str, bytes]
) -> None:
    job = Job(parquet, tmp_path / "out", model, on_ray=False)
    for after in (5, 20):
        driver = job.start()
        wait_for(lambda after=after: job.done() >= after, f"{after} parts")
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
        assert not (tmp_path / "out/manifest.json").exists()
    assert job.start().wait(240) == 0
    assert files(tmp_path / "out") == undisturbed


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_a_killed_actor_and_a_killed_driver_change_no_byte(
    tmp_path: Path, parquet: Path, model: str, undisturbed: dict[str, bytes]
) -> None:
    job = Job(parquet, tmp_path / "out", model, on_ray=True)
    driver = job.start()
    wait_for(lambda: job.done() >= 5, "5 parts")
    for pid in wait_for(lambda: below(driver.pid, "ray::MapWorker"), "an actor"):
        os.kill(pid, signal.SIGKILL)
    seen = job.done()
    wait_for(lambda: job.done() > seen + 10 or driver.poll() is not None, "parts after the actor's death")
    if driver.poll() is None:  # on a busy machine this process may look too late
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        assert not (tmp_path / "out/manifest.json").exists()
    assert job.start().wait(240) == 0
    assert files(tmp_path / "out") == undisturbed


def test_files_that_a_node_wrote_elsewhere_are_missed(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "in", 3)
    monkeypatch.setattr("cifar.batch.part.write_file", lambda *_: None)
    with pytest.raises(ConfigError, match=r"part-00000.*were written elsewhere; name a folder that every"):
        run(folder, tmp_path / "out", model)
    assert not (tmp_path / "out/manifest.json").exists()


def test_small_jobs_do_without_ray(tmp_path: Path, model: str) -> None:
    folder = write_images(tmp_path / "in", 2)
    code = "import sys; sys.modules['ray'] = None; from jobs import predict; sys.exit(predict.main(sys.argv[1:]))"
    for given in (folder, folder / "000.png"):
        flags = ["--input", str(given), "--output", str(tmp_path / "out"), "--model", model]
        subprocess.run([sys.executable, "-c", code, *flags], check=True, cwd=ROOT)


def test_only_large_jobs_start_ray(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start() -> None:
        raise Started

    folder = write_images(tmp_path / "in", 3)
    monkeypatch.setattr(execute, "HERE_PIXEL_BYTES", 3 * 16 * 16 * 3 - 1)
    config = BatchConfig(input=str(folder), output=str(tmp_path / "out"), model=model)
    with find_model(model, "") as found, pytest.raises(Started):
        predict_all(config, found, start)
