"""What a replica does with images, whatever protocol they came by. No Ray: it runs in any event loop."""

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifar.data.decode import BadImage
from cifar.machine import resident_memory, return_freed_memory, usable_cpus
from cifar.serve.config import ServeConfig
from cifar.serve.errors import Busy, Failed, TooMany
from cifar.serve.metrics import Metrics
from cifar.serve.queue import Queue
from cifar.serve.versions import Selection, Served, Versions

Image: TypeAlias = bytes | NDArray[np.uint8]
"""Encoded, or uint8 (H,W,3)."""

LARGE_BYTES = 32 << 10
"""Encoded images from here on are decoded by threads beside the computation; a smaller one takes less time than the way
to another thread and back (a PNG of CIFAR-10: 45 us)."""
LARGE_PIXELS = 1 << 16
"""The same for the pixels, of which a few bytes may hold many."""
HUGE_PIXELS = 1 << 22
"""Images from here on are decoded one at a time: each takes up to 20 bytes for a pixel."""
DECODE_SECONDS = 2.0
"""Of one core for one request, beyond which the rest of its images get no answer. Only files that are made to take long
get there: honest ones of so many pixels take less."""
WAITING_REQUESTS = 8
"""So many times the pixels of one request may wait to be decoded."""
TOOK_TOO_LONG = "took too long to decode"
KEPT_BYTES = 256 << 20
"""What a busy replica may hold beyond what it needed last before it returns freed memory to the system."""
CANARY_BATCHES = 200
"""The last batches that the canary's limits look at."""
CANARY_LEAST = 20
"""Fewer batches decide nothing."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answers to one request."""

    served: Served
    probabilities: NDArray[np.float32]
    """(N,C); NaN in the rows of images without an answer."""
    errors: list[str | None]
    """Per image, such as "not an image"."""


class Service:
    """Answers images with the versions that are selected, computing those of many requests together."""

    def __init__(self, config: ServeConfig, replica: str = "local") -> None:
        self.config = config
        self.metrics = Metrics(replica)
        self._versions = Versions(config)
        self._queue: Queue[Served, Image | str, NDArray[np.float32] | str] = Queue(
            self._compute, config.max_batch, config.max_queue
        )
        self._decoders = ThreadPoolExecutor(usable_cpus(), thread_name_prefix="decode")
        self._huge = ThreadPoolExecutor(1, thread_name_prefix="huge")
        self._decoding = 0
        """Pixels that wait to be decoded or are."""
        self._asked = False
        """Since the last look at the memory."""
        self._needed = 0
        """Bytes held after freed memory was returned the last time."""
        self._judged: Served | None = None
        """The canary that the seconds below are of."""
        self._canary: deque[float] = deque(maxlen=CANARY_BATCHES)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        return self._versions.name

    @property
    def selection(self) -> Selection:
        """The versions that are served at this moment."""
        return self._versions.selection

    @property
    def ready(self) -> bool:
        """Does it take requests? Not while its queue is full."""
        return self._queue.size < self.config.max_queue

    def versions(self) -> list[Served]:
        return list(self.selection.served.values())

    def find(self, version: str | None) -> Served:
        """By version or alias; None is the default. Raises UnknownVersion."""
        return self.selection.find(version)

    async def predict(self, images: list[Image], version: str | None = None) -> Answered:
        """Answer all images of a request by one version: the one asked for, else the default or the canary.

        Raises TooMany, UnknownVersion, Busy, and Failed when the model itself fails. A canary that fails, fails nobody:
        the default answers instead.
        """
        if len(images) > self.config.max_images:
            raise TooMany(f"{len(images)} images; a request may hold {self.config.max_images}")
        self._asked = True
        selection = self.selection
        served = selection.route(self.config.canary_share) if version is None else selection.find(version)
        try:
            answered = await self._answer(served, images)
        except (Busy, TooMany):
            raise
        except Exception as error:
            if served is not selection.canary or version is not None:
                raise Failed(f"the model {served.version} failed") from error
            answered = await self._answer(selection.default, images)
        if selection.shadow is not None:
            self._spawn(self._ask_shadow(selection.shadow, images, answered))
        return answered

    async def follow(self) -> None:
        """Read the aliases again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.config.poll_seconds)
            try:
                await loop.run_in_executor(None, self._versions.refresh)
            except Exception:
                logger.exception("the versions stay as they are")
            await loop.run_in_executor(None, self._tidy)

    def close(self) -> None:
        self._queue.close()
        for threads in (self._decoders, self._huge):
            threads.shutdown(wait=False, cancel_futures=True)

    def _tidy(self) -> None:
        """Return freed memory to the system when nobody asks, or much came together: peaks would stay otherwise."""
        kept = KEPT_BYTES if self._asked else 0
        self._asked = False
        held = resident_memory()
        if held <= self._needed + kept:
            self._needed = min(self._needed, held)
            return
        return_freed_memory()
        self._needed = resident_memory()

    async def _answer(self, served: Served, images: list[Image], spare: bool = False) -> Answered:
        put = self._queue.put_spare if spare else self._queue.put
        rows = await put(served, await self._decode_large(served, images))
        probabilities = np.full((len(images), len(served.predictor.classes)), np.nan, np.float32)
        errors: list[str | None] = [None] * len(images)
        labels: Counter[str] = Counter()
        for place, row in enumerate(rows):
            if isinstance(row, str):
                errors[place] = row
                if not spare:
                    self.metrics.bad_image(row)
            else:
                probabilities[place] = row
                labels[served.predictor.classes[int(row.argmax())]] += 1
        if not spare:
            self.metrics.answered(served.version, labels, len(served.predictor.classes))
        return Answered(served=served, probabilities=probabilities, errors=errors)

    async def _decode_large(self, served: Served, images: list[Image]) -> list[Image | str]:
        """The images with the large ones decoded, or why they cannot be. TooMany above `max_megapixels`."""
        loop = asyncio.get_running_loop()
        seconds = 0.0

        def measure(image: Image) -> int:
            return served.predictor.pixels_to_decode(image) if isinstance(image, bytes) else 0

        def decode(image: bytes) -> Image | str:
            nonlocal seconds
            if seconds > DECODE_SECONDS:
                return TOOK_TOO_LONG
            started_at = time.thread_time()
            try:
                return served.predictor.decode(image)
            except BadImage as error:
                return str(error)
            finally:
                seconds += time.thread_time() - started_at

        async def decoded(image: Image, pixels: int) -> Image | str:
            if not isinstance(image, bytes):
                return image
            # The header of an AVIF may say less than its pixels are.
            huge = pixels >= HUGE_PIXELS or image[4:8] == b"ftyp"
            if not huge and pixels < LARGE_PIXELS and len(image) < LARGE_BYTES:
                return image
            return await loop.run_in_executor(self._huge if huge else self._decoders, decode, image)

        pixels = []
        for image in images:
            if len(image) >= LARGE_BYTES:  # a header can be long
                pixels.append(await loop.run_in_executor(self._decoders, measure, image))
            else:
                pixels.append(measure(image))
        total = sum(pixels)
        most = self.config.max_megapixels * 1e6
        if total > most:
            limit = f"a request may hold {self.config.max_megapixels:g}"
            raise TooMany(f"the images have {total / 1e6:.1f} megapixels together; {limit}, so send smaller ones")
        if self._decoding + total > WAITING_REQUESTS * most:
            raise Busy("too many large images wait already")
        self._decoding += total
        try:
            return list(await asyncio.gather(*map(decoded, images, pixels)))
        finally:
            self._decoding -= total

    def _compute(
        self, served: Served, images: list[Image | str], waited: list[float]
    ) -> list[NDArray[np.float32] | str]:
        """In the queue's thread: probabilities (C,) or the reason why there are none, per image."""
        for seconds in waited:
            self.metrics.waited(seconds)
        started_at = time.perf_counter()
        rows: list[NDArray[np.float32] | str] = []
        pixels = []
        for image in images:
            if isinstance(image, str):
                rows.append(image)
                continue
            try:
                fitted = (
                    served.predictor.decode(image) if isinstance(image, bytes) else served.predictor.fit([image])[0]
                )
            except BadImage as error:
                rows.append(str(error))
                continue
            pixels.append(fitted)
            rows.append("")
        try:
            probabilities = served.predictor.predict(np.stack(pixels)) if pixels else np.empty((0, 1), np.float32)
            if not np.isfinite(probabilities).all():
                raise Failed("probabilities that are no numbers")
        except Exception:
            self.metrics.failed(served.version)
            self._judge(served, math.inf)
            logger.exception("a batch of %d images failed with %s", len(pixels), served.version)
            raise
        seconds = time.perf_counter() - started_at
        self.metrics.batch(served.version, len(images), seconds)
        self._judge(served, seconds)
        answers = iter(probabilities)
        return [next(answers) if row == "" else row for row in rows]

    def _judge(self, served: Served, seconds: float) -> None:
        """Withdraw the canary when its last batches broke a limit; a failed batch took infinitely long."""
        if served is not self.selection.canary:
            return
        if served is not self._judged:
            self._judged = served
            self._canary.clear()
        self._canary.append(seconds)
        if len(self._canary) < CANARY_LEAST:
            return
        failed = sum(map(math.isinf, self._canary)) / len(self._canary)
        took = [seconds for seconds in self._canary if not math.isinf(seconds)]
        slow = 1000 * float(np.quantile(took, 0.95)) if took else 0.0
        if failed > self.config.canary_max_errors or (self.config.canary_max_ms and slow > self.config.canary_max_ms):
            logger.warning(
                "canary %s withdrawn: of its last %d batches %.1f %% failed, the slowest 5 %% took %.1f ms and more",
                *(served.version, len(self._canary), 100 * failed, slow),
            )
            self._canary.clear()
            self.metrics.withdrew(served.version)
            self._versions.withdraw(served)

    async def _ask_shadow(self, shadow: Served, images: list[Image], answered: Answered) -> None:
        """Let the shadow answer too, when nobody waits for anything else, and count where it says the same."""
        try:
            found = await self._answer(shadow, images, spare=True)
        except Exception:  # its failures are counted where they happen, and nobody waits for it
            return
        pairs = [
            answered.served.predictor.classes[int(one.argmax())] == shadow.predictor.classes[int(other.argmax())]
            for one, other, error in zip(answered.probabilities, found.probabilities, answered.errors, strict=True)
            if error is None
        ]
        self.metrics.shadowed(shadow.version, sum(pairs), len(pairs) - sum(pairs))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # a task that nobody holds may be collected before it ends
        task.add_done_callback(self._tasks.discard)
