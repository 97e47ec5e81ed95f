"""Calibration: what is fitted, what it is worth on other images, and that it goes wherever the model goes."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from cifar.calibration import CALIBRATION, Calibration
from cifar.config import ConfigError
from cifar.data.prepared import Prepared
from cifar.evaluate import calibrate, evaluate
from cifar.evaluate.confidence import find_threshold, fit_calibration, fit_temperature
from cifar.evaluate.evaluation import coverage_curve, quantile_slices, wilson_interval
from cifar.model_dir import load_model, save_model
from cifar.predictor import Predictor
from cifar.run_dir import RunDir, write_calibration
from cifar.store import Store
from tests.test_evaluate import SIZE, write_prepared
from tests.test_predictor import loaded_model


def drawn(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N,10), and labels drawn from what they are at this temperature."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 6, (count, 10))
    probabilities = softmax(logits / temperature, axis=1)
    labels = (probabilities.cumsum(1) > generator.random((count, 1))).argmax(1)
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_is_that_by_which_labels_were_drawn(temperature: float) -> None:
    assert fit_temperature(*drawn(20_000, temperature)) == pytest.approx(temperature, rel=0.05)


def loss_of(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    return float(-np.log(softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels]).mean())


def test_no_other_temperature_is_likelier() -> None:
    logits, labels = drawn(500, 1.7)

    def loss(temperature: float) -> float:
        return 500 * loss_of(logits, labels, temperature) + (np.log(temperature) / 0.5) ** 2 / 2

    best = fit_temperature(logits, labels)
    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))


def test_a_few_images_that_are_all_right_make_no_answer_certain() -> None:
    """Else the first wrong one would be a certain one: a loss without bound."""
    logits, labels = drawn(4000, 0.6)
    others = logits[2000:], labels[2000:]
    right = np.flatnonzero(logits[:2000].argmax(1) == labels[:2000])
    fitted = [fit_temperature(logits[rows], labels[rows]) for rows in right[: 20 * 40].reshape(20, 40)]
    assert max(loss_of(*others, temperature) for temperature in fitted) < 1.5 * loss_of(*others, 0.6)


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_is_always_or_never_right_has_a_finite_temperature(right: bool) -> None:
    logits = np.eye(4, dtype=np.float32).repeat(5, 0)
    labels = np.arange(4).repeat(5)
    assert 0.01 < fit_temperature(logits, labels if right else (labels + 1) % 4) < 100


def test_the_threshold_keeps_its_promise_on_other_images() -> None:
    """The lower end of the interval: in one of forty tries it may fail."""
    kept, shares = 0, []
    for seed in range(40):
        logits, labels = drawn(3000, 1.0, seed)
        fitted = fit_calibration(logits, labels, 0.95)
        logits, labels = drawn(20_000, 1.0, 1000 + seed)
        probabilities = softmax(logits / fitted.temperature, axis=1)
        accepted = probabilities.max(1) >= fitted.threshold
        kept += (probabilities.argmax(1) == labels)[accepted].mean() >= 0.95
        shares.append(accepted.mean())
    assert kept >= 37
    assert np.mean(shares) > 0.4


def test_the_threshold_is_the_lowest_that_will_do() -> None:
    generator = np.random.default_rng(0)
    confidences = np.round(generator.random(2000), 2).astype(np.float32)
    correct = generator.random(2000) < confidences
    threshold = find_threshold(confidences, correct, 0.9)

    def low(value: float) -> float:
        inside = correct[confidences >= value]
        return wilson_interval(int(inside.sum()), len(inside))[0]

    assert low(threshold) >= 0.9
    assert all(low(value) < 0.9 for value in np.unique(confidences) if value < threshold)


def test_too_few_images_promise_nothing() -> None:
    sure = np.ones(188, np.float32)
    assert find_threshold(sure, sure > 0, 0.98) == 0
    assert find_threshold(np.ones(189, np.float32), np.ones(189, bool), 0.98) == 1


def test_what_is_predicted_is_calibrated_everywhere(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared", counts={"train": 40, "val": 200, "test": 210})
    loaded = loaded_model(SIZE)
    images = next(prepared.batches("test", 1000)).images
    plain = Predictor(loaded, "cpu").logits(images)
    predictor = Predictor(loaded, "cpu")
    before = evaluate(predictor, prepared)
    calibration = calibrate(predictor, prepared)
    assert (calibration.split, calibration.count) == ("val", 200)
    assert abs(calibration.temperature - 1) > 0.05, "or nothing is tested"
    np.testing.assert_allclose(predictor.logits(images), plain / calibration.temperature, rtol=1e-6)
    np.testing.assert_allclose(predictor.predict(images), softmax(plain / calibration.temperature, axis=1), atol=1e-6)
    after = evaluate(predictor, prepared)
    assert after.accuracy == before.accuracy
    assert after.loss < before.loss
    assert after.ece_uncalibrated == pytest.approx(before.ece, abs=1e-6)
    save_model(tmp_path / "model", loaded.model, loaded.info, {})
    write_calibration(str(tmp_path / "model"), calibration)
    np.testing.assert_array_equal(Predictor(tmp_path / "model", "cpu").predict(images), predictor.predict(images))
    assert calibrate(predictor, prepared) == calibration, "of what the network says, not of what was fitted before"


def test_a_split_without_images_leaves_the_answers_alone(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared", counts={"train": 40, "val": 0, "test": 210})
    predictor = Predictor(loaded_model(SIZE), "cpu", calibration=Calibration(temperature=2.0))
    assert calibrate(predictor, prepared) == Calibration() == predictor.calibration


def test_answers_abstain_below_the_models_own_threshold_or_that_which_is_asked_for() -> None:
    predictor = Predictor(loaded_model(SIZE), "cpu", calibration=Calibration(threshold=0.7))
    probabilities = np.array([[0.8, 0.2, 0, 0], [0.6, 0.4, 0, 0]], np.float32)
    assert [answer.abstained for answer in predictor.answers(probabilities)] == [False, True]
    assert [answer.abstained for answer in predictor.answers(probabilities, threshold=0)] == [False, False]
    assert [answer.abstained for answer in predictor.answers(probabilities, threshold=0.9)] == [True, True]


def test_a_version_keeps_its_calibration_and_its_sum(tmp_path: Path) -> None:
    loaded = loaded_model(SIZE)
    save_model(tmp_path / "model", loaded.model, loaded.info, {})
    write_calibration(str(tmp_path / "model"), Calibration(temperature=1.5, threshold=0.9, target=0.98))
    store = Store(str(tmp_path / "store"))
    version = store.publish(str(tmp_path / "model"), "digits")
    assert CALIBRATION in version.files
    assert (
        store.describe(version)["numbers"] | {"temperature": 1.5, "threshold": 0.9}
        == store.describe(version)["numbers"]
    )
    with store.open(version) as folder:
        assert load_model(folder).calibration.temperature == 1.5
    (tmp_path / f"store/{version}/{CALIBRATION}").write_bytes(Calibration(threshold=0.1).to_json())
    with pytest.raises(ConfigError, match="not what was published"), store.open(version):
        pass


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"threshold": 2},
        {"threshold": None},
        {"count": float("inf")},
    ],
)
def test_a_strangers_calibration_is_one_clear_error(tmp_path: Path, values: dict[str, Any]) -> None:
    loaded = loaded_model(SIZE)
    save_model(tmp_path / "model", loaded.model, loaded.info, {})
    good = json.loads(Calibration().to_json())
    (tmp_path / "model" / CALIBRATION).write_text(json.dumps(good | values))
    with pytest.raises(ConfigError, match=r"calibration.json: not a calibration"):
        load_model(tmp_path / "model")


def test_the_calibration_of_other_weights_does_not_stay(tmp_path: Path) -> None:
    """As when a run goes on for more epochs, and is killed before it is calibrated anew."""
    loaded = loaded_model(SIZE)
    save_model(tmp_path / "checkpoint/model", loaded.model, loaded.info, {})
    run = RunDir(str(tmp_path / "run"))
    model = run.copy_model(str(tmp_path / "checkpoint"))
    write_calibration(model, Calibration(temperature=3.0))
    run.copy_model(str(tmp_path / "checkpoint"))
    assert load_model(model).calibration == Calibration()


def test_the_surest_images_are_counted_first() -> None:
    confidences = np.array([0.9, 0.5, 0.7, 0.8])
    correct = np.array([True, False, False, True])
    assert coverage_curve(confidences, correct, 4) == [(0.25, 1.0), (0.5, 1.0), (0.75, 2 / 3), (1.0, 0.5)]
    assert coverage_curve(confidences[:1], correct[:1]) == [(1.0, 1.0)]


def test_slices_hold_every_image_once(prepared: Prepared) -> None:
    """Against the images themselves."""
    evaluation = evaluate(Predictor(loaded_model(SIZE), "cpu"), prepared)
    images = next(prepared.batches("test", 1000)).images
    luma = images @ np.array([0.299, 0.587, 0.114])
    for by, values in (("brightness", luma.mean((1, 2))), ("contrast", luma.std((1, 2)))):
        found = [one for one in evaluation.slices if one.by == by]
        assert [one.count for one in found] == [42] * 5
        assert found[0].low == pytest.approx(values.min(), rel=1e-5)
        assert found[-1].high == pytest.approx(values.max(), rel=1e-5)
        assert all(left.high < right.low for left, right in itertools.pairwise(found))
        assert sum(one.count * one.accuracy for one in found) == pytest.approx(210 * evaluation.accuracy)
    assert [one.count for one in evaluation.slices if one.by == "confidence"] == [42] * 5


def test_images_that_are_all_alike_are_one_slice(prepared: Prepared) -> None:
    from cifar.evaluate.evaluation import Rows

    same = np.full(7, 0.5, np.float32)
    zeros = np.zeros(7, np.int64)
    rows = Rows(zeros, zeros, same, same.astype(np.float64), same > 0, same, same, same)
    assert [one.count for one in quantile_slices(rows, same > 0)] == [7, 7, 7]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return write_prepared(tmp_path / "prepared")
