"""Classes of unequal size: weights, weighted losses, and how often an epoch draws what."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.balance import (
    class_weights,
    image_losses,
    image_losses_of,
    occurrences,
    repetitions,
    sampling_weights,
)
from cifar.config import AugmentConfig, Config, ConfigError, OptimConfig, TrainConfig
from cifar.data import Prepared, loader, prepare
from cifar.data.loader import Batch, ResidentLoader, StreamingLoader, read_stream
from cifar.data.shares import share
from cifar.metrics import ClassTotals
from cifar.model_dir import load_model
from cifar.selection import Selection
from cifar.train import fit
from cifar.worker import Worker
from tests.conftest import IMBALANCED

COUNTS = list(IMBALANCED)
COLUMNS = ["image", "label", "index"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tailed(config: Config, imbalanced: Path) -> Prepared:
    return prepare(replace(config.data, data=str(imbalanced)))


def make(prepared: Prepared, kind: str, weights: Tensor | None, rank: int = 0, workers: int = 1, parts: int = 1) -> Any:
    common = {"batch_size": 44, "seed": 3, "rank": rank, "world_size": workers, "device": CPU, "weights": weights}
    if kind == "streaming":
        return StreamingLoader(prepared, read_stream(prepared), epochs=200, **common)
    total = prepared.counts["train"]
    start, stop = share(total, rank, workers, parts)
    table = prepared.table("train", COLUMNS).slice(start, stop - start)
    return ResidentLoader(table, total=total, micro_batches=parts, **common)


def drawn(batches: list[Batch]) -> list[tuple[int, int]]:
    """Index and draw of every image, in order."""
    return [pair for batch in batches for pair in zip(batch.indices.tolist(), batch.draws.tolist(), strict=True)]


def counted(losses: Tensor, counts: Tensor | None) -> Tensor:
    return losses if counts is None else losses * counts


def balanced(way: Any) -> Config:
    return Config(train=TrainConfig(balance=way))


def test_all_classes_count_alike_and_images_one_on_average() -> None:
    weights = class_weights(COUNTS).double()
    torch.testing.assert_close(weights * torch.tensor(COUNTS), torch.full((4,), 99.0, dtype=torch.float64))


def test_a_class_without_images_changes_nothing_for_the_others() -> None:
    assert class_weights([30, 0, 10]).tolist() == pytest.approx([2 / 3, 1, 2])
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 2, 0])
    for way in ("loss", "logits"):
        assert counted(*image_losses_of(balanced(way), [30, 0, 10], CPU)(logits, labels)).isfinite().all()


def test_only_sampling_draws_and_only_the_others_change_the_loss() -> None:
    logits, labels = torch.randn(9, 4), torch.arange(9) % 4
    plain = F.cross_entropy(logits, labels, reduction="none")
    for way in ("none", "sampling", "loss", "logits"):
        weights = sampling_weights(balanced(way), COUNTS)
        assert weights is None if way != "sampling" else torch.equal(weights, class_weights(COUNTS))  # pyright: ignore
        losses = counted(*image_losses_of(balanced(way), COUNTS, CPU)(logits, labels))
        assert torch.equal(losses, plain) == (way in ("none", "sampling"))


@pytest.mark.parametrize(("way", "level"), [("none", False), ("loss", True), ("logits", True)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_network_that_sees_nothing_is_best_off_without_a_favourite(way: Any, level: bool, smoothing: float) -> None:
    """Equal logits for all images are where the gradient of the mean over the training split vanishes; without balance
    the frequent classes are preferred."""
    logits = torch.zeros(4, requires_grad=True)
    labels = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    config = replace(balanced(way), optim=OptimConfig(label_smoothing=smoothing))
    losses = counted(*image_losses_of(config, COUNTS, CPU)(logits.expand(396, 4), labels))
    losses.mean().backward()
    assert logits.grad is not None
    if smoothing and way == "logits":  # the share of all classes is that of the frequent ones, a little
        assert logits.grad.abs().max() < 0.04
    else:
        assert (logits.grad.abs().max() < 1e-6) == level
    assert losses.shape == (396,)


def test_the_weighted_loss_is_torchs() -> None:
    """Of labels and of mixed targets; its mean divides by the sum of weights, or by the count of images."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(396, 4, generator=generator)
    labels = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    weights = class_weights(COUNTS)
    losses = counted(*image_losses(logits, labels, weights=weights))
    torch.testing.assert_close(losses.sum() / 396, F.cross_entropy(logits, labels, weight=weights))
    torch.testing.assert_close(
        losses[:7].sum(), F.cross_entropy(logits[:7], labels[:7], weight=weights, reduction="sum")
    )
    mixed = torch.rand(396, 4, generator=generator).softmax(1)
    losses = counted(*image_losses(logits, mixed, weights=weights))
    torch.testing.assert_close(losses, F.cross_entropy(logits, mixed, weight=weights, reduction="none"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_image_is_so_much_of_an_image_of_each_class(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(20, 4, generator=generator), class_weights(COUNTS)
    first, second = torch.randint(4, (2, 20), generator=generator)
    share = torch.rand(20, 1, generator=generator)
    mixed = share * F.one_hot(first, 4) + (1 - share) * F.one_hot(second, 4)
    of_each = [
        weights[labels] * F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        for labels in (first, second)
    ]
    losses, counts = image_losses(logits, mixed, smoothing, weights)
    torch.testing.assert_close(counted(losses, counts), share[:, 0] * of_each[0] + (1 - share[:, 0]) * of_each[1])
    torch.testing.assert_close(counts, (mixed * weights).sum(1))


def test_without_weights_the_loss_is_as_it_was() -> None:
    logits, labels = torch.randn(9, 4), torch.arange(9) % 4
    losses, counts = image_losses(logits, labels, 0.1)
    assert counts is None
    assert torch.equal(losses, F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1))


def test_repetitions_are_the_weight_rounded_either_way_and_equal_it_on_average() -> None:
    labels, indices = torch.arange(4).repeat_interleave(50), torch.arange(200) * 3
    weights = torch.tensor([0.25, 1.0, 2.6, 7.0])
    of_epochs = torch.stack(
        [repetitions(labels, indices, weights, seed=1, epoch=epoch) for epoch in range(400)]
    ).double()
    assert ((of_epochs >= weights.floor()[labels]) & (of_epochs <= weights.ceil()[labels])).all()
    # 20,000 draws of each class: a deviation of 0.5 / sqrt(20,000) at most.
    np.testing.assert_allclose(of_epochs.mean(0).view(4, 50).mean(1), weights, atol=0.015)
    per_image = of_epochs[:, labels == 2].mean(0)
    assert (per_image - 2.6).abs().max() < 0.1, "each image by itself"
    other = repetitions(labels, indices, weights, seed=2, epoch=0)
    assert not torch.equal(of_epochs[0], other)
    assert not torch.equal(of_epochs[0], of_epochs[1])


def test_occurrences_count_what_came_before() -> None:
    assert occurrences(torch.tensor([7, 2, 7, 7, 2, 0])).tolist() == [0, 0, 1, 2, 1, 0]


@pytest.mark.parametrize("kind", ["resident", "streaming"])
def test_an_epoch_draws_classes_as_often_as_their_weights_say(tailed: Prepared, kind: str) -> None:
    weights = class_weights(COUNTS)
    found = make(tailed, kind, weights)
    assert found.num_batches == 9
    counts, images = np.zeros(4), Counter()
    for epoch in range(40):
        batches = list(found.epoch(epoch))
        assert [len(batch.labels) for batch in batches] == [44] * 9
        pairs = drawn(batches)
        # No image has the same changes twice in an epoch, but for those that fill a stream's last batches.
        assert len({draw for _, draw in pairs}) >= (396 if kind == "resident" else 360)
        images.update(index for index, _ in pairs)
        counts += np.bincount(torch.cat([batch.labels for batch in batches]).numpy(), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), [0.25] * 4, atol=0.01)
    assert len(images) == 396, "each image has its turn"
    arrays = tailed.table("train", COLUMNS)
    label_of = dict(zip(arrays.column("index").to_pylist(), arrays.column("label").to_pylist(), strict=True))
    of_rarest = [images[index] / 40 for index, label in label_of.items() if label == 3]
    assert min(of_rarest) > 7.5
    assert max(of_rarest) < 8.7, "8.25 times each"


@pytest.mark.parametrize("kind", ["resident", "streaming"])
def test_what_an_epoch_draws_depends_on_seed_and_epoch_alone(tailed: Prepared, kind: str) -> None:
    """Not on the epochs before, nor on the batch that it begins with."""
    weights = class_weights(COUNTS)
    one, other = make(tailed, kind, weights), make(tailed, kind, weights)
    whole = [drawn(list(one.epoch(epoch))) for epoch in range(3)]
    assert drawn(list(other.epoch(2, 4))) == whole[2][4 * 44 :]
    assert whole[0] != whole[1]


def test_both_loaders_draw_the_same_images(tailed: Prepared) -> None:
    """But for the few by which an epoch is made to fit."""
    weights = class_weights(COUNTS)
    resident, streaming = (make(tailed, kind, weights) for kind in ("resident", "streaming"))
    for epoch in range(5):
        of_each = [Counter(index for index, _ in drawn(list(one.epoch(epoch)))) for one in (resident, streaming)]
        assert (of_each[0] & of_each[1]).total() > 396 - 40


def test_a_stream_in_small_windows_draws_full_batches(tailed: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many rows are drawn not at all, and one is drawn more often than a window is long."""
    monkeypatch.setattr(loader, "SHUFFLE_BYTES", 1)
    for weights in (class_weights(COUNTS), torch.tensor([0.1, 0.1, 0.1, 20.0]), torch.tensor([0.01] * 4)):
        found = make(tailed, "streaming", weights)
        for epoch in range(3):
            assert [len(batch.labels) for batch in found.epoch(epoch)] == [44] * 9


def test_streams_and_memory_without_weights_draw_what_they_drew(tailed: Prepared) -> None:
    """Weights of one, by way of the drawing, are no weights."""
    for kind in ("resident", "streaming"):
        plain, ones = make(tailed, kind, None), make(tailed, kind, torch.ones(4))
        assert sorted(drawn(list(plain.epoch(0)))) == sorted(drawn(list(ones.epoch(0))))
        assert all(index == draw for index, draw in drawn(list(plain.epoch(1))))


@pytest.mark.parametrize("fewer", [False, True])
def test_workers_draw_what_the_micro_batches_of_one_worker_draw(tailed: Prepared, fewer: bool) -> None:
    def choose(of: Tensor) -> Tensor:
        chosen = torch.zeros(len(of), dtype=torch.bool)
        chosen[(of % 7).argsort(stable=True)[:50]] = True
        return chosen

    def micro_batches(workers: int) -> list[list[list[int]]]:
        parts = 4 // workers
        loaders = [make(tailed, "resident", class_weights(COUNTS), rank, workers, parts) for rank in range(workers)]
        epochs = [list(one.epoch(1, 1, choose if fewer else None)) for one in loaders]
        batches = [torch.cat([batch.draws for batch in step]) for step in zip(*epochs, strict=True)]
        return [batch.view(4, 11).tolist() for batch in batches]

    assert len(micro_batches(1)) == (50 // 11 if fewer else 9) - 1
    assert micro_batches(1) == micro_batches(2) == micro_batches(4)


def test_of_a_repeated_image_the_highest_loss_counts() -> None:
    selection = Selection(4, CPU)
    selection.add(torch.tensor([1, 0, 1, 1]), torch.tensor([0.5, 0.7, 2.0, 0.1]))
    selection.add(torch.tensor([0]), torch.tensor([0.2]))
    selection.finish_epoch()
    assert selection.hardest(torch.tensor([0, 1]), 1).tolist() == [False, True]
    assert selection.state_dict()["known"][:2].tolist() == pytest.approx([0.7, 2.0])


def test_means_over_classes_are_those_of_scikit_learn_and_of_torch() -> None:
    from sklearn.metrics import balanced_accuracy_score

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (100,), generator=generator) * torch.randint(2, (100,), generator=generator)
    logits = torch.randn(100, 5, generator=generator)
    logits[:, 3:] = -9  # classes without an image, which nobody predicts
    totals = ClassTotals(5, "cpu")
    totals.add(logits[:30], labels[:30])
    totals.add(logits[30:], labels[30:])
    result = totals.result()
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    of_each = [F.cross_entropy(logits[labels == label], labels[labels == label]).item() for label in range(3)]
    assert result["balanced_loss"] == pytest.approx(np.mean(of_each))


@pytest.mark.parametrize("way", ["sampling", "loss", "logits"])
def test_a_balanced_run_learns_and_tells_means_over_classes(here: Config, imbalanced: Path, way: Any) -> None:
    config = replace(here, data=replace(here.data, data=str(imbalanced)))
    run = fit(replace(config, train=replace(here.train, balance=way)))
    for row in run.history:
        # Classes of 11 val images each: the mean over classes is the mean over images.
        assert row["val_balanced_accuracy"] == pytest.approx(row["val_accuracy"])
        assert row["val_balanced_loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    assert run.history[-1]["val_accuracy"] > 0.9
    assert "val_balanced_accuracy" not in fit(config).history[0]


def test_the_best_epoch_and_patience_go_by_the_loss_over_the_classes(
    here: Config, imbalanced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where accuracy, loss and the mean accuracy of the classes go other ways."""
    told = iter([(0.9, 0.5, 1.5, 0.3), (0.8, 0.6, 1.2, 0.5), (0.7, 0.7, 1.3, 0.6), (0.6, 0.8, 1.4, 0.7)])

    def evaluate(*_: object) -> dict[str, float]:
        return dict(zip(("accuracy", "loss", "balanced_loss", "balanced_accuracy"), next(told), strict=True)) | {
            "count": 44
        }

    monkeypatch.setattr(Worker, "evaluate", evaluate)
    config = replace(here, data=replace(here.data, data=str(imbalanced)))
    run = fit(replace(config, train=replace(here.train, balance="loss", epochs=9, patience=2)))
    assert [row["val_balanced_loss"] for row in run.history] == [1.5, 1.2, 1.3, 1.4]
    assert run.stopped == "no better val loss over the classes for 2 epochs (--patience)"
    assert load_model(run.model).metrics["epoch"] == 2


def test_sampling_is_refused_where_an_image_is_changed_once_an_epoch() -> None:
    with pytest.raises(ConfigError, match=r"--balance sampling: .*--balance loss"):
        Config(train=TrainConfig(balance="sampling"), augment=AugmentConfig(augment_on="data"))
