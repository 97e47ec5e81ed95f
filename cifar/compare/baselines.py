"""Classical methods of scikit-learn on pixels and on histograms of oriented gradients, to measure networks by.

Each learns from the train split; what it has to choose it chooses by its accuracy on val, as a network does with its
best epoch. Sizes and choices are such that on CIFAR-10 each takes a minute or three of one core.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from cifar.data.prepared import Arrays
from cifar.loop import resize

LARGEST_SIDE = 32
"""In pixels: larger images are reduced, since features grow with the square of the side."""
MOST_IMAGES = 50_000
"""Of train that are learnt from, others are left out at random: as pixels they are 0.6 GB."""
ORIENTATIONS, CELLS = 9, 4
"""Of the gradients, and cells along each side."""
EXPLAINED = 0.999
"""Share of the variance that principal components keep, up to the number that a method takes."""
CHUNK = 1000
"""Images whose features are computed at a time."""


@dataclass(frozen=True)
class Method:
    words: str
    components: int
    """Principal components that it gets at most, of standardised features; 0: the features as they are."""
    whiten: bool
    """Components of variance 1, on which solvers converge in tens of steps instead of thousands."""
    options: Mapping[str, Callable[[int, int], Any]]
    """What val chooses from: each makes an estimator from a seed and a number of threads."""


def _logistic(c: float) -> Callable[[int, int], Any]:
    return lambda seed, threads: LogisticRegression(C=c, max_iter=200)


def _svm(c: float) -> Callable[[int, int], Any]:
    # Of more images than features it solves the primal problem, which draws no random numbers.
    return lambda seed, threads: LinearSVC(C=c, dual="auto", max_iter=200)


def _knn(k: int) -> Callable[[int, int], Any]:
    return lambda seed, threads: KNeighborsClassifier(k, weights="distance", algorithm="brute", n_jobs=threads)


def _forest(trees: int) -> Callable[[int, int], Any]:
    # Of fully grown trees the nodes alone would take 0.6 GB.
    return lambda seed, threads: RandomForestClassifier(trees, min_samples_leaf=4, random_state=seed, n_jobs=threads)


METHODS = {
    "logistic": Method(
        "logistic regression on up to 256 whitened principal components",
        256,
        True,
        {f"C={c:g}": _logistic(c) for c in (1e-3, 1e-2, 1e-1)},
    ),
    "svm": Method(
        "linear support vector machine, one against the others, on up to 256 whitened principal components",
        256,
        True,
        {f"C={c:g}": _svm(c) for c in (1e-5, 1e-4, 1e-3, 1e-2)},
    ),
    "forest": Method("random forest with 4 images or more in a leaf", 0, False, {"100 trees": _forest(100)}),
    "knn": Method(
        "k nearest neighbours, weighted by distance, on up to 64 principal components",
        64,
        False,
        {f"k={k}": _knn(k) for k in (1, 5, 10, 20, 40)},
    ),
}
"""By the names of `cifar.compare.settings.Estimator`; of random numbers only the forest draws."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    estimator: str
    features: str
    chosen: str
    tried: dict[str, float]
    """Val accuracy of each option."""
    images: int
    """That it learnt from."""
    parameters: int
    """Numbers that it keeps."""
    seconds: float
    """Of features, of fitting all options, and of val."""
    pipeline: Pipeline

    @property
    def val_accuracy(self) -> float:
        return self.tried[self.chosen]

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Classes (N,) of images (N,S,S,3)."""
        return self.pipeline.predict(extract(reduced(images), self.features)).astype(np.int64)

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        names = ("estimator", "features", "chosen", "tried", "images", "parameters", "seconds")
        seen = {"pixels": "pixels", "hog": "histograms of oriented gradients"}[self.features]
        return {name: getattr(self, name) for name in names} | {"method": f"{seen}; {METHODS[self.estimator].words}"}


def fit_baseline(estimator: str, features: str, train: Arrays, val: Arrays, seed: int, threads: int) -> Fitted:
    """Fit every option on train and keep the one of the highest val accuracy, the first of equals.

    `train` and `val` are what `gather` gives; no more than `threads` threads are used.
    """
    started_at = time.perf_counter()
    method = METHODS[estimator]
    with threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are bounded, and val judges the result
        torch.set_num_threads(threads)
        inputs, val_inputs = extract(train.images, features), extract(val.images, features)
        steps = _steps(method)
        if steps:
            inputs = Pipeline(steps).fit_transform(inputs)
            val_inputs = Pipeline(steps).transform(val_inputs)
        models = {name: make(seed, threads).fit(inputs, train.labels) for name, make in method.options.items()}
        tried = {name: float(np.mean(model.predict(val_inputs) == val.labels)) for name, model in models.items()}
    chosen = max(tried, key=lambda name: tried[name])
    pipeline = Pipeline([*steps, ("model", models[chosen])])
    return Fitted(
        estimator=estimator,
        features=features,
        chosen=chosen,
        tried=tried,
        images=len(train.labels),
        parameters=_numbers(pipeline),
        seconds=time.perf_counter() - started_at,
        pipeline=pipeline,
    )


def gather(batches: Iterable[Arrays], count: int, most: int) -> Arrays:
    """At most so many of `count` images, drawn at random but always the same, each of at most `LARGEST_SIDE` pixels."""
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[:most]] = True
    found, first = [], 0
    for batch in batches:
        rows = np.flatnonzero(chosen[first : first + len(batch.labels)])
        first += len(batch.labels)
        found.append(Arrays(reduced(batch.images[rows]), batch.labels[rows], batch.indices[rows]))
    return Arrays(*(np.concatenate(column) for column in zip(*found, strict=True)))


def reduced(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (N,S,S,3) of at most `LARGEST_SIDE` pixels, area-averaged."""
    if images.shape[1] <= LARGEST_SIDE:
        return images
    planes = torch.tensor(images).permute(0, 3, 1, 2)
    return resize(planes, LARGEST_SIDE).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def extract(images: NDArray[np.uint8], features: str) -> NDArray[np.float32]:
    """Features (N,D): pixels from 0 to 1, or histograms of oriented gradients (Dalal and Triggs 2005)."""
    kind = {"pixels": _pixels, "hog": _hog}[features]
    found: NDArray[np.float32] | None = None
    for start in range(0, len(images), CHUNK):
        part = kind(images[start : start + CHUNK])
        if found is None:
            found = np.empty((len(images), part.shape[1]), np.float32)
        found[start : start + CHUNK] = part
    assert found is not None
    return found


def _pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def _hog(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Of each pixel the channel of the steepest gradient; cells are normalised in blocks of 2x2."""
    from skimage.feature import hog  # a part of a second

    cell = max(images.shape[1] // CELLS, 1)
    shape: Any = {"pixels_per_cell": (cell, cell), "cells_per_block": (2, 2), "orientations": ORIENTATIONS}
    return np.stack([hog(image, channel_axis=-1, **shape) for image in images]).astype(np.float32)


def _steps(method: Method) -> list[tuple[str, Any]]:
    if not method.components:
        return []
    return [("scale", StandardScaler(copy=False)), ("components", Components(method.components, method.whiten))]


class Components(TransformerMixin, BaseEstimator):
    """The first principal components, as many as explain `EXPLAINED` of the variance, but at most `most`.

    What is left of features that repeat each other would be whitened noise.
    """

    def __init__(self, most: int, whiten: bool):
        self.most, self.whiten = most, whiten

    def fit(self, inputs: NDArray[np.float32], labels: Any = None) -> Self:
        # By the covariance, which is small where there are more images than features; without random numbers.
        count = min(self.most, *inputs.shape)
        self.pca_ = PCA(count, whiten=self.whiten, svd_solver="covariance_eigh").fit(inputs)
        self.kept_ = min(int(np.searchsorted(self.pca_.explained_variance_ratio_.cumsum(), EXPLAINED)) + 1, count)
        return self

    def transform(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.pca_.transform(inputs)[:, : self.kept_], np.float32)


def _numbers(pipeline: Pipeline) -> int:
    """Means, scales and used components, weights; of a forest thresholds, features and the leaves' shares; of
    neighbours the images themselves."""
    steps, count = pipeline.named_steps, 0
    model: Any = steps["model"]
    if "components" in steps:
        count = steps["components"].pca_.n_features_in_ * (3 + steps["components"].kept_)
    if isinstance(model, RandomForestClassifier):
        trees: list[Any] = [tree.tree_ for tree in model.estimators_]
        leaves = sum(int(tree.n_leaves) for tree in trees)
        return count + 2 * (sum(int(tree.node_count) for tree in trees) - leaves) + leaves * len(model.classes_)
    if isinstance(model, KNeighborsClassifier):
        return count + model.n_samples_fit_ * (model.n_features_in_ + 1)
    return count + int(np.size(model.coef_)) + int(np.size(model.intercept_))
