"""The runs that drills disturb: small ones of the real code, and what has to be the same however they are."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from cifar.autoscaler import cluster_nodes
from cifar.batch.execute import predict_on_ray
from cifar.batch.part import Target
from cifar.batch.source import list_rows, plan_parts
from cifar.cluster import make_plan
from cifar.config import Config, ConfigError, DataConfig, ModelConfig, RunConfig, TrainConfig
from cifar.data.named import locate
from cifar.data.prepared import filesystem, join, read_file, write_file
from cifar.model_dir import load_model
from cifar.progress import Mailbox
from cifar.store import find_model
from cifar.train import fit
from cifar.tune.run import sweep
from cifar.tune.settings import TuneConfig

EPOCHS = 8
TRIALS = 2
IMAGES, PART_ROWS = 256, 16
BEFORE = 2
"""Epochs, or parts, that are finished before the fault."""


class Outcome(NamedTuple):
    results: dict[str, Any]
    """By name, what has to be the same."""
    recovered: bool = True
    """Does the run itself say that something was done again? True where it says nothing of the kind."""


@dataclass(frozen=True, kw_only=True)
class Drill:
    check: str
    doing: str
    victim: str
    """What is killed, in words."""
    actor: str
    """How the name of its class begins."""
    run: Callable[[str], Outcome]
    """Makes a run of this name, in a folder of its own."""
    same: str
    """How its results are the same."""
    middle: Callable[[str], bool]
    """Is the run of this name in its middle?"""


def drills(folder: str, verbose: bool) -> list[Drill]:
    """Those that fit on the cluster; `folder`, a folder or URI, takes what they write."""
    nodes, coming = cluster_nodes()
    exact = repeats_bits([*nodes, *coming])
    same = "the same, bit for bit" if exact else "complete, and not compared: the nodes differ, or have GPUs"
    config = Config(
        data=DataConfig(data="digits", image_size=16),
        model=ModelConfig(widths=(8, 16)),
        # Many small steps: their time hangs on the processor's speed, not on how many cores it has.
        train=TrainConfig(epochs=EPOCHS, batch_size=32, precision="fp32"),
        run=RunConfig(storage=folder, verbose=verbose),
    )
    found = []
    for workers in (1, 2):
        one = replace(config, run=replace(config.run, workers=str(workers)))
        try:
            make_plan(one, 0, nodes, coming)
        except ConfigError:  # one worker fits, or the doctor would have found it
            continue
        found.append(
            Drill(
                check="drill train",
                doing=f"training on {workers} worker{'s' if workers > 1 else ''}",
                victim="the worker" if workers == 1 else "one of 2 workers",
                actor="RayTrainWorker",
                same=same,
                run=partial(train, one, exact),
                middle=partial(in_training, one),
            )
        )
    predicting = Predicting(folder, exact)
    return [
        *found,
        Drill(
            check="drill tune",
            doing=f"a sweep of {TRIALS} trials",
            victim="a trial's process",
            actor="ImplicitFunc",
            same=same,
            run=partial(tune, config, exact),
            middle=partial(in_trials, folder),
        ),
        Drill(
            check="drill predict",
            doing=f"predicting {IMAGES} images",
            victim="a process that predicts",
            actor="MapWorker",
            same=same,
            run=predicting.run,
            middle=predicting.middle,
        ),
    ]


def repeats_bits(nodes: Sequence[Mapping[str, float]]) -> bool:
    """Does a run come to the same bits on whichever nodes it is started again? Not with another number of threads, nor
    on GPUs, where some kernels add up in no fixed order."""
    computing = [node for node in nodes if node.get("CPU", 0.0) >= 1]
    return len({node["CPU"] for node in computing}) == 1 and not any(node.get("GPU") for node in nodes)


def train(config: Config, exact: bool, name: str) -> Outcome:
    run = fit(named(config, name))
    return Outcome(trained(run.history, run.model, exact))


def named(config: Config, name: str) -> Config:
    return replace(config, run=replace(config.run, name=f"train-{config.run.workers}-{name}"))


def trained(history: list[dict[str, Any]], model: str, exact: bool) -> dict[str, Any]:
    """What a training came to."""
    if not exact:
        return {"epochs": [(row["epoch"], row["val_count"]) for row in history]}
    timeless = [{key: value for key, value in row.items() if "second" not in key} for row in history]
    return {"weights": read_file(join(model, "model.safetensors")), "metrics": timeless}


def in_training(config: Config, name: str) -> bool:
    history = Mailbox(join(config.run.storage, named(config, name).run.name)).get("history") or []
    return BEFORE <= len(history) < EPOCHS


def tune(config: Config, exact: bool, name: str) -> Outcome:
    config = replace(config, run=replace(config.run, name=f"tune-{name}"))
    # One at a time: the process that is there is then that of the trial in its middle. No value of what is searched
    # makes a training diverge; the rest of the space takes time.
    flags = TuneConfig(trials=TRIALS, at_once=1, space="augment", scheduler="none", confirm="0", publish="none")
    trials = sweep(config, flags, "fast", config, ("rotate", "shift", "zoom", "shear")).summary["trials"]
    results: dict[str, Any] = {"number of trials": len(trials)}
    for trial in trials:
        came_to = trained(trial["history"], join(trial["path"], "model"), exact)
        results[f"trial {trial['number']}"] = trial["state"], trial["values"], came_to
    return Outcome(results, recovered=any(trial["resumed"] for trial in trials))


def in_trials(folder: str, name: str) -> bool:
    files = [join(folder, f"tune-{name}/trials/{number:05d}/metrics.jsonl") for number in range(TRIALS)]
    return any(BEFORE <= len((read_file(file) or b"").splitlines()) < EPOCHS for file in files)


class Predicting:
    """Unlabelled digits by the model in the box, in parts so small that there is a middle. Not through `predict_all`,
    which does so few images without Ray."""

    def __init__(self, folder: str, exact: bool):
        self._folder, self._exact = folder, exact
        self._done: dict[str, int] = {}

    def run(self, name: str) -> Outcome:
        given, output = join(self._folder, "images/images.parquet"), join(self._folder, f"predict-{name}")
        if read_file(given) is None:
            write_file(given, images())
        with find_model("", "") as found:
            info = load_model(found.folder).info
            (whole,) = plan_parts(list_rows(given, info.classes), info.config.data, len(info.classes))
            parts = [
                replace(whole, number=number, first=start, indices=whole.indices[start : start + PART_ROWS])
                for number, start in enumerate(range(0, IMAGES, PART_ROWS))
            ]
            target = Target(output=output, format="parquet", top_k=1, threshold=0.0, version=found.version)
            results: dict[str, Any] = {}
            for summary in predict_on_ray(parts, found.folder, target, "auto"):
                self._done[name] = self._done.get(name, 0) + 1
                written = read_file(join(output, summary.name))
                results[summary.name] = written if self._exact else summary.rows
        return Outcome(results)

    def middle(self, name: str) -> bool:
        return BEFORE <= self._done.get(name, 0) < IMAGES // PART_ROWS


def images() -> bytes:
    files, path = filesystem(locate("digits")[1])
    with files.open_input_file(path) as file:
        table = pq.read_table(file, columns=["img"]).slice(0, IMAGES)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
