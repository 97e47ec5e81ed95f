"""Predictor: the same answers whatever the layout, the batch size or the memory the images come in."""

import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar.config import Config, ConfigError, DataConfig, ModelConfig, TestTimeAugmentation
from cifar.model_dir import LoadedModel, ModelInfo, load_model, save_model
from cifar.models import build_model
from cifar.predictor import BATCH_BYTES, CLOSE, Predictor, default_batch_size, find_device
from cifar.recipes import RECIPES
from tests.images import encode

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)


def loaded_model(
    size: int = 16, classes: tuple[str, ...] = ("a", "b", "c", "d"), tta: TestTimeAugmentation = "none"
) -> LoadedModel:
    torch.manual_seed(0)
    config = Config(data=DataConfig(image_size=size), model=ModelConfig(widths=(8, 8), tta=tta))
    model = build_model(config, len(classes), MEAN, STD)
    info = ModelInfo(config=config, classes=classes, mean=MEAN, std=STD, fingerprint="f", source="digits")
    return LoadedModel(model=model.eval(), info=info, metrics={"train_seconds": 1.5})


def images(count: int = 11, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def exact(model: LoadedModel | Path, batch_size: int = 0) -> Predictor:
    """In float32, so that rounding hides nothing."""
    return Predictor(model, "cpu", batch_size, precision="fp32")


def test_probabilities_are_the_softmax_of_what_the_bare_model_says():
    loaded = loaded_model()
    with torch.inference_mode():
        expected = loaded.model(torch.from_numpy(images()).permute(0, 3, 1, 2)).softmax(1).numpy()
    found = exact(loaded).predict(images())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_mirror_averages_the_logits_of_the_image_and_its_mirror_image():
    """An untrained network is unsure of all of them."""
    plain, mirror = (exact(loaded_model(tta=tta)) for tta in ("none", "mirror"))
    expected = (plain.logits(images()) + plain.logits(images()[:, :, ::-1])) / 2
    np.testing.assert_allclose(mirror.logits(images()), expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(expected, plain.logits(images()), atol=1e-3)


def test_shift_weighs_the_image_in_place_as_much_as_both_shifted_ones():
    mirror, shift = (exact(loaded_model(tta=tta)) for tta in ("mirror", "shift"))
    padded = np.pad(images(), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    corners = mirror.logits(padded[:, :-2, :-2]) + mirror.logits(padded[:, 2:, 2:])
    expected = mirror.logits(images()) / 2 + corners / 4
    np.testing.assert_allclose(shift.logits(images()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_images_that_the_network_is_sure_of_are_asked_once(monkeypatch, batch_size):
    """Those below the margin get the mean, the others the plain answer, whatever else is in their batch."""
    plain, mirror = (exact(loaded_model(tta=tta), batch_size) for tta in ("none", "mirror"))
    means = mirror.logits(images())
    probabilities = np.sort(plain.predict(images()), axis=1)
    margins = probabilities[:, -1] - probabilities[:, -2]
    monkeypatch.setattr("cifar.predictor.SURE", float(np.median(margins)))
    unsure = margins < np.median(margins)
    assert 0 < unsure.sum() < len(unsure)
    expected = np.where(unsure[:, None], means, plain.logits(images()))
    np.testing.assert_allclose(mirror.logits(images()), expected, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr("cifar.predictor.SURE", 0.0)
    np.testing.assert_allclose(mirror.logits(images()), plain.logits(images()), rtol=1e-4, atol=1e-6)


def test_more_than_two_views_are_for_those_of_which_two_leave_it_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, shift = (exact(loaded_model(tta=tta)) for tta in ("mirror", "shift"))
    means, all_views = mirror.logits(images()), shift.logits(images())
    probabilities = np.sort(mirror.predict(images()), axis=1)
    margins = probabilities[:, -1] - probabilities[:, -2]
    monkeypatch.setattr("cifar.predictor.SURE_OF_TWO", float(np.median(margins)))
    expected = np.where(margins[:, None] < np.median(margins), all_views, means)
    np.testing.assert_allclose(shift.logits(images()), expected, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_what_is_close_is_answered_as_in_float32_and_the_rest_nearly_so() -> None:
    loaded = loaded_model()
    with torch.no_grad():
        loaded.model.head.weight.mul_(30)  # of an untrained network all answers are close
    many = images(200)
    expected = exact(loaded).predict(many)
    found = Predictor(loaded, "cpu", precision="bf16").predict(many)
    highest = np.sort(found, axis=1)
    close = highest[:, -1] - highest[:, -2] < CLOSE
    assert 0 < close.sum() < 100
    np.testing.assert_allclose(found[close], expected[close], rtol=1e-4)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert not np.allclose(found[~close], expected[~close], rtol=1e-4)


def test_array_and_tensor_layouts_give_the_same_answers():
    predictor = exact(loaded_model())
    tensor = torch.from_numpy(images()).permute(0, 3, 1, 2).contiguous()
    np.testing.assert_allclose(predictor.logits(images()), predictor.logits(tensor), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_the_batch_size_changes_neither_order_nor_count(batch_size):
    loaded = loaded_model()
    expected = exact(loaded).logits(images())
    found = exact(loaded, batch_size).logits(images())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_training_mode_model_is_put_into_evaluation_mode():
    loaded = loaded_model()
    loaded.model.train()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    exact(loaded).predict(images())
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_read_only_memory_gives_no_warning_and_is_left_alone():
    frozen = images()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact(loaded_model()).predict(frozen)
    np.testing.assert_array_equal(frozen, images())


def test_no_images_give_no_rows():
    assert exact(loaded_model()).predict(images(0)).shape == (0, 4)


def test_a_folder_gives_what_the_model_in_memory_gives(tmp_path: Path):
    loaded = loaded_model()
    save_model(tmp_path / "model", loaded.model, loaded.info, loaded.metrics)
    predictor = exact(tmp_path / "model")
    assert predictor.classes == ("a", "b", "c", "d")
    assert predictor.metrics == {"train_seconds": 1.5}
    np.testing.assert_allclose(predictor.predict(images()), exact(loaded).predict(images()), rtol=1e-5)
    assert replace(load_model(tmp_path / "model").info, source="") == replace(loaded.info, source="")


@pytest.mark.parametrize(
    "wrong",
    [
        images(2).astype(np.float32),
        images(2).transpose(0, 3, 1, 2),
        torch.from_numpy(images(2)),
        images(2)[0],
    ],
    ids=["float", "planes first", "tensor with channels last", "one image"],
)
def test_images_of_another_shape_or_type_are_refused_with_the_shape_wanted(wrong):
    with pytest.raises(ValueError, match=r"uint8 \((H, W, 3|N, 3, 16, 16)\)"):
        exact(loaded_model()).predict(wrong)


def test_an_unknown_device_is_one_line_that_names_the_flag():
    with pytest.raises(ConfigError, match="--device nonsense") as caught:
        find_device("nonsense")
    assert "\n" not in str(caught.value)


def test_images_of_any_size_are_fitted_as_training_images_were() -> None:
    """The way of a file: decode. Pixels that were decoded elsewhere take the same way from there on."""
    predictor = exact(loaded_model())
    rng = np.random.default_rng(1)
    shapes = [(16, 16, 3), (40, 24, 3), (9, 200, 3)]
    pictures = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    files = [encode(Image.fromarray(picture)) for picture in pictures]
    decoded = np.stack([predictor.decode(data) for data in files])
    np.testing.assert_array_equal(predictor.fit(pictures), decoded)
    np.testing.assert_array_equal(predictor.predict(pictures), predictor.predict(decoded))
    np.testing.assert_array_equal(predictor.predict(np.stack([pictures[1]] * 2))[1], predictor.predict(decoded)[1])
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\), not float64"):
        predictor.predict([np.zeros((4, 4, 3))])  # pyright: ignore[reportArgumentType]


def test_answers_name_the_likeliest_classes_and_abstain_below_the_threshold() -> None:
    predictor = exact(loaded_model())
    probabilities = np.array([[0.1, 0.6, 0.1, 0.2], [0.4, 0.3, 0.2, 0.1]], np.float32)
    sure, unsure = predictor.answers(probabilities, top_k=2, threshold=0.5)
    assert (sure.label, sure.abstained, unsure.label, unsure.abstained) == ("b", False, "a", True)
    assert [name for name, _ in sure.top_k] == ["b", "d"]
    assert sure.probability == pytest.approx(0.6)
    assert len(predictor.answers(probabilities, top_k=9)[0].top_k) == 4


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - {"record97", "mobilenet-transfer"}))
def test_small_images_are_answered_by_500(recipe: str) -> None:
    assert default_batch_size(RECIPES[recipe]()) == 500


def test_large_images_and_wide_networks_get_smaller_batches() -> None:
    def size(side: int, *widths: int) -> int:
        return default_batch_size(Config(data=DataConfig(image_size=side), model=ModelConfig(widths=widths)))

    assert size(224, 64, 256, 256) in range(10, 30)
    assert size(224, 64, 256, 256) == size(224, 64) > size(224, 64, 512) > size(448, 64, 512) > 1
    assert size(1024, 8192) == 1
    loaded = loaded_model(128)
    assert Predictor(loaded, "cpu").batch_size == default_batch_size(loaded.info.config) < 500
    assert Predictor(loaded, "cpu", 500).batch_size == 500


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_batch_of_large_images_takes_no_more_memory_than_allowed() -> None:
    code = """if True:
        import numpy as np, torch
        from cifar.machine import peak_memory
        from tests.test_predictor import exact, loaded_model
        torch.set_num_threads(2)
        predictor = exact(loaded_model(224), 0)
        predictor.predict(np.zeros((1, 224, 224, 3), np.uint8))
        before = peak_memory()
        predictor.predict(np.zeros((2 * predictor.batch_size, 224, 224, 3), np.uint8))
        print(predictor.batch_size, peak_memory() - before)
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    count, grown = map(int, done.stdout.split())
    assert count < 100
    assert BATCH_BYTES / 4 < grown < BATCH_BYTES


def with_rates(predictor: Predictor, monkeypatch: pytest.MonkeyPatch, rate: Callable[[int], float]) -> list[int]:
    """Let the predictor answer so many images a second with each batch size; returns the sizes that it tries."""
    tried = []

    def images_per_second(count: int) -> float:
        tried.append(count)
        return rate(count)

    monkeypatch.setattr(predictor, "_images_per_second", images_per_second)
    return tried


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({8: 100, 16: 200, 32: 300, 64: 310, 128: 900}, 32),
        ({8: 100, 16: 90}, 8),
        ({8: 100, 16: 106, 32: 112, 64: 118, 128: 119}, 64),
    ],
)
def test_the_batch_grows_while_that_pays(rates: dict[int, float], chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = exact(loaded_model())
    with_rates(predictor, monkeypatch, lambda count: rates.get(count, 1.0))
    assert predictor.choose_batch_size() == predictor.batch_size == chosen


@pytest.mark.parametrize(
    ("available", "image", "chosen"),
    [(2 * 64 * 10**6, 10**6, 64), (2 * 64 * 10**6 - 2, 10**6, 32), (2 * 64 * 10**6, 3 * 10**6, 16), (10**4, 1, 1)],
    ids=["just fits", "just not", "larger images", "not even the first size"],
)
def test_the_growth_of_the_peak_bounds_the_batch_by_half_of_the_memory(
    available: int, image: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image takes more here than the network's planes say."""
    predictor = exact(loaded_model())
    tried = with_rates(predictor, monkeypatch, float)
    monkeypatch.setattr("cifar.predictor.available_memory", lambda: available)
    monkeypatch.setattr("cifar.predictor.peak_memory", lambda: 10**9 + image * (0 if tried[-1] == 1 else tried[-1]))
    assert predictor.choose_batch_size() == chosen
    assert max(tried) == chosen


def test_what_does_not_fit_on_the_device_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = exact(loaded_model())

    def rate(count: int) -> float:
        if count > 32:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return count

    tried = with_rates(predictor, monkeypatch, rate)
    assert predictor.choose_batch_size() == 32
    assert tried == [1, 8, 16, 32, 64]


def test_the_time_for_choosing_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = exact(loaded_model())

    def rate(count: int) -> float:
        time.sleep(count / 1000)
        return count

    tried = with_rates(predictor, monkeypatch, rate)
    assert predictor.choose_batch_size(seconds=0) == 8
    assert tried == [1, 8]
    started_at = time.perf_counter()
    assert predictor.choose_batch_size(seconds=0.5) <= 256
    assert time.perf_counter() - started_at < 2


def test_the_chosen_size_is_measured_and_leaves_answers_and_random_numbers_alone() -> None:
    predictor = exact(loaded_model(tta="mirror"), 3)
    expected = predictor.logits(images())
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    chosen = predictor.choose_batch_size(0.1)
    assert torch.rand(1) == drawn
    assert chosen == predictor.batch_size >= 8
    assert chosen & (chosen - 1) == 0
    np.testing.assert_allclose(predictor.logits(images()), expected, rtol=1e-4, atol=1e-6)
