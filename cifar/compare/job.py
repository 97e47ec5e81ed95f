"""One run of a contender: a trial of Ray Tune, as in a sweep, that answers the test images when it is trained."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune

from cifar.compare.answers import answer, write_answers
from cifar.compare.contenders import Contender
from cifar.data.loader import EVALUATION_BATCH, in_batches
from cifar.data.prepared import Arrays, join, write_file
from cifar.ray_job import Blocks
from cifar.run_dir import local_model
from cifar.tune.trial import SweepJob

BASELINE = "baseline.json"
"""In a baseline's folder, what it chose."""


@dataclass(frozen=True, kw_only=True)
class ComparisonJob(SweepJob):
    """A trial's `values` are the name of its `contender`."""

    contenders: Mapping[str, Contender]
    test: Blocks | None
    """None: streamed."""

    def run(self, key: str, setting: Mapping[str, Any]) -> str:
        """Train, then answer; nothing that is chosen sees the test images."""
        contender = self.contenders[setting["values"]["contender"]]
        if contender.config is None:
            return self._fit_baseline(key, contender, setting["seed"])
        outcome = self.fit(key, contender.config, setting)
        from cifar.predictor import Predictor

        with local_model(join(self.path, f"{key}/model")) as folder:
            predictor = Predictor(folder)
        found = answer(
            lambda images: predictor.logits(images).argmax(1).astype(np.int64),
            self._batches("test", self.test),
            self.prepared.fingerprint,
        )
        write_answers(join(self.path, key), found)
        return outcome

    def _fit_baseline(self, key: str, contender: Contender, seed: int) -> str:
        from cifar.compare.baselines import MOST_IMAGES, fit_baseline, gather

        path, counts = join(self.path, key), self.prepared.counts
        train, val = (
            gather(self._batches(split, blocks), counts[split], most)
            for split, blocks, most in (("train", self.train, MOST_IMAGES), ("val", self.val, counts["val"]))
        )
        fitted = fit_baseline(contender.estimator, contender.features, train, val, seed, self.plan.threads)
        write_file(join(path, BASELINE), (json.dumps(fitted.describe(), indent=2) + "\n").encode())
        row = {"epoch": 1, "val_accuracy": fitted.val_accuracy, "val_count": len(val.labels)}
        row |= {"seconds": fitted.seconds, "train_seconds": fitted.seconds}
        found = answer(fitted.predict, self._batches("test", self.test), self.prepared.fingerprint)
        write_answers(path, found)
        write_file(join(path, "metrics.jsonl"), (json.dumps(row) + "\n").encode())
        tune.report(row)
        return f"{fitted.chosen}, the best on val of {len(fitted.tried)}" if len(fitted.tried) > 1 else fitted.chosen

    def _batches(self, split: str, blocks: Blocks | None) -> Iterator[Arrays]:
        if blocks is None:
            return self.prepared.batches(split, EVALUATION_BATCH)
        return in_batches(blocks.read(0, blocks.rows[0]))
