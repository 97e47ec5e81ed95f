"""Which of several networks, optimizers or settings is better: python jobs/compare.py --optimizers sgd,muon"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from cifar.cli import command_line, given_flags, run_job
from cifar.compare.settings import CompareConfig
from cifar.config import Config, RunFailed
from cifar.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Flags:
    compare: CompareConfig = field(default_factory=CompareConfig)
    config: Config = field(default_factory=Config)
    base: Annotated[str, tyro.conf.Suppress] = ""
    """Name of the recipe."""
    given: Annotated[frozenset[str], tyro.conf.Suppress] = frozenset()
    """Names of the flags on the command line."""


def compare_contenders(flags: Flags) -> dict[str, Any]:
    """Compare networks, optimizers, recipes, any settings and classical baselines over several seeds: which differences
    hold, and what each costs. All learn from the same images; test ranks them. The same command resumes."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.compare.run import compare

    done = compare(flags.config, flags.compare, flags.base, flags.given)
    from cifar.data.prepared import join
    from cifar.report import write_comparison_report
    from cifar.run_dir import writable

    with writable(done.path) as folder:
        write_comparison_report(folder, done.summary, command=command_line())
    for one in done.summary["contenders"]:
        if one["rank"]:
            low, high = one["interval"]
            spread = f"{one['n']} seeds" if one["n"] > 1 else "1 seed" if one["varies"] else "no seed"
            print(
                f"{one['rank']}. {one['name']}: accuracy {one['mean']:.4f} ({low:.4f} to {high:.4f}), {spread}, "
                f"{one['train_seconds']:.1f} s each"
            )
    for paragraph in done.summary["headline"]:
        print(paragraph)
    report = join(done.path, "compare.html")
    print(f"report: {report}")
    shown = ("name", "rank", "mean", "interval", "n", "sd", "train_seconds", "parameters", "flops")
    result = {
        "contenders": [{name: one.get(name) for name in shown} for one in done.summary["contenders"]],
        "pairs": [
            {name: pair[name] for name in ("first", "second", "difference", "interval", "p_holm", "verdict")}
            for pair in done.summary["pairs"]
        ],
        "comparison": done.path,
        "report": report,
    }
    if lost := [one["name"] for one in done.summary["contenders"] if not one["rank"]]:
        failure = RunFailed(f"no run of {', '.join(lost)} came to an end; {report} says why")
        failure.result = result
        raise failure
    return result


def main(argv: Sequence[str] | None = None) -> int:
    given = given_flags(argv)
    recipes = {name: Flags(config=recipe(), base=name, given=given) for name, recipe in RECIPES.items()}
    return run_job(compare_contenders, recipes, argv)


if __name__ == "__main__":
    sys.exit(main())
