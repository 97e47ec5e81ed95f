"""A sweep over settings, its report, the winner trained anew and published: python jobs/tune.py --trials 20"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cifar.cli import command_line, given_flags, run_job
from cifar.config import Config
from cifar.recipes import RECIPES
from cifar.tune.settings import TuneConfig

if TYPE_CHECKING:
    from cifar.tune.run import Sweep


@dataclass(frozen=True, kw_only=True)
class Flags:
    tune: TuneConfig = field(default_factory=TuneConfig)
    config: Config = field(default_factory=Config)
    base: Annotated[str, tyro.conf.Suppress] = ""
    """Name of the recipe."""
    given: Annotated[frozenset[str], tyro.conf.Suppress] = frozenset()
    """Names of the flags on the command line."""


def search(flags: Flags) -> dict[str, Any]:
    """Search settings by many short trainings, confirm the best, evaluate the winner once on test. The same command
    resumes; --max-minutes bounds the search."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.tune.run import keep, sweep

    done = sweep(flags.config, flags.tune, flags.base, RECIPES[flags.base](), flags.given)
    summary = done.summary
    if summary["test"] is None:
        summary = keep(done.path, test=evaluate_winner(done))
    if flags.tune.publish != "none":
        summary = publish_winner(done, summary, flags.tune)
    from cifar.data.prepared import join
    from cifar.report import write_sweep_report
    from cifar.run_dir import writable

    with writable(done.path) as folder:
        write_sweep_report(folder, summary, command=command_line())
    test = summary["test"]
    low, high = test["accuracy_ci95"]
    print(f"winner: trial {summary['winner']['number']}, {summary['winner']['command']}")
    print(f"accuracy {test['accuracy']:.4f} ({low:.4f} to {high:.4f}) of {test['count']:,} test images")
    print(f"run: {done.winner}")
    if summary["published"]:
        print(f"published: {summary['published']} in {summary['published_to']}")
    print(f"sweep: {join(done.path, 'sweep.html')}")
    shown = ("winner", "test", "published", "luck", "confirmed", "wall_seconds", "train_seconds", "at_once")
    states = Counter(trial["state"] for trial in summary["trials"])
    return {name: summary[name] for name in shown} | {"trials": dict(states), "sweep": done.path}


def evaluate_winner(done: "Sweep") -> dict[str, Any]:
    """Read test once; the report goes into the winner's run."""
    from cifar.data.prepared import join
    from cifar.evaluate import calibrate, evaluate, to_dict
    from cifar.predictor import Predictor
    from cifar.report import read_history, write_report
    from cifar.run_dir import local_model, writable, write_calibration

    with local_model(join(done.winner, "model")) as model, writable(done.winner) as folder:
        predictor = Predictor(model)
        write_calibration(join(done.winner, "model"), calibrate(predictor, done.prepared))
        evaluation = evaluate(predictor, done.prepared, split="test")
        history = read_history(join(done.winner, "metrics.jsonl"))
        evaluation = replace(evaluation, train_seconds=history[-1]["train_seconds"])
        write_report(folder, evaluation, history=history, command=done.summary["winner"]["command"])
    values = to_dict(evaluation)
    test = {name: values[name] for name in ("accuracy", "accuracy_ci95", "count")}
    folder, report = (path.partition("?")[0] for path in (done.path, join(done.winner, "report.html")))
    return test | {"report": report.removeprefix(f"{folder}/")}


def publish_winner(done: "Sweep", summary: dict[str, Any], flags: TuneConfig) -> dict[str, Any]:
    """The summary with the version, which --promote makes the champion; each is done once for a name and a store."""
    from cifar.data.prepared import absolute
    from cifar.store import Store, name_of
    from cifar.tune.run import keep

    where = absolute(flags.store)
    store = Store(where)
    name = name_of(done.prepared.source) if flags.publish == "auto" else flags.publish
    if (summary["published_to"], (summary["published"] or "").partition("/")[0]) != (where, name):
        version = store.publish(done.winner, name)
        summary = keep(done.path, published=str(version), published_to=where, promoted=None)
    if flags.promote and not summary["promoted"]:
        store.promote(store.resolve(summary["published"]))
        summary = keep(done.path, promoted=True)
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    given = given_flags(argv)
    recipes = {name: Flags(config=recipe(), base=name, given=given) for name, recipe in RECIPES.items()}
    return run_job(search, recipes, argv)


if __name__ == "__main__":
    sys.exit(main())
