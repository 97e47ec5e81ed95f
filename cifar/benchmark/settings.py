"""The flags of a benchmark: those of a run, and what of it is measured."""

import re
from dataclasses import dataclass, field
from typing import Literal

from cifar.config import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A run's groups but for `run`, which the benchmark fills in for each of the runs that it makes."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    budget: float = 2.0
    """Seconds for each stage; starting runs gets ten times as much. What takes longer is measured three times if that
    stays within five budgets, else as often as it does, be it once."""
    seeds: int = 0
    """Train so many times in full, with --seed 0, 1, ..., for the time to accuracy; 0 skips this."""
    split: Literal["val", "test"] = "val"
    """What the runs of --seeds are evaluated on; test is for figures that are published, and never to choose by."""
    target: float = 0.0
    """Val accuracy, such as 0.86, for which the runs of --seeds say after how many seconds they had it; 0: none."""
    workers: str = ""
    """Counts of workers to train with for a few epochs, such as 1,2,4, and to predict others from; empty skips this."""
    link_gbps: float = 25.0
    """Bandwidth in Gbit/s, each way, that predictions take for the link between two workers where none was measured."""
    link_latency_us: float = 50.0
    """Microseconds that a message takes on that link."""
    cost: str = ""
    """A benchmark.json that was written before, on the machine or on a GPU like those to come: instead of measuring,
    predict from it what the run costs on 1 to 512 GPUs."""
    assume: dict[str, float] = field(default_factory=dict)
    """For --cost: assumptions by name and value, such as images 1e8 gpu_hour 2.5; --cost alone lists them all."""
    storage: str = ""
    """Folder or URI that keeps the runs, in a new folder of its own; every node must be able to write it. Empty: a
    temporary folder of this machine."""
    output: str = "./benchmark"
    """Folder or URI for benchmark.json."""

    def __post_init__(self) -> None:
        _require(self.budget > 0, f"--budget {self.budget:g}: use a positive number of seconds")
        _require(self.seeds >= 0, f"--seeds {self.seeds}: use 0 or more")
        _require(0 <= self.target <= 1, f"--target {self.target:g}: use a share, such as 0.86 for 86 %")
        _require(not self.target or self.seeds > 0, f"--target {self.target:g}: says nothing without --seeds 1 or more")
        _require(self.link_gbps > 0, f"--link-gbps {self.link_gbps:g}: use a positive number")
        _require(self.link_latency_us >= 0, f"--link-latency-us {self.link_latency_us:g}: use 0 or more")
        _require(
            re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", self.workers) is not None,
            f"--workers {self.workers}: give counts with commas between them, such as 1,2,4",
        )
        _require(bool(self.cost) or not self.assume, "--assume: says nothing without --cost FILE")
        self.config()  # refuses groups that contradict each other

    @classmethod
    def of(cls, recipe: Config) -> "Benchmark":
        """The benchmark of a recipe, with its groups as defaults."""
        return cls(data=recipe.data, augment=recipe.augment, model=recipe.model, optim=recipe.optim, train=recipe.train)

    @property
    def worker_counts(self) -> list[int]:
        """Ascending, each once."""
        return sorted({int(count) for count in self.workers.split(",") if count})

    def config(self, run: RunConfig | None = None) -> Config:
        return Config(
            data=self.data,
            augment=self.augment,
            model=self.model,
            optim=self.optim,
            train=self.train,
            run=run or RunConfig(),
        )


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ConfigError(text)
