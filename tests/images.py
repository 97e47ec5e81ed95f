"""Small makers of images, good and bad, for tests."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encode(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def noise(seed: int, side: int = 32) -> np.ndarray:
    """uint8 (side,side,3), different for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(seed: int, side: int = 32) -> bytes:
    return encode(Image.fromarray(noise(seed, side)))


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header says 20,000 x 20,000 pixels."""

    def piece(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + piece(b"IHDR", header)
        + piece(b"IDAT", zlib.compress(b"\0" * 1000))
        + piece(b"IEND", b"")
    )


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Bytes and the reason that decode must give, by kind."""
    jpeg = encode(Image.fromarray(noise(0, 64)), "jpeg")
    return {
        "truncated_png": (png(0)[:1500], "truncated or damaged"),
        "truncated_jpeg": (jpeg[: len(jpeg) // 2], "truncated or damaged"),
        "header_only": (png(0)[:20], "truncated or damaged"),
        "empty": (b"", "empty file"),
        "text": (b"not an image at all" * 10, "not an image"),
        "bomb": (bomb(), "decompression bomb"),
    }


def write_folder(root: Path, classes: int = 2, per_class: int = 10, seed: int = 0, side: int = 32) -> None:
    for label in range(classes):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            (folder / f"{number:04d}.png").write_bytes(png(seed + label * per_class + number, side))


def write_parquet(
    path: Path, images: list[bytes | None], labels: list[Any], metadata: dict[str, str] | None = None
) -> None:
    """In the hub's layout, struct of bytes and path in `img`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pa.array(
        [{"bytes": data, "path": None} for data in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({"img": rows, "label": pa.array(labels)}).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=7)
