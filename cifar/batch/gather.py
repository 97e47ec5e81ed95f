"""What the parts' summaries come to: counts, the manifest, the evaluation."""

import heapq
from typing import Any

import numpy as np

from cifar.batch.part import BadRow, Summary
from cifar.config import ConfigError
from cifar.evaluate import NUM_MISTAKES, Evaluation, Mistake, Rows, assess
from cifar.model_dir import LoadedModel

_NAMED_BAD_ROWS = 5


class Gathered:
    """The summaries that have come, in any order; without the pixels of all but the worst mistakes."""

    def __init__(self, source: str, total: int, max_bad: float):
        self._source, self._total, self._max_bad = source, total, max_bad
        self.parts: dict[int, dict[str, Any]] = {}
        """By number, what the manifest says of each file."""
        self.predicted = self.abstained = self.quarantined = 0
        self._bad: dict[int, list[BadRow]] = {}
        self._scored: dict[int, Rows] = {}
        self._mistakes: list[Mistake] = []
        self._device = ""

    @property
    def rows(self) -> int:
        return self.predicted + self.quarantined

    def add(self, summary: Summary) -> None:
        """ConfigError when with these more rows are bad than --max-bad allows."""
        number = summary.number
        self.parts[number] = {
            "name": summary.name,
            "rows": summary.rows,
            "bytes": summary.size,
            "sha256": summary.sha256,
        }
        self.predicted += summary.rows
        self.abstained += summary.abstained
        self.quarantined += len(summary.bad)
        self._bad[number] = summary.bad
        self._device = summary.device
        if summary.scored is not None:
            self._scored[number] = summary.scored
        worst = [*self._mistakes, *summary.mistakes]
        self._mistakes = heapq.nsmallest(NUM_MISTAKES, worst, key=lambda one: (-one.loss, one.index))
        if self.quarantined > self._max_bad * self._total:
            raise ConfigError(
                f"--max-bad {self._max_bad:g}: at least {self.quarantined} of {self._total} images cannot be read "
                f"({self._first_bad()}); mend them or allow more with --max-bad"
            )

    def check_any(self) -> None:
        """ConfigError when no image could be read."""
        if not self.predicted:
            raise ConfigError(
                f"--input {self._source}: none of its {self._total} images can be read ({self._first_bad()})"
            )

    def bad(self) -> list[BadRow]:
        """In the order of the source."""
        return [row for number in sorted(self._bad) for row in self._bad[number]]

    def _first_bad(self) -> str:
        bad = self.bad()
        named = "; ".join(f"{row.id}: {row.reason}" for row in bad[:_NAMED_BAD_ROWS])
        return named + "; ..." * (len(bad) > _NAMED_BAD_ROWS)

    def manifest(self, job: dict[str, Any]) -> dict[str, Any]:
        return {
            "job": job,
            "rows": self.rows,
            "predicted": self.predicted,
            "quarantined": self.quarantined,
            "abstained": self.abstained,
            "parts": [self.parts[number] for number in sorted(self.parts)],
        }

    def evaluation(self, model: LoadedModel, fingerprint: str, rate: float) -> Evaluation | None:
        """Of the rows with a label; None if there are none. `rate` is in images per second."""
        scored = [self._scored[number] for number in sorted(self._scored)]
        if not sum(len(rows.labels) for rows in scored):
            return None
        rows = Rows(*map(np.concatenate, zip(*scored, strict=True)))
        return assess(
            rows,
            self._mistakes,
            model,
            data=self._source,
            split="labelled",
            fingerprint=fingerprint,
            device=self._device,
            seconds=len(rows.labels) / rate if rate else np.inf,
        )
