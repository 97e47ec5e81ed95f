"""Likely label errors: the pure part against plain loops and against noise of a known kind; the job from flipped labels
to the CSV, the report and back to the image."""

import csv
import io
import json
import shutil
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
import torch
from PIL import Image
from scipy.special import softmax
from sklearn.datasets import load_digits

from cifar.config import Config
from cifar.data import Prepared
from cifar.evaluate.evaluation import wilson_interval
from cifar.evaluate.label_errors import NOBODY, find_label_errors, review, review_to_dict
from cifar.model_dir import load_model
from cifar.report import write_report
from cifar.report.label_errors import COLUMNS
from cifar.run_dir import RunDir
from cifar.tune.folds import fit_fold, make_folds
from jobs import evaluate as evaluate_job
from jobs import train as train_job
from tests.images import encode, write_parquet
from tests.processes import alive, below, wait_for
from tests.test_evaluate import CLASSES, SIZE, write_prepared
from tests.test_report import NASTY, Page, make_evaluation, pictures

ROOT = Path(__file__).parent.parent
TRAIN, FLIPPED = 1400, 70
"""Digits, and those of them whose label is changed: 5 %."""
EPOCHS = 16
NETWORK = [
    *("--image-size", "16", "--widths", "16", "32", "--depths", "1", "--scales", "1", "--batch-size", "32"),
    *("--flip", "none", "--tta", "none", "--optimizer", "adam", "--lr", "0.01", "--label-smoothing", "0"),
    *("--epochs", str(EPOCHS)),
]


def random_case(seed: int, count: int = 300, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float32 (N,C) that lean towards the labels int64 (N,), by chance more or less."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(0, 1.5, (count, classes)) + 2 * np.eye(classes)[labels]
    return softmax(logits, axis=1).astype(np.float32), labels


def by_loops(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Confident learning as equations 1 to 3 of the paper say it, image by image."""
    classes = probabilities.shape[1]
    thresholds = []
    for j in range(classes):
        own = [float(p[j]) for p, label in zip(probabilities, labels, strict=True) if label == j]
        thresholds.append(sum(own) / len(own) if own else float("inf"))
    joint = np.zeros((classes, classes), int)
    confident = []
    for p, label in zip(probabilities, labels, strict=True):
        reached = [(float(p[j]), -j) for j in range(classes) if p[j] >= thresholds[j]]
        confident.append(-max(reached)[1] if reached else NOBODY)
        if reached:
            joint[label, confident[-1]] += 1
    estimated = np.zeros((classes, classes))
    for i in range(classes):
        for j in range(classes):
            share = joint[i, j] / joint[i].sum() if joint[i].sum() else float(i == j)
            estimated[i, j] = share * sum(label == i for label in labels)
    return {"thresholds": thresholds, "joint": joint, "confident": confident, "estimated": estimated}


@pytest.mark.parametrize("seed", range(5))
def test_confident_learning_is_what_the_paper_says(seed: int) -> None:
    probabilities, labels = random_case(seed)
    expected, found = by_loops(probabilities, labels), find_label_errors(probabilities, labels)
    np.testing.assert_allclose(found.thresholds, expected["thresholds"])
    np.testing.assert_array_equal(found.joint, expected["joint"])
    np.testing.assert_allclose(found.estimated, expected["estimated"])
    confident = np.array(expected["confident"])
    likely = (confident != NOBODY) & (confident != labels)
    assert 0 < likely.sum() < len(labels) / 2
    np.testing.assert_array_equal(found.likely, likely)
    np.testing.assert_array_equal(found.suggested, np.where(likely, confident, probabilities.argmax(1)))
    assert found.likely.sum() == found.joint.sum() - np.trace(found.joint)
    assert found.errors == pytest.approx(expected["estimated"].sum() - np.trace(expected["estimated"]))


def test_images_that_no_class_is_sure_of_are_not_counted_and_a_label_without_any_is_taken_to_be_right() -> None:
    probabilities = np.array([[0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4], [0.4, 0.4, 0.2]], np.float32)
    found = find_label_errors(probabilities, np.array([0, 0, 1, 1]))
    # Thresholds 0.7 and 0.35; class 2 is no image's label, and so none's suggestion.
    np.testing.assert_allclose(found.thresholds, [0.7, 0.35, np.inf])
    assert found.joint.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert found.estimated.tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 0]]
    sure_of_none = find_label_errors(np.array([[0.9, 0.1], [0.1, 0.9]], np.float32)[[0, 1, 0]], np.array([0, 0, 1]))
    assert sure_of_none.joint.tolist() == [[1, 1], [1, 0]]
    assert sure_of_none.errors == 2


def noisy(seed: int, sure: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, given labels, true labels, and the matrix (C,C) of transitions from true to given ones.

    The probabilities know the true label as well as `sure` makes them, and not the given one.
    """
    transitions = np.array([[0.94, 0.05, 0.01, 0], [0, 1, 0, 0], [0.02, 0, 0.9, 0.08], [0, 0.1, 0, 0.9]])
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 4, count)
    given = (rng.random((count, 1)) > transitions.cumsum(1)[true]).sum(1)
    logits = rng.normal(0, 1, (count, 4)) + sure * np.eye(4)[true]
    return softmax(logits, axis=1).astype(np.float32), given, true, transitions


def test_where_the_networks_never_err_the_joint_of_given_and_true_labels_is_exact() -> None:
    """The paper's theorem 1; its condition holds as no image lies between two classes."""
    _, given, true, _ = noisy(0, 0)
    rng = np.random.default_rng(1)
    probabilities = np.full((len(true), 4), 0.02, np.float32)
    probabilities[np.arange(len(true)), true] = 0.94
    probabilities += rng.uniform(-1e-3, 1e-3, probabilities.shape)
    found = find_label_errors((probabilities / probabilities.sum(1, keepdims=True)).astype(np.float32), given)
    truth = np.zeros((4, 4))
    np.add.at(truth, (given, true), 1)
    np.testing.assert_allclose(found.estimated, truth)
    np.testing.assert_array_equal(found.likely, given != true)
    np.testing.assert_array_equal(found.suggested, true)
    assert found.errors == (given != true).sum()


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_a_known_joint_is_estimated_and_its_errors_come_first(seed: int) -> None:
    probabilities, given, true, _ = noisy(seed, sure=7)
    found = find_label_errors(probabilities, given)
    truth = np.zeros((4, 4))
    np.add.at(truth, (given, true), 1)
    np.testing.assert_allclose(found.estimated, truth, atol=0.003 * len(true))
    wrong = given != true
    assert found.errors == pytest.approx(wrong.sum(), rel=0.05)
    first = found.order[: wrong.sum()]
    assert wrong[first].mean() > 0.97
    assert wrong[found.likely].mean() > 0.97
    assert np.array_equal(np.sort(found.order), np.arange(len(true)))


def test_networks_that_err_are_taken_for_wrong_labels() -> None:
    """Why the report calls the estimate none of wrong labels alone: here all labels are right."""
    probabilities, _, true, _ = noisy(0, sure=1.5)
    assert find_label_errors(probabilities, true).errors > 0.02 * len(true)


def test_the_interval_of_the_errors_is_wilsons_for_one_label_and_holds_what_chance_gives() -> None:
    probabilities, labels = random_case(0, classes=2)
    found = find_label_errors(probabilities, np.zeros_like(labels))
    assert found.errors == 0
    assert found.errors_ci95 == (0.0, pytest.approx(len(labels) * wilson_interval(0, int(found.joint.sum()))[1]))
    # Of a large population's errors, the intervals of samples hold the true number 95 times of 100.
    probabilities, given, *_ = noisy(5, sure=4)
    rng = np.random.default_rng(0)
    held = 0
    whole = find_label_errors(probabilities, given).errors / len(given)
    for _ in range(200):
        some = rng.choice(len(given), 2000)
        low, high = find_label_errors(probabilities[some], given[some]).errors_ci95
        held += low <= 2000 * whole <= high
    assert 180 <= held <= 200


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.full((2, 3), 1 / 3), np.array([0, 3]), "labels must be 0 to 2"),
        (np.full((2, 3), 1 / 3), np.array([-1, 0]), "labels must be 0 to 2"),
        (np.full((2, 3), 1 / 3), np.array([0]), r"must be \(N, C\) and \(N,\)"),
        (np.full((0, 3), 1 / 3), np.array([], np.int64), r"must be \(N, C\) and \(N,\)"),
        (np.array([[2.0, -1.0]]), np.array([0]), "0 or more"),
        (np.array([[3.0, 4.0]]), np.array([0]), "their sum 1"),
        (np.array([[np.nan, 1.0]]), np.array([0]), "their sum 1"),
    ],
)
def test_what_is_no_probability_or_label_is_refused(
    probabilities: np.ndarray, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_label_errors(probabilities.astype(np.float32), labels)


def make_review(folder: Path, classes: tuple[str, ...] = CLASSES) -> Any:
    """Of the images of train and val, by probabilities that lean towards the labels."""
    prepared = write_prepared(folder, classes, {"train": 80, "val": 20, "test": 10})
    table = pa.concat_tables(prepared.table(split, ["image", "label", "index"]) for split in ("train", "val"))
    rng = np.random.default_rng(3)
    labels = table.column("label").to_numpy()
    logits = rng.normal(0, 1, (100, len(classes))) + 1.5 * np.eye(len(classes))[labels]
    probabilities = softmax(logits, axis=1).astype(np.float32)
    return prepared, table, review(prepared, table, probabilities, ("train", "val"), folds=3, path="runs/x-3-folds")


def test_a_suspect_has_the_id_the_split_the_index_and_the_pixels_of_one_image(tmp_path: Path) -> None:
    prepared, _, found = make_review(tmp_path / "prepared")
    assert len(found.suspects) == 24
    assert [suspect.label_probability for suspect in found.suspects] == sorted(found.found.scores)[:24]
    for suspect in found.suspects:
        batch = next(prepared.batches(suspect.split, 1000))
        (row,) = np.flatnonzero(batch.indices == suspect.index)
        np.testing.assert_array_equal(suspect.image, batch.images[row])
        assert suspect.id == f"{suspect.split}/{suspect.index}.png"
        assert suspect.label == CLASSES[batch.labels[row]]
    assert {suspect.split for suspect in found.suspects} == {"train", "val"}


def test_the_pairs_are_the_confident_joint_off_the_diagonal(tmp_path: Path) -> None:
    _, _, found = make_review(tmp_path / "prepared")
    joint = found.found.joint
    counts = {
        (label, other): joint[row, column]
        for row, label in enumerate(CLASSES)
        for column, other in enumerate(CLASSES)
        if row != column and joint[row, column]
    }
    assert {(pair.label, pair.suggested): pair.likely for pair in found.pairs} == dict(
        sorted(counts.items(), key=lambda item: -item[1])[:10]
    )
    assert [pair.likely for pair in found.pairs] == sorted((pair.likely for pair in found.pairs), reverse=True)
    for pair in found.pairs:
        assert pair.ci95[0] <= pair.estimated <= pair.ci95[1]


def test_the_report_has_the_section_the_csv_and_the_numbers(tmp_path: Path) -> None:
    _, _, found = make_review(tmp_path / "prepared")
    evaluation = make_evaluation(tmp_path / "evaluated")
    path = write_report(tmp_path / "report", evaluation, label_review=found)
    shown = Page(path.read_text())
    assert f"finds {found.found.likely.sum()} likely errors" in shown.text
    assert {"href": "#label-errors"} in shown.all("a")
    assert {"href": "label_errors.csv"} in shown.all("a")
    images = [image for image in shown.all("img") if (image["alt"] or "").startswith("Labelled ")][-24:]
    for image, suspect in zip(images, found.suspects, strict=True):
        assert image["alt"] == f"Labelled {suspect.label}, suggested {suspect.suggested}"
        assert image["src"]
        np.testing.assert_array_equal(pictures(image["src"], SIZE)[0], suspect.image)
    values = json.loads((tmp_path / "report/report.json").read_text())["label_errors"]
    assert values == json.loads(json.dumps(review_to_dict(found)))
    assert (values["count"], values["folds"], values["likely_errors"]) == (100, 3, int(found.found.likely.sum()))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report/label_errors.csv").read_text())))
    assert tuple(rows[0]) == COLUMNS
    assert [row["id"] for row in rows[:24]] == [suspect.id for suspect in found.suspects]
    assert sorted(row["id"] for row in rows) == sorted(found.rows.column("id").to_pylist())
    assert sum(row["likely_error"] == "1" for row in rows) == values["likely_errors"]
    for row in rows:
        place = found.rows.column("id").to_pylist().index(row["id"])
        probabilities = found.probabilities[place]
        assert row["label"] == CLASSES[found.labels[place]]
        assert float(row["label_probability"]) == pytest.approx(probabilities[found.labels[place]], rel=1e-5)
        other = probabilities[CLASSES.index(row["suggested_label"])]
        assert float(row["suggested_probability"]) == pytest.approx(other, rel=1e-5)


def test_without_a_review_there_is_no_section(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report", make_evaluation(tmp_path / "evaluated"))
    assert "label-errors" not in path.read_text()
    assert "label_errors" not in json.loads((tmp_path / "report/report.json").read_text())
    assert not (tmp_path / "report/label_errors.csv").exists()


def test_class_names_are_text_in_the_section_and_one_field_in_the_csv(tmp_path: Path) -> None:
    names = (*NASTY[:3], 'a,"b"\n')
    _, _, found = make_review(tmp_path / "prepared", names)
    path = write_report(tmp_path / "report", make_evaluation(tmp_path / "evaluated", names), label_review=found)
    shown = Page(path.read_text())
    assert not shown.all("script")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report/label_errors.csv").read_text())))
    assert {row["label"] for row in rows} == set(names)


@pytest.mark.parametrize("count", ["1", "-2"])
def test_one_training_is_refused(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_job.main(["--label-errors", count]) == 2
    assert f"--label-errors {count}: use 2 trainings or more, or 0 for none" in capsys.readouterr().err


def test_a_fold_is_validated_on_some_rows_of_those_that_it_leaves_out(here: Config, prepared: Prepared) -> None:
    """And leaves easy images out by numbers that reach beyond those rows."""
    config = replace(here, train=replace(here.train, epochs=4, skip_easy=0.5))
    table, folds = make_folds(prepared, 2, seed=0)
    run_dir = RunDir(f"{here.run.storage}/fold")
    summary = fit_fold(config, prepared, table.combine_chunks(), folds[0], run_dir, torch.device("cpu"), most_val=50)
    assert [row["val_count"] for row in summary["history"]] == [44] * 4
    assert load_model(f"{run_dir.path}/model").info.fingerprint == prepared.fingerprint


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """scikit-learn's digits as 1,400 train and 397 test rows in Parquet, 70 labels of train changed to another class
    drawn at random; the folder, the labels as they were and as they are, int64 (1400,)."""
    folder = tmp_path_factory.mktemp("flipped")
    pixels, labels = load_digits(return_X_y=True)
    images = [encode(Image.fromarray((image * 15).astype(np.uint8))) for image in np.asarray(pixels).reshape(-1, 8, 8)]
    true = np.asarray(labels).astype(np.int64)
    given, rng = true.copy(), np.random.default_rng(0)
    rows = rng.choice(TRAIN, FLIPPED, replace=False)
    given[rows] = (given[rows] + rng.integers(1, 10, FLIPPED)) % 10
    write_parquet(folder / "data/train.parquet", list(images[:TRAIN]), given[:TRAIN].tolist())
    write_parquet(folder / "data/test.parquet", list(images[TRAIN:]), given[TRAIN:].tolist())
    return folder, true[:TRAIN], given[:TRAIN]


@pytest.fixture(scope="module")
def reviewed(flipped: tuple[Path, np.ndarray, np.ndarray]) -> Iterator[list[dict[str, str]]]:
    """The rows of the CSV that the job writes of a model trained on the flipped labels."""
    import ray

    folder = flipped[0]
    storage = ["--storage", str(folder / "runs")]
    assert train_job.main(["--data", str(folder / "data"), *NETWORK, *storage, "--name", "r", "--workers", "0"]) == 0
    assert evaluate_job.main(command_for(folder, "report")) == 0
    yield rows_of(folder / "report")
    ray.shutdown()


def command_for(folder: Path, name: str) -> list[str]:
    flags = ["--model", str(folder / "runs/r"), "--label-errors", "3", "--output", str(folder / name)]
    return [*flags, "--storage", str(folder / f"{name}-runs"), "--json"]


def rows_of(report: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((report / "label_errors.csv").read_text())))


@pytest.mark.slow
@pytest.mark.ray
def test_flipped_labels_come_first_and_can_be_found_in_the_source(
    flipped: tuple[Path, np.ndarray, np.ndarray], reviewed: list[dict[str, str]]
) -> None:
    folder, true, given = flipped
    assert len(reviewed) == TRAIN
    assert {row["split"] for row in reviewed} == {"train", "val"}
    places = []
    for row in reviewed:
        name, _, place = row["id"].partition("#")
        assert name == "train.parquet"
        assert row["label"] == str(given[int(place)])
        places.append(int(place))
    assert sorted(places) == list(range(TRAIN))
    wrong = true != given
    assert wrong[places[:FLIPPED]].mean() > 0.9
    assert wrong[places[: 2 * FLIPPED]].sum() >= 0.97 * FLIPPED
    likely = [place for row, place in zip(reviewed, places, strict=True) if row["likely_error"] == "1"]
    assert wrong[likely].mean() > 0.9
    assert wrong[likely].sum() > 0.5 * FLIPPED, "those that no network is unsure of"
    suggested = {place: row["suggested_label"] for row, place in zip(reviewed, places, strict=True)}
    assert np.mean([suggested[place] == str(true[place]) for place in np.flatnonzero(wrong)]) > 0.9
    values = json.loads((folder / "report/report.json").read_text())["label_errors"]
    assert values["estimated_errors"] == pytest.approx(FLIPPED, rel=0.35)
    # The picture in the report is that of the row.
    source = pq.read_table(folder / "data/train.parquet").column("img").to_pylist()
    shown = Page((folder / "report/report.html").read_text()).all("img")
    first = next(image for image in shown if ", suggested " in (image["alt"] or ""))
    original = np.asarray(Image.open(io.BytesIO(source[places[0]]["bytes"])).convert("RGB"))
    assert first["src"]
    small = np.asarray(Image.fromarray(pictures(first["src"], 16)[0]).resize((8, 8), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - original).mean() < 20
    others = [np.asarray(Image.open(io.BytesIO(one["bytes"])).convert("RGB")) for one in source]
    distances = [np.abs(small.astype(int) - other).mean() for other in others]
    assert int(np.argmin(distances)) == places[0]


@pytest.mark.slow
@pytest.mark.ray
def test_killed_in_its_middle_it_goes_on_and_comes_to_the_same(
    flipped: tuple[Path, np.ndarray, np.ndarray], reviewed: list[dict[str, str]]
) -> None:
    folder, *_ = flipped
    command = [sys.executable, "jobs/evaluate.py", *command_for(folder, "killed")]

    def epochs() -> list[int]:
        return [len(path.read_text().splitlines()) for path in folder.glob("killed-runs/*/fold-*/metrics.jsonl")]

    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(2 <= count < EPOCHS - 2 for count in epochs()), "a fold in its middle")
        children = below(driver.pid, "ray::answer_fold")
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert children
    wait_for(lambda: not any(map(alive, children)), "the folds' processes to end")
    assert sum(epochs()) < 3 * EPOCHS
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"of {EPOCHS} epochs were trained before" in done.stderr
    assert rows_of(folder / "killed") == reviewed


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("group", "setting", "value", "code", "message"),
    [
        ("optim", "lr", 1e30, 1, "fold-1: the loss is not finite"),
        ("train", "batch_size", 1000, 2, "--label-errors 3: leaves 933 images to train on, and the model takes 1000"),
    ],
)
@pytest.mark.usefixtures("reviewed")
def test_what_cannot_be_trained_is_one_line(
    flipped: tuple[Path, np.ndarray, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    group: str,
    setting: str,
    value: float,
    code: int,
    message: str,
) -> None:
    shutil.copytree(flipped[0] / "runs/r/model", tmp_path / "model")
    file = tmp_path / "model/config.json"
    description = json.loads(file.read_text())
    description["config"][group][setting] = value
    file.write_text(json.dumps(description))
    flags = ["--label-errors", "3", "--output", str(tmp_path / "report"), "--storage", str(tmp_path / "runs")]
    assert evaluate_job.main(["--model", str(tmp_path / "model"), *flags]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "report").exists()
