"""Augmentation: each operation against a slow or foreign reference, and draws that depend on nothing but their key."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from cifar.augment import Draws, affine, apply_policy, augment, cutout, derive_seed, flip_and_crop, mix, warp
from cifar.config import AugmentConfig

OFF = {"flip": "none", "crop_padding": 0}
EVERYTHING = AugmentConfig(cutout=6, rotate=15, shift=0.1, shear=10, zoom=0.1, policy="trivial")
COUNT = 20_000


def random_images(count: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def draws(count: int = COUNT, seed: int = 0, epoch: int = 0) -> Draws:
    return Draws(seed, epoch, torch.arange(count))


# Draws


def test_draws_never_change_silently():
    """Runs of earlier versions stay repeatable: these values are part of the format."""
    assert derive_seed(0, "order") == 5618756638689033999
    fixed = Draws(7, 3, torch.tensor([0, 1, 49_999]))
    assert fixed.bits("flip", 2).tolist() == [
        [4159094659953882987, -2368877792422585080],
        [8891844712554973817, -2064113346905100816],
        [-262976484665940098, -4131567444202644181],
    ]
    assert fixed.uniform("flip").flatten().tolist() == [0.22546494007110596, 0.4820278286933899, 0.9857439994812012]
    assert [limit.tolist() for limit in fixed.integers("crop", 5, 9)] == [[3, 2, 1], [5, 8, 6]]


def test_draws_follow_splitmix64_in_plain_integers():
    """The tensor arithmetic is the published function modulo 2**64."""

    def scramble(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    step = 0x9E3779B97F4A7C15
    key = derive_seed(5, 2, "s")
    expected = [
        [scramble((scramble((i * step + key) % 2**64) + j * step) % 2**64) for j in (1, 2)] for i in (0, 9, 2**40)
    ]
    found = Draws(5, 2, torch.tensor([0, 9, 2**40])).bits("s", 2)
    assert [[value % 2**64 for value in row] for row in found.tolist()] == expected


def test_draws_are_uniform():
    values = draws().uniform("a", 2)
    assert values.dtype == torch.float32
    assert 0 <= values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    expected = values.numel() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-squared, 99 degrees of freedom: p < 1e-4


def test_draws_of_streams_epochs_seeds_neighbours_and_counts_are_independent():
    base = draws().uniform("a")[:, 0]
    others = {
        "stream": draws().uniform("b")[:, 0],
        "epoch": draws(epoch=1).uniform("a")[:, 0],
        "seed": draws(seed=1).uniform("a")[:, 0],
        "neighbour": base.roll(1),
        "count": draws().uniform("a", 2)[:, 1],
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1].abs()
        assert correlation < 4 / COUNT**0.5, name


def test_integers_reach_every_value_below_their_limit_alike():
    small, large = draws().integers("a", 5, 1025)
    assert torch.bincount(small).min() > COUNT / 5 * 0.9
    assert len(torch.bincount(small)) == 5
    assert large.min() >= 0
    assert large.max() == 1024


# The composition


@pytest.mark.parametrize("config", [AugmentConfig(cutout=6), EVERYTHING])
def test_an_image_does_not_depend_on_its_batch(config: AugmentConfig):
    images, indices = random_images(24), torch.arange(100, 124)
    together = augment(images, indices, config, seed=3, epoch=5)
    some = torch.tensor([7, 2, 19])
    assert augment(images[some], indices[some], config, seed=3, epoch=5).equal(together[some])


@pytest.mark.parametrize("fill", ["reflect", "zero"])
def test_channels_last_images_give_the_same_pixels_in_the_same_layout(fill):
    config = AugmentConfig(cutout=6, crop_fill=fill)
    images = random_images(8, 12, 20)
    plain = augment(images, torch.arange(8), config, seed=0, epoch=0)
    last = augment(images.contiguous(memory_format=torch.channels_last), torch.arange(8), config, seed=0, epoch=0)
    assert last.equal(plain)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_epochs_and_seeds_change_the_pixels_and_repetition_does_not():
    images, indices = random_images(24), torch.arange(24)
    config = AugmentConfig(flip="random", cutout=6, rotate=10)
    first = augment(images, indices, config, seed=0, epoch=0)
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert augment(images, indices, config, seed=0, epoch=0).equal(first)
    for seed, epoch in ((0, 1), (1, 0)):
        other = augment(images, indices, config, seed=seed, epoch=epoch)
        assert (other != first).flatten(1).any(1).float().mean() > 0.9


def test_the_input_is_left_alone():
    images = random_images(8)
    before = images.clone()
    augment(images, torch.arange(8), EVERYTHING, seed=0, epoch=1)
    assert images.equal(before)


def test_a_config_without_augmentation_changes_nothing():
    images = random_images(8)
    assert augment(images, torch.arange(8), AugmentConfig(**OFF), seed=0, epoch=1).equal(images)


def test_one_augmentation_does_not_change_the_draws_of_another():
    images, indices = random_images(8), torch.arange(8)
    without = augment(images, indices, AugmentConfig(), seed=0, epoch=0)
    with_cutout = augment(images, indices, AugmentConfig(cutout=4), seed=0, epoch=0)
    kept = with_cutout != 0
    assert with_cutout[kept].equal(without[kept])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_pixels():
    images, indices = random_images(64), torch.arange(64)
    for config in (AugmentConfig(cutout=6), AugmentConfig(rotate=15)):
        here = augment(images, indices, config, seed=0, epoch=1)
        there = augment(images.cuda(), indices.cuda(), config, seed=0, epoch=1).cpu()
        assert (here.int() - there.int()).abs().max() <= (1 if config.rotate else 0)


# Flip and crop


def crop_reference(images: Tensor, config: AugmentConfig, flips: list[bool], shifts: list[tuple[int, int]]) -> Tensor:
    pad, (height, width) = config.crop_padding, images.shape[2:]
    crops = []
    for image, flip, (top, left) in zip(images.numpy(), flips, shifts, strict=True):
        image = image[:, :, ::-1] if flip else image
        mode = {"reflect": "reflect", "zero": "constant"}[config.crop_fill]
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode=mode)  # pyright: ignore
        crops.append(padded[:, top : top + height, left : left + width])
    return torch.from_numpy(np.stack(crops))


@pytest.mark.parametrize("fill", ["reflect", "zero"])
@pytest.mark.parametrize(("height", "width", "pad"), [(16, 16, 2), (9, 14, 4), (5, 7, 12)])
def test_flip_and_crop_match_numpy_image_by_image(fill, height, width, pad):
    """Also for images that are not square, and for padding wider than the image."""
    config = AugmentConfig(flip="random", crop_padding=pad, crop_fill=fill)
    images, keys = random_images(40, height, width), draws(40, epoch=3)
    flips = (keys.uniform("flip")[:, 0] < 0.5).tolist()
    top, left = keys.integers("crop", 2 * pad + 1, 2 * pad + 1)
    expected = crop_reference(images, config, flips, list(zip(top.tolist(), left.tolist(), strict=True)))
    assert 0 < sum(flips) < 40
    assert flip_and_crop(images, keys, config).equal(expected)


def test_alternating_flip_shows_each_side_every_other_epoch():
    images, indices = random_images(400), torch.arange(400)
    config = AugmentConfig(flip="alternating", crop_padding=0)
    epochs = [augment(images, indices, config, seed=0, epoch=epoch) for epoch in range(3)]
    assert epochs[1].equal(epochs[0].flip(3))
    assert epochs[2].equal(epochs[0])
    flipped = (epochs[0] == images.flip(3)).flatten(1).all(1).float().mean()
    assert 0.4 < flipped < 0.6


def test_random_flip_tosses_a_new_coin_every_epoch():
    images, indices = random_images(400), torch.arange(400)
    config = AugmentConfig(flip="random", crop_padding=0)
    epochs = [augment(images, indices, config, seed=0, epoch=epoch) for epoch in range(2)]
    assert 0.4 < (epochs[0] == epochs[1]).flatten(1).all(1).float().mean() < 0.6


# Cutout


def test_cutout_zeroes_one_square_that_the_border_clips():
    height, width, side = 12, 20, 5
    keys = draws(300)
    result = cutout(torch.full((300, 3, height, width), 9, dtype=torch.uint8), keys, side)
    expected = torch.full_like(result, 9)
    for image, y, x in zip(
        expected, *(limit.tolist() for limit in keys.integers("cutout", height, width)), strict=True
    ):
        image[:, max(y - side // 2, 0) : y - side // 2 + side, max(x - side // 2, 0) : x - side // 2 + side] = 0
    assert result.equal(expected)
    holes = (result[:, 0] == 0).flatten(1).sum(1)
    assert holes.max() == side**2
    assert holes.min() < side**2


# Warp


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 31)])
@pytest.mark.parametrize(
    ("angle", "shift", "shear", "zoom"),
    [
        (30.0, (0, 0), 0.0, 1.0),
        (0.0, (3, -2), 0.0, 1.0),
        (0.0, (0, 0), 20.0, 1.0),
        (0.0, (0, 0), 0.0, 1.3),
        (-50.0, (2, 4), 12.0, 0.8),
    ],
)
def test_warp_matches_torchvision(height, width, angle, shift, shear, zoom):
    images = random_images(4, height, width)
    expected = v2.functional.affine(
        images,
        angle=angle,
        translate=list(shift),
        scale=zoom,
        shear=[shear, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    result = affine(
        images,
        angles=torch.full((4,), angle),
        shifts=torch.tensor([[shift[0] / width, shift[1] / height]]).expand(4, 2),
        shears=torch.full((4,), shear),
        zooms=torch.full((4,), zoom),
    )
    difference = (result.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_warp_draws_within_its_limits():
    """Only a shift of whole images: the bright pixel moves at most by its share, to either side."""
    images = torch.zeros(200, 3, 21, 21, dtype=torch.uint8)
    images[:, :, 10, 10] = 255
    moved = warp(images, draws(200), AugmentConfig(shift=0.2, crop_fill="zero"))[:, 0].flatten(1).argmax(1)
    for offset in (moved // 21 - 10, moved % 21 - 10):
        assert offset.abs().max() == 4
        assert offset.min() < 0 < offset.max()


def test_warp_fills_with_the_reflection_or_with_zero():
    images = torch.full((50, 3, 16, 16), 200, dtype=torch.uint8)
    assert warp(images, draws(50), AugmentConfig(rotate=45)).eq(200).all()
    assert warp(images, draws(50), AugmentConfig(rotate=45, crop_fill="zero")).eq(0).any()


# Policies and mixing


@pytest.mark.parametrize(("policy", "transform"), [("trivial", v2.TrivialAugmentWide()), ("rand", v2.RandAugment())])
def test_policies_are_torchvisions_with_a_seed_per_image(policy, transform):
    images, keys = random_images(12), draws(12)
    result = apply_policy(images, keys, AugmentConfig(policy=policy))
    for image, seed, found in zip(images, keys.bits("policy")[:, 0].tolist(), result, strict=True):
        torch.manual_seed(seed)
        assert found.equal(transform(image))
    assert not result.equal(images)


def test_policies_and_mixing_leave_the_global_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    apply_policy(random_images(3), draws(3), AugmentConfig(policy="trivial"))
    mix(random_images(3), torch.arange(3), AugmentConfig(mixup=1.0, cutmix=1.0), 3, seed=0, epoch=0, step=0)
    assert torch.rand(3).equal(expected)


def test_mixup_blends_neighbours_and_their_labels_alike():
    images, labels = random_images(6), torch.arange(6)
    mixed, targets = mix(images, labels, AugmentConfig(mixup=1.0), 10, seed=0, epoch=1, step=2)
    share = targets[0, 0]
    assert 0 < share < 1
    one_hot = torch.nn.functional.one_hot(labels, 10).float()
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.roll(1, 0))
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    assert mixed.dtype == torch.float32


def test_cutmix_pastes_a_box_as_large_as_its_share_of_the_label():
    images = torch.arange(1, 7, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 16, 16).contiguous()
    mixed, targets = mix(images, torch.arange(6), AugmentConfig(cutmix=1.0), 6, seed=0, epoch=0, step=3)
    own = (mixed == images)[:, 0]
    assert (mixed == images.roll(1, 0))[:, 0].equal(~own)
    torch.testing.assert_close(own.flatten(1).float().mean(1), targets.diagonal())
    assert 0 < own[0].float().mean() < 1
    assert mixed.dtype == torch.uint8
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_mixing_chooses_one_kind_per_step_and_repeats_by_step():
    images, labels = random_images(6), torch.arange(6)
    config = AugmentConfig(mixup=1.0, cutmix=1.0)

    def at(step: int) -> tuple[Tensor, Tensor]:
        return mix(images, labels, config, 6, seed=0, epoch=0, step=step)

    is_cutmix = [bool((at(step)[0] == at(step)[0].round()).all()) for step in range(20)]
    assert 3 <= sum(is_cutmix) <= 17
    assert at(4)[1].equal(at(4)[1])
    assert not at(4)[1].equal(at(5)[1])
