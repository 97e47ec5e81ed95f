"""Check a data set, convert it once, and write its report: python jobs/prepare.py --data cifar10"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cifar.cli import command_line, run_job
from cifar.config import AugmentConfig, DataConfig


@dataclass(frozen=True, kw_only=True)
class Flags:
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    output: str = "./data-report"
    """Folder for data_report.html and data_report.json."""


def prepare_data(flags: Flags) -> dict[str, Any]:
    """Read, check and convert a data set, cache it for training, and write a report on it."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.cluster import start_ray
    from cifar.data import prepare
    from cifar.report import write_data_report

    prepared = prepare(flags.data, partial(start_ray, verbose=False))
    report = write_data_report(flags.output, prepared, flags.augment, command=command_line())
    counts = ", ".join(f"{count:,} {split}" for split, count in prepared.counts.items())
    print(f"{prepared.source}: {counts}, {prepared.quarantined:,} quarantined")
    print(f"prepared set: {prepared.path}")
    print(f"report: {report}")
    return {
        "data": prepared.source,
        "path": prepared.path,
        "fingerprint": prepared.fingerprint,
        "counts": prepared.counts,
        "quarantined": prepared.quarantined,
        "report": str(report),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(prepare_data, Flags, argv)


if __name__ == "__main__":
    sys.exit(main())
