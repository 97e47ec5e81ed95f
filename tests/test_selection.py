"""Which images an epoch leaves out, and what a resumed run knows of it."""

import torch

from cifar.selection import Selection, epoch_batches

CPU = torch.device("cpu")


def test_the_first_two_epochs_and_the_last_leave_nothing_out() -> None:
    assert epoch_batches(10, 6, 0.3) == [10, 10, 7, 7, 7, 10]
    assert epoch_batches(10, 3, 0.3) == [10, 10, 10]
    assert epoch_batches(10, 4, 0.0) == [10] * 4
    assert epoch_batches(1, 4, 0.9) == [1] * 4


def test_the_hardest_are_those_of_highest_loss_and_the_unseen() -> None:
    selection = Selection(8, CPU)
    indices = torch.tensor([6, 1, 4, 3, 0])
    selection.add(indices[:4], torch.tensor([0.5, 0.1, 2.0, 0.0]))
    selection.finish_epoch()
    assert selection.hardest(indices, 3).tolist() == [True, False, True, False, True]
    assert selection.hardest(indices, 4).tolist() == [True, True, True, False, True]


def test_losses_count_from_the_next_epoch_on() -> None:
    """So that an epoch that is resumed in its middle chooses what it chose at its start."""
    selection = Selection(4, CPU)
    indices = torch.arange(4)
    selection.add(indices, torch.tensor([4.0, 3.0, 2.0, 1.0]))
    selection.finish_epoch()
    selection.add(indices[:2], torch.tensor([0.1, 0.2]))
    assert selection.hardest(indices, 2).tolist() == [True, True, False, False]
    resumed = Selection(4, CPU)
    resumed.load_state_dict(selection.state_dict())
    assert resumed.hardest(indices, 2).tolist() == [True, True, False, False]
    for one in (selection, resumed):
        one.finish_epoch()
        assert one.hardest(indices, 2).tolist() == [False, False, True, True]
