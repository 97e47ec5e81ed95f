"""Images of many requests, computed together.

While one batch is computed the next one gathers, so that a batch grows with the load and nobody waits for a timer. The
queue counts images, not requests, and is bounded: what does not fit is refused at once instead of being late.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from cifar.serve.errors import Busy

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Waiting(Generic[Key, Item, Result]):
    key: Key
    items: list[Item]
    since: float
    future: "asyncio.Future[list[Result]]"


class Queue(Generic[Key, Item, Result]):
    """`compute(key, items, waited)` runs in a thread, one call at a time, on the items of requests with one key.

    `waited` are the seconds that each of the requests waited. A request of more than `max_batch` items is computed in
    several calls.
    """

    def __init__(
        self, compute: Callable[[Key, list[Item], list[float]], list[Result]], max_batch: int, max_queue: int
    ) -> None:
        self._compute = compute
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._waiting: deque[Waiting[Key, Item, Result]] = deque()
        self._spare: deque[Waiting[Key, Item, Result]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._worker: asyncio.Task[None] | None = None
        self.size = 0
        """Items that wait or are being computed."""

    async def put(self, key: Key, items: list[Item]) -> list[Result]:
        """The results in the order of the items; Busy when the queue has no room for them."""
        if self.size + len(items) > self._max_queue:
            raise Busy(f"{self.size} images wait already")
        self.size += len(items)
        try:
            return await self._enqueue(self._waiting, key, items)
        finally:
            self.size -= len(items)

    async def put_spare(self, key: Key, items: list[Item]) -> list[Result]:
        """The same when nobody else waits; Busy at once if another spare request does."""
        if self._spare:
            raise Busy("a spare request waits already")
        return await self._enqueue(self._spare, key, items)

    async def _enqueue(self, queue: deque[Waiting[Key, Item, Result]], key: Key, items: list[Item]) -> list[Result]:
        future: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        queue.append(Waiting(key, items, time.perf_counter(), future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Ends when nothing waits; the next request starts it again."""
        loop = asyncio.get_running_loop()
        while batch := self._take():
            started_at = time.perf_counter()
            items = [item for waiting in batch for item in waiting.items]
            waited = [started_at - waiting.since for waiting in batch]
            try:
                results: list[Result] = []
                for start in range(0, len(items), self._max_batch):
                    part = items[start : start + self._max_batch]
                    results += await loop.run_in_executor(self._thread, self._compute, batch[0].key, part, waited)
                    waited = []
            except Exception as error:
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
                continue
            start = 0
            for waiting in batch:
                if not waiting.future.done():  # its client may have left
                    waiting.future.set_result(results[start : start + len(waiting.items)])
                start += len(waiting.items)

    def _take(self) -> list[Waiting[Key, Item, Result]]:
        """The oldest request, and those behind it of the same key, as far as one batch holds them."""
        queue = self._waiting or self._spare
        while queue and queue[0].future.done():
            queue.popleft()
        if not queue:
            return self._take() if self._spare and queue is not self._spare else []
        batch = [queue.popleft()]
        count = len(batch[0].items)
        left: list[Waiting[Key, Item, Result]] = []
        while queue:
            waiting = queue[0]
            if waiting.key is not batch[0].key:
                left.append(queue.popleft())
                continue
            if count + len(waiting.items) > self._max_batch:
                break
            batch.append(queue.popleft())
            count += len(waiting.items)
        queue.extendleft(reversed(left))
        return batch

    def close(self) -> None:
        if self._worker:
            with suppress(RuntimeError):  # its loop may have ended before it
                self._worker.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
