"""A model on a labelled set, as numbers and a report: python jobs/evaluate.py --model runs/NAME"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from cifar.cli import command_line, run_job


@dataclass(frozen=True, kw_only=True)
class Flags:
    model: str = ""
    """Folder or URI of a run or a model, or a published NAME, NAME@ALIAS or NAME/VERSION; empty: the one in the box."""
    store: str = "./models"
    """Folder or URI of the published models."""
    data: str = ""
    """Data set, as in jobs/train.py; empty: the one that the model was trained on."""
    split: Literal["train", "val", "test"] = "test"
    """Which part of the data."""
    output: str = "./report"
    """Folder or URI for report.html, report.json and figures."""


def evaluate_model(flags: Flags) -> dict[str, Any]:
    """Evaluate a model on labelled images and write a report."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.cluster import start_ray
    from cifar.data import prepare
    from cifar.data.prepared import absolute, join, parent
    from cifar.evaluate import evaluate, to_dict
    from cifar.predictor import Predictor
    from cifar.report import read_history, write_report
    from cifar.run_dir import writable
    from cifar.store import find_model, model_path

    with find_model(flags.model, flags.store) as found:
        predictor = Predictor(found.folder)
    path = model_path(flags.model)
    history = read_history(join(parent(path), "metrics.jsonl")) if path else []
    config = replace(predictor.info.config.data, data=flags.data or predictor.info.source)
    prepared = prepare(config, partial(start_ray, verbose=False))
    evaluation = evaluate(predictor, prepared, flags.split)
    output = absolute(flags.output)
    with writable(output) as folder:
        write_report(folder, evaluation, history=history, command=command_line())
    report = join(output, "report.html")
    low, high = evaluation.accuracy_ci95
    print(f"accuracy {evaluation.accuracy:.4f} ({low:.4f} to {high:.4f}) of {evaluation.count:,} {flags.split} images")
    print(f"report: {report}")
    return to_dict(evaluation) | {"report": report}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(evaluate_model, Flags, argv)


if __name__ == "__main__":
    sys.exit(main())
