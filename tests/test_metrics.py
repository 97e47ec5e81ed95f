"""Totals: numerators and counts, never an average of averages."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn

from cifar.metrics import Totals


def batch(size: int = 103, classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, classes, generator=generator), torch.randint(classes, (size,), generator=generator)


def test_uneven_batches_give_the_numbers_of_the_whole():
    logits, labels = batch()
    totals = Totals.zeros("cpu")
    for start, stop in ((0, 50), (50, 100), (100, 103)):
        totals.add(logits[start:stop], labels[start:stop])
    assert totals.result() == pytest.approx(
        {
            "loss": F.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "count": 103,
        }
    )


def test_a_given_loss_sum_is_taken_as_it_is_and_its_graph_is_not_kept():
    logits, labels = batch()
    logits.requires_grad_()
    totals = Totals.zeros("cpu")
    totals.add(logits, labels, 2 * logits.sum())
    assert totals.result()["loss"] == pytest.approx(2 * logits.sum().item() / 103, rel=1e-5)
    assert not totals.sums.requires_grad


def test_target_probabilities_count_like_the_labels_they_stand_for():
    logits, labels = batch()
    by_label, by_target = Totals.zeros("cpu"), Totals.zeros("cpu")
    by_label.add(logits, labels)
    by_target.add(logits, F.one_hot(labels, 7).float())
    assert by_target.result() == pytest.approx(by_label.result())


def test_half_precision_logits_do_not_lose_the_loss():
    logits, labels = batch(4096)
    totals = Totals.zeros("cpu")
    for _ in range(64):
        totals.add(logits.bfloat16(), labels)
    expected = F.cross_entropy(logits.bfloat16().float(), labels).item()
    assert totals.result()["loss"] == pytest.approx(expected, rel=1e-6)
    assert totals.result()["count"] == 64 * 4096


def test_nothing_counted_is_an_error_not_nan():
    with pytest.raises(ValueError, match="no images"):
        Totals.zeros("cpu").result()


def _worker(rank: int, address: str, expected: dict[str, float]) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    logits, labels = batch()
    rows = slice(0, 3) if rank == 0 else slice(3, None)
    totals = Totals.zeros("cpu")
    totals.add(logits[rows], labels[rows])
    totals.all_reduce()
    assert totals.result() == pytest.approx(expected, rel=1e-6)
    dist.destroy_process_group()


def test_two_workers_with_uneven_shards_report_what_one_reports(tmp_path):
    totals = Totals.zeros("cpu")
    totals.add(*batch())
    totals.all_reduce()  # without a process group: nothing to do
    spawn(_worker, (f"file://{tmp_path / 'rendezvous'}", totals.result()), nprocs=2)
