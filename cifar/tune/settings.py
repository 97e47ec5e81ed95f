"""The flags of a sweep, beside those of a training run."""

import re
from dataclasses import dataclass
from typing import Literal

from cifar.config import ConfigError

Search = Literal["random", "optuna", "pbt"]
Scheduler = Literal["asha", "median", "none"]


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    trials: int = 20
    """Configurations to try; the same command with more goes on."""
    search: Search = "random"
    """Where they come from: drawn at random, proposed by Optuna's TPE sampler from the results so far, or drawn at
    random and then changed while they train by population based training (pbt)."""
    space: str = "auto"
    """What is searched: fast, notebook, optimizer, augment, or a Python file that defines SPACE; auto suits the
    network. A flag that is given a value is not searched."""
    scheduler: Scheduler = "asha"
    """What ends trials early: asha, those not among the best at an epoch where trials are compared; median, those below
    the median; none. Under pbt nothing does."""
    grace_epochs: int = 0
    """Epochs before a trial is compared first; with pbt, between two exchanges. With folds, folds. 0: of asha the most
    epochs over the square of --reduction, so that it compares after a ninth and a third of them; else 1."""
    reduction: int = 3
    """Of asha: one of so many trials goes on, for so many times the epochs."""
    folds: int = 0
    """Cross-validation: each trial trains so often, on all but one part of train and val, and its score is the mean."""
    at_once: int = 0
    """Trials at a time; 0: one for each core or GPU, as many as memory allows."""
    confirm: str = "3,3"
    """K,S: the best K configurations are trained S times anew, with other seeds, and the best mean on val wins; 0 takes
    the best trial as it is."""
    store: str = "./models"
    """Folder or s3:// or gs:// URI of the published models."""
    publish: str = "auto"
    """Name under which the winner is published in the store; auto: the data set's; none: not at all."""
    promote: bool = False
    """Make the winner the champion of its name."""
    dashboard: bool = False
    """Show the sweep in a browser while it runs, with optuna-dashboard, on this machine only."""
    dashboard_port: int = 8080
    """Port of the dashboard."""

    def __post_init__(self) -> None:
        checks = {
            "trials": (1 <= self.trials <= 100_000, "use 1 to 100000"),
            "grace-epochs": (self.grace_epochs >= 0, "use 1 or more, or 0 for what suits the epochs"),
            "reduction": (self.reduction >= 2, "use 2 or more"),
            "folds": (self.folds == 0 or 2 <= self.folds <= 100, "use 2 to 100, or 0 for the val split"),
            "at-once": (self.at_once >= 0, "use 1 or more, or 0 for as many as fit"),
            "confirm": (re.fullmatch(r"0|[1-9]\d*,[1-9]\d*", self.confirm), "use K,S such as 3,3, or 0"),
            # As cifar.store has it, which is not imported: it would tell only after the search.
            "publish": (
                re.fullmatch(r"[A-Za-z0-9][\w.\-]*", self.publish, re.ASCII) and self.publish != "aliases",
                "use letters, digits, dots, dashes and underscores, the first a letter or digit",
            ),
            "dashboard-port": (1 <= self.dashboard_port <= 65535, "use 1 to 65535"),
        }
        for flag, (holds, remedy) in checks.items():
            if not holds:
                raise ConfigError(f"--{flag} {getattr(self, flag.replace('-', '_'))}: {remedy}")
        if self.promote and self.publish == "none":
            raise ConfigError("--promote: the champion is a published version; drop --publish none")
        if self.search == "pbt" and self.folds:
            raise ConfigError("--search pbt: changes a run while it trains, which folds cannot share; drop --folds")
        if self.search == "pbt" and self.trials < 4:
            raise ConfigError(f"--trials {self.trials}: --search pbt lets the worst copy the best; use 4 or more")

    @property
    def confirm_counts(self) -> tuple[int, int]:
        """Configurations and seeds. Folds leave no model of all the data behind, so that one at least is trained."""
        if self.confirm == "0":
            return (1, 1) if self.folds else (0, 0)
        configs, seeds = self.confirm.split(",")
        return int(configs), int(seeds)

    def first_rung(self, max_epochs: int) -> int:
        """`grace_epochs`, where trials have at most so many epochs."""
        if self.grace_epochs:
            return self.grace_epochs
        return max(max_epochs // self.reduction**2, 1) if self.scheduler == "asha" and self.search != "pbt" else 1

    @property
    def stops_early(self) -> bool:
        return self.scheduler != "none" and self.search != "pbt"
