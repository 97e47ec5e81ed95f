"""Corruptions: each against the reference that it has, and what holds for all."""

import colorsys
import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from sklearn.datasets import load_sample_image
from torch import Tensor

from cifar.augment import Draws
from cifar.evaluate import corruptions
from cifar.evaluate.corruptions import CORRUPTIONS, GROUPS, STRENGTHS, corrupt

EVERY = pytest.mark.parametrize("name", CORRUPTIONS)


def photographs(side: int = 32, count: int = 12) -> Tensor:
    """Windows of two photographs, uint8 (count,3,side,side)."""
    crops = []
    for place in range(count):
        photograph = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[place % 2]))
        window = photograph.crop((20 * place, 20, 20 * place + 400, 420))
        crops.append(np.asarray(window.resize((side, side), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def plain(level: int | tuple[int, int, int], count: int = 1, side: int = 32) -> Tensor:
    """Images of one colour."""
    colour = torch.tensor((level,) * 3 if isinstance(level, int) else level, dtype=torch.uint8)
    return colour[:, None, None].expand(count, 3, side, side).contiguous()


def distance(images: Tensor, others: Tensor) -> float:
    """Mean absolute difference in levels."""
    return float((images.float() - others.float()).abs().mean())


def correlation(images: Tensor, others: Tensor) -> float:
    """Mean over the images of Pearson's correlation."""
    pairs = zip(images.flatten(1).numpy(), others.flatten(1).numpy(), strict=True)
    return float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]))


def filtered(image: Tensor, function) -> np.ndarray:
    """Each channel (H,W) of one image (1,3,H,W), in 0..1, by a function; uint8 levels (3,H,W)."""
    channels = [function(channel / 255) for channel in image[0].double().numpy()]
    return (np.stack(channels).clip(0, 1) * 255).round().astype(np.uint8)


def assert_within_a_level(found: Tensor, expected: np.ndarray) -> None:
    difference = np.abs(found.numpy().astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02  # a tie of rounding here and there


# All of them


def test_there_are_the_papers_fifteen_in_its_order_and_groups():
    assert {group: len(names) for group, names in GROUPS.items()} == {
        "noise": 3,
        "blur": 4,
        "weather": 4,
        "digital": 4,
    }
    assert list(CORRUPTIONS)[:4] == ["gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur"]
    assert len(CORRUPTIONS) == 15


@EVERY
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 3, 33, 33), (2, 3, 20, 47), (1, 3, 224, 224), (0, 3, 32, 32)])
def test_shape_and_type_stay_and_the_input_is_left_alone(name, shape):
    images = photographs(max(shape[2:]), 3)[: shape[0], :, : shape[2], : shape[3]].contiguous()
    before = images.clone()
    for strength in (1, 5):
        found = corrupt(images, name, strength, seed=0)
        assert found.shape == shape
        assert found.dtype == torch.uint8
    assert images.equal(before)


@EVERY
@pytest.mark.parametrize("level", [0, 128, 255])
def test_images_of_one_grey_are_no_special_case(name, level):
    """No division by a deviation or a brightness of zero; grey stays grey where no channel is drawn alone."""
    found = corrupt(plain(level, 2), name, 5, seed=0)
    if name not in ("gaussian_noise", "shot_noise", "impulse_noise", "frost"):
        assert (found[:, 0] == found[:, 1]).all()
        assert (found[:, 1] == found[:, 2]).all()
    if name in {*GROUPS["blur"], *GROUPS["digital"]}:
        assert (found.int() - level).abs().max() <= (name == "jpeg_compression")


@EVERY
def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(name):
    images = photographs()
    first = corrupt(images, name, 4, seed=3)
    assert corrupt(images, name, 4, seed=3).equal(first)
    drawn = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert corrupt(images, name, 4, seed=4).equal(first) != drawn


@EVERY
def test_what_befalls_an_image_does_not_hang_on_its_batch(name, monkeypatch):
    """Nor on the chunks that it is worked on in; matrix products may round in another order."""

    def assert_same(found: Tensor, expected: Tensor) -> None:
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() < 1e-3

    images, indices = photographs(), torch.arange(100, 112)
    together = corrupt(images, name, 5, 0, indices)
    order = torch.tensor([7, 2, 11])
    assert_same(corrupt(images[order], name, 5, 0, indices[order]), together[order])
    assert_same(corrupt(images[:3], name, 5, 0), corrupt(images, name, 5, 0)[:3])
    monkeypatch.setattr(corruptions, "CHUNK_VALUES", 1)
    assert_same(corrupt(images, name, 5, 0, indices), together)


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "motion_blur", "snow", "frost", "fog"])
def test_images_of_one_batch_have_draws_of_their_own(name):
    twice = photographs(count=1).expand(2, -1, -1, -1)
    first, second = corrupt(twice, name, 5, seed=0)
    assert not first.equal(second)


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize(
    "name", sorted(CORRUPTIONS.keys() - {"glass_blur", "motion_blur", "frost", "elastic_transform"})
)
def test_damage_grows_with_the_strength(name, side):
    images = photographs(side, 4 if side > 100 else 12)
    found = [distance(corrupt(images, name, strength, 0), images) for strength in STRENGTHS]
    assert found[0] > 0
    assert all(weaker < stronger for weaker, stronger in pairwise(found)), found


def test_motion_blur_grows_but_is_the_same_at_3_and_4_as_published():
    images = photographs()
    found = [distance(corrupt(images, "motion_blur", strength, 0), images) for strength in STRENGTHS]
    assert 0 < found[0] < found[1] < found[2] == found[3] < found[4]


@pytest.mark.parametrize("side", [32, 224])
def test_glass_scatters_farther_in_two_passes_than_in_one(side):
    images = photographs(side, 4)
    found = [distance(corrupt(images, "glass_blur", strength, 0), images) for strength in STRENGTHS]
    assert 0 < max(found[:3]) < min(found[3:])


def test_frost_hides_more_with_each_strength():
    """The ice brightens and the image darkens, which the distance confounds."""
    images = photographs()
    found = [correlation(corrupt(images, "frost", strength, 0), images) for strength in STRENGTHS]
    assert all(weaker > stronger for weaker, stronger in pairwise(found)), found


def whence(strength: int, side: int, indices: Tensor) -> Tensor:
    """(B,2,side,side): the x and y, 0 to side - 1, from which the elastic transform takes each pixel."""
    ramp = torch.linspace(0, 255, side).round().to(torch.uint8)
    image = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), plain(0, 1, side)[0, 0]])
    found = corrupt(image.expand(len(indices), -1, -1, -1), "elastic_transform", strength, 0, indices)
    return found[:, :2].double() / 255 * (side - 1)


@pytest.mark.parametrize("side", [32, 224])
def test_the_bends_of_the_elastic_transform_grow_and_strength_1_has_none(side):
    """The bend is what no affine map explains, in shares of the side; far from the border, where ramps turn round."""
    y, x = np.mgrid[:side, :side].reshape(2, -1)
    inner = (abs(x - side / 2) < side / 4) & (abs(y - side / 2) < side / 4)
    basis = np.stack([x, y, np.ones_like(x)], 1)[inner]
    bends = []
    for strength in STRENGTHS:
        places = whence(strength, side, torch.arange(8)).numpy().reshape(16, -1).T[inner]
        bends.append((places - basis @ np.linalg.lstsq(basis, places, rcond=None)[0]).std() / side)
    assert bends[0] < 0.5 / 255
    assert all(weaker < stronger for weaker, stronger in pairwise(bends)), bends


def test_the_affine_part_of_the_elastic_transform_moves_the_published_corners():
    """At 32 pixels (26, 26), (26, 6) and (6, 6) move by up to 8 % of the side."""
    indices = torch.arange(20)
    shifts = 0.08 * 32 * (Draws(0, 0, indices).uniform("elastic corners", 6).view(-1, 3, 2).double() * 2 - 1)
    places = whence(1, 32, indices).numpy()
    for corner, corner_shifts in zip(((26, 26), (26, 6), (6, 6)), shifts.unbind(1), strict=True):
        for place, shift in zip(places, corner_shifts.numpy(), strict=True):
            x, y = np.array(corner) + shift
            found = [ndimage.map_coordinates(channel, [[y], [x]], order=1)[0] for channel in place]
            assert found == pytest.approx(corner, abs=0.2)


@EVERY
@pytest.mark.parametrize("side", [16, 32, 96])
def test_the_strongest_is_seen_and_leaves_the_image_recognisable(name, side):
    images = photographs(side, 6)
    found = corrupt(images, name, 5, 0)
    assert distance(found, images) > 4
    assert 0.5 < correlation(found, images) < 0.999


def test_larger_images_look_as_damaged_as_small_ones():
    """Seen from as far: shrunk to 32 pixels, those that move or hide pixels leave as much as the small one's."""
    small, large = photographs(32), photographs(128)

    def seen(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images.float(), images.shape[2] // 32)

    for name in ("defocus_blur", "motion_blur", "zoom_blur", "snow", "fog", "brightness", "contrast"):
        of_small = distance(corrupt(small, name, 5, 0), small)
        of_large = distance(seen(corrupt(large, name, 5, 0)), seen(large))
        assert 0.6 < of_large / of_small < 1.5, name


@pytest.mark.parametrize("name", ["", "gaussian", "Fog"])
def test_an_unknown_name_is_refused_and_the_known_are_named(name):
    with pytest.raises(ValueError, match="there are: gaussian_noise"):
        corrupt(plain(0), name, 1, 0)


@pytest.mark.parametrize("strength", [0, 6, -1, 1.5])
def test_an_unknown_strength_is_refused(strength):
    with pytest.raises(ValueError, match="1 to 5"):
        corrupt(plain(0), "fog", strength, 0)


@pytest.mark.parametrize("wrong", [plain(0).float(), plain(0)[0], plain(0)[:, :1], plain(0).permute(0, 2, 3, 1)])
def test_images_of_another_type_or_shape_are_refused(wrong):
    with pytest.raises(ValueError, match="uint8"):
        corrupt(wrong, "fog", 1, 0)


# Each against its reference


@pytest.mark.parametrize(("strength", "scale"), [(1, 0.04), (5, 0.10)])
def test_gaussian_noise_is_normal_with_the_published_deviation(strength, scale):
    noise = corrupt(plain(128, 20), "gaussian_noise", strength, 0).double().numpy() / 255 - 128 / 255
    assert noise.mean() == pytest.approx(0, abs=4 * scale / noise.size**0.5)
    assert noise.std() == pytest.approx(scale, rel=0.02)
    assert stats.kurtosis(noise.ravel()) == pytest.approx(0, abs=0.1)
    channels = noise.transpose(1, 0, 2, 3).reshape(3, -1)
    assert abs(np.corrcoef(channels) - np.eye(3)).max() < 0.03


def test_noise_of_larger_images_grows_with_the_root_of_the_side():
    deviation = [float(corrupt(plain(128, 2, side), "gaussian_noise", 1, 0).double().std()) for side in (32, 128)]
    assert deviation[1] / deviation[0] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("strength", "photons"), [(1, 500), (3, 100), (5, 50)])
@pytest.mark.parametrize("level", [3, 90, 200])
def test_shot_noise_is_poissons(strength, photons, level):
    """Each of the 256 levels is as frequent as Poisson's law says; counts above white's are white."""
    found = corrupt(plain(level, 20), "shot_noise", strength, 0)
    counts = np.arange(2 * photons)
    levels = (255 * counts.clip(max=photons) / photons).round().astype(int)
    chances = np.bincount(levels, stats.poisson.pmf(counts, photons * level / 255), minlength=256)
    expected, frequencies = chances * found.numel(), np.bincount(found.flatten().numpy(), minlength=256)
    likely = expected > 5
    assert frequencies[~likely].sum() < 100
    scale = frequencies[likely].sum() / expected[likely].sum()
    assert stats.chisquare(frequencies[likely], expected[likely] * scale).pvalue > 1e-4


def test_shot_noise_leaves_black_black():
    assert (corrupt(plain(0), "shot_noise", 5, 0) == 0).all()


def test_impulse_noise_makes_its_share_of_the_values_black_or_white():
    found = corrupt(plain(100, 40), "impulse_noise", 5, 0)
    assert set(found.unique().tolist()) == {0, 100, 255}
    for level in (0, 255):
        assert float((found == level).double().mean()) == pytest.approx(0.035, rel=0.05)


def test_defocus_blur_is_scipys_correlation_with_the_published_kernel():
    """The last two disks are a plus and a square of nine; the first a pixel under a Gaussian of three taps."""
    image = photographs(count=1)
    gauss = np.exp(-0.5 * np.array([-1.0, 0, 1]) ** 2 / 0.4**2)
    kernels = {1: np.outer(gauss, gauss) / gauss.sum() ** 2, 5: np.full((3, 3), 1 / 9)}
    for strength, kernel in kernels.items():
        expected = filtered(image, lambda channel, kernel=kernel: ndimage.correlate(channel, kernel, mode="mirror"))
        assert_within_a_level(corrupt(image, "defocus_blur", strength, 0)[0], expected)


def test_the_disk_of_larger_images_has_the_published_deviation_times_the_scale():
    def deviation(kernel: Tensor) -> float:
        places = torch.arange(len(kernel)) - len(kernel) // 2
        return float((kernel.sum(0) * places**2).sum().sqrt())

    for radius, smooth in ((0.3, 0.4), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)):
        small, large = (corruptions._disk(radius, smooth, scale) for scale in (1.0, 7.0))
        assert float(large.sum()) == pytest.approx(1, abs=1e-5)
        assert deviation(large) / deviation(small) == pytest.approx(7, rel=0.02)


def test_glass_blur_is_the_published_loop_over_the_pixels():
    """With the same shifts, in which `a, b = b, a` of two views of an array copies b to a."""
    image, indices = photographs(count=1), torch.tensor([5])
    shifts = Draws(9, 0, indices).uniform("glass 0", 2 * 32 * 32).view(2, 32, 32)
    dy, dx = ((shifts * 2).long() - 1).tolist()
    pixels = image[0].permute(1, 2, 0).numpy().copy()
    for y in range(31, 1, -1):
        for x in range(31, 1, -1):
            place = y + dy[y][x], x + dx[y][x]
            pixels[y, x], pixels[place] = pixels[place], pixels[y, x]
    found = corrupt(image, "glass_blur", 1, 9, indices)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, pixels)
    assert (found != image[0].permute(1, 2, 0).numpy()).any()


def test_motion_blur_is_a_half_gaussian_along_its_angle():
    """A point of light leaves its weights, step by step, on a line."""
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    weights = np.exp(-(np.arange(11) ** 2) / (2 * 2.5**2))
    weights /= weights.sum()
    for angle, (down, right) in {0.0: (0, 1), 90.0: (1, 0), -45.0: (-1, 1)}.items():
        found = corruptions._blur_line(point, 9, 2.5, torch.tensor([angle]))[0, 0].numpy()
        expected = np.zeros((41, 41))
        for step, weight in enumerate(weights):
            far = round(step * 0.5**0.5) if angle == -45 else step
            expected[20 - down * far, 20 - right * far] += weight
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_zoom_blur_is_the_mean_of_scipys_enlargements():
    def clipped(channel: np.ndarray, factor: float) -> np.ndarray:
        kept = int(np.ceil(32 / factor))
        first = (32 - kept) // 2
        enlarged: Any = ndimage.zoom(channel[first : first + kept, first : first + kept], factor, order=1)
        trim = (len(enlarged) - 32) // 2
        return enlarged[trim : trim + 32, trim : trim + 32]

    image = photographs(count=1)
    for strength, last in ((1, 1.06), (3, 1.16), (5, 1.26)):
        factors = np.arange(1, last, 0.01)  # as published; the last one is in or out by a rounding
        expected = filtered(
            image,
            lambda channel, factors=factors: (
                (channel + sum(clipped(channel, factor) for factor in factors)) / (len(factors) + 1)
            ),
        )
        assert_within_a_level(corrupt(image, "zoom_blur", strength, 0)[0], expected)


def test_snow_brightens_and_its_flakes_lie_point_symmetrically():
    image = plain(60, 6)
    found = corrupt(image, "snow", 3, 0).int()
    assert (found >= 60).all()
    assert found.equal(found.flip(2, 3))
    assert 0.01 < float((found > 120).double().mean()) < 0.5


def test_fog_is_a_cloud_between_nothing_and_its_whole_amount():
    found = corrupt(plain(128, 6), "fog", 5, 0).double() / 255
    value = 128 / 255
    assert float(found.amin()) == pytest.approx(value * value / (value + 1.5), abs=0.003)
    assert float(found.amax()) == pytest.approx(value, abs=0.003)
    assert len(found.flatten(1).unique(dim=0)) == 6
    neighbours = np.corrcoef(found[:, 0, :, 1:].flatten().numpy(), found[:, 0, :, :-1].flatten().numpy())[0, 1]
    assert neighbours > 0.8


def test_brightness_raises_the_value_of_hsv():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), dtype=np.uint8))
    image[..., 0, :4] = 0
    for strength, amount in ((1, 0.05), (5, 0.3)):
        found = corrupt(image, "brightness", strength, 0)[0].flatten(1).T.tolist()
        for before, after in zip(image[0].flatten(1).T.tolist(), found, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in before))
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1))
            assert after == pytest.approx([255 * level for level in expected], abs=0.51)


def test_contrast_shrinks_the_deviation_and_keeps_the_mean():
    images = photographs().double()
    found = corrupt(images.byte(), "contrast", 4, 0).double()
    torch.testing.assert_close(found.mean((2, 3)), images.mean((2, 3)), atol=0.1, rtol=0)
    torch.testing.assert_close(found.std((2, 3)), images.std((2, 3)) * 0.3, atol=0.1, rtol=0.01)


def test_pixelate_is_pillows_box_filter_there_and_back():
    image = photographs(count=1)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    for strength, small in ((1, 30), (3, 27), (5, 20)):
        expected = picture.resize((small, small), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
        found = corrupt(image, "pixelate", strength, 0)[0].permute(1, 2, 0).numpy().astype(int)
        assert abs(found - np.asarray(expected).astype(int)).max() <= 1  # Pillow rounds four times


@pytest.mark.parametrize(("strength", "quality"), [(1, 80), (3, 58), (5, 40)])
def test_jpeg_compression_is_pillows_of_the_published_quality(strength, quality):
    image = photographs(count=1)
    content = io.BytesIO()
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(content, "JPEG", quality=quality)
    expected = np.asarray(Image.open(content))
    np.testing.assert_array_equal(corrupt(image, "jpeg_compression", strength, 0)[0].permute(1, 2, 0), expected)


def test_a_coarser_quality_has_larger_quantisation_steps():
    def steps(quality: int) -> np.ndarray:
        content = io.BytesIO()
        Image.new("RGB", (8, 8)).save(content, "JPEG", quality=quality)
        return np.array(Image.open(content).quantization[0])  # pyright: ignore

    for quality in (80, 50, 40):
        assert corruptions._coarser(quality, 1.0) == quality
        found = steps(corruptions._coarser(quality, 2.0)) / steps(quality)
        assert found.mean() == pytest.approx(2, rel=0.05)
