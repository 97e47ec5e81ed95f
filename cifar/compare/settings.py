"""The flags of a comparison, beside those of a training run."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from cifar.config import ConfigError, Optimizer
from cifar.recipes import RECIPES

Estimator = Literal["logistic", "svm", "forest", "knn"]
Features = Literal["pixels", "hog"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    optimizers: str = ""
    """Compare these, such as sgd,adam,muon: the other settings stay, and each has the learning rate that suits it,
    unless --lr gives one for all."""
    models: str = ""
    """Compare these networks, such as cnn,resnet18, with all other settings the same."""
    recipes: str = ""
    """Compare these recipes, such as fast,record94; a flag that is given holds for all of them."""
    variants: tuple[str, ...] = ()
    """Compare the command's settings as changed by each of these, such as 'lr=0.1 cutout=8' 'wide: widths=96,192,384',
    of which the second has a name; base changes nothing."""
    baselines: str = ""
    """Compare with these classical methods, of logistic,svm,forest,knn."""
    features: str = "pixels,hog"
    """What the baselines see: pixels, histograms of oriented gradients (hog), or one after the other."""
    seeds: int = 3
    """Runs of each, from --seed on; the same command with more goes on."""
    at_once: int = 0
    """Runs at a time; 0: one for each core or GPU, as many as memory allows."""

    def __post_init__(self) -> None:
        known = {
            "optimizers": get_args(Optimizer),
            "recipes": tuple(RECIPES),
            "baselines": get_args(Estimator),
            "features": get_args(Features),
        }
        for flag in ("optimizers", "models", "recipes", "baselines", "features"):
            value = getattr(self, flag)
            names = listed(value)
            for name in names:
                if flag in known and name not in known[flag]:
                    raise ConfigError(f"--{flag} {value}: there is no {name!r}; use {', '.join(known[flag])}")
                if flag == "models" and not re.fullmatch(r"\w{1,60}", name):
                    raise ConfigError(f"--models {value}: {name!r} is no name of a network; use such as cnn,resnet18")
                if names.count(name) > 1:
                    raise ConfigError(f"--{flag} {value}: names {name} twice; name it once")
        if not self.features:
            raise ConfigError("--features: empty; use pixels, hog, or pixels,hog")
        if not 1 <= self.seeds <= 1000:
            raise ConfigError(f"--seeds {self.seeds}: use 1 to 1000")
        if self.at_once < 0:
            raise ConfigError(f"--at-once {self.at_once}: use 1 or more, or 0 for as many as fit")


def listed(value: str) -> list[str]:
    """The names of a list as the command line has it."""
    return value.split(",") if value else []
