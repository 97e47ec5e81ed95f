"""Tiny data, no network, no state of this user's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image

from cifar.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cifar.data import Prepared, prepare
from cifar.data.prepared import filesystem
from tests.images import encode, write_parquet

NUM_CLASSES = 4
NUM_TRAIN, NUM_TEST = 440, 60
IMBALANCED = (240, 96, 48, 12)
"""Train images of each class."""


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the session's own; two threads, as many as the smallest machine has cores."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CIFAR_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("CIFAR10_DIR", "CIFAR100_DIR", "CIFAR_API_KEY", "RAY_ADDRESS"):
        patch.delenv(name, raising=False)
    # Epochs here take a tenth of a second, and each report waits for a poll.
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.05")
    torch.set_num_threads(2)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the hub's layout: 16x16 images, each class a colour under noise, 440 train and 60 test rows."""
    folder = tmp_path_factory.mktemp("parquet")
    write_colours(
        folder, {split: np.arange(count) % NUM_CLASSES for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST))}
    )
    return folder


@pytest.fixture(scope="session")
def imbalanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The like, of 396 train rows, few of some classes, and 44 val rows, as many of each."""
    folder = tmp_path_factory.mktemp("imbalanced")
    labels = {split: np.arange(count) % NUM_CLASSES for split, count in (("val", 44), ("test", NUM_TEST))}
    write_colours(folder, labels | {"train": np.repeat(np.arange(NUM_CLASSES), IMBALANCED)})
    return folder


def write_colours(folder: Path, splits: dict[str, np.ndarray]) -> None:
    """The rows of each split in random order, by their labels."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (NUM_CLASSES, 3))
    for split, ordered in splits.items():
        labels = rng.permutation(ordered)
        pixels = colours[labels][:, None, None] + rng.normal(0, 25, (len(labels), 16, 16, 3))
        images = [encode(Image.fromarray(image)) for image in pixels.clip(0, 255).astype(np.uint8)]
        write_parquet(folder / f"{split}-00000-of-00001.parquet", list(images), labels.tolist())


@pytest.fixture(scope="session")
def config(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of a second in this process: 396 train and 44 val images, 3 epochs of 9 steps."""
    return Config(
        data=DataConfig(data=str(parquet), image_size=16),
        augment=AugmentConfig(cutout=4),
        model=ModelConfig(widths=(8, 16)),
        optim=OptimConfig(optimizer="adam", lr=0.01),
        train=TrainConfig(epochs=3, batch_size=44, precision="fp32"),
        run=RunConfig(storage=str(tmp_path_factory.mktemp("runs")), workers="0"),
    )


@pytest.fixture(scope="session")
def prepared(config: Config) -> Prepared:
    return prepare(config.data)


@pytest.fixture
def here(config: Config, tmp_path: Path) -> Config:
    """The tiny config with a storage of the test's own."""
    return replace(config, run=replace(config.run, storage=str(tmp_path / "runs")))


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The query that leads an s3:// URI to a server of the tests' own, which has a bucket `bucket`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        host, port = server.get_host_and_port()
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()  # its objects are the process's
        query = f"?endpoint_override=http%3A%2F%2F127.0.0.1%3A{port}&scheme=http"
        files, bucket = filesystem(f"s3://bucket{query}&allow_bucket_creation=true")
        files.create_dir(bucket)
        yield query
    server.stop()
