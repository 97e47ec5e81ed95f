"""What every training worker does, wherever it runs: under Ray Train, inside a Tune trial, or bare in this process.

The worker gets what differs as its `Context`: rank and world size, device, how to report, the checkpoint to start from,
the preemption notice. What is written at a step and what is drawn at a step depend on nothing else, so a run that was
interrupted ends with the weights of one that was not, bit for bit, on the same number of workers and kind of device.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar.balance import image_losses_of
from cifar.config import Config, RunFailed
from cifar.context import Context, Wish
from cifar.data.loader import Batch, Choose, Loader
from cifar.data.prepared import Arrays, Prepared
from cifar.loop import evaluate, train_epoch
from cifar.machine import keep_freed_memory
from cifar.metrics import ClassTotals, Totals
from cifar.selection import epoch_batches
from cifar.training import Position, Training, build_training, compile_ahead, load_checkpoint, save_checkpoint

AGREE_SECONDS, MOST_AGREE_STEPS = 0.5, 64
"""How often several workers agree on stopping and on checkpoints; asking at each step would cost a round trip."""
SHOW_SECONDS = 0.5

T = TypeVar("T")


def train_worker(
    config: Config,
    prepared: Prepared,
    context: Context,
    make_loader: Callable[[Context], Loader],
    val_batches: Callable[[Context], Iterable[Arrays]],
    augmented: bool = False,
) -> dict[str, Any]:
    """Train to the end of the config, reporting each epoch; returns what the run comes to.

    `make_loader` gives this worker's training batches (`augmented` if random changes are applied already), and
    `val_batches` its share of val, anew at each call. Raises RunFailed when the loss is no number any more, on all
    workers at the same step.
    """
    if context.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # float32 is for what must be exact, such as the whitening layer
    with closing(make_loader(context)) as loader:
        training = build_training(config, prepared, loader, context)
        position = Position()
        if context.checkpoint is not None:
            position = load_checkpoint(context.checkpoint, training)
            if context.rank == 0:
                context.history(position.history)
        if config.train.compile:
            context.doing("compiling")
            rest = range(position.epoch, config.train.epochs)
            compile_ahead(config, training, loader, context, rest, len(prepared.classes), augmented)
        worker = Worker(config, prepared, context, training, position, loader.num_batches)
        while position.epoch < config.train.epochs and not position.stopped:
            batches = loader.epoch(position.epoch, position.step, worker.choose())
            train_result = worker.train_epoch(batches, augmented)
            val_result = worker.evaluate(val_batches(context))
            worker.finish_epoch(train_result, val_result)
            worker.report_epoch()
    return {
        "epochs": len(position.history),
        "stopped": position.stopped or "all epochs done",
        "train_seconds": position.train_seconds,
        "history": position.history,
    }


class Worker:
    """One worker's run: the verbs of `train_worker`, and what happens between two steps."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        context: Context,
        training: Training,
        position: Position,
        num_batches: int,
    ):
        self.config, self.prepared, self.context = config, prepared, context
        self.training, self.position = training, position
        skip_easy = 0.0 if training.selection is None else config.train.skip_easy
        self.epoch_batches = epoch_batches(num_batches, config.train.epochs, skip_easy)
        self.totals = Totals.zeros(context.device)
        self._image_losses = image_losses_of(config, prepared.class_counts["train"], context.device)
        self._run_started_at = time.perf_counter() - position.train_seconds
        self._epoch_started_at, self._shown_at = 0.0, 0.0
        self._resumed_at, self._seconds = 0, 0.0
        self._out_of_time, self._wish = False, Wish.NOTHING
        self._agreed_after, self._agreed_at, self._agree_steps = 0, 0.0, 1
        self._alone = context.world_size == 1
        if not self._alone:
            # The first parameters get their gradients last; what is left of the step is the exchange with the others.
            first = next(parameter for parameter in training.model.parameters() if parameter.requires_grad)
            first.register_post_accumulate_grad_hook(self._computed)
            self._micro_batches = itertools.cycle(range(config.optim.accumulate - 1, -1, -1))

    @property
    def num_batches(self) -> int:
        """Of this epoch."""
        return self.epoch_batches[self.position.epoch]

    @property
    def first_step(self) -> int:
        """Of this epoch, counted over the run."""
        return sum(self.epoch_batches[: self.position.epoch])

    def choose(self) -> Choose | None:
        """What picks the images of this epoch; None for all."""
        if self.training.selection is None or self.num_batches == self.epoch_batches[0]:
            return None
        per_part = self.config.train.batch_size // self.context.world_size // self.config.optim.accumulate
        return partial(self.training.selection.hardest, count=self.num_batches * per_part)

    def train_epoch(self, batches: Iterable[Batch], augmented: bool) -> dict[str, float]:
        """The steps that are left of the epoch; loss and accuracy over all workers."""
        position, training = self.position, self.training
        self.totals = Totals.zeros(self.context.device)
        if self.context.rank == 0:
            self.totals.sums += self.totals.sums.new_tensor(position.sums)
        self._resumed_at = self._agreed_after = position.step
        self._epoch_started_at = self._agreed_at = time.perf_counter()
        train_epoch(
            training.model,
            training.optimizer,
            training.averager,
            self._told(batches, f"in epoch {position.epoch + 1}", position.step),
            self.config,
            epoch=position.epoch,
            start=position.step,
            first_step=self.first_step,
            total_steps=sum(self.epoch_batches),
            num_classes=len(self.prepared.classes),
            rank=self.context.rank,
            totals=self.totals,
            selection=training.selection,
            teacher=training.teacher,
            image_losses=self._image_losses,
            augmented=augmented,
            after_step=self._after_step,
        )
        self.context.doing("adding up the epoch", waits=True)
        self._agree()
        self.totals.all_reduce()
        result = self.totals.result()
        self._seconds = time.perf_counter() - self._epoch_started_at
        return result

    def evaluate(self, batches: Iterable[Arrays]) -> dict[str, float]:
        """Loss, accuracy and count over all workers' shares of val; with --balance the means over classes, too."""
        share_buffers(self.training.evaluated)
        told = self._told(batches, "of val", 0)
        balanced = self.config.train.balance != "none"
        by_class = ClassTotals(len(self.prepared.classes), self.context.device) if balanced else None
        totals = evaluate(self.training.evaluated, told, self.config.train, self.context.device, by_class)
        self.context.doing("adding up val", waits=True)
        totals.all_reduce()
        self._require_finite(totals.sums)
        if by_class is None:
            return totals.result()
        by_class.all_reduce()
        return totals.result() | by_class.result()

    def _computed(self, _: Tensor) -> None:
        """This worker's gradients of a micro-batch are complete; with the last one of a step they are exchanged."""
        if not next(self._micro_batches):
            self.context.doing("exchanging gradients", waits=True)

    def _told(self, batches: Iterable[T], where: str, start: int) -> Iterator[T]:
        """The batches, with a note of which one is loaded or computed."""
        doing, coming = self.context.doing, iter(batches)
        for number in itertools.count(start + 1):
            doing(f"loading batch {number} {where}")
            batch = next(coming, None)
            if batch is None:
                return
            doing(f"computing batch {number} {where}")
            yield batch

    def finish_epoch(self, train_result: dict[str, float], val_result: dict[str, float]) -> None:
        """Move on to the next epoch, or decide that there is none."""
        position, train = self.position, self.config.train
        value = math.exp(-val_result["balanced_loss"]) if "balanced_loss" in val_result else val_result["accuracy"]
        position.epochs_without_gain = 0 if value > position.best_accuracy else position.epochs_without_gain + 1
        position.best_accuracy = max(position.best_accuracy, value)
        if train.patience and position.epochs_without_gain >= train.patience:
            what = "val accuracy" if train.balance == "none" else "val loss over the classes"
            position.stopped = f"no better {what} for {train.patience} epochs (--patience)"
        if self._out_of_time:
            position.stopped = f"time budget spent (--max-minutes {train.max_minutes:g})"
        position.train_seconds = time.perf_counter() - self._run_started_at
        images = (position.step - self._resumed_at) * train.batch_size
        row = {
            "epoch": position.epoch + 1,
            "step": self.first_step + position.step,
            "train_loss": train_result["loss"],
            "train_accuracy": train_result["accuracy"],
            "val_loss": val_result["loss"],
            "val_accuracy": val_result["accuracy"],
            "val_count": val_result["count"],
            "workers": self.context.world_size,
            "lr": self.training.optimizer.param_groups[0]["lr"],
            "images_per_second": images / self._seconds,
            "seconds": self._seconds,
            "train_seconds": position.train_seconds,
        }
        row |= {f"val_{name}": value for name, value in val_result.items() if name.startswith("balanced")}
        position.history.append(row)
        if self.training.selection is not None:
            self.training.selection.finish_epoch()
        position.epoch, position.step, position.sums = position.epoch + 1, 0, (0.0, 0.0, 0.0)

    def report_epoch(self) -> None:
        row = self.position.history[-1]
        if self.context.rank == 0:
            self.context.history(self.position.history)
        self._report(row | {"score": score(row)})

    def _after_step(self, steps_done: int) -> bool:
        """Called after each optimizer step, on all workers alike; True ends the epoch early."""
        self.position.step = steps_done
        now = time.perf_counter()
        show = now - self._shown_at >= SHOW_SECONDS
        if show and self.context.rank == 0:
            self._shown_at = now
            self._show_progress()
        if steps_done == self.num_batches:
            return False
        # Asking waits for the device. A GPU that has no other to agree with is let run on until progress is shown; on a
        # CPU it costs nothing, so that the very step at which the loss breaks is named.
        due = show or self.context.device.type == "cpu"
        if due if self._alone else steps_done >= self._agreed_after + self._agree_steps:
            self._agree()
        every = self.config.train.checkpoint_steps
        if self._wish is not Wish.NOTHING or (every and steps_done % every == 0):
            self._checkpoint()
        if self._wish is Wish.LEAVE:
            self.context.leave()
        self._wish = Wish.NOTHING
        return self._out_of_time

    def _agree(self) -> None:
        """Stop, fail or write a checkpoint at the same step everywhere: workers that disagree would wait for each other
        for ever."""
        budget, now = self.config.train.max_minutes * 60, time.perf_counter()
        out_of_time = bool(budget) and now - self._run_started_at >= budget
        wish = self.context.wish()
        seen = self.totals.sums[:1]
        if not self._alone:
            # By the clock of rank 0, to which the others add nothing: the steps until they meet again.
            steps, seconds = self.position.step - self._agreed_after, now - self._agreed_at
            pause = min(max(AGREE_SECONDS * steps // seconds, 1), MOST_AGREE_STEPS) if self.context.rank == 0 else 0
            seen = torch.cat([seen, seen.new_tensor([out_of_time, wish is Wish.CHECKPOINT, wish is Wish.LEAVE, pause])])
            dist.all_reduce(seen)
            _, late, checkpoint, leave, pause = seen.tolist()  # waits for the device
            out_of_time = late > 0
            wish = Wish.LEAVE if leave else Wish.CHECKPOINT if checkpoint else Wish.NOTHING
            self._agreed_after, self._agreed_at, self._agree_steps = self.position.step, time.perf_counter(), int(pause)
        self._require_finite(seen)
        self._out_of_time, self._wish = out_of_time, wish

    def _checkpoint(self) -> None:
        """In mid-epoch: what has no val accuracy yet never counts as the best."""
        position, totals = self.position, Totals(self.totals.sums.clone())
        totals.all_reduce()
        self._require_finite(totals.sums)
        loss, correct, count = totals.sums.tolist()
        position.sums = loss, correct, count
        if self.training.selection is not None:
            self.training.selection.share()
        position.train_seconds = time.perf_counter() - self._run_started_at
        self._report({"epoch": position.epoch + 1, "step": position.step, "score": -1.0})

    def _report(self, metrics: dict[str, Any]) -> None:
        self.context.doing("saving a checkpoint")
        checkpoint = None
        if self.context.rank == 0:
            checkpoint = save_checkpoint(self.config, self.prepared, self.training, self.position)
        self.context.report(metrics, checkpoint)

    def _require_finite(self, sums: Tensor) -> None:
        """Raise RunFailed if a sum is not a number. Waits for the device."""
        if not bool(sums.isfinite().all()):
            step = self.first_step + self.position.step
            raise RunFailed(
                f"the loss is not finite after step {step} (epoch {self.position.epoch + 1}); lower --lr "
                f"(now {self.config.optim.lr:g}), add --warmup 0.1 or --clip-norm 1, or use --precision fp32"
            )

    def _show_progress(self) -> None:
        loss, correct, count = self.totals.sums.tolist()  # of rank 0 alone; waits for the device
        now = time.perf_counter()
        steps = self.position.step - self._resumed_at
        self.context.progress(
            {
                "epoch": self.position.epoch + 1,
                "epochs": self.config.train.epochs,
                "step": self.position.step,
                "steps": self.num_batches,
                "workers": self.context.world_size,
                "train_loss": loss / max(count, 1),
                "train_accuracy": correct / max(count, 1),
                "images_per_second": steps * self.config.train.batch_size / (now - self._epoch_started_at),
                "train_seconds": now - self._run_started_at,
            }
        )


def score(row: dict[str, Any]) -> float:
    """What the best epoch has most of, 0 to 1: val accuracy, and among equal ones the lower loss, which never outweighs
    one image. With --balance exp(-loss), of the mean over the classes.

    Not their mean accuracy: where val has an image or two of the small classes, as in 93 of a long-tailed CIFAR-10, its
    best epoch was 3 points worse than the last on 1,200 others, that of the lowest loss 0.1 (9 runs).
    """
    if "val_balanced_loss" in row:
        return math.exp(-row["val_balanced_loss"])
    return row["val_accuracy"] - 1e-9 * min(row["val_loss"], 100.0)


def share_buffers(network: nn.Module) -> None:
    """Give all workers rank 0's batch norm statistics, so that they evaluate one model."""
    if dist.is_available() and dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
