"""Why the service gives no answer; each message is one sentence for the client."""

from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse

RETRY_AFTER = 1
"""Seconds after which a client that was sent away may ask again."""


class ServiceError(Exception):
    """Has the HTTP status that says the same."""

    status: ClassVar[int] = 500
    headers: ClassVar[dict[str, str]] = {}


class BadRequest(ServiceError):
    """What the client can mend."""

    status = 400


class UnknownVersion(ServiceError):
    """No such version or alias is served here."""

    status = 404


class UnknownModel(ServiceError):
    """The service answers for another model."""

    status = 404


class TooMany(ServiceError):
    """More images in one request than the service takes."""

    status = 413


class Compressed(ServiceError):
    """A body with a Content-Encoding."""

    status = 415
    headers: ClassVar[dict[str, str]] = {"Accept-Encoding": "identity"}


class Failed(ServiceError):
    """The model gave no usable probabilities."""


class Busy(ServiceError):
    """The queue is full: ask again in a second."""

    status = 503
    headers: ClassVar[dict[str, str]] = {"Retry-After": str(RETRY_AFTER)}


def explain(request: Request, error: Any) -> JSONResponse:
    """FastAPI's handler for all of them."""
    return JSONResponse({"error": str(error)}, error.status, error.headers)
