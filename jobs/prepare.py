"""Check a data set, convert it once, and write its report: python jobs/prepare.py --data cifar10"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cifar.cli import command_line, run_job
from cifar.config import AugmentConfig, DataConfig
from cifar.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Flags:
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    output: str = "./data-report"
    """Folder or URI for data_report.html and data_report.json."""


def prepare_data(flags: Flags) -> dict[str, Any]:
    """Read, check and convert a data set for runs with the same --recipe and flags of data, and write its report."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.cluster import start_ray
    from cifar.data import prepare
    from cifar.data.prepared import absolute, join
    from cifar.report import write_data_report
    from cifar.run_dir import writable

    prepared = prepare(flags.data, partial(start_ray, verbose=False))
    output = absolute(flags.output)
    with writable(output) as folder:
        write_data_report(folder, prepared, flags.augment, command=command_line())
    report = join(output, "data_report.html")
    counts = ", ".join(f"{count:,} {split}" for split, count in prepared.counts.items())
    print(f"{prepared.source}: {counts}, {prepared.quarantined:,} quarantined")
    within, across = prepared.duplicates["within_train"], prepared.duplicates["train_test"]
    if within or across:
        print(f"duplicates: {within:,} within train, {across:,} of test in train")
    if prepared.imbalance_advice:
        print(prepared.imbalance_advice)
    print(f"prepared set: {prepared.path}")
    print(f"report: {report}")
    return {
        "data": prepared.source,
        "path": prepared.path,
        "fingerprint": prepared.fingerprint,
        "counts": prepared.counts,
        "quarantined": prepared.quarantined,
        "report": report,
    }


def main(argv: Sequence[str] | None = None) -> int:
    recipes = {name: recipe() for name, recipe in RECIPES.items()}
    return run_job(prepare_data, {name: Flags(data=r.data, augment=r.augment) for name, r in recipes.items()}, argv)


if __name__ == "__main__":
    sys.exit(main())
