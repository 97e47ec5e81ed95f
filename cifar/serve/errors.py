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


class TooManyValues(ServiceError):
    """JSON that would take seconds to read, while nobody else is answered."""

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


MOST_VALUES = 500_000
"""Of a JSON body: 160 images of 32 pixels as numbers. It takes 0.2 s to read."""


def check_values(body: bytes) -> None:
    """TooManyValues for JSON of more than MOST_VALUES; base64 has none of what is counted here."""
    count = sum(map(body.count, (b",", b"[", b"{")))
    if count > MOST_VALUES:
        raise TooManyValues(f"JSON of {count} values, the most is {MOST_VALUES}; send encoded images, or binary data")


def explain(request: Request, error: Any) -> JSONResponse:
    """FastAPI's handler for all of them."""
    return JSONResponse({"error": str(error)}, error.status, error.headers)
