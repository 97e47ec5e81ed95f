"""A folder of images as people have them: 7 classes of 10 to 400, of many shapes and kinds, some grey, some broken."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COUNTS = {"cross": 400, "disc": 216, "ring": 117, "square": 63, "star": 34, "triangle": 18, "wave": 10}
"""Images of each class that can be read."""
BROKEN = 5
EDGE = 3
"""Shapes are drawn so many times as large, and then reduced."""


def write_signs(root: Path, counts: Mapping[str, int] = COUNTS, seed: int = 0) -> None:
    """A folder for each class: painted signs, turned, in any colour, before blurred grounds, with scribbles and noise.

    Sides are 48 to 200 pixels, upright or lying. Half are JPEG, half PNG; a third is grey: of 8 bits, with alpha, or of
    16 bits. `BROKEN` files more cannot be read.
    """
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(count):
            image = paint(name, rng)
            if number % 3 == 2:
                image = greyed(image, number // 3 % 3)
            suffix = "png" if number % 2 or image.mode in ("LA", "I;16") else "jpg"
            image.save(folder / f"{number:04d}.{suffix}")
    first, *others = counts
    good = (root / first / "0000.jpg").read_bytes()
    for number, data in enumerate((good[: len(good) // 2], good[:100], b"", b"not an image", good[: len(good) // 3])):
        (root / (others[0] if number % 2 else first) / f"broken-{number}.jpg").write_bytes(data)


def paint(name: str, rng: np.random.Generator) -> Image.Image:
    """RGB."""
    long = int(rng.integers(96, 201))
    short = max(int(long * rng.uniform(0.5, 1)), 48)
    size = (long, short) if rng.random() < 0.5 else (short, long)
    ground = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize((EDGE * size[0], EDGE * size[1]), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 6)):
        ends = [tuple(rng.integers(0, EDGE * np.array(size)).tolist()) for _ in range(2)]
        draw.line(ends, fill=tuple(rng.integers(0, 256, 3).tolist()), width=int(rng.integers(1, 4)) * EDGE)
    radius = EDGE * short * rng.uniform(0.25, 0.42)
    centre = EDGE * np.array(size) / 2 + rng.uniform(-0.12, 0.12, 2) * EDGE * short
    behind = np.array(image.getpixel(tuple(centre.astype(int).tolist())), int)
    colour = rng.integers(0, 256, 3)
    while np.abs(colour - behind).sum() < 160:
        colour = rng.integers(0, 256, 3)
    draw_sign(draw, name, centre, radius, rng.uniform(0, 2 * math.pi), tuple(colour.tolist()))
    pixels = np.asarray(image.resize(size, Image.Resampling.BOX)) + rng.normal(0, rng.uniform(4, 16), (*size[::-1], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_sign(
    draw: ImageDraw.ImageDraw, name: str, centre: np.ndarray, radius: float, angle: float, colour: tuple[int, ...]
) -> None:
    """All have about the same extent, so that only their form tells them apart."""

    def around(*polar: tuple[float, float]) -> list[tuple[float, float]]:
        """Points by their share of the radius and of a turn."""
        turns = [(radius * r, angle + 2 * math.pi * t) for r, t in polar]
        return [(centre[0] + r * math.cos(t), centre[1] + r * math.sin(t)) for r, t in turns]

    box = [*(centre - radius).tolist(), *(centre + radius).tolist()]
    thick = round(0.3 * radius)
    match name:
        case "disc":
            draw.ellipse(box, fill=colour)
        case "ring":
            draw.ellipse(box, outline=colour, width=thick)
        case "cross":
            for turn in (0, 0.25):
                draw.line(around((1, turn), (1, turn + 0.5)), fill=colour, width=thick)
        case "square":
            draw.polygon(around(*((1, turn / 4) for turn in range(4))), fill=colour)
        case "triangle":
            draw.polygon(around(*((1, turn / 3) for turn in range(3))), fill=colour)
        case "star":
            draw.polygon(around(*((1 if turn % 2 else 0.45, turn / 10) for turn in range(10))), fill=colour)
        case "wave":
            along = np.linspace(-1, 1, 40)
            heights = 0.4 * np.sin(5 * along)
            points = zip(np.hypot(along, heights), np.arctan2(heights, along) / 2 / math.pi, strict=True)
            draw.line(around(*points), fill=colour, width=thick, joint="curve")
        case _:
            raise ValueError(name)


def greyed(image: Image.Image, kind: int) -> Image.Image:
    """Grey as 8 bits, with alpha, or of 16 bits."""
    if kind == 0:
        return image.convert("L")
    if kind == 1:
        return image.convert("LA")
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
