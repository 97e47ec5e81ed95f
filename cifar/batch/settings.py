"""The flags of a batch prediction."""

from dataclasses import dataclass
from typing import Literal

from cifar.config import ConfigError

Format = Literal["parquet", "csv", "jsonl"]


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    input: str
    """An image, a folder of images, or a Parquet file or folder, on disk or behind an s3:// or gs:// URI; on a cluster
    every node must be able to read it."""
    output: str = "./predictions"
    """Folder or URI for the predictions, which every node must be able to write; the same command again resumes."""
    model: str = ""
    """Folder or URI of a run or a model, or a published NAME, NAME@ALIAS or NAME/VERSION; empty: the one in the box."""
    store: str = "./models"
    """Folder or URI of the published models."""
    format: Format = "parquet"
    """Of the files of predictions."""
    top_k: int = 5
    """How many of the likeliest classes to name for each image."""
    threshold: float = -1.0
    """Probability below which an answer is marked as abstained; -1: what the model's calibration says, 0: none."""
    device: str = "auto"
    """Device, such as cpu or cuda; auto: a GPU where there is one."""
    max_bad: float = 1.0
    """Largest share of unreadable images before the job stops. They are listed in quarantine.parquet; by default any
    number is allowed as long as one image can be read."""
    verbose: bool = False
    """Show all of Ray's logs."""

    def __post_init__(self) -> None:
        _require(bool(self.input), "--input '': name an image, a folder or a Parquet path")
        _require(bool(self.output), "--output '': name a folder")
        _require(self.top_k >= 1, f"--top-k {self.top_k}: use 1 or more")
        _require(
            0 <= self.threshold <= 1 or self.threshold == -1,
            f"--threshold {self.threshold:g}: use a probability from 0 to 1, or -1 for the model's own",
        )
        _require(0 <= self.max_bad <= 1, f"--max-bad {self.max_bad:g}: use a share from 0 to 1, such as 0.01 for 1 %")


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ConfigError(text)
