"""Sums and counts that stay on the device: add per batch, reduce once over the workers, divide once."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Totals:
    """Loss sum, number correct and image count, as one tensor; adding a batch costs no host sync.

    float64, in which counts are exact and the loss of millions of images keeps its digits; float32 on Apple's GPU,
    which has no float64.
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums
        """(3,): loss, correct, count."""

    @classmethod
    def zeros(cls, device: torch.device | str) -> "Totals":
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return cls(torch.zeros(3, dtype=dtype, device=device))

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss_sum: Tensor | None = None) -> None:
        """Count a batch: logits float (B,C), labels int64 (B,) or target probabilities (B,C).

        `loss_sum` is the summed loss of the batch where the caller has it already; without it, it is the plain
        cross-entropy, no label smoothing. With mixed targets, correct means the class of the largest share.
        """
        if loss_sum is None:
            loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum")
        correct = (logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum()
        count = torch.full_like(correct, len(logits))
        self.sums += torch.stack([loss_sum.detach().to(self.sums.dtype), correct, count])

    def all_reduce(self) -> None:
        """Sum over all workers; without a process group there is one worker and nothing to do."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)

    def result(self) -> dict[str, float]:
        """`loss` and `accuracy` per image, and `count`; the one host sync. ValueError when nothing was counted."""
        loss_sum, correct, count = self.sums.tolist()
        if count == 0:
            raise ValueError("no images were counted; the split is empty")
        return {"loss": loss_sum / count, "accuracy": correct / count, "count": int(count)}


class ClassTotals:
    """Loss sum, number correct and image count of each class, as one tensor."""

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self.sums = torch.zeros(num_classes, 3, dtype=Totals.zeros(device).sums.dtype, device=device)
        """(C, 3): loss, correct, count."""

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits float (B,C), labels int64 (B,)."""
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        columns = [losses, logits.argmax(1) == labels, torch.ones_like(losses)]
        self.sums.index_add_(0, labels, torch.stack([column.to(self.sums.dtype) for column in columns], 1))

    def all_reduce(self) -> None:
        """Sum over all workers; without a process group there is one worker and nothing to do."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)

    def result(self) -> dict[str, float]:
        """`balanced_loss` and `balanced_accuracy` (Brodersen 2010): means over the classes that have images of their
        means; the one host sync."""
        loss, correct, count = self.sums[self.sums[:, 2] > 0].T
        return {"balanced_loss": (loss / count).mean().item(), "balanced_accuracy": (correct / count).mean().item()}
