"""Robustness: the numbers against plain predictions of the corrupted sample, the sample, and the report's section."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from cifar.config import ConfigError
from cifar.evaluate.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from cifar.evaluate.robustness import Robustness, draw_sample, robustness
from cifar.predictor import Predictor
from cifar.report import page
from cifar.report.robustness import title, view
from tests.test_evaluate import SIZE, write_prepared
from tests.test_predictor import loaded_model
from tests.test_report import NASTY, Page, pictures


@pytest.fixture
def prepared(tmp_path):
    return write_prepared(tmp_path / "prepared")


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(loaded_model(SIZE), device="cpu", batch_size=64, precision="fp32")


def test_the_numbers_are_those_of_plain_predictions_of_the_corrupted_sample(prepared, predictor):
    found = robustness(predictor, prepared, "test", sample=90, seed=5)
    drawn = draw_sample(prepared, "test", 90, 5)
    images, indices = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(drawn.indices)
    clean = predictor.predict(images).argmax(1) == drawn.labels
    assert (found.count, found.clean_accuracy) == (90, clean.mean())
    assert found.clean_accuracy_ci95[0] < found.clean_accuracy < found.clean_accuracy_ci95[1]
    every = []
    for result in found.corruptions:
        right = np.stack(
            [
                predictor.predict(corrupt(images, result.name, strength, 5, indices)).argmax(1) == drawn.labels
                for strength in STRENGTHS
            ]
        )
        assert [cell.accuracy for cell in result.cells] == right.mean(1).tolist()
        assert result.mean_accuracy == pytest.approx(right.mean())
        every.append(right)
    assert [result.name for result in found.corruptions] == list(CORRUPTIONS)
    by_image = np.concatenate(every).mean(0)
    assert found.mean_accuracy == pytest.approx(by_image.mean())
    assert found.standard_error == pytest.approx(stats.sem(by_image))
    assert found.worst.mean_accuracy == min(result.mean_accuracy for result in found.corruptions)


def test_the_examples_are_one_image_that_the_model_knows_and_what_becomes_of_it(prepared, predictor):
    found = robustness(predictor, prepared, "test", sample=50)
    assert found.original.prediction == found.label
    drawn = draw_sample(prepared, "test", 50, 0)
    place = next(i for i, image in enumerate(drawn.images) if (image == found.original.image).all())
    image = torch.from_numpy(drawn.images[place : place + 1]).permute(0, 3, 1, 2)
    index = torch.from_numpy(drawn.indices[place : place + 1])
    for result in found.corruptions:
        assert [example.strength for example in result.examples] == [1, 3, 5]
        for example in result.examples:
            damaged = corrupt(image, result.name, example.strength, 0, index)
            np.testing.assert_array_equal(example.image, damaged[0].permute(1, 2, 0))
            answer = predictor.predict(damaged)[0]
            assert example.prediction == predictor.classes[answer.argmax()]
            assert example.confidence == pytest.approx(answer.max(), abs=1e-5)


def test_examples_of_large_images_are_kept_small(tmp_path):
    prepared = write_prepared(tmp_path / "prepared", counts={"train": 8, "val": 8, "test": 8}, size=128)
    found = robustness(Predictor(loaded_model(128), device="cpu"), prepared, "val", sample=4)
    assert found.original.image.shape == found.corruptions[0].examples[0].image.shape == (96, 96, 3)


@pytest.mark.parametrize("batch_size", [7, 300])
def test_the_batch_size_changes_no_number(prepared, predictor, batch_size):
    other = Predictor(loaded_model(SIZE), device="cpu", batch_size=batch_size, precision="fp32")
    expected = robustness(predictor, prepared, "test", sample=30).to_dict()
    found = robustness(other, prepared, "test", sample=30).to_dict()
    assert found | {"seconds": 0} == expected | {"seconds": 0}


def test_the_result_is_json_without_pixels(prepared, predictor):
    values = json.loads(json.dumps(robustness(predictor, prepared, "val").to_dict()))
    assert (values["split"], values["count"], values["seed"]) == ("val", 8, 0)
    assert list(values["corruptions"]) == list(CORRUPTIONS)
    assert all(len(found["accuracy"]) == 5 for found in values["corruptions"].values())
    assert len(json.dumps(values)) < 10_000


def test_one_image_has_no_standard_error(prepared, predictor):
    assert robustness(predictor, prepared, "test", sample=1).standard_error is None


@pytest.mark.parametrize("count", [1, 10, 53, 209, 210, 1000])
def test_a_sample_has_its_size_and_each_class_in_proportion(prepared, count):
    """Its rows are the split's own: index, label and pixels belong together."""
    drawn = draw_sample(prepared, "test", count, seed=2)
    whole = next(prepared.batches("test", 1000))
    rows = np.searchsorted(whole.indices, drawn.indices)
    assert len(rows) == len(set(rows.tolist())) == min(count, 210)
    np.testing.assert_array_equal(drawn.labels, whole.labels[rows])
    np.testing.assert_array_equal(drawn.images, whole.images[rows])
    shares = np.bincount(whole.labels, minlength=4) * len(rows) / 210
    assert (abs(np.bincount(drawn.labels, minlength=4) - shares) < 1).all()


def test_samples_of_other_seeds_are_others_and_every_image_is_as_likely(prepared):
    drawn = [draw_sample(prepared, "test", 21, seed).indices for seed in range(200)]
    np.testing.assert_array_equal(drawn[3], draw_sample(prepared, "test", 21, 3).indices)
    assert len({tuple(indices) for indices in drawn}) == 200
    frequencies = np.bincount(np.concatenate(drawn) - 48, minlength=210)
    assert stats.chisquare(frequencies).pvalue > 1e-4


def test_what_does_not_fit_is_refused(prepared, predictor):
    with pytest.raises(ConfigError, match="--sample 0"):
        robustness(predictor, prepared, "test", sample=0)
    with pytest.raises(ConfigError, match="--image-size 16"):
        robustness(predictor, replace(prepared, image_size=32), "test")
    with pytest.raises(ConfigError, match="--split nonsense"):
        robustness(predictor, prepared, "nonsense")


# The section of a report


def render(found: Robustness) -> str:
    """A page of this section alone, included as any report's template may."""
    source = (
        '{% extends "base.html" %}{% import "robustness.html" as section %}'
        "{% block main %}{{ section.section(robustness) }}{% endblock %}"
    )
    return page._environment().from_string(source).render(version="0", made_at="now", robustness=view(found))


def test_the_section_says_every_number_in_a_table_of_four_groups(prepared, predictor):
    found = robustness(predictor, prepared, "test", sample=60)
    read = Page(render(found))
    for result in found.corruptions:
        row = [*(cell.accuracy for cell in result.cells), result.mean_accuracy]
        assert "".join([title(result.name), *map(page.percent, row)]) in "".join(read.text.split("\n"))
    assert f"{title(found.worst.name)} hurts most: {page.percent(found.worst.mean_accuracy)}" in read.text
    for said in (found.clean_accuracy, found.mean_accuracy, found.standard_error):
        assert said is not None
        assert page.percent(said) in read.text
    assert [th.get("scope") for th in read.all("th")].count("rowgroup") == 4
    strengths = [float((cell["style"] or "").partition(":")[2]) for cell in read.all("td") if cell.get("style")]
    assert len(strengths) == 16 * 6
    assert all(0 <= strength <= 1 for strength in strengths)


def test_the_strips_hold_the_image_as_it_is_and_its_damaged_ones(prepared, predictor):
    found = robustness(predictor, prepared, "test", sample=20)
    images = Page(render(found)).all("img")
    assert len(images) == 15
    for image, result in zip(images, found.corruptions, strict=True):
        assert title(result.name) in (image["alt"] or "")
        expected = [found.original.image, *(example.image for example in result.examples)]
        np.testing.assert_array_equal(pictures(image["src"] or "", SIZE), expected)


def test_class_names_are_text_never_markup(tmp_path):
    prepared = write_prepared(tmp_path / "prepared", NASTY)
    html = render(robustness(Predictor(loaded_model(SIZE, NASTY), device="cpu"), prepared, "val"))
    read = Page(html)
    assert read.all("script") == []
    assert all(image.keys() <= {"class", "src", "alt", "style"} for image in read.all("img"))
    assert "49" not in read.text.split("Examples")[1]  # of {{ 7 * 7 }}


def test_a_model_that_knows_nothing_or_loses_nothing_has_a_section(prepared, predictor):
    found = robustness(predictor, prepared, "test", sample=1)
    perfect = [replace(one, mean_accuracy=1.0) for one in found.corruptions]
    for clean in (0.0, 1.0):
        text = Page(render(replace(found, clean_accuracy=clean, corruptions=tuple(perfect)))).text
        assert "No corruption lowers the accuracy" in text
        assert "standard error" not in text.partition("Point at")[0]
