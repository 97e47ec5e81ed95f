"""Why the service gives no answer; each message is one sentence for the client."""


class UnknownVersion(LookupError):
    """No such version or alias is served here (HTTP 404)."""


class TooMany(ValueError):
    """More images in one request than the service takes (HTTP 413)."""


class Busy(RuntimeError):
    """The queue is full: ask again in a second (HTTP 503)."""
