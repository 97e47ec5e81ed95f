"""A TCP proxy before the tests' S3 server that fails as networks and busy stores do, by seed, or not at all."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress

BUSY = (
    ("503 Slow Down", "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    ("500 Internal Server Error", "<Error><Code>InternalError</Code><Message>Try again.</Message></Error>"),
)
KINDS = ("busy", "reset", "lost answer", "half answer", "silence")
WEIGHTS = (50, 20, 15, 10, 5)
SILENCE_SECONDS = 4.0
"""Longer than the client waits for a byte."""


class FlakyS3:
    """Listens on a port of its own, and passes each request on to the server at `target`, one a connection."""

    def __init__(self, target: int, share: float, seed: int = 0):
        """`share` of the requests fail, each in a way drawn from KINDS."""
        self.share, self._target = share, target
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._down_until, self._hanging = 0.0, False
        self.counts: Counter[str] = Counter()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def go_down(self, seconds: float, hanging: bool = False) -> None:
        """Refuse every connection for so long, or accept it and stay silent."""
        self._hanging, self._down_until = hanging, time.monotonic() + seconds

    @property
    def is_down(self) -> bool:
        return time.monotonic() < self._down_until

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError, ValueError):
            if self.is_down:
                self._fail(client, "down")
                return
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(1 << 16)
                if not data:
                    return
                head += data
            head, _, body = head.partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
            if fields.get(b"expect", b"").lower() == b"100-continue":
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            lines = [line for line in lines if not line.lower().startswith((b"expect:", b"connection:"))]
            if fields.get(b"transfer-encoding") == b"chunked":
                while not body.endswith(b"\r\n0\r\n\r\n"):
                    body += client.recv(1 << 20) or self._gone()
            while len(body) < int(fields.get(b"content-length", 0)):
                body += client.recv(1 << 20) or self._gone()
            with self._lock:
                self.counts["requests"] += 1
                kind = self._random.choices(KINDS, WEIGHTS)[0] if self._random.random() < self.share else ""
                status, error = self._random.choice(BUSY)
            if kind in ("reset", "silence"):
                self._fail(client, kind)
            elif kind == "busy":
                self.counts[kind] += 1
                text = "" if lines[0].startswith(b"HEAD") else error
                client.sendall(
                    f"HTTP/1.1 {status}\r\nContent-Length: {len(error)}\r\nConnection: close\r\n\r\n{text}".encode()
                )
            else:
                self._pass_on(client, b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body, kind)

    def _pass_on(self, client: socket.socket, request: bytes, kind: str) -> None:
        """The request reaches the server; of the answer, all, half or nothing comes back."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self._target)) as server:
            server.sendall(request)
            while data := server.recv(1 << 20):
                answer += data
        if kind or self.is_down:
            client.sendall(answer[: len(answer) // 2] if kind == "half answer" else b"")
            self._fail(client, kind or "down")
        else:
            client.sendall(answer)

    def _fail(self, client: socket.socket, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1
        if kind == "silence" or (kind == "down" and self._hanging):
            time.sleep(SILENCE_SECONDS)
        # Without lingering, a closed connection is reset.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _gone(self) -> bytes:
        raise ConnectionError
