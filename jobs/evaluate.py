"""A model on a labelled set, as numbers and a report: python jobs/evaluate.py --model runs/NAME"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from cifar.cli import command_line, run_job
from cifar.config import ConfigError

if TYPE_CHECKING:
    from cifar.predictor import Predictor

Section = Literal["robustness", "saliency", "neighbours"]
ROBUSTNESS_IMAGES = 500


@dataclass(frozen=True, kw_only=True)
class Flags:
    model: str = ""
    """Folder or URI of a run or a model, or a published NAME, NAME@ALIAS or NAME/VERSION; empty: the one in the box."""
    models: tuple[str, ...] = ()
    """Several such models as an ensemble, which answers by the mean of their probabilities."""
    store: str = "./models"
    """Folder or URI of the published models."""
    data: str = ""
    """Data set, as in jobs/train.py; empty: the one that the model was trained on."""
    split: Literal["train", "val", "test"] = "test"
    """Which part of the data."""
    tta: Literal["model", "none", "mirror", "shift"] = "model"
    """Test-time augmentation, as in jobs/train.py, in place of the model's own."""
    without: tuple[Section, ...] = ()
    """Sections that the report shall not have: robustness, what 15 kinds of damage to 500 images cost; saliency, what
    sways each mistake; neighbours, the training images most like it."""
    output: str = "./report"
    """Folder or URI for report.html, report.json and figures."""
    label_errors: int = 0
    """Look for wrong labels in train and val, too: train the model's configuration so many times anew, each on all but
    one part of them, and ask each about the part left out. Takes as long as 2, 3 or more trainings; 0: don't."""
    storage: str = "./runs"
    """Folder or URI for the trainings of --label-errors; the same command goes on with them."""

    def __post_init__(self) -> None:
        if self.label_errors < 0 or self.label_errors == 1:
            raise ConfigError(f"--label-errors {self.label_errors}: use 2 trainings or more, or 0 for none")
        if self.model and self.models:
            raise ConfigError(f"--model {self.model}: name it among --models, or drop these")
        if len(self.models) == 1:
            raise ConfigError(f"--models {self.models[0]}: an ensemble has 2 or more; use --model for one")


def evaluate_model(flags: Flags) -> dict[str, Any]:
    """Evaluate a model, or an ensemble of several, on labelled images and write a report."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.cluster import start_ray
    from cifar.data import prepare
    from cifar.data.prepared import absolute, join, parent
    from cifar.evaluate import Ensemble, calibrate, evaluate, explain, review_to_dict, to_dict
    from cifar.evaluate.robustness import robustness
    from cifar.report import read_history, write_report
    from cifar.run_dir import writable
    from cifar.store import model_path

    names = flags.models or (flags.model,)
    members = load(names, flags)
    path = model_path(flags.model)
    history = read_history(join(parent(path), "metrics.jsonl")) if path else []
    config = replace(members[0].info.config.data, data=flags.data or members[0].info.source)
    prepared = prepare(config, partial(start_ray, verbose=False))
    predictor, alone = members[0], {}
    if flags.models:
        alone = {name: evaluate(one, prepared, flags.split).accuracy for name, one in zip(names, members, strict=True)}
        predictor = Ensemble(members)
        if flags.split != "val":
            calibrate(predictor, prepared)
    evaluation = replace(evaluate(predictor, prepared, flags.split), members=alone)
    evaluation = explain(
        evaluation,
        predictor,
        prepared,
        saliency="saliency" not in flags.without,
        neighbours="neighbours" not in flags.without,
    )
    robust = None
    if "robustness" not in flags.without:
        robust = robustness(predictor, prepared, flags.split, sample=ROBUSTNESS_IMAGES)
    review = None
    if flags.label_errors:
        from cifar.cross_validation import review_labels  # not above: it needs Ray

        start_ray(verbose=False)
        recipe = replace(members[0].info.config, data=config)
        review = review_labels(recipe, prepared, flags.label_errors, flags.storage)
    output = absolute(flags.output)
    with writable(output) as folder:
        write_report(
            folder, evaluation, history=history, command=command_line(), robustness=robust, label_review=review
        )
    report = join(output, "report.html")
    low, high = evaluation.accuracy_ci95
    for name, accuracy in alone.items():
        print(f"accuracy {accuracy:.4f} of {name} by itself")
    if alone:
        print(f"accuracy {sum(alone.values()) / len(alone):.4f} in the mean of the {len(alone)}")
    print(f"accuracy {evaluation.accuracy:.4f} ({low:.4f} to {high:.4f}) of {evaluation.count:,} {flags.split} images")
    deeper: dict[str, Any] = {"robustness": robust.to_dict()} if robust else {}
    if review is not None:
        deeper["label_errors"] = review_to_dict(review)
        likely = deeper["label_errors"]["likely_errors"]
        print(f"label errors: {likely:,} likely, {join(output, 'label_errors.csv')}")
    print(f"report: {report}")
    return to_dict(evaluation) | deeper | {"report": report}


def load(names: Sequence[str], flags: Flags) -> "list[Predictor]":
    from cifar.predictor import Predictor
    from cifar.store import find_model

    found = []
    with ExitStack() as stack:
        for name in names:
            predictor = Predictor(stack.enter_context(find_model(name, flags.store)).folder)
            if flags.tta != "model":
                config = predictor.info.config
                config = replace(config, model=replace(config.model, tta=flags.tta))
                predictor.info = replace(predictor.info, config=config)
            found.append(predictor)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(evaluate_model, Flags, argv)


if __name__ == "__main__":
    sys.exit(main())
