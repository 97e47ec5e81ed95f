"""Any number of workers takes the same steps."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar.config import Config
from cifar.train import fit
from tests.images import encode, write_parquet

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four workers fit, whatever the machine has."""
    import ray

    from cifar import cluster

    monkeypatch.setattr(cluster, "usable_cpus", lambda: 4)
    cluster.start_ray(verbose=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("four_cpus")
def test_one_two_and_four_workers_take_the_same_steps(here: Config, tmp_path: Path) -> None:
    """Fifty, in fp32. Batch norm sees the same micro-batches; the first worker's share sets whitening.

    At a rate three times as high rounding alone, by two threads instead of one, changes the loss in its third digit.
    """
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.arange(2300) % 10)
    colours = rng.integers(90, 166, (10, 3))
    pixels = colours[labels][:, None, None] + rng.normal(0, 40, (2300, 16, 16, 3))
    images: list[bytes | None] = [encode(Image.fromarray(image)) for image in pixels.clip(0, 255).astype(np.uint8)]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", images[:2260], labels[:2260].tolist())
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[2260:], labels[2260:].tolist())
    config = replace(
        here,
        data=replace(here.data, data=str(tmp_path / "data")),
        train=replace(here.train, epochs=10, batch_size=400),
    )
    histories = []
    for workers in (1, 2, 4):
        optim = replace(here.optim, optimizer="sgd", lr=0.3, accumulate=4 // workers)
        run = replace(here.run, name=str(workers), workers=str(workers))
        histories.append(fit(replace(config, optim=optim, run=run)).history)
    one, two, four = histories
    assert [row["step"] for row in one] == list(range(5, 51, 5))
    assert one[-1]["train_loss"] < one[0]["train_loss"] - 0.3
    for row, *others in zip(one, two, four, strict=True):
        for other in others:
            assert other["train_loss"] == pytest.approx(row["train_loss"], abs=1e-4)
            assert other["val_count"] == row["val_count"] == 226
