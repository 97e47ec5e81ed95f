"""What all pages share: the template environment, pictures as data URIs, atomic writes, versions."""

import base64
import datetime
import importlib.metadata
import io
import json
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import cifar
from cifar.data.prepared import write_file

LARGEST_THUMBNAIL = 96
LARGEST_EXACT = 48
"""Side in pixels up to which pictures are PNG and the page shows their pixels as squares."""
PERCENT = "\u00a0%"  # a space that does not break


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cifar.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, number=number, duration=duration)
    return environment


def render(template: str, **values: Any) -> str:
    """The page of a template; every value is escaped unless it is `markupsafe.Markup`."""
    made_at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return _environment().get_template(template).render(version=cifar.__version__, made_at=made_at, **values)


def write(path: Path, content: str | bytes) -> Path:
    """Readers see the old file or the new one, never a part."""
    write_file(str(path), content.encode() if isinstance(content, str) else content)
    return path


def write_json(path: Path, values: dict[str, Any]) -> Path:
    return write(path, json.dumps(values, indent=2) + "\n")


def strip(images: Sequence[NDArray[np.uint8]], gap: int = 2) -> str:
    """Images uint8 (S,S,3) side by side, transparent gaps between, as one data URI.

    Small ones exactly, as PNG; large ones as thumbnails, in lossy WebP of a tenth of the size.
    """
    tiles = [_thumbnail(image) for image in images]
    side = tiles[0].width
    row = Image.new("RGBA", (len(tiles) * side + (len(tiles) - 1) * gap, side))
    for place, tile in enumerate(tiles):
        row.paste(tile, (place * (side + gap), 0))
    kind = "png" if side <= LARGEST_EXACT else "webp"
    content = io.BytesIO()
    row.save(content, format=kind, quality=85)
    return data_uri(content.getvalue(), f"image/{kind}")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _thumbnail(image: NDArray[np.uint8]) -> Image.Image:
    picture = Image.fromarray(image)
    if picture.width > LARGEST_THUMBNAIL:
        picture = picture.resize((LARGEST_THUMBNAIL, LARGEST_THUMBNAIL), Image.Resampling.LANCZOS)
    return picture


def versions() -> dict[str, str]:
    """Of what the numbers depend on; a package that is not installed is left out."""
    found = {"cifar": cifar.__version__, "python": platform.python_version()}
    for name in ("torch", "ray", "numpy", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"platform": platform.platform()}


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}{PERCENT}"


def number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
