"""The 15 common corruptions at 5 strengths (Hendrycks and Dietterich 2019, arXiv 1903.12261): noise, blur, weather and
digital damage, as pure functions on uint8 batches (B, 3, H, W) on the CPU.

At 32 pixels, parameters and procedures are those of the authors' script for CIFAR-10-C (`make_cifar_c.py` in
github.com/hendrycks/robustness), in our own code and with our own draws. Figures compare with published ones as two
draws of the same noise do, but for these:

- `frost` is drawn, where the authors paste photographs of frost. Its figures, and means that hold them, do not compare.
- `motion_blur` and `snow` follow the definition of ImageMagick's motion blur, which the authors call.
- Values are rounded, where the authors cut off the fraction: half a level brighter in the mean.

Above 32 pixels, with s = side / 32, lengths (radii, widths of blur, shifts, flakes, needles of ice) grow by s, so that
the image looks the same on the same paper. What works pixel by pixel (noise, the neighbours of `glass_blur`, the
squares of `pixelate`, the steps of JPEG's quantisation) grows by sqrt(s): at 224 pixels that is within a factor of 2.2
of the authors' parameters for ImageNet-C. Brightness, contrast and the shares of fog, frost and snow stay as they are.
Below 32 pixels all is as at 32; a zoom by a few percent may then come to nothing.

Stronger is not always farther from the image, as published: `motion_blur` is the same at 3 and 4, `glass_blur` blurs
its own scatter at 3 and 5, `elastic_transform` trades an affine map for bends, `frost` first brightens.

What befalls an image hangs on (seed, its index, the corruption), see `cifar.augment.Draws`: not on its batch, and not
on the strength, so that strengths differ by their parameters alone. All 75 take 6 ms per image of 32x32 on one core,
0.65 s per image of 224x224.
"""

import io
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.special import pdtr
from torch import Tensor

from cifar.augment import Draws

STRENGTHS = (1, 2, 3, 4, 5)
PUBLISHED_SIDE = 32
CHUNK_VALUES = 1 << 18
"""Values worked on at once, which stay in a core's cache: 0.7 of the time that a batch of 1,000 images takes as one."""
LARGEST_TAP = 4.0
"""Deviations after which a blur along a line ends: 0.01 % of the weight would follow."""
FINE = 8
"""Points along the side of a pixel of which those in a disk are counted."""
LUMA = (0.299, 0.587, 0.114)
"""Luma of ITU-R BT.601."""

Border: TypeAlias = Literal["nearest", "reflect"]
"""As scipy calls them."""
Corruption: TypeAlias = Callable[[Tensor, int, Draws], Tensor]
"""uint8 (B,3,H,W), strength 1 to 5 and the draws of the images give uint8 (B,3,H,W)."""


def corrupt(images: Tensor, name: str, strength: int, seed: int, indices: Tensor | None = None) -> Tensor:
    """uint8 (B,3,H,W) on the CPU, of at least 8 x 8 pixels, damaged; `images` are left as they are.

    `indices` int64 (B,) tell the images apart, by default their places in the batch: the same image with the same
    index and seed is damaged in the same way, whatever comes with it, but for a rounding of the filters. ValueError for
    an unknown name or strength, and for other images.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption {name!r}; there are: {', '.join(CORRUPTIONS)}")
    if strength not in STRENGTHS:
        raise ValueError(f"strength {strength}: must be 1 to 5")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if indices is None:
        indices = torch.arange(len(images))
    size = max(1, CHUNK_VALUES // max(1, images[:1].numel()))
    chunks = zip(images.split(size), indices.split(size), strict=True)
    damage = CORRUPTIONS[name]
    damaged = [damage(chunk, strength, Draws(seed, 0, which)) for chunk, which in chunks if len(chunk)]
    return torch.cat(damaged) if damaged else images.clone()


# Noise


def gaussian_noise(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """The same deviation for all values, as in low light."""
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[strength - 1] * _grain(images)
    return _levels(_floats(images) + scale * _normal(draws, "gaussian noise", *images.shape[1:]))


def shot_noise(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """Poisson counts, of which white has `photons` in the mean."""
    photons = (500, 250, 100, 75, 50)[strength - 1] / _grain(images) ** 2
    table = _poisson_table(photons)
    most = len(table) // 256
    values = images.flatten(1).long()
    draw = draws.uniform("shot noise", values.shape[1]).double()
    counts = torch.searchsorted(table, draw + values, right=True) - values * most
    return _levels(counts.view(images.shape) / photons)


def impulse_noise(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """A share of the values becomes 0 or 255."""
    share = min((0.01, 0.02, 0.03, 0.05, 0.07)[strength - 1] * _grain(images), 1.0)
    draw = draws.uniform("impulse noise", images[0].numel()).view(images.shape)
    return images.masked_fill(draw < share, 255).masked_fill(draw < share / 2, 0)


# Blur


def defocus_blur(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """A disk of a radius, its edge smoothed by a Gaussian of a deviation."""
    radius, smooth = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[strength - 1]
    kernel = _disk(radius, smooth, _scale(images))
    planes = F.pad(_floats(images).flatten(0, 1)[:, None], (len(kernel) // 2,) * 4, mode="reflect")
    return _levels(F.conv2d(planes, kernel[None, None]).view(images.shape))


def glass_blur(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """Pixels take the places of near ones at random, between two weak Gaussian blurs.

    The published loop over the pixels copies where it means to swap, and from pixels that it has yet to reach: the
    same as all pixels at once from their neighbours above and to the left.
    """
    sigma, passes = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[strength - 1]
    reach = round(_grain(images))
    height, width = images.shape[2:]
    pixels = _gaussian(_floats(images), sigma, "nearest")
    y, x = torch.arange(height)[:, None], torch.arange(width)
    inside = (y > reach) & (y <= height - reach) & (x > reach) & (x <= width - reach)
    for number in range(passes):
        shifts = draws.uniform(f"glass {number}", 2 * height * width).view(-1, 2, height, width)
        shifts = (shifts * 2 * reach).long().clamp(max=2 * reach - 1) - reach  # the product may round up
        dy, dx = shifts.masked_fill(~inside, 0).unbind(1)
        pixels = _gather(pixels, y + dy, x + dx)
    return _levels(_gaussian(pixels, sigma, "nearest"))


def motion_blur(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """Half a Gaussian along a line within 45 degrees of the horizontal, another for each image."""
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[strength - 1]
    angles = draws.uniform("motion angle")[:, 0] * 90 - 45
    return _levels(_blur_line(_floats(images), radius * _scale(images), sigma * _scale(images), angles))


def zoom_blur(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """The mean over the image and enlargements of its centre by 0, 1, 2 percent and so on."""
    # Whether 1.25 is 1.25 or a rounding error more decides over a pixel: the factors come about as the authors' do.
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[strength - 1], 0.01).tolist()
    pixels = _floats(images)
    total = sum((_zoomed(pixels, factor) for factor in factors), start=pixels)
    return _levels(total / (len(factors) + 1))


# Weather


def snow(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """Flakes: the peaks of noise, enlarged and blurred along their fall, over an image made paler."""
    mean, deviation, zoom, threshold, radius, sigma, clear = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    )[strength - 1]
    scale = _scale(images)
    size = [round(side / scale) for side in images.shape[2:]]  # enlarged sooner, peaks would fall below the threshold
    flakes = _zoomed(mean + deviation * _normal(draws, "snow", 1, *size), zoom)
    flakes = flakes.masked_fill(flakes < threshold, 0).clamp(0, 1)
    flakes = F.interpolate(flakes, images.shape[2:], mode="bilinear", align_corners=False)
    angles = draws.uniform("snow angle")[:, 0] * 90 - 135
    flakes = _blur_line(flakes, radius * scale, sigma * scale, angles)
    pixels = _floats(images)
    grey = torch.einsum("bchw,c->bhw", pixels, torch.tensor(LUMA))[:, None]
    pale = clear * pixels + (1 - clear) * torch.maximum(pixels, grey * 1.5 + 0.5)
    return _levels(pale + flakes + flakes.flip(2, 3))


def frost(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """The image and ice on the pane before it, in shares; the shares are published, the ice is our own."""
    share, ice = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[strength - 1]
    return _levels(share * _floats(images) + ice * _ice(images, draws))


def fog(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """A cloud is added, then the brightest value set back to what it was."""
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[strength - 1]
    pixels = _floats(images)
    brightest = pixels.amax((1, 2, 3), keepdim=True)
    height, width = images.shape[2:]
    cloud = _cloud(draws, "fog", height, width, decay)
    return _levels((pixels + amount * cloud) * brightest / (brightest + amount))


def brightness(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """The value of HSV, the largest of red, green and blue, is raised; hue and saturation stay."""
    pixels = _floats(images)
    value = pixels.amax(1, keepdim=True)
    raised = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[strength - 1]).clamp(max=1)
    return _levels(torch.where(value > 0, pixels * (raised / value), raised))


# Digital


def contrast(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """A share of each channel's distance from its mean over the image is left."""
    share = (0.75, 0.5, 0.4, 0.3, 0.15)[strength - 1]
    pixels = _floats(images)
    means = pixels.mean((2, 3), keepdim=True)
    return _levels((pixels - means) * share + means)


def elastic_transform(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """A random affine map, then a smooth random shift of each pixel (Simard 2003).

    The published parameters trade one for the other: the affine map is strongest at 1, which has no shifts.
    """
    shift, smooth, jitter = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[strength - 1]
    height, width = images.shape[2:]
    side = min(height, width)
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")

    # Three corners of a square go to places near them; output pixels ask where they come from.
    centre, half = torch.tensor([height // 2, width // 2]), max(side // 3, 1)
    corners = centre + half * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = corners + jitter * side * (draws.uniform("elastic corners", 6).view(-1, 3, 2) * 2 - 1)
    inverse = torch.linalg.solve(F.pad(moved, (0, 1), value=1.0), corners)
    places = torch.stack([x, y, torch.ones_like(x)], dim=2) @ inverse[:, None]
    pixels = _sampled(_floats(images), places[..., 0], places[..., 1], align_corners=True)

    if shift:
        field = draws.uniform("elastic shifts", 2 * height * width).view(-1, 2, height, width) * 2 - 1
        # Smoothing over s times as many pixels leaves an s-th of the noise.
        field = shift * side * _scale(images) * _gaussian(field, smooth * side, "reflect", truncate=3.0)
        pixels = _sampled(pixels, x + field[:, 0], y + field[:, 1], align_corners=False)
    return _levels(pixels)


def pixelate(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """Shrunk to a share of its side and enlarged again, both with a box filter."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[strength - 1] / _grain(images)
    height, width = (_pixelated(size, max(1, int(size * share))) for size in images.shape[2:])
    return _levels(_filtered(_floats(images), height, width))


def jpeg_compression(images: Tensor, strength: int, draws: Draws) -> Tensor:
    """By Pillow, with its chroma at half of the resolution; 0.1 ms per image of 32x32."""
    quality = _coarser((80, 65, 58, 50, 40)[strength - 1], _grain(images))
    decoded = []
    for image in images.permute(0, 2, 3, 1).contiguous().numpy():
        content = io.BytesIO()
        Image.fromarray(image).save(content, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(content)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()


GROUPS: dict[str, dict[str, Corruption]] = {
    "noise": {"gaussian_noise": gaussian_noise, "shot_noise": shot_noise, "impulse_noise": impulse_noise},
    "blur": {
        "defocus_blur": defocus_blur,
        "glass_blur": glass_blur,
        "motion_blur": motion_blur,
        "zoom_blur": zoom_blur,
    },
    "weather": {"snow": snow, "frost": frost, "fog": fog, "brightness": brightness},
    "digital": {
        "contrast": contrast,
        "elastic_transform": elastic_transform,
        "pixelate": pixelate,
        "jpeg_compression": jpeg_compression,
    },
}
"""In the order of the paper."""
CORRUPTIONS: dict[str, Corruption] = {name: damage for group in GROUPS.values() for name, damage in group.items()}


def _scale(images: Tensor) -> float:
    """What lengths grow by."""
    return max(1.0, min(images.shape[2:]) / PUBLISHED_SIDE)


def _grain(images: Tensor) -> float:
    """What works pixel by pixel grows by this."""
    return math.sqrt(_scale(images))


def _floats(images: Tensor) -> Tensor:
    return images.float() / 255


def _levels(pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 1).mul(255).round().to(torch.uint8)


def _normal(draws: Draws, stream: str, *shape: int) -> Tensor:
    """Standard normal float32 (B, *shape), by Box and Muller (1958)."""
    count = math.prod(shape)
    radius, angle = draws.uniform(stream, count + count % 2).chunk(2, dim=1)
    radius, angle = (-2 * torch.log1p(-radius)).sqrt(), 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].view(-1, *shape)


@lru_cache(maxsize=16)
def _poisson_table(photons: float) -> Tensor:
    """For each level v, v + the chances of at most 0, 1, 2, ... counts of mean photons * v / 255, float64 (256 * K,).

    As one rising row, in which the draw v + u has its count as its place among the K of v. Counts above `photons` are
    white, so that K need not be larger.
    """
    counts = np.arange(math.ceil(photons) + 1)
    levels = np.arange(256)[:, None]
    return torch.from_numpy(levels + pdtr(counts, photons * levels / 255)).flatten()


@lru_cache(maxsize=16)
def _disk(radius: float, smooth: float, scale: float) -> Tensor:
    """Kernel float32 (K,K) that sums to 1: the published one, or the disk of `scale` times its deviation.

    Of the published disks the first three are single pixels, so that radius and smoothing do not say how large they
    look; 2 deviations of the smoothing count, a pixel at least.
    """
    edge = max(1, round(2 * smooth))
    reach = int(radius) + edge
    places = np.arange(-reach, reach + 1)
    disk = (places**2 + places[:, None] ** 2 <= radius**2).astype(np.float64)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), smooth, mode="constant", radius=edge)
    if scale > 1:
        radius = 2 * math.sqrt(places**2 @ kernel.sum(0)) * scale  # a disk's deviation is half of its radius
        reach = math.ceil(radius)
        fine = (np.arange((2 * reach + 1) * FINE) + 0.5) / FINE - reach - 0.5
        inside = fine**2 + fine[:, None] ** 2 <= radius**2
        kernel = inside.reshape(2 * reach + 1, FINE, -1, FINE).mean((1, 3))
    return torch.from_numpy(kernel / kernel.sum()).float()


# Filters of rows and columns are matrices: what scipy's or Pillow's filter makes of the unit matrix. So a product
# filters all planes at once, as their filters do image by image.


def _filtered(planes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B,C,H,W) by a matrix (H,H) along the height and one (W,W) along the width."""
    return rows @ (planes @ columns.T)


def _gaussian(planes: Tensor, sigma: float, border: Border, truncate: float = 4.0) -> Tensor:
    height, width = (_gaussian_matrix(size, sigma, border, truncate) for size in planes.shape[2:])
    return _filtered(planes, height, width)


@lru_cache(maxsize=64)
def _gaussian_matrix(size: int, sigma: float, border: Border, truncate: float) -> Tensor:
    matrix = ndimage.gaussian_filter1d(np.eye(size), sigma, axis=0, mode=border, truncate=truncate)
    return torch.from_numpy(matrix).float()


def _zoomed(planes: Tensor, factor: float) -> Tensor:
    height, width = (_zoom_matrix(size, factor) for size in planes.shape[2:])
    return _filtered(planes, height, width)


@lru_cache(maxsize=256)
def _zoom_matrix(size: int, factor: float) -> Tensor:
    """The middle `size` pixels of the linearly enlarged middle."""
    kept = math.ceil(size / factor)
    first = (size - kept) // 2
    enlarged: Any = ndimage.zoom(np.eye(size)[first : first + kept], (factor, 1), order=1)
    trim = (len(enlarged) - size) // 2
    return torch.from_numpy(enlarged[trim : trim + size]).float()


@lru_cache(maxsize=16)
def _pixelated(size: int, small: int) -> Tensor:
    def resize(matrix: np.ndarray, rows: int) -> np.ndarray:
        picture = Image.fromarray(matrix.astype(np.float32))
        return np.asarray(picture.resize((picture.width, rows), Image.Resampling.BOX))

    return torch.from_numpy(resize(resize(np.eye(size), small), size).copy())


def _blur_line(planes: Tensor, radius: float, sigma: float, angles: Tensor) -> Tensor:
    """The mean over steps to one side, in whole pixels, at `angles` (B,) in degrees, weighted by a Gaussian.

    The border pixels go on outside. After ImageMagick's -motion-blur.
    """
    height, width = planes.shape[2:]
    steps = torch.arange(min(2 * math.ceil(radius), math.ceil(LARGEST_TAP * sigma)) + 1)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    angles = torch.deg2rad(angles)[:, None]
    down, right = ((steps * side - 0.5).ceil().long() for side in (angles.sin(), angles.cos()))
    total = torch.zeros_like(planes)
    for step, weight in enumerate(weights.tolist()):
        rows = (torch.arange(height) + down[:, step, None]).clamp(0, height - 1)
        columns = (torch.arange(width) + right[:, step, None]).clamp(0, width - 1)
        total.add_(_gather(planes, rows[:, :, None], columns[:, None]), alpha=weight)
    return total


def _gather(planes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B,C,H,W) of the pixels at `rows` and `columns`, int64 that broadcast to (B,H,W)."""
    places = (rows * planes.shape[3] + columns).flatten(1)
    return planes.flatten(2).gather(2, places[:, None].expand(-1, planes.shape[1], -1)).view(planes.shape)


def _sampled(planes: Tensor, x: Tensor, y: Tensor, align_corners: bool) -> Tensor:
    """Bilinear at pixel places (B,H,W), mirrored at the outermost pixels (`align_corners`) or behind them."""
    height, width = planes.shape[2:]
    if align_corners:
        grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], dim=-1)
    else:
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="reflection", align_corners=align_corners)


def _coarser(quality: int, factor: float) -> int:
    """The JPEG quality whose quantisation steps are `factor` times as large, in the scale of the IJG's libjpeg."""
    percent = factor * (5000 / quality if quality < 50 else 200 - 2 * quality)
    return max(1, round(5000 / percent if percent > 100 else (200 - percent) / 2))


def _cloud(draws: Draws, stream: str, height: int, width: int, decay: float) -> Tensor:
    """Plasma float32 (B,1,H,W) within 0..1, by midpoint displacement on a torus (Fournier, Fussell, Carpenter 1982).

    Each halving of the distances divides the displacements by the square of `decay`, as in the published script.
    """
    size = 1 << (max(height, width) - 1).bit_length()
    noise = draws.uniform(stream, size * size).view(-1, size, size) * 2 - 1
    plasma = torch.zeros_like(noise)
    step, amplitude = size, 1.0
    while step > 1:
        half = step // 2
        corners = plasma[:, ::step, ::step]
        below, right = corners.roll(-1, 1), corners.roll(-1, 2)
        centres = (corners + below + right + below.roll(-1, 2)) / 4 + amplitude * noise[:, half::step, half::step]
        plasma[:, half::step, half::step] = centres
        across = (corners + right + centres + centres.roll(1, 1)) / 4
        down = (corners + below + centres + centres.roll(1, 2)) / 4
        plasma[:, ::step, half::step] = across + amplitude * noise[:, ::step, half::step]
        plasma[:, half::step, ::step] = down + amplitude * noise[:, half::step, ::step]
        step, amplitude = half, amplitude / decay**2
    low, high = (edge(plasma, (1, 2), keepdim=True) for edge in (torch.amin, torch.amax))
    return ((plasma - low) / (high - low))[:, None, :height, :width]


def _ice(images: Tensor, draws: Draws) -> Tensor:
    """Frost on a pane, float32 (B,3,H,W) within 0..1: needles in three directions 60 degrees apart, as ice grows, on a
    film of uneven thickness; whitish where it is thick and bluish where it is thin."""
    height, width = images.shape[2:]
    scale = _scale(images)
    noise = _gaussian(_normal(draws, "frost", 3, height, width), 0.6 * _grain(images), "nearest")
    first = draws.uniform("frost angle")[:, 0] * 60
    needles = [_blur_line(noise[:, i : i + 1], 12 * scale, 4 * scale, first + 60 * i) for i in range(3)]
    ridge = torch.stack(needles).amax(0)
    ridge = (ridge - ridge.mean((2, 3), keepdim=True)) / ridge.std((2, 3), keepdim=True)
    film = _cloud(draws, "frost film", height, width, 1.7)
    thickness = (film * (0.7 + 0.5 * ridge)).clamp(0, 1)[:, 0]
    thin, thick = torch.tensor([0.10, 0.18, 0.28]), torch.tensor([0.95, 0.98, 1.0])
    return thin[:, None, None] + thickness[:, None] * (thick - thin)[:, None, None]
