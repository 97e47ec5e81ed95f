"""API keys: where they are read, who must have them, and the look at each request before its body. No Ray."""

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from cifar.config import ConfigError
from cifar.machine import is_loopback
from cifar.serve.limits import Receive, Scope, Send, refuse, replay
from cifar.serve.metrics import Metrics

VARIABLE = "CIFAR_API_KEY"
HEADER = "X-API-Key"
KEY = re.compile(r"[!-~]{16,1024}")
GENERATE = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'
ASK = f"this service needs an API key; send one as the header 'Authorization: Bearer KEY' or '{HEADER}: KEY'"
WRONG = f"this API key is not valid here; send another as the header 'Authorization: Bearer KEY' or '{HEADER}: KEY'"

# Who asks for these has no key at hand: an orchestrator's probes, and a browser, which sends no header of ours for an
# address that is typed. The page asks for the key itself, and the documents say nothing that the source does not.
OPEN = frozenset({"/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"})
OPEN |= {f"/static-offline-docs/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keys:
    """SHA-256 digests of the keys. They leave this process, the keys do not: what a replica is started with can be
    seen in the cluster's state."""

    digests: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def of(cls, keys: Iterable[str]) -> "Keys":
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys)))

    def admit(self, key: bytes) -> bool:
        """Is it one of them? Takes as long whichever it is, or none."""
        digest = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0


def read_keys(file: str) -> Keys | None:
    """Those of `file` ("": none) and of $CIFAR_API_KEY together; None where neither is given.

    A ConfigError says where one is no key, and never what it is.
    """
    keys = _of_file(file) if file else []
    if (value := os.environ.get(VARIABLE)) is not None:
        keys.append(_checked(value.strip(), VARIABLE))
    return Keys.of(keys) if keys else None


def _of_file(file: str) -> list[str]:
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        shared = path.stat().st_mode & 0o077
    except OSError as error:
        problem = f"--api-key-file {file}: cannot be read ({error.strerror})"
        raise ConfigError(f"{problem}; put one key on a line; make one by: {GENERATE}") from None
    found = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            found.append(_checked(line, f"--api-key-file {file}, line {number}"))
    if not found:
        raise ConfigError(f"--api-key-file {file}: holds no key; put one on a line; make one by: {GENERATE}")
    if shared:
        logger.warning("--api-key-file %s: other users can get at it; keep it to yourself: chmod 600", file)
    return found


def _checked(key: str, where: str) -> str:
    if KEY.fullmatch(key) is None:
        raise ConfigError(f"{where}: a key has 16 to 1024 characters of ASCII without spaces; make one by: {GENERATE}")
    return key


def check_host(host: str | None, keys: Keys | None, insecure: bool) -> None:
    """ConfigError where others could reach the service and nothing would stop them. None: nothing listens."""
    if host is not None and not is_loopback(host) and keys is None and not insecure:
        raise ConfigError(
            f"--host {host}: other machines could use the service without a key; say --insecure, or give keys by "
            f"--api-key-file FILE or {VARIABLE}; make one by: {GENERATE}"
        )


class Guard:
    """ASGI middleware: who has no key gets the OPEN pages and 401 for everything else. No body is read for either, so
    that nobody takes room from those who have one."""

    def __init__(self, app: Any, keys: Keys, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        given = sent_keys(scope["headers"])
        if any(map(self._keys.admit, given)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
        elif scope["method"] in ("GET", "HEAD") and scope["path"].removeprefix(scope.get("root_path", "")) in OPEN:
            await self._app(scope, replay(b"", receive), send)
        else:
            await refuse(send, 401, WRONG if given else ASK, (b"www-authenticate", b"Bearer"))
            self._metrics.request("other", 401, time.perf_counter() - started_at)


def sent_keys(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """At most two: one may be for a proxy before the service. A header that is there twice says nothing."""
    headers = list(headers)
    keys = []
    for name, scheme in ((HEADER.lower().encode(), b""), (b"authorization", b"bearer ")):
        values = [value for other, value in headers if other == name]
        if len(values) == 1 and values[0][: len(scheme)].lower() == scheme:
            keys.append(values[0][len(scheme) :].strip())
    return keys


def describe_keys(app: FastAPI) -> None:
    """Have the app's OpenAPI document say who needs a key, so that /docs asks for it."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": HEADER},
        }
        refusal = {
            "description": "No API key, or a wrong one.",
            "headers": {"WWW-Authenticate": {"schema": {"type": "string"}}},
            "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}},
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if path not in OPEN:
                    operation["security"] = [{"bearer": []}, {"header": []}]
                    operation["responses"]["401"] = refusal
        return document

    app.openapi = openapi
