"""A published model over HTTP, with a web page: python jobs/serve.py --model cifar10"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cifar.cli import run_job
from cifar.serve.config import ServeConfig


@dataclass(frozen=True, kw_only=True)
class Flags:
    serve: ServeConfig = field(default_factory=ServeConfig)
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, which needs an API key, or --insecure."""
    port: int = 8000
    """Port to listen at."""


def serve_model(flags: Flags) -> dict[str, Any]:
    """Answer over HTTP until interrupted. On a cluster ($RAY_ADDRESS) start the service there and leave it running."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.serve.run import serving

    with serving(flags.serve, flags.host, flags.port) as (url, needs_key):
        asks = "asks for an API key" if needs_key else "asks for no key"
        print(f"serving: {url}  (API: {url}docs; {asks})", flush=True)
        if os.environ.get("RAY_ADDRESS"):
            print("it stays when this command ends; stop it with: serve shutdown")
        else:
            wait_for_signal()
    return {"url": url, "needs_key": needs_key}


def wait_for_signal() -> None:
    """Return at Ctrl-C or SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(serve_model, Flags, argv)


if __name__ == "__main__":
    sys.exit(main())
