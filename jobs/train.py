"""One training run: data in, a run's folder with model and report out. The same command again resumes."""

import sys
from collections.abc import Sequence
from typing import Any

from cifar.cli import command_line, run_job
from cifar.config import Config
from cifar.recipes import RECIPES


def train(config: Config) -> dict[str, Any]:
    """Train a network on images, evaluate the best epoch on the test split, and write the report."""
    from cifar.train import fit

    run = fit(config)
    from cifar.evaluate import evaluate
    from cifar.predictor import Predictor
    from cifar.report import write_report

    evaluation = evaluate(Predictor(run.model), run.prepared, split="test")
    report = write_report(run.path, evaluation, history=run.history, command=command_line())
    print(f"test accuracy {evaluation.accuracy:.4f} on {evaluation.count} images, {run.stopped}")
    print(f"model {run.model}\nreport {report}")
    return {"run": run.path, "model": run.model, "report": str(report), "accuracy": evaluation.accuracy}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(train, {name: recipe() for name, recipe in RECIPES.items()}, argv)


if __name__ == "__main__":
    sys.exit(main())
