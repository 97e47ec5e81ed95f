"""Sets known by name: where they are, and how they get into the cache as Parquet in the hub's layout."""

import io
import json
import logging
import os
import pickle
import socket
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cifar.config import ConfigError
from cifar.data.prepared import absolute, exists, join, write_file

NAMES = ("cifar10", "cifar100", "digits", "auto")
_DOWNLOAD_TIMEOUT_SECONDS = 30

logger = logging.getLogger(__name__)


def cache_folder() -> str:
    """Folder or URI of everything that can be made again: $CIFAR_CACHE or ~/.cache/cifar."""
    return absolute(os.environ.get("CIFAR_CACHE") or "~/.cache/cifar")


def locate(name: str) -> tuple[str, str]:
    """The set that `name` stands for (`auto` becomes cifar10 or digits) and its Parquet path.

    $CIFAR10_DIR or $CIFAR100_DIR, else the cache, else a download, which is kept in the cache.
    """
    if name == "auto":
        try:
            return locate("cifar10")
        except ConfigError as error:
            logger.warning("--data auto: NO CIFAR-10, FALLING BACK TO DIGITS, a toy set of 1,797 images. %s", error)
            return locate("digits")
    if name == "digits":
        path = join(cache_folder(), f"sources/digits-{version('scikit-learn')}.parquet")
        if not exists(path):
            _write_digits(path)
        return name, path
    variable = f"{name.upper()}_DIR"
    path = os.environ.get(variable)
    if path:
        if not exists(path):
            raise ConfigError(f"--data {name}: ${variable} is {path}, which does not exist; mend or unset it")
        return name, path
    path = join(cache_folder(), f"sources/{name}")
    if not all(exists(join(path, f"{split}.parquet")) for split in ("train", "test")):
        _download(name, path, variable)
    return name, path


def _download(name: str, path: str, variable: str) -> None:
    from torchvision import datasets  # 3 s

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)  # torchvision sets none: a dead link would hang for ever
    try:
        with tempfile.TemporaryDirectory() as scratch:
            logger.warning("--data %s: downloading it once into %s", name, path)
            for split in ("train", "test"):
                # Checks the archive's MD5 sum.
                found = cls(scratch, train=split == "train", download=True)
                labels = {"label": (found.targets, found.classes)}
                if name == "cifar100":
                    folder = os.path.join(scratch, cls.base_folder)
                    labels = {"fine_label": labels["label"], "coarse_label": _superclasses(folder, split)}
                _write(join(path, f"{split}.parquet"), found.data, labels)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"--data {name}: ${variable} is unset, the cache has no copy and the download failed ({error}); set "
            f"${variable} to a folder with train-*.parquet and test-*.parquet, run once with a network, or use "
            f"--data digits"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _superclasses(folder: str, split: str) -> tuple[list[int], list[str]]:
    """CIFAR-100's coarse labels and their names, from the archive that torchvision has checked and leaves them in."""
    found = []
    for file in (split, "meta"):
        with open(os.path.join(folder, file), "rb") as stream:
            found.append(pickle.load(stream, encoding="latin1"))
    return found[0]["coarse_labels"], found[1]["coarse_label_names"]


def _write_digits(path: str) -> None:
    from sklearn.datasets import load_digits  # 1 s

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(np.asarray(images).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    _write(path, pixels, {"label": (np.asarray(labels).tolist(), [str(digit) for digit in range(10)])})


def _write(path: str, images: np.ndarray, labels: Mapping[str, tuple[list[int], list[str]]]) -> None:
    """Parquet in the hub's layout: PNG in `img.bytes`, of each column of labels the class names in the schema's
    metadata."""
    features: dict[str, Any] = {"img": {"_type": "Image"}}
    features |= {name: {"names": classes, "_type": "ClassLabel"} for name, (_, classes) in labels.items()}
    schema = pa.schema(
        {"img": pa.struct({"bytes": pa.binary(), "path": pa.string()})} | {name: pa.int64() for name in labels},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"bytes": _png(image), "path": None} for image in images]
    sink = io.BytesIO()
    columns = [pa.array(values, pa.int64()) for values, _ in labels.values()]
    table = pa.table([pa.array(rows, schema.field("img").type), *columns], schema=schema)
    pq.write_table(table, sink, row_group_size=1000)
    write_file(path, sink.getvalue())


def _png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "png", compress_level=1)
    return sink.getvalue()
