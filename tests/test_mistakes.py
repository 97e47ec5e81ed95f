"""Ensembles, and what a report says of each mistake: what sways the answer, and which training images are like it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cifar.calibration import Calibration
from cifar.config import ConfigError, ModelConfig
from cifar.data.prepared import Prepared
from cifar.evaluate import Ensemble, calibrate, evaluate, explain, to_dict
from cifar.evaluate.mistakes import nearest_images, saliency_maps
from cifar.model_dir import LoadedModel
from cifar.predictor import Predictor
from cifar.report import write_report
from tests.test_evaluate import SIZE, write_prepared
from tests.test_predictor import loaded_model
from tests.test_report import Page


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return write_prepared(tmp_path / "prepared", counts={"train": 60, "val": 60, "test": 210})


@pytest.fixture
def predictors() -> list[Predictor]:
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        loaded = loaded_model(SIZE)
        for parameter in loaded.model.head.parameters():
            nn.init.normal_(parameter)
        found.append(Predictor(loaded, "cpu", batch_size=64, precision="fp32"))
    return found


def test_an_ensemble_answers_by_the_mean_of_calibrated_probabilities(predictors: list[Predictor]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (130, SIZE, SIZE, 3), np.uint8)
    predictors[1].calibration = Calibration(temperature=0.5)
    expected = np.mean([one.predict(images) for one in predictors], axis=0)
    assert np.abs(expected - predictors[0].predict(images)).max() > 0.01, "or nothing is tested"
    ensemble = Ensemble(predictors)
    np.testing.assert_allclose(ensemble.predict(images), expected, atol=1e-6)
    np.testing.assert_allclose(np.exp(ensemble.logits(images)), expected, atol=1e-6)


def test_an_ensemble_is_calibrated_by_itself(predictors: list[Predictor], prepared: Prepared) -> None:
    ensemble = Ensemble(predictors)
    before = evaluate(ensemble, prepared)
    assert calibrate(ensemble, prepared).temperature != 1
    assert evaluate(ensemble, prepared).loss < before.loss
    assert all(one.calibration == Calibration() for one in predictors)


def test_members_answer_the_same_question(predictors: list[Predictor]) -> None:
    with pytest.raises(ConfigError, match=r"--models: all must have the same classes.* and 4 at 8"):
        Ensemble([predictors[0], Predictor(loaded_model(8), "cpu")])


def test_an_explained_mistake_comes_into_report_and_numbers(
    predictors: list[Predictor], prepared: Prepared, tmp_path: Path
) -> None:
    for predictor in (predictors[0], Ensemble(predictors)):
        evaluation = explain(evaluate(predictor, prepared), predictor, prepared, saliency=True, neighbours=True)
        evaluation = replace(evaluation, members={"one": 0.25, "two": 0.75})
        found = json.loads(json.dumps(to_dict(evaluation)))
        assert len(found["mistakes"][0]["neighbours"]) == 3
        assert "image" not in found["mistakes"][0]["neighbours"][0]
        page = Page(write_report(tmp_path / "report", evaluation).read_text())
        assert "The nearest training images" in str(page.tags)
        assert "their mean is 50.00" in page.text
        assert "SmoothGrad" in page.text
    plain = explain(evaluation, predictors[0], prepared, saliency=False, neighbours=False)
    assert plain == evaluation
    page = Page(write_report(tmp_path / "report", evaluate(predictors[0], prepared)).read_text())
    assert "SmoothGrad" not in page.text
    assert "nearest" not in page.text


def test_the_nearest_are_those_of_the_highest_cosine(predictors: list[Predictor], prepared: Prepared) -> None:
    """Over batches of every size, and an image that is in train is nearest to itself."""
    train = next(prepared.batches("train", 1000))
    table = prepared.table("train", ["index", "id"]).to_pydict()
    ids = dict(zip(table["index"], table["id"], strict=True))
    wanted = next(prepared.batches("test", 5)).images
    images = np.concatenate([wanted, train.images[7:8]])
    for predictor in (predictors[0], Ensemble(predictors)):
        ours, theirs = (predictor.features(some) for some in (images, train.images))
        ours, theirs = (some / np.linalg.norm(some, axis=1, keepdims=True) for some in (ours, theirs))
        expected = np.argsort(-(ours @ theirs.T), axis=1)[:, :3]
        for batch_size in (7, 64):
            predictor.batch_size = batch_size
            found = nearest_images(predictor, prepared, images)
            assert [[one.index for one in row] for row in found] == train.indices[expected].tolist()
            assert all(one.id == ids[one.index] for row in found for one in row)
            assert found[-1][0].similarity == pytest.approx(1, abs=1e-5)
            np.testing.assert_array_equal(found[-1][0].image, train.images[7])


class Left(nn.Module):
    """Says class 1 as far as the left half is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images.float()[..., : SIZE // 2].mean((1, 2, 3)) / 255
        return torch.stack([torch.zeros_like(bright), bright, torch.zeros_like(bright), -bright], 1)


def test_the_map_shows_the_pixels_that_the_answer_hangs_on(prepared: Prepared) -> None:
    loaded: LoadedModel = replace(loaded_model(SIZE), model=Left())  # pyright: ignore[reportArgumentType]
    predictor = Predictor(loaded, "cpu", precision="fp32")
    mistakes = evaluate(predictor, prepared).mistakes
    assert {one.prediction for one in mistakes} == {"b"}
    (found, *_) = saliency_maps(predictor, mistakes)
    assert found.shape == (SIZE, SIZE)
    assert found[:, : SIZE // 2].min() > 0.2
    assert found[:, SIZE // 2 + 1 :].max() == 0
    np.testing.assert_array_equal(found, saliency_maps(predictor, mistakes)[0])


@pytest.mark.parametrize("name", ["cnn", "notebook", "mobilenet_v2", "wrn_10_1"])
def test_every_network_has_features_and_gradients(name: str, prepared: Prepared) -> None:
    from cifar.models import build_model

    loaded = loaded_model(SIZE)
    config = replace(loaded.info.config, model=ModelConfig(model=name, widths=(8, 8)))
    torch.manual_seed(0)
    model = build_model(config, 4, loaded.info.mean, loaded.info.std)
    predictor = Predictor(
        LoadedModel(model=model, info=replace(loaded.info, config=config), metrics={}), "cpu", batch_size=50
    )
    evaluation = evaluate(predictor, prepared)
    explained = explain(evaluation, predictor, prepared, saliency=True, neighbours=True)
    assert all(one.saliency is not None and np.isfinite(one.saliency).all() for one in explained.mistakes)
    assert all(len(one.neighbours) == 3 for one in explained.mistakes)
    assert predictor.features(next(prepared.batches("test", 60)).images).shape[0] == 60


def test_pictures_of_maps_are_small(predictors: list[Predictor], prepared: Prepared, tmp_path: Path) -> None:
    evaluation = explain(evaluate(predictors[0], prepared), predictors[0], prepared, saliency=True, neighbours=True)
    path = write_report(tmp_path, evaluation)
    assert path.stat().st_size < 2_000_000
    with Image.open(tmp_path / "figures/reliability.png") as picture:
        assert picture.width > 100
