"""Bounds around every request: its size, the time to send it, and what all of them hold together."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from cifar.serve.errors import RETRY_AFTER
from cifar.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HELD_REQUESTS = 8
"""Requests of the largest size that a replica holds at a time."""


BUSY = "too many large requests at once; try again in a second"
NOSNIFF = (b"x-content-type-options", b"nosniff")
"""No answer is anything but what its Content-Type says."""


class TooLarge(Exception):
    pass


@dataclass(eq=False)
class Body:
    """Of a request, from its first byte to its answer."""

    since: float
    size: int = 0
    """Bytes that are held."""
    dropped: bool = False
    """Another one needed the room."""


class Limits:
    """ASGI middleware: reads the whole body before the app sees the request, and counts and times what comes back.

    A body that is too large gets 413, one that takes too long 408. All of them together are bounded, too: where there
    is no room for more, the one that is still arriving and has held most for longest gets 503 with Retry-After, so
    that many slow clients do not stop the others.
    """

    def __init__(self, app: Any, max_bytes: int, seconds: float, metrics: Metrics) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._metrics = metrics
        self._held = 0
        self._arriving: dict[Body, asyncio.Timeout] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0
        started_at = time.perf_counter()
        body = Body(since=started_at)

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if all(name != NOSNIFF[0] for name, _ in message["headers"]):
                    message = {**message, "headers": [*message["headers"], NOSNIFF]}
            await send(message)

        try:
            try:
                async with asyncio.timeout(self._seconds) as timeout:
                    self._arriving[body] = timeout
                    data = await self._read(scope, receive, body)
            except TimeoutError:
                if body.dropped:
                    await refuse(note, 503, BUSY)
                    return
                await refuse(note, 408, f"the request took longer than {self._seconds:g} s to arrive; send it faster")
                return
            except TooLarge:
                megabytes = self._max_bytes / 1e6
                await refuse(note, 413, f"the request is larger than {megabytes:g} MB; send fewer or smaller images")
                return
            except MemoryError:
                await refuse(note, 503, BUSY)
                return
            finally:
                self._arriving.pop(body, None)
            if data is None:  # the client has left
                return
            started_at = time.perf_counter()
            await self._app(scope, replay(data, receive), note)
        finally:
            self._hold(body, -body.size)
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.perf_counter() - started_at)

    async def _read(self, scope: Scope, receive: Receive, body: Body) -> bytes | None:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and (len(value) > 18 or int(value) > self._max_bytes):
                raise TooLarge
        parts = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_bytes:
                raise TooLarge
            self._hold(body, len(part))
            while self._held > HELD_REQUESTS * self._max_bytes:
                self._drop()
            if body.dropped:
                raise MemoryError
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _drop(self) -> None:
        """Let the body that uses most go; MemoryError if none is arriving."""
        now = time.perf_counter()
        body = max(self._arriving, key=lambda one: one.size * (now - one.since), default=None)
        if body is None:
            raise MemoryError
        body.dropped = True
        self._arriving.pop(body).reschedule(asyncio.get_running_loop().time())
        self._hold(body, -body.size)

    def _hold(self, body: Body, size: int) -> None:
        body.size += size
        self._held += size
        self._metrics.body.set(self._held)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, and then waits for what the server has to say."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again


async def refuse(send: Send, status: int, error: str, *more: tuple[bytes, bytes]) -> None:
    """A whole response, which also closes the connection: what is left of the body is not read."""
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close"), NOSNIFF, *more]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
