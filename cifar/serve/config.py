"""What the service is told: one dataclass from the flags of jobs/serve.py and the args of cluster/serve.yaml."""

import re
from dataclasses import dataclass

from cifar.config import ConfigError, Precision


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    model: str = ""
    """Published NAME, NAME@ALIAS or NAME/VERSION, or the folder of a run or a model; empty: the one in the box."""
    store: str = "./models"
    """Folder or s3:// or gs:// URI of the published models."""
    api_key_file: str = ""
    """File of API keys, one on a line; the environment variable CIFAR_API_KEY may hold one more. Without any, everybody
    who can reach the service may use it. Read once, at the start."""
    insecure: bool = False
    """Let other machines use the service without a key."""
    replicas: str = "auto"
    """Processes that answer: N, or A:B to follow the load; `auto` is one for each GPU, or core, up to 4."""
    device: str = "auto"
    """Where the model runs: auto (a GPU if there is one), cpu, cuda."""
    precision: Precision = "auto"
    """As in training; `auto` is bfloat16 where that is native, with close answers computed anew in float32."""
    top_k: int = 5
    """Classes that an answer lists."""
    threshold: float = -1.0
    """Answers of a lower probability are marked as abstained; -1: what the version's calibration says, 0: none."""
    max_batch: int = 128
    """Most images that are computed together."""
    max_queue: int = 1024
    """Images that may wait in a replica; a request beyond gets 503 with Retry-After."""
    max_images: int = 64
    """Images of one request."""
    max_request_mb: float = 32.0
    """Megabytes of one request; a replica holds at most 8 times as much of requests that it has not answered."""
    max_megapixels: float = 32.0
    """Megapixels that the images of one request may have together when decoded. A JPEG photo is decoded at a fraction
    of its size, down to an eighth of each side, and counts as that."""
    request_seconds: float = 30.0
    """Time that a client has to send its request."""
    canary_share: float = 0.1
    """Share of the requests that the version NAME@canary answers while there is one."""
    canary_max_errors: float = 0.02
    """Share of failed canary batches at which the alias is taken from the version and it gets no more requests."""
    canary_max_ms: float = 0.0
    """The same for the 95th percentile of the milliseconds that a canary batch takes; 0: no limit."""
    poll_seconds: float = 2.0
    """How often aliases are read again."""

    def __post_init__(self) -> None:
        match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", self.replicas.replace("auto", "1"))
        checks = {
            "replicas": match is not None and int(match[1]) <= int(match[2] or match[1]) <= 10_000,
            "top-k": 1 <= self.top_k <= 1000,
            "threshold": 0 <= self.threshold <= 1 or self.threshold == -1,
            "max-batch": 1 <= self.max_batch <= 10_000,
            "max-queue": 1 <= self.max_queue <= 1_000_000,
            "max-images": 1 <= self.max_images <= self.max_queue,
            "max-request-mb": 0 < self.max_request_mb <= 1024,
            "max-megapixels": 0 < self.max_megapixels <= 1000,
            "request-seconds": 0 < self.request_seconds <= 3600,
            "canary-share": 0 <= self.canary_share <= 1,
            "canary-max-errors": 0 <= self.canary_max_errors <= 1,
            "canary-max-ms": self.canary_max_ms >= 0,
            "poll-seconds": 0.05 <= self.poll_seconds <= 3600,
        }
        remedies = {
            "replicas": "use a count such as 2, a range such as 1:4, or auto",
            "threshold": "use a probability from 0 to 1, or -1 for the version's own",
            "max-images": f"use 1 to --max-queue, {self.max_queue}",
            "max-request-mb": "use more than 0, up to 1024",
            "max-megapixels": "use more than 0, up to 1000",
            "request-seconds": "use more than 0 seconds, up to 3600",
            "canary-max-ms": "use 0 for no limit, or milliseconds",
            "poll-seconds": "use 0.05 to 3600 seconds",
            "top-k": "use 1 to 1000",
            "max-batch": "use 1 to 10000",
            "max-queue": "use 1 to 1000000",
        }
        for flag, holds in checks.items():
            if not holds:
                value = getattr(self, flag.replace("-", "_"))
                raise ConfigError(f"--{flag} {value}: {remedies.get(flag, 'use a share from 0 to 1')}")

    @property
    def replica_counts(self) -> tuple[int, int]:
        """Fewest and most replicas; of `auto`, which depends on the machines, 1."""
        low, _, high = self.replicas.replace("auto", "1").partition(":")
        return int(low), int(high or low)

    @property
    def max_request_bytes(self) -> int:
        return int(self.max_request_mb * 1e6)
