"""Which images an epoch trains on: those with the highest loss when they were last trained on.

Most images are learnt long before training ends, and a step on them changes little (Jiang 2019, "Accelerating Deep
Learning by Focusing on the Biggest Losers", arXiv 1910.00762; airbench96_faster by Jordan leaves out half of each
batch, as a small network trained before judges them). Here the losses are those of the run itself, which cost nothing,
and what is left out costs neither the forward nor the backward pass.
"""

import torch
import torch.distributed as dist
from torch import Tensor

FULL_EPOCHS = 2
"""At the start, in which every image is seen; in the last epoch it is seen too."""


def epoch_batches(num_batches: int, epochs: int, skip_easy: float) -> list[int]:
    """Batches of each of so many epochs: `num_batches`, or fewer where the share `skip_easy` is left out."""
    fewer = max(round(num_batches * (1 - skip_easy)), 1)
    between = range(FULL_EPOCHS, epochs - 1)
    return [fewer if epoch in between else num_batches for epoch in range(epochs)]


class Selection:
    """The latest loss of each image, by its number in the prepared set, 0 to `num_images` - 1.

    An epoch chooses by the losses that were known when it began, so that one that is resumed in its middle chooses as
    it did before. 8 bytes an image.
    """

    def __init__(self, num_images: int, device: torch.device):
        self._known = torch.full((num_images,), torch.inf, device=device)
        self._fresh = torch.full((num_images,), -1.0, device=device)
        """Of this epoch; negative where an image has not been seen. A cross-entropy never is."""

    def hardest(self, indices: Tensor, count: int) -> Tensor:
        """bool (N,): the `count` images of highest loss among `indices`, int64 (N,); unseen ones before all others."""
        chosen = torch.zeros(len(indices), dtype=torch.bool, device=indices.device)
        chosen[self._known[indices].argsort(descending=True, stable=True)[:count]] = True
        return chosen

    def add(self, indices: Tensor, losses: Tensor) -> None:
        """Take in the losses, float (B,), of the images `indices`, int64 (B,); of a repeated one the highest counts."""
        self._fresh.scatter_reduce_(0, indices, losses.detach().float(), "amax")

    def share(self) -> None:
        """Let every worker know this epoch's losses of all; called by all at once."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._fresh, dist.ReduceOp.MAX)

    def finish_epoch(self) -> None:
        """From here on, choose by what was added; called by all workers at once."""
        self.share()
        self._known = torch.where(self._fresh < 0, self._known, self._fresh)
        self._fresh.fill_(-1.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"known": self._known, "fresh": self._fresh}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._known.copy_(state["known"])
        self._fresh.copy_(state["fresh"])
