"""Distillation: a student learns from what a teacher says of each augmented image, beside the labels (Hinton 2015)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.config import Config, ConfigError, Precision
from cifar.data.prepared import Prepared, absolute
from cifar.loop import autocast, resize
from cifar.model_dir import LoadedModel, load_model
from cifar.store import Store, find_model, model_path


class Teacher:
    """A trained network in evaluation mode, and how much its word weighs."""

    def __init__(self, loaded: LoadedModel, config: Config, device: torch.device):
        self._model = loaded.model.to(device).requires_grad_(False)
        self._size = loaded.info.config.data.image_size
        self._precision: Precision = config.train.precision
        self._weight, self._temperature = config.distill.teacher_weight, config.distill.teacher_temperature

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """float32 (B,C) of augmented images (B,3,S,S) in 0..255: the student's own view, at the teacher's size."""
        with autocast(self._precision, images.device):
            return self._model(resize(images, self._size)).float()

    def blend(self, losses: Tensor, logits: Tensor, taught: Tensor) -> Tensor:
        """The student's losses (B,) against the labels, with the teacher's share: the divergence of the two softened
        distributions, times the square of the temperature, which keeps its gradients as large (Hinton 2015, arXiv
        1503.02531, section 2)."""
        soft, target = (values / self._temperature for values in (logits.float(), taught))
        divergence = F.kl_div(soft.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True).sum(1)
        return (1 - self._weight) * losses + self._weight * self._temperature**2 * divergence


def settle_teacher(config: Config) -> Config:
    """With the very version that `--teacher` means today: an alias may name another one when the run goes on."""
    reference, store = config.distill.teacher, config.distill.teacher_store
    if not reference:
        return config
    if path := model_path(reference):
        exact = absolute(path)
    else:
        try:
            exact = str(Store(store).resolve(reference))
        except ConfigError as error:
            raise ConfigError(
                f"--teacher {reference}: no folder of a run or a model, and not in --teacher-store: {error}"
            ) from error
    return replace(config, distill=replace(config.distill, teacher=exact))


def load_teacher(config: Config, prepared: Prepared, device: torch.device) -> Teacher | None:
    """None without `--teacher`; ConfigError if it cannot be had, or was trained for other classes."""
    reference = config.distill.teacher
    if not reference:
        return None
    with find_model(reference, config.distill.teacher_store) as found:
        loaded = load_model(found.folder)
    if loaded.info.classes != prepared.classes:
        raise ConfigError(
            f"--teacher {reference}: knows {len(loaded.info.classes)} classes ({', '.join(loaded.info.classes[:3])}, "
            f"...), the data has {len(prepared.classes)} ({', '.join(prepared.classes[:3])}, ...); name a model that "
            "was trained on the same classes"
        )
    return Teacher(loaded, config, device)
