"""Several models that answer as one."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar.calibration import Calibration
from cifar.config import ConfigError
from cifar.predictor import Images, Predictor


class Ensemble(Predictor):
    """The mean of the members' calibrated probabilities (Lakshminarayanan 2017, arXiv 1612.01474), as logits their
    logarithm; with a calibration of its own, since the mean is less sure than its members.

    ConfigError if the members do not answer the same question. Settings such as the data are the first one's.
    """

    def __init__(self, members: Sequence[Predictor]):
        first = members[0]
        for member in members[1:]:
            if (member.classes, member.image_size) != (first.classes, first.image_size):
                raise ConfigError(
                    "--models: all must have the same classes and image size, but there are "
                    f"{len(first.classes)} classes at {first.image_size} pixels and "
                    f"{len(member.classes)} at {member.image_size}"
                )
        self.members = list(members)
        self.info, self.metrics = first.info, {}
        self.batch_size = min(member.batch_size for member in members)
        self.device, self.precision = first.device, first.precision
        self.calibration = Calibration()

    def _logits(self, images: Tensor) -> Tensor:
        found = [(member._logits(images) / member.calibration.temperature).log_softmax(1) for member in self.members]
        return torch.stack(found).logsumexp(0) - math.log(len(found))

    def features(self, images: Images) -> NDArray[np.float32]:
        """Those of all members, each of length 1."""
        found = [member.features(images) for member in self.members]
        lengths = [np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12) for features in found]
        return np.concatenate([features / length for features, length in zip(found, lengths, strict=True)], axis=1)

    def gradients(self, images: Tensor, classes: Tensor, against: Tensor) -> Tensor:
        """The mean of the members'."""
        return torch.stack([member.gradients(images, classes, against) for member in self.members]).mean(0)
