"""From `--input` to predictions, manifest and report; the same call again resumes."""

import hashlib
import logging
import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.batch.execute import is_small, predict_here, predict_on_ray
from cifar.batch.gather import Gathered
from cifar.batch.output import Output
from cifar.batch.part import Summary, Target
from cifar.batch.progress import Progress
from cifar.batch.settings import BatchConfig
from cifar.batch.source import Listing, Part, inside, list_rows, plan_parts
from cifar.calibration import CALIBRATION
from cifar.config import ConfigError
from cifar.data.decode import BadImage, decode_whole
from cifar.data.prepared import absolute, join, read_file, write_file
from cifar.data.sources import listing_key
from cifar.model_dir import load_model
from cifar.predictor import Answer, Predictor
from cifar.probe import probe
from cifar.report import write_report
from cifar.report.picture import captioned
from cifar.run_dir import writable
from cifar.store import FoundModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A finished job."""

    manifest: dict[str, Any]
    now: int
    """Images that this call predicted; the others were before."""
    startup_seconds: float
    images_per_second: float
    """After starting."""


def predict_picture(config: BatchConfig, found: FoundModel) -> tuple[Answer, str]:
    """The answer for the one image that `--input` names, and the picture with it that was written."""
    predictor = Predictor(found.folder, config.device)
    data = read_file(config.input)
    assert data is not None
    name = os.path.splitext(os.path.basename(absolute(config.input).partition("?")[0]))[0] + ".png"
    path = join(config.output, name)
    if inside(path, config.input):
        raise ConfigError(f"--output {config.output}: would replace the image by the picture; name another folder")
    try:
        probabilities = predictor.predict(predictor.decode(data)[None])
        (answer,) = predictor.answers(probabilities, config.top_k, config.threshold)
        picture = captioned(decode_whole(data), f"{answer.label} ({100 * answer.probability:.1f} %)")
    except BadImage as error:
        raise ConfigError(
            f"--input {config.input}: {error}; name an image, a folder of images, or a Parquet file or folder"
        ) from error
    write_file(path, picture)
    return answer, path


def predict_all(
    config: BatchConfig, found: FoundModel, start_ray: Callable[[], object], command: str = ""
) -> Predicted:
    """Predict every row of a folder or of Parquet once, and evaluate the model on those with a label.

    Large jobs run on Ray, after a call of `start_ray`. ConfigError when the output is that of another job, or when more
    than `config.max_bad` of the rows, or all of them, cannot be read.
    """
    if inside(config.output, config.input) or inside(config.input, join(config.output, "predictions")):
        raise ConfigError(f"--output {config.output}: lies in --input {config.input}; name a folder elsewhere")
    probe(config.output, "--output")
    model = load_model(found.folder)
    listing = list_rows(config.input, model.info.classes, model.info.config.data.label)
    parts = plan_parts(listing, model.info.config.data, len(model.info.classes))
    threshold = model.calibration.threshold_or(config.threshold)
    job = describe(config, found, listing, len(parts), threshold)
    output = Output(absolute(config.output))
    with output.claim(job):
        if manifest := output.manifest():
            output.tidy()
            return Predicted(manifest=manifest, now=0, startup_seconds=0.0, images_per_second=0.0)
        gathered = Gathered(config.input, listing.total, config.max_bad)
        for summary in output.finished(range(len(parts))):
            gathered.add(summary)
        if before := gathered.rows:
            logger.info("%s of %s images were predicted before", f"{before:,}", f"{listing.total:,}")
        left = [part for part in parts if part.number not in gathered.parts]
        target = Target(
            output=output.path,
            format=config.format,
            top_k=config.top_k,
            threshold=threshold,
            version=found.version,
        )
        coming = _predict(left, is_small(parts), found.folder, target, config.device, start_ray)
        with Progress(listing.total, before) as progress, closing(coming) as summaries:
            for summary in summaries:
                gathered.add(summary)
                progress.add(summary.rows + len(summary.bad), summary.seconds)
        gathered.check_any()
        manifest = gathered.manifest(job)
        output.write_quarantine(gathered.bad())
        if evaluation := gathered.evaluation(model, job["fingerprint"], progress.rate):
            with writable(output.path) as folder:
                write_report(folder, evaluation, command=command)
            names = ("count", "accuracy", "accuracy_ci95", "loss", "macro_f1")
            manifest["evaluation"] = {name: getattr(evaluation, name) for name in names}
        manifest = output.finish(manifest)
    return Predicted(
        manifest=manifest,
        now=gathered.rows - before,
        startup_seconds=progress.startup,
        images_per_second=progress.rate,
    )


def describe(config: BatchConfig, found: FoundModel, listing: Listing, parts: int, threshold: float) -> dict[str, Any]:
    """What makes a job this job: with the same, the files of predictions are the same."""
    content = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        content.update((found.folder / name).read_bytes())
    if (calibration := found.folder / CALIBRATION).exists():
        content.update(calibration.read_bytes())
    return {
        "model": {"version": found.version, "sha256": content.hexdigest()},
        "input": absolute(config.input),
        "fingerprint": listing_key(listing.source),
        "rows": listing.total,
        "parts": parts,
        "format": config.format,
        "top_k": config.top_k,
        "threshold": threshold,
    }


def _predict(
    parts: list[Part], here: bool, model: Path, target: Target, device: str, start_ray: Callable[[], object]
) -> Generator[Summary, None, None]:
    if here:
        yield from predict_here(parts, model, target, device)
    else:
        start_ray()
        yield from predict_on_ray(parts, model, target, device)
