"""evaluate: every number is checked against scikit-learn or the plain formula on the whole split at once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn import metrics
from sklearn.calibration import calibration_curve

from cifar.config import ConfigError
from cifar.data.prepared import Part, Prepared
from cifar.evaluate import evaluate, to_dict
from cifar.evaluate.evaluation import confused_pairs, reliability_bins, wilson_interval
from cifar.predictor import Predictor
from tests.test_predictor import loaded_model

CLASSES = ("a", "b", "c", "d")
SIZE = 16


def write_prepared(folder: Path, classes=CLASSES, counts=None, size: int = SIZE, **extras) -> Prepared:
    """A prepared set of noise whose mean grey rises with the class; train, val and test differ."""
    counts = counts or {"train": 40, "val": 8, "test": 210}
    generator = np.random.default_rng(0)
    parts, class_counts, first = {}, {}, 0
    for split, count in counts.items():
        labels = generator.permutation(np.arange(count) % len(classes))
        noise = generator.integers(0, 128, (count, size, size, 3), dtype=np.uint8)
        pixels = noise + (labels * (120 // len(classes))).astype(np.uint8)[:, None, None, None]
        columns = {
            "image": pa.array([image.tobytes() for image in pixels], pa.binary(size * size * 3)),
            "label": pa.array(labels, pa.int64()),
            "index": pa.array(np.arange(first, first + count), pa.int64()),
            "id": [f"{split}/{row}.png" for row in range(first, first + count)],
        }
        (folder / split).mkdir(parents=True)
        name = f"{split}/part-00000.parquet"
        pq.write_table(pa.table(columns), folder / name, row_group_size=50, compression="none")
        parts[split] = [Part(name, count, (folder / name).stat().st_size)]
        class_counts[split] = np.bincount(labels, minlength=len(classes)).tolist()
        first += count
    prepared = Prepared(
        path=str(folder),
        fingerprint="abc123",
        classes=tuple(classes),
        image_size=size,
        counts=counts,
        class_counts=class_counts,
        mean=(125.3, 123.0, 113.9),
        std=(63.0, 62.1, 66.7),
        source="digits",
        group_rows=50,
        parts=parts,
        **{
            "quarantined": 0,
            "duplicates": {"within_train": 0, "train_test": 0, "pairs": []},
            "source_stats": {"shapes": [[size, size, sum(counts.values())]], "num_shapes": 1, "modes": {"RGB": 258}}
            | {"value_range": [0, 255]},
            **extras,
        },
    )
    prepared.save()
    return Prepared.load(str(folder))


@pytest.fixture
def prepared(tmp_path) -> Prepared:
    return write_prepared(tmp_path / "prepared")


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(loaded_model(SIZE), device="cpu", batch_size=64)


@pytest.fixture
def truth(prepared, predictor) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and probabilities (N,C) of the whole test split at once."""
    batch = next(prepared.batches("test", 10_000))
    return batch.labels, softmax(predictor.logits(batch.images).astype(np.float64), axis=1)


def test_the_numbers_are_scikit_learns(prepared, predictor, truth):
    labels, probabilities = truth
    predictions = probabilities.argmax(1)
    found = evaluate(predictor, prepared)
    assert found.count == 210
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert found.loss == pytest.approx(metrics.log_loss(labels, probabilities, labels=range(4)), rel=1e-5)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, predictions, average="macro"))
    assert found.confusion_matrix.tolist() == metrics.confusion_matrix(labels, predictions).tolist()
    never: Any = 0  # scikit-learn's hints leave numbers out
    report = metrics.classification_report(
        labels, predictions, target_names=CLASSES, output_dict=True, zero_division=never
    )
    assert isinstance(report, dict)
    for name in CLASSES:
        expected = {key.replace("f1-score", "f1"): value for key, value in report[name].items()}
        assert found.per_class[name] == pytest.approx(expected)


def test_top5_is_scikit_learns_where_it_says_something(tmp_path):
    classes = tuple("abcdefgh")
    loaded = loaded_model(SIZE, classes)
    prepared = write_prepared(tmp_path / "prepared", classes)
    predictor = Predictor(loaded, device="cpu")
    batch = next(prepared.batches("test", 10_000))
    expected = metrics.top_k_accuracy_score(batch.labels, predictor.logits(batch.images), k=5, labels=range(8))
    found = evaluate(predictor, prepared).top5_accuracy
    assert found == pytest.approx(expected)
    assert 0 < found < 1


def test_top5_of_at_most_five_classes_is_one(prepared, predictor):
    assert evaluate(predictor, prepared).top5_accuracy == 1


def test_reliability_bins_are_scikit_learns_calibration_curve():
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0, 1, 2000)
    correct = generator.uniform(0, 1, 2000) < confidences**2
    accuracy, confidence = calibration_curve(correct, confidences, n_bins=15, strategy="uniform")
    bins = reliability_bins(confidences, correct)
    assert [b.accuracy for b in bins] == pytest.approx(accuracy)
    assert [b.confidence for b in bins] == pytest.approx(confidence)
    assert sum(b.count for b in bins) == 2000


def test_bins_hold_the_borders_of_the_range_and_empty_ones_are_left_out():
    bins = reliability_bins(np.array([0.0, 1.0, 1.0]), np.array([False, True, True]))
    assert [(b.count, b.accuracy) for b in bins] == [(1, 0.0), (2, 1.0)]


def test_ece_is_the_weighted_gap_between_confidence_and_accuracy(prepared, predictor, truth):
    labels, probabilities = truth
    confidences, correct = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidences > low) & (confidences <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    assert evaluate(predictor, prepared).ece == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("correct", "count", "expected"),
    [(940, 1000, (0.9235, 0.9531)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0))],
)
def test_the_interval_is_wilsons_also_where_the_normal_one_has_no_width(correct, count, expected):
    reference = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, count) == pytest.approx((reference.low, reference.high), abs=1e-6)
    assert wilson_interval(correct, count) == pytest.approx(expected, abs=1e-4)


def test_confused_pairs_are_the_largest_off_the_diagonal_with_their_share_of_the_class():
    matrix = np.array([[50, 3, 0], [0, 10, 0], [5, 1, 4]])
    found = [(pair.label, pair.prediction, pair.count, pair.share) for pair in confused_pairs(matrix, ("x", "y", "z"))]
    assert found == [("z", "x", 5, 0.5), ("x", "y", 3, pytest.approx(3 / 53)), ("z", "y", 1, 0.1)]


@pytest.mark.parametrize("batch_size", [7, 300])
def test_the_batch_size_changes_no_number(prepared, predictor, batch_size):
    expected = to_dict(evaluate(predictor, prepared))
    found = to_dict(evaluate(Predictor(loaded_model(SIZE), device="cpu", batch_size=batch_size), prepared))
    for key in ("count", "accuracy", "confusion_matrix", "top5_accuracy", "per_class"):
        assert found[key] == expected[key]
    assert (found["loss"], found["ece"]) == pytest.approx((expected["loss"], expected["ece"]), rel=1e-4)
    assert [m["id"] for m in found["mistakes"]] == [m["id"] for m in expected["mistakes"]]


def test_the_worst_mistakes_are_the_wrong_answers_of_the_highest_loss_with_their_own_pixels(prepared, predictor, truth):
    labels, probabilities = truth
    losses = -np.log(probabilities[np.arange(len(labels)), labels])
    losses[probabilities.argmax(1) == labels] = -1
    expected = np.argsort(-losses)[:24]
    batch = next(prepared.batches("test", 10_000))
    found = evaluate(predictor, prepared).mistakes
    assert [mistake.index for mistake in found] == batch.indices[expected].tolist()
    for mistake, row in zip(found, expected, strict=True):
        assert mistake.id == f"test/{mistake.index}.png"
        assert mistake.loss == pytest.approx(losses[row], rel=1e-4)
        assert (mistake.label, mistake.prediction) == (CLASSES[labels[row]], CLASSES[probabilities[row].argmax()])
        np.testing.assert_array_equal(mistake.image, batch.images[row])


def test_another_split_is_evaluated_when_asked_for(prepared, predictor):
    found = evaluate(predictor, prepared, "val")
    assert (found.split, found.count) == ("val", 8)


def test_the_result_is_json_and_has_the_keys_that_scripts_rely_on(prepared, predictor):
    values = json.loads(json.dumps(to_dict(evaluate(predictor, prepared))))
    promised = {"data", "split", "count", "accuracy", "accuracy_ci95", "loss", "macro_f1", "per_class"}
    promised |= {"confusion_matrix", "top5_accuracy", "ece", "train_seconds"}
    assert promised <= values.keys()
    assert values["train_seconds"] == 1.5
    assert values["accuracy_ci95"][0] <= values["accuracy"] <= values["accuracy_ci95"][1]


def test_other_class_names_are_refused_and_both_are_named(prepared, predictor):
    other = replace(prepared, classes=("a", "b", "d", "c"))
    with pytest.raises(ConfigError, match=r"--data digits: .*\(a, b, d, c\).*\(a, b, c, d\)"):
        evaluate(predictor, other)


def test_another_image_size_is_refused_with_the_remedy(prepared, predictor):
    with pytest.raises(ConfigError, match="--image-size 16"):
        evaluate(predictor, replace(prepared, image_size=32))


@pytest.mark.parametrize("split", ["test", "nonsense"])
def test_a_split_without_images_is_refused_and_the_others_are_named(prepared, predictor, split):
    with pytest.raises(ConfigError, match=rf"--split {split}.*train, val"):
        evaluate(predictor, replace(prepared, counts={"train": 40, "val": 8, "test": 0}), split)


@pytest.mark.parametrize("value", ["1.5", None, [], {}, True, -1, float("nan"), 10**400])
def test_a_training_time_that_is_none_is_left_out(prepared, value):
    predictor = Predictor(replace(loaded_model(SIZE), metrics={"train_seconds": value}), device="cpu")
    assert evaluate(predictor, prepared, "val").train_seconds is None
