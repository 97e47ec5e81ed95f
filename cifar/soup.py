"""A greedy soup: one network whose weights are the mean of several of the same recipe (Wortsman 2022).

It answers as fast as one of them. Weights average well where all began at the same ones, as in transfer learning;
networks that began at random lie in different valleys, and the mean of any two is worse than either.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar.config import ConfigError
from cifar.data.prepared import Prepared
from cifar.evaluate import calibrate, evaluate
from cifar.model_dir import LoadedModel, save_model
from cifar.models import Classifier
from cifar.predictor import Predictor
from cifar.run_dir import write_calibration

STATISTICS_IMAGES = 5_000
"""Training images by which batch norm's statistics are measured anew."""
NORMS = nn.modules.batchnorm._BatchNorm

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Soup:
    accuracies: list[float]
    """Of each network by itself on val, in the order given."""
    kept: list[int]
    """Places of those whose mean it is, in the order in which they were taken."""
    accuracy: float
    """On val."""


def make_soup(models: Sequence[LoadedModel], prepared: Prepared, folder: Path) -> Soup:
    """Write the soup as a model folder: the best on val first, then each that does not make the mean worse.

    Algorithm 1 of Wortsman 2022 (arXiv 2203.05482). ConfigError if the networks are not of one shape.
    """
    check_same(models)
    if not prepared.counts["val"]:
        raise ConfigError(f"--data {prepared.source}: has no val images, by which a soup is chosen")
    accuracies = [accuracy_of(model, prepared) for model in models]
    order = sorted(range(len(models)), key=lambda place: -accuracies[place])
    best, kept = models[order[0]], [order[0]]
    accuracy = accuracies[order[0]]
    for place in order[1:]:
        tried = mean_of([models[one] for one in (*kept, place)])
        measure_statistics(tried.model, prepared)
        reached = accuracy_of(tried, prepared)
        logger.info("val accuracy %.4f with model %d, %.4f without", reached, place + 1, accuracy)
        if reached >= accuracy:
            best, accuracy = tried, reached
            kept.append(place)
    metrics: dict[str, Any] = {"val_accuracy": accuracy, "val_count": prepared.counts["val"], "ingredients": len(kept)}
    save_model(folder, best.model.cpu(), best.info, metrics)
    predictor = Predictor(folder)
    write_calibration(str(folder), calibrate(predictor, prepared))
    return Soup(accuracies=accuracies, kept=kept, accuracy=accuracy)


def check_same(models: Sequence[LoadedModel]) -> None:
    first = models[0]
    shapes = {name: value.shape for name, value in first.model.state_dict().items()}
    for place, model in enumerate(models[1:], 2):
        if model.info.classes != first.info.classes or model.info.config.data != first.info.config.data:
            raise ConfigError(f"model {place} of the soup: was trained on other data than the first")
        if {name: value.shape for name, value in model.model.state_dict().items()} != shapes:
            raise ConfigError(f"model {place} of the soup: is another network than the first; use runs of one recipe")


def mean_of(models: Sequence[LoadedModel]) -> LoadedModel:
    """A new network with the mean of all weights and of batch norm's statistics."""
    first = models[0]
    states = [model.model.state_dict() for model in models]
    mean = {name: _mean([state[name] for state in states]) for name in states[0]}
    network = copy.deepcopy(first.model)
    network.load_state_dict(mean)
    return replace(first, model=network)


def measure_statistics(network: Classifier, prepared: Prepared) -> None:
    """Batch norm's statistics of the first training images as they are: those of averaged weights are not the mean."""
    norms = [module for module in network.modules() if isinstance(module, NORMS) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    seen, device = 0, next(network.parameters()).device
    with torch.inference_mode():
        for batch in prepared.batches("train", 500):
            network(torch.tensor(batch.images, device=device).permute(0, 3, 1, 2))
            seen += len(batch.labels)
            if seen >= STATISTICS_IMAGES:
                break
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def accuracy_of(model: LoadedModel, prepared: Prepared) -> float:
    """On val, with the model's test-time augmentation."""
    return evaluate(Predictor(model), prepared, "val").accuracy


def _mean(values: list[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0]
    return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)
