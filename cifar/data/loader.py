"""From prepared rows to batches on the training device: resident in memory, or streamed.

Both loaders give the same kind of batches for the same arguments: `epoch(number, start)` yields uint8 images
(B, 3, S, S) in channels-last memory, int64 labels (B,) and int64 indices (B,), shuffled anew every epoch by the seed,
all batches full. A worker's order depends on (seed, epoch, rank, number of workers) alone, so a run that resumes at
(epoch, start) sees what it would have seen. From memory, each micro-batch draws from a share of the rows of its own, as
a worker does: one worker with four micro-batches, two with two and four with one take the same steps.
"""

import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cifar.augment import derive_seed
from cifar.balance import exactly, occurrences, repetitions
from cifar.data.prepared import Arrays, Prepared, RowRange, to_arrays
from cifar.data.shares import num_batches, share

EVALUATION_BATCH = 500
REPEATED = 40
"""Bits of `Batch.draws` that hold the index; those above count how often the image has come before."""
SHUFFLE_BYTES = 64 * 2**20
"""Rows that the streaming loader mixes at a time: 20,000 images of 32x32."""
STREAM_BYTES = 256 * 2**20
"""Pixels that one stream is opened for: 87,000 images of 32x32. Two streams are open at a time, and opening one costs a
second."""


OpenStream: TypeAlias = Callable[[list[tuple[int, RowRange]]], Generator[pa.Table]]
"""From row ranges, each with its epoch, to their tables."""
Choose: TypeAlias = Callable[[Tensor], Tensor]
"""From the indices of the images that a micro-batch draws from, int64 (N,), to bool (N,): as many of each."""


class Batch(NamedTuple):
    images: Tensor
    """uint8 (B, 3, S, S), channels last."""
    labels: Tensor
    """int64 (B,)."""
    indices: Tensor
    """int64 (B,): each image's number in the prepared set."""
    draws: Tensor
    """int64 (B,): what the random changes of each image are drawn for: its index, or another number each time that the
    epoch repeats it."""


class Loader(Protocol):
    num_batches: int
    """Batches per epoch of this worker, the same on all workers."""
    chooses: bool
    """Whether an epoch can leave images out."""

    def epoch(self, epoch: int, start: int = 0, choose: Choose | None = None) -> Iterator[Batch]:
        """The batches of one epoch, from batch `start` on; of the images that `choose` picks, if it is given."""
        ...

    def sample(self, count: int) -> Tensor:
        """Up to `count` training images, uint8 (n, 3, S, S), always the same ones."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


class ResidentLoader:
    """The worker's share of `total` rows, `table`, as one uint8 tensor on its device, where there is room for it.

    `rows` picks some of the table's, int64 (n,); the `micro_batches` of a batch divide them. `weights`, float32 (C,),
    say how often an epoch draws an image of each class, on average; without them each comes once. On a CPU a table of
    one chunk is used where it is, so that processes that train on the same block of the object store share its pages.
    """

    chooses = True

    def __init__(
        self,
        table: pa.Table,
        *,
        total: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        micro_batches: int = 1,
        rows: np.ndarray | None = None,
        weights: Tensor | None = None,
    ):
        arrays = to_arrays(table)
        images = as_tensor(arrays.images)
        self._images = images.pin_memory() if crowds(images, device) else images.to(device)
        self._rows = torch.arange(len(table)) if rows is None else torch.from_numpy(rows)
        self._rows = self._rows.to(device)
        labels, indices = (torch.tensor(column, device=device) for column in (arrays.labels, arrays.indices))
        self._labels, self._indices = labels[self._rows], indices[self._rows]
        self.num_batches = num_batches(total, batch_size, world_size)
        self._parts, self._per_part = micro_batches, batch_size // world_size // micro_batches
        self._seed, self._rank, self._device = seed, rank, device
        self._weights = None if weights is None else weights.to(device)

    def epoch(self, epoch: int, start: int = 0, choose: Choose | None = None) -> Iterator[Batch]:
        orders = torch.stack([self._order(epoch, part, choose) for part in range(self._parts)])
        before = None if self._weights is None else torch.stack([occurrences(order) for order in orders])
        for number in range(start, min(orders.shape[1] // self._per_part, self.num_batches)):
            places = slice(number * self._per_part, (number + 1) * self._per_part)
            rows = orders[:, places].flatten()
            images = self._images[self._rows[rows].to(self._images.device)].to(self._device, non_blocking=True)
            draws = indices = self._indices[rows]
            if before is not None:
                draws = indices + (before[:, places].flatten() << REPEATED)
            yield Batch(images.permute(0, 3, 1, 2), self._labels[rows], indices, draws)

    def _order(self, epoch: int, part: int, choose: Choose | None) -> Tensor:
        """Rows of the worker's share that one of its micro-batches goes by, int64 (n,)."""
        count = len(self._labels) // self._parts
        rows = self._drawn(epoch, part, slice(part * count, (part + 1) * count))
        order = self._shuffled(count, epoch, part, "order")
        if choose is not None:
            order = order[choose(self._indices[rows])[order]]
        return rows[order]

    def _drawn(self, epoch: int, part: int, share: slice) -> Tensor:
        """As many rows as there are in a micro-batch's share, int64 (n,): each once, or by the weights."""
        rows = torch.arange(share.start, share.stop, device=self._device)
        if self._weights is None:
            return rows
        times = repetitions(self._labels[share], self._indices[share], self._weights, seed=self._seed, epoch=epoch)
        drawn = rows.repeat_interleave(times) if times.any() else rows
        return exactly(drawn[self._shuffled(len(drawn), epoch, part, "balance")], len(rows))

    def _shuffled(self, count: int, epoch: int, part: int, stream: str) -> Tensor:
        """0 to count - 1, int64 (count,)."""
        seed = derive_seed(self._seed, epoch, self._rank * self._parts + part, stream)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order.to(self._device, non_blocking=True)

    def sample(self, count: int) -> Tensor:
        return self._images[self._rows[:count].to(self._images.device)].to(self._device).permute(0, 3, 1, 2)

    def close(self) -> None:
        pass


class StreamingLoader:
    """Row ranges in an order that is new every epoch, opened by `open_stream`, mixed in a window of `SHUFFLE_BYTES`.

    `open_stream` takes row ranges of the epochs to come, in order, each with its epoch, and yields their tables in that
    order; it may read all of them ahead. The next stream is opened while one is used, whatever epoch either belongs to.
    `weights`, float32 (C,), say how often an epoch draws an image of each class, on average.
    """

    chooses = False

    def __init__(
        self,
        prepared: Prepared,
        open_stream: OpenStream,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        weights: Tensor | None = None,
    ):
        self.num_batches = num_batches(prepared.counts["train"], batch_size, world_size)
        self._prepared, self._open_stream = prepared, open_stream
        self._epochs, self._seed, self._rank, self._world_size = epochs, seed, rank, world_size
        self._per_worker = batch_size // world_size
        self._device, self._weights = device, weights
        self._window = max(SHUFFLE_BYTES // (3 * prepared.image_size**2), 2 * self._per_worker)
        self._stream: Generator[pa.Table] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._next_epoch = -1

    def epoch(self, epoch: int, start: int = 0, choose: Choose | None = None) -> Iterator[Batch]:
        assert choose is None, "a stream goes by all rows"
        if epoch != self._next_epoch or self._stream is None:
            # The first epoch, or one after another that was left early.
            self.close()
            self._thread = ThreadPoolExecutor(1)
            self._stream = self._open_ahead(epoch, self._thread)
        self._next_epoch = -1
        for number, batch in enumerate(self._mixed(epoch, self._stream)):
            if start <= number < self.num_batches:
                yield Batch(*(tensor.to(self._device, non_blocking=True) for tensor in batch))
        self._next_epoch = epoch + 1

    def sample(self, count: int) -> Tensor:
        images = next(self._prepared.batches("train", count)).images
        return torch.tensor(images, device=self._device).permute(0, 3, 1, 2)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._thread.shutdown()
            self._stream = None

    def _open_ahead(self, epoch: int, thread: ThreadPoolExecutor) -> Generator[pa.Table]:
        """The tables of this epoch and all later ones."""
        plans = self._plans(epoch)
        opened = thread.submit(self._open, next(plans))
        try:
            while opened is not None:
                first, rest = opened.result()
                plan = next(plans, None)
                opened = thread.submit(self._open, plan) if plan else None
                yield first
                yield from rest
        finally:
            # Left early. A stream of Ray Data that only the interpreter's end collects starts Ray again, and hangs.
            # Nothing may wait here: the garbage collector can come by in the middle of the start of a thread, which
            # holds a lock that threads need to end.
            if opened is not None:
                opened.add_done_callback(_close_opened)

    def _open(self, plan: list[tuple[int, RowRange]]) -> tuple[pa.Table, Generator[pa.Table]]:
        """The stream's first table, which sets the reading going, and the others."""
        tables = self._open_stream(plan)
        return next(tables), tables

    def _plans(self, epoch: int) -> Iterator[list[tuple[int, RowRange]]]:
        """What to open a stream for, one after the other."""
        plan, rows = [], 0
        for number in range(epoch, self._epochs):
            for some in self._row_ranges(number):
                plan.append((number, some))
                rows += some.stop - some.start
                if rows * 3 * self._prepared.image_size**2 >= STREAM_BYTES:
                    yield plan
                    plan, rows = [], 0
        if plan:
            yield plan

    def _row_ranges(self, epoch: int) -> list[RowRange]:
        """The worker's share of an epoch: all row groups in random order, cut into equal runs of rows."""
        groups = self._prepared.row_groups("train")
        generator = torch.Generator().manual_seed(derive_seed(self._seed, epoch, "groups"))
        order = torch.randperm(len(groups), generator=generator).tolist()
        low, high = share(sum(group.stop - group.start for group in groups), self._rank, self._world_size)
        mine, first = [], 0
        for group in (groups[place] for place in order):
            rows = group.stop - group.start
            start, stop = max(low - first, 0), min(high - first, rows)
            if start < stop:
                mine.append(group._replace(start=group.start + start, stop=group.start + stop))
            first += rows
        return mine

    def _mixed(self, epoch: int, stream: Iterator[pa.Table]) -> Iterator[tuple[Tensor, ...]]:
        """Exactly one epoch's rows off the stream, as full batches and a rest; at least as many as an epoch has."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, epoch, self._rank, "order"))
        low, high = share(self._prepared.counts["train"], self._rank, self._world_size)
        remaining, missing = high - low, self.num_batches * self._per_worker
        pool: list[Arrays] = []
        drawn: list[tuple[Tensor, Tensor]] = []  # rows of the pool, and how often each of them has come before
        while remaining:
            arrays = to_arrays(next(stream))
            remaining -= len(arrays.labels)
            arrays, rows, before = self._drawn(arrays, epoch)
            drawn.append((rows + sum(len(part.labels) for part in pool), before))
            pool.append(arrays)
            if remaining and sum(len(rows) for rows, _ in drawn) < self._window:
                continue
            images, labels, indices = (torch.from_numpy(np.concatenate(column)) for column in zip(*pool, strict=True))
            rows, before = (torch.cat(column) for column in zip(*drawn, strict=True))
            order = torch.randperm(len(rows), generator=generator)
            if not remaining:
                order = exactly(order, max(len(order), missing))
            # Half a window stays behind, so that rows of one row group spread over more than one window.
            ready = len(order) if not remaining else len(order) // 2 // self._per_worker * self._per_worker
            missing -= ready
            for some in order[:ready].split(self._per_worker):
                row, index = rows[some], indices[rows[some]]
                yield images[row].permute(0, 3, 1, 2), labels[row], index, index + (before[some] << REPEATED)
            # A row that will come several times is kept once.
            kept, places = rows[order[ready:]].unique(return_inverse=True)
            pool = [Arrays(*(column[kept].numpy() for column in (images, labels, indices)))]
            drawn = [(places, before[order[ready:]])]

    def _drawn(self, arrays: Arrays, epoch: int) -> tuple[Arrays, Tensor, Tensor]:
        """The images of a table that the epoch has; of these the row numbers, int64 (n,), each as often as the epoch
        has it, and how often it has come before."""
        if self._weights is None:
            rows = torch.arange(len(arrays.labels))
            return arrays, rows, torch.zeros_like(rows)
        labels, indices = (torch.tensor(column) for column in (arrays.labels, arrays.indices))
        times = repetitions(labels, indices, self._weights, seed=self._seed, epoch=epoch)
        if not times.any():
            times[0] = 1  # so that an epoch has something to fill its batches with
        kept = times.nonzero()[:, 0]
        rows = torch.arange(len(kept)).repeat_interleave(times[kept])
        return Arrays(*(column[kept.numpy()] for column in arrays)), rows, occurrences(rows)


def crowds(images: Tensor, device: torch.device) -> bool:
    """Whether the images would take more than half of what is free on a GPU; then they stay in the host's memory."""
    return device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2


def as_tensor(column: np.ndarray) -> Tensor:
    """The array as a tensor that must not be written to: its memory may be the object store's or a file's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is read-only, which torch cannot express
        return torch.from_numpy(column)


def in_batches(table: pa.Table, rows: np.ndarray | None = None) -> Iterator[Arrays]:
    """All rows of the table in order, or those that `rows` picks, `EVALUATION_BATCH` at a time."""
    arrays = to_arrays(table)
    for start in range(0, len(table) if rows is None else len(rows), EVALUATION_BATCH):
        some = slice(start, start + EVALUATION_BATCH)
        yield Arrays(*(column[some if rows is None else rows[some]] for column in arrays))


def read_stream(prepared: Prepared) -> OpenStream:
    """An `open_stream` that reads in this process, for runs without Ray."""

    def open_stream(ahead: list[tuple[int, RowRange]]) -> Generator[pa.Table]:
        for _, rows in ahead:
            yield prepared.read(rows)

    return open_stream


def _close_opened(opened: Future[tuple[pa.Table, Generator[pa.Table]]]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result()[1].close()
