"""Predictions for an image, a folder or Parquet files, resumable: python jobs/predict.py --input photos"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from cifar.batch.settings import BatchConfig
from cifar.cli import command_line, run_job


def predict(flags: BatchConfig) -> dict[str, Any]:
    """Predict one image, or all of a folder or Parquet files. The same command resumes."""
    # Not above: --help needs neither Ray nor torch.
    from cifar.batch.run import predict_all, predict_picture
    from cifar.batch.source import is_picture
    from cifar.data.prepared import MANIFEST, QUARANTINE, absolute, join
    from cifar.store import find_model

    with find_model(flags.model, flags.store) as found:
        if is_picture(flags.input):
            answer, picture = predict_picture(flags, found)
            print(f"{answer.label}{', abstained: too unsure' if answer.abstained else ''}")
            for label, probability in answer.top_k:
                print(f"{probability:8.4f}  {label}")
            print(f"picture: {picture}")
            return vars(answer) | {"version": found.version, "picture": picture}
        done = predict_all(flags, found, partial(_start_ray, flags.verbose), command_line())
    manifest, output = done.manifest, absolute(flags.output)
    if done.now:
        print(f"start-up {done.startup_seconds:.1f} s, then {done.images_per_second:,.0f} images/s")
    else:
        print("finished before: nothing left to do")
    threshold = manifest["job"]["threshold"]
    unsure = f", {manifest['abstained']:,} of them below the threshold of {threshold:.3g}" if threshold else ""
    print(f"{manifest['predicted']:,} images predicted{unsure}")
    if manifest["quarantined"]:
        print(f"{manifest['quarantined']:,} cannot be read: {join(output, QUARANTINE)}")
    if evaluation := manifest.get("evaluation"):
        low, high = evaluation["accuracy_ci95"]
        accuracy, count = evaluation["accuracy"], evaluation["count"]
        print(f"accuracy {accuracy:.4f} ({low:.4f} to {high:.4f}) of {count:,} labelled images")
        print(f"report: {join(output, 'report.html')}")
    print(f"predictions: {join(output, 'predictions')}")
    return manifest | {
        "now": done.now,
        "startup_seconds": done.startup_seconds,
        "images_per_second": done.images_per_second,
        "manifest": join(output, MANIFEST),
    }


def _start_ray(verbose: bool) -> None:
    from cifar.cluster import start_ray  # its import takes a second, which small jobs do without

    start_ray(verbose)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(predict, BatchConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
