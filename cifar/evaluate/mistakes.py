"""What may lie behind a mistake: the pixels that spoke for it, and the training images that are most like it."""

import logging
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cifar.augment import derive_seed
from cifar.data.prepared import Prepared
from cifar.evaluate.evaluation import Evaluation, Mistake, Neighbour, ids_of
from cifar.predictor import Predictor

NUM_NOISY, NOISE = 24, 0.1
"""Noisy copies of each image, and their noise as a share of its range (Smilkov 2017 takes 50, and 0.1 to 0.2)."""
NUM_NEIGHBOURS = 3
MOST_COMPARED = 50_000
"""Training images among which neighbours are looked for; of more, as many from the beginning."""

logger = logging.getLogger(__name__)


def explain(
    evaluation: Evaluation, predictor: Predictor, prepared: Prepared, *, saliency: bool, neighbours: bool
) -> Evaluation:
    """The evaluation with what was asked for beside each of its worst mistakes."""
    mistakes = evaluation.mistakes
    if not mistakes:
        return evaluation
    if saliency:
        maps = saliency_maps(predictor, mistakes)
        mistakes = [replace(one, saliency=found) for one, found in zip(mistakes, maps, strict=True)]
    if neighbours and prepared.counts["train"]:
        nearest = nearest_images(predictor, prepared, np.stack([one.image for one in mistakes]))
        mistakes = [replace(one, neighbours=found) for one, found in zip(mistakes, nearest, strict=True)]
    return replace(evaluation, mistakes=mistakes)


def saliency_maps(predictor: Predictor, mistakes: list[Mistake]) -> list[NDArray[np.float32]]:
    """How much each pixel sways the wrong answer against the right one, (S,S) in 0..1 for each mistake.

    SmoothGrad (Smilkov 2017, arXiv 1706.03825): the gradient of the difference of the two logits, its mean over noisy
    copies of the image, then the largest magnitude of the three channels, and its mean over a window of a twelfth of
    the side, without which single pixels are all that is seen. 1 is the image's 99th percentile.
    """
    maps, window = [], predictor.image_size // 24 * 2 + 1
    for mistake in mistakes:
        image = torch.from_numpy(mistake.image.copy()).permute(2, 0, 1).float()
        generator = torch.Generator().manual_seed(derive_seed(mistake.index, "saliency"))
        noise = torch.randn((NUM_NOISY, *image.shape), generator=generator) * NOISE * (image.max() - image.min())
        total = torch.zeros_like(image)
        for noisy in (image + noise).split(max(min(predictor.batch_size, NUM_NOISY), 1)):
            wrong, right = (
                torch.full((len(noisy),), predictor.classes.index(name), device=predictor.device)
                for name in (mistake.prediction, mistake.label)
            )
            total += predictor.gradients(noisy.to(predictor.device), wrong, right).sum(0).cpu()
        strength = F.avg_pool2d(total.abs().amax(0, keepdim=True), window, 1, window // 2)[0].numpy()
        maps.append((strength / max(float(np.percentile(strength, 99)), 1e-12)).clip(0, 1).astype(np.float32))
    return maps


def nearest_images(predictor: Predictor, prepared: Prepared, images: NDArray[np.uint8]) -> list[list[Neighbour]]:
    """For each of the images (N,S,S,3) the training images of the most similar features, by their cosine."""
    logger.info("looking for the nearest of %s training images", f"{min(prepared.counts['train'], MOST_COMPARED):,}")
    wanted = _directions(predictor.features(images))
    best: list[list[Neighbour]] = [[] for _ in images]
    seen = 0
    for batch in prepared.batches("train", predictor.batch_size):
        similarities = wanted @ _directions(predictor.features(batch.images)).T
        for found, row in zip(best, similarities, strict=True):
            for place in np.argsort(-row, kind="stable")[:NUM_NEIGHBOURS]:
                neighbour = Neighbour(
                    index=int(batch.indices[place]),
                    label=prepared.classes[batch.labels[place]],
                    similarity=float(row[place]),
                    image=batch.images[place].copy(),
                )
                found.append(neighbour)
            found.sort(key=lambda one: -one.similarity)
            del found[NUM_NEIGHBOURS:]
        seen += len(batch.labels)
        if seen >= MOST_COMPARED:
            break
    ids = ids_of(prepared, "train", [one.index for found in best for one in found])
    return [[replace(one, id=ids[one.index]) for one in found] for found in best]


def _directions(features: NDArray[np.float32]) -> NDArray[np.float32]:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
