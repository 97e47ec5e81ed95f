"""A model on a labelled set, as numbers and a report: python jobs/evaluate.py --model runs/NAME"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cifar.cli import command_line, run_job


@dataclass(frozen=True, kw_only=True)
class Flags:
    model: Path
    """Model folder, or the run folder around it; the report shows the learning curves of a run."""
    data: str = ""
    """Data set, as in jobs/train.py; empty: the one that the model was trained on."""
    split: Literal["train", "val", "test"] = "test"
    """Which part of the data."""
    output: str = "./report"
    """Folder for report.html, report.json and figures."""


def evaluate_model(flags: Flags) -> dict[str, Any]:
    """Evaluate a model on labelled images and write a report."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.data import prepare
    from cifar.evaluate import evaluate, to_dict
    from cifar.predictor import Predictor
    from cifar.report import read_history, write_report

    folder = flags.model / "model" if (flags.model / "model").is_dir() else flags.model
    predictor = Predictor(folder)
    config = predictor.info.config.data
    prepared = prepare(replace(config, data=flags.data or config.data))
    evaluation = evaluate(predictor, prepared, flags.split)
    report = write_report(
        flags.output, evaluation, history=read_history(folder.parent / "metrics.jsonl"), command=command_line()
    )
    low, high = evaluation.accuracy_ci95
    print(f"accuracy {evaluation.accuracy:.4f} ({low:.4f} to {high:.4f}) of {evaluation.count:,} {flags.split} images")
    print(f"report: {report}")
    return to_dict(evaluation) | {"report": str(report)}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(evaluate_model, Flags, argv)


if __name__ == "__main__":
    sys.exit(main())
