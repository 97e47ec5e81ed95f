"""One training run: images in, a run's folder with model and report out: python jobs/train.py --data cifar10"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cifar.cli import command_line, run_job
from cifar.config import Config
from cifar.recipes import RECIPES


def train(config: Config) -> dict[str, Any]:
    """Train a network on images, evaluate its best epoch on test, and write the report. The same command resumes."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.train import fit

    run = fit(config)
    from cifar.evaluate import calibrate, evaluate, to_dict
    from cifar.predictor import Predictor
    from cifar.report import write_report
    from cifar.run_dir import local_model, writable, write_calibration

    with local_model(run.model) as model, writable(run.path) as folder:
        predictor = Predictor(model)
        write_calibration(run.model, calibrate(predictor, run.prepared))
        evaluation = evaluate(predictor, run.prepared, split="test")
        # The model's folder knows the time up to its epoch, the run knows the whole.
        evaluation = replace(evaluation, train_seconds=run.train_seconds)
        write_report(folder, evaluation, history=run.history, command=command_line())
    low, high = evaluation.accuracy_ci95
    print(f"{run.stopped}: {len(run.history)} epochs in {run.train_seconds:.1f} s")
    print(f"accuracy {evaluation.accuracy:.4f} ({low:.4f} to {high:.4f}) of {evaluation.count:,} test images")
    print(f"model: {run.model}")
    print(f"report: {run.path}/report.html")
    return to_dict(evaluation) | {"run": run.path, "model": run.model, "report": f"{run.path}/report.html"}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(train, {name: recipe() for name, recipe in RECIPES.items()}, argv)


if __name__ == "__main__":
    sys.exit(main())
