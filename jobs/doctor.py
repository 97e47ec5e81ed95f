"""What would go wrong with a run, before it does: python jobs/doctor.py, with the flags of jobs/train.py"""

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from cifar.cli import run_job
from cifar.config import Config, ConfigError, RunFailed
from cifar.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Flags:
    config: Config = field(default_factory=Config)
    drill: bool = False
    """Where nothing is in the way, also train, search and predict a little, kill a process of each, and compare the
    results with those of undisturbed runs. Some minutes; only processes of its own are killed, and all that it writes
    is deleted."""
    words: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Of the command line."""

    def __post_init__(self) -> None:
        if self.drill and self.config.run.workers == "0":
            raise ConfigError("--drill: kills workers of Ray's, and --workers 0 has none; drop one of the two")


def examine(flags: Flags) -> dict[str, Any]:
    """Look for what would break a run with these flags: on this machine, on the cluster at $RAY_ADDRESS, or, through a
    job of its own, on the one at $RAY_API_SERVER_ADDRESS."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.doctor.machine import check_machine, check_working_dir

    findings = check_machine()
    for finding in findings:
        print(finding, flush=True)
    submits_to = "" if os.environ.get("RAY_ADDRESS") else os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if any(finding.check == "packages" and finding.level == "problem" for finding in findings):
        rest = []
    elif submits_to:
        import ray

        from cifar.doctor.dashboard import check_dashboard
        from cifar.doctor.submitted import DRILL_SECONDS, SECONDS, check_inside

        rest = [*check_dashboard(submits_to, os.environ, ray.__version__), check_working_dir(Path.cwd())]
        if not any(finding.level == "problem" for finding in rest):
            seconds = DRILL_SECONDS if flags.drill else SECONDS
            rest += check_inside(submits_to, Path.cwd(), flags.words, seconds)
    else:
        from cifar.cluster import start_ray
        from cifar.doctor.cluster import check_cluster

        start_ray(flags.config.run.verbose)
        rest = check_cluster(flags.config)
    for finding in rest:
        print(finding, flush=True)
    problems = [finding for finding in (*findings, *rest) if finding.level == "problem"]
    if flags.drill and not problems and not submits_to:
        from cifar.doctor.drill import run_drills

        with closing(run_drills(flags.config)) as tried:
            for finding in tried:
                print(finding, flush=True)
                rest.append(finding)
                problems += [finding] * (finding.level == "problem")
    result = {"findings": [asdict(finding) for finding in (*findings, *rest)]}
    if problems:
        failed = RunFailed(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}: see above")
        failed.result = result
        raise failed
    print("nothing in the way")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    words = tuple(word for word in (sys.argv[1:] if argv is None else argv) if word != "--json")
    recipes = {name: Flags(config=recipe(), words=words) for name, recipe in RECIPES.items()}
    return run_job(examine, recipes, argv)


if __name__ == "__main__":
    sys.exit(main())
