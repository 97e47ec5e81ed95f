"""Random changes to training images: pure functions on uint8 batches (B, 3, H, W), on the device that holds them.

Every draw is a hash of (seed, epoch, index of the image, name of the draw), so what happens to an image does not depend
on its batch, its worker or the device, and a resumed run needs no generator state. Flip, crop and cutout move bytes and
are the same on every device; the warp and the policies compute with floats, where a device may round a pixel's value
to its neighbour. 50,000 images of 32x32 take 0.1 s (flip and crop) to 0.2 s (with cutout) on one core.
"""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar.config import AugmentConfig, Flip

# The constants of splitmix64 (Steele, Lea and Flood 2014), as signed integers: torch multiplies int64 modulo 2**64.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_BITS = 24  # of a draw: what float32 holds exactly


def derive_seed(*parts: int | str) -> int:
    """Integer in [0, 2**63) that depends on all `parts` and on nothing else, such as `(seed, epoch, "order")`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Draws:
    """Random numbers for the images `indices`, int64 (B,), of one epoch: the same for an index wherever it stands.

    Each draw names its stream; streams are independent of each other, so that switching one augmentation on leaves
    the draws of the others as they were.
    """

    def __init__(self, seed: int, epoch: int, indices: Tensor):
        self.seed, self.epoch, self.indices = seed, epoch, indices

    def bits(self, stream: str | int, count: int = 1) -> Tensor:
        """All 64 bits, int64 (B, count)."""
        base = _scramble(self.indices * _STEP + derive_seed(self.seed, self.epoch, stream))
        counter = torch.arange(1, count + 1, device=self.indices.device)
        return _scramble(base[:, None] + counter * _STEP)

    def uniform(self, stream: str | int, count: int = 1) -> Tensor:
        """float32 (B, count) in [0, 1), in steps of 2**-24."""
        return self._leading_bits(stream, count).float() * 2.0**-_BITS

    def integers(self, stream: str | int, *limits: int) -> list[Tensor]:
        """One int64 (B,) for each limit, in 0 .. limit - 1. Integer arithmetic: a float product may round up to it."""
        leading = self._leading_bits(stream, len(limits))
        return [(leading[:, i] * limit) >> _BITS for i, limit in enumerate(limits)]

    def _leading_bits(self, stream: str | int, count: int) -> Tensor:
        return _shift_right(self.bits(stream, count), 64 - _BITS)


def augment(images: Tensor, indices: Tensor, config: AugmentConfig, *, seed: int, epoch: int) -> Tensor:
    """Flip, crop, warp, policy, cutout, in this order, as far as `config` has them; mixing batches is `mix`.

    `images` uint8 (B, 3, H, W), contiguous or channels_last, and `indices` int64 (B,) on the same device give uint8
    (B, 3, H, W) of the same layout; `images` are left as they are. Nothing waits for a GPU, except the policies.
    """
    draws = Draws(seed, epoch, indices)
    if config.flip != "none" or config.crop_padding:
        images = flip_and_crop(images, draws, config)
    if config.rotate or config.shift or config.shear or config.zoom:
        images = warp(images, draws, config)
    if config.policy != "none":
        images = apply_policy(images, draws, config)
    if config.cutout:
        images = cutout(images, draws, config.cutout)
    return images


def flip_and_crop(images: Tensor, draws: Draws, config: AugmentConfig) -> Tensor:
    """Mirror some of the images, then pad all by `crop_padding` and cut the old size out at a random place.

    Both are one look-up, of whole rows first, which are contiguous and so cheap, then within the rows. For 500 images
    of 32x32 on one core it takes 1 ms; a flip and a window into padded images took 3.6 ms, a loop over the 25 shifts
    4.6 ms (and must know how many images share a shift), indexing with four tensors 9.5 ms.
    """
    batch, channels, height, width = images.shape
    device = images.device
    channels_last = channels > 1 and images.stride(1) == 1
    step = channels if channels_last else 1  # bytes from pixel to pixel in a row: rows (B, 1, H, W * 3) or (B, 3, H, W)
    rows = (images.permute(0, 2, 3, 1) if channels_last else images).reshape(batch, channels // step, height, -1)
    y = torch.arange(height, device=device).expand(batch, -1)
    x = torch.arange(width, device=device).expand(batch, -1)
    if pad := config.crop_padding:
        top, left = draws.integers("crop", 2 * pad + 1, 2 * pad + 1)
        y, x = y + top[:, None], x + left[:, None]
        if config.crop_fill == "zero":
            rows = F.pad(rows, (pad * step, pad * step, pad, pad))
        else:
            y, x = _reflect(y - pad, height), _reflect(x - pad, width)
    planes, tall, long = rows.shape[1:]
    if config.flip != "none":
        x = torch.where(_flips(draws, config.flip)[:, None], long // step - 1 - x, x)
    starts = torch.arange(batch * planes, device=device).view(batch, planes, 1) * tall
    rows = rows.reshape(-1, long).index_select(0, (starts + y[:, None]).flatten()).view(batch, planes * height, long)
    columns = (x[:, :, None] * step + torch.arange(step, device=device)).view(batch, 1, width * step)
    result = rows.gather(2, columns.expand(-1, planes * height, -1))
    if channels_last:
        return result.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return result.view(batch, channels, height, width)


def cutout(images: Tensor, draws: Draws, side: int) -> Tensor:
    """Set a square of `side` pixels to zero; its centre is any pixel, so that the border may cut it off."""
    height, width = images.shape[2:]
    centre_y, centre_x = draws.integers("cutout", height, width)
    y = torch.arange(height, device=images.device) - centre_y[:, None] + side // 2
    x = torch.arange(width, device=images.device) - centre_x[:, None] + side // 2
    inside = ((y >= 0) & (y < side))[:, None, :, None] & ((x >= 0) & (x < side))[:, None, None, :]
    return images * ~inside  # a third of masked_fill's time


def warp(images: Tensor, draws: Draws, config: AugmentConfig) -> Tensor:
    """Rotate, shear, zoom and shift, each by a uniform draw up to its limit, in one bilinear resampling.

    Outside the image lies what `crop_fill` says: its reflection or zero.
    """
    draw = draws.uniform("warp", 5) * 2 - 1
    return affine(
        images,
        angles=draw[:, 0] * config.rotate,
        shifts=draw[:, 1:3] * config.shift,
        shears=draw[:, 3] * config.shear,
        zooms=1 + draw[:, 4] * config.zoom,
        reflect=config.crop_fill == "reflect",
    )


def affine(
    images: Tensor, *, angles: Tensor, shifts: Tensor, shears: Tensor, zooms: Tensor, reflect: bool = False
) -> Tensor:
    """Warp each image about its centre: shear along x, rotate clockwise (both in degrees), zoom, shift.

    All float (B,), but `shifts` (B, 2): right and down, as shares of width and height. The convention, and the pixels
    within rounding, are those of torchvision's `affine` with bilinear interpolation.
    """
    height, width = images.shape[2:]
    angles, tangents = torch.deg2rad(angles), torch.tan(torch.deg2rad(shears))
    cos, sin = torch.cos(angles), torch.sin(angles)
    # grid_sample asks where each output pixel comes from: the inverse of zoom * R(angle) @ [[1, -tangent], [0, 1]].
    inverse = torch.stack([cos - tangents * sin, sin + tangents * cos, -sin, cos], dim=1).view(-1, 2, 2)
    inverse = inverse / zooms[:, None, None]
    # It measures from the centre in halves of width and height, in which a square pixel need not be square.
    half = torch.full((2,), width, device=images.device)  # filled there: a copy from the host would wait for a GPU
    half[1] = height
    inverse = inverse * half / half[:, None]
    origin = -(inverse @ (2 * shifts)[:, :, None])
    grid = F.affine_grid(torch.cat([inverse, origin], dim=2), list(images.shape), align_corners=False)
    mode = "reflection" if reflect else "zeros"
    warped = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode=mode, align_corners=False)
    return warped.round_().to(torch.uint8)


def apply_policy(images: Tensor, draws: Draws, config: AugmentConfig) -> Tensor:
    """torchvision's TrivialAugmentWide or RandAugment with its defaults, image by image, 0.1 to 0.2 ms each."""
    from torchvision.transforms import v2  # 1.5 s, which a run without it need not pay

    transform = v2.TrivialAugmentWide() if config.policy == "trivial" else v2.RandAugment()
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, image_seed in zip(images, draws.bits("policy").flatten().tolist(), strict=True):
            # These draw from the global CPU generator; torch.manual_seed would reseed those of the GPUs as well.
            torch.default_generator.manual_seed(image_seed)
            changed.append(transform(image))
    return torch.stack(changed) if changed else images


def mix(
    images: Tensor, labels: Tensor, config: AugmentConfig, num_classes: int, *, seed: int, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour in the batch by torchvision's MixUp or CutMix; with both on, a coin per step.

    `images` uint8 (B, 3, H, W) and `labels` int64 (B,) give images in 0..255, float32 where `mixup` is on, else uint8,
    and targets, float32 (B, C), whose rows sum to 1. The partner is the neighbour, so the batch must be shuffled; the
    share is drawn once per step, the same on all workers. Only for configs with `mixup` or `cutmix` above 0.
    """
    from torchvision.transforms import v2  # 1.5 s, which a run without it need not pay

    kinds = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
    mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, epoch, step, "mix"))
        return v2.RandomChoice(mixers)(images.float() if config.mixup else images, labels)


def _flips(draws: Draws, flip: Flip) -> Tensor:
    """bool (B,). Alternating: a coin per image for the even epochs, the other side in the odd ones (Jordan 2024)."""
    if flip == "random":
        return draws.uniform("flip")[:, 0] < 0.5
    coin = Draws(draws.seed, 0, draws.indices).uniform("flip")[:, 0] < 0.5
    return coin ^ (draws.epoch % 2 == 1)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Positions in or beyond 0 .. size - 1, mirrored at the border pixels as often as it takes."""
    period = max(2 * (size - 1), 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def _scramble(x: Tensor) -> Tensor:
    """splitmix64's finalizer, a bijection of int64 in which every bit of the result depends on every bit of `x`."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Of the 64 bits as they are; `>>` alone would fill in the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
