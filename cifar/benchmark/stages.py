"""Every stage of a run by itself, in this process but for what only Ray does."""

import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

from cifar.balance import image_losses_of, sampling_weights
from cifar.benchmark.measure import (
    MOST,
    Stage,
    ceiling_side,
    matrix_product_rates,
    more_wanted,
    repeat,
    synchronize,
    weighted_mean,
)
from cifar.benchmark.step import PARTS, FlopMeter, Stepper, Stopwatch, mean_shares, operator_shares, steps_by_size
from cifar.cluster import choose_loader
from cifar.config import Config, RunConfig
from cifar.context import Wish
from cifar.data.decode import decode
from cifar.data.loader import Batch, Loader, ResidentLoader, StreamingLoader, read_stream
from cifar.data.prepared import Prepared
from cifar.data.shares import share
from cifar.loop import autocast
from cifar.predictor import Predictor
from cifar.train import fit
from cifar.training import COMPILE_STEPS, Position, Training, build_training, load_checkpoint, save_checkpoint

DECODED = 128
"""Images of one repetition."""
DISTINCT_BATCHES = 8
PROFILED_STEPS = 2
START_UP_BUDGETS = 10
"""What starting runs may take, in budgets of a stage: one takes seconds."""
ALMOST_NONE = 1e-9
"""Minutes after which a run that measures only start-up ends: after its first step."""


@dataclass
class Alone:
    """`cifar.context.Context` of a worker that reports to nobody."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    checkpoint: Path | None = None

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        pass

    def wish(self) -> Wish:
        return Wish.NOTHING

    def leave(self) -> NoReturn:
        raise NotImplementedError("nobody wishes it here")

    def doing(self, what: str, waits: bool = False) -> None:
        pass

    def progress(self, values: dict[str, Any]) -> None:
        pass

    def history(self, rows: list[dict[str, Any]]) -> None:
        pass


class Bench:
    """A run's parts as they are before its first step, on data that are prepared, and the measurements on them.

    `config` has its batch size. The loader is the one that a run in this process takes.
    """

    def __init__(self, config: Config, prepared: Prepared, device: torch.device, budget: float):
        self.config, self.prepared, self.device, self.budget = config, prepared, device, budget
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        data_bytes = prepared.num_bytes("train") + prepared.num_bytes("val")
        self.loader_kind, _ = choose_loader(config, data_bytes, memory)
        with closing(self._loader(self.loader_kind)) as loader:
            self.num_batches = loader.num_batches
            self.batches = list(islice(loader.epoch(0), DISTINCT_BATCHES))
            self.training = build_training(config, prepared, loader, Alone(device))

    def stepper(self, training: Training | None = None) -> Stepper:
        classes = len(self.prepared.classes)
        image_losses = image_losses_of(self.config, self.prepared.class_counts["train"], self.device)
        return Stepper(self.config, training or self.training, classes, self.num_batches, self.device, image_losses)

    @property
    def gradient_bytes(self) -> int:
        """What workers exchange at each step."""
        return sum(p.numel() * p.element_size() for p in self.training.network.parameters() if p.requires_grad)

    def ceiling(self) -> list[float]:
        """FLOP/s of matrix products in the precision that the run trains in."""
        return matrix_product_rates(self._dtype(), self.device, self.budget / 2)

    def ceiling_facts(self, before: list[float], after: list[float]) -> dict[str, Any]:
        """The ceiling in FLOP/s is the median over both: a machine that others use too may change in between."""
        return {
            "precision": str(self._dtype()).removeprefix("torch."),
            "side": ceiling_side(self.device),
            "flops_per_second": median(before + after),
            "before": median(before),
            "after": median(after),
            "best": max(before + after),
            "n": len(before) + len(after),
        }

    def decoding(self) -> list[Stage]:
        """Encoded bytes to square RGB in one process: the prepared images, encoded anew."""
        images = next(self.prepared.batches("train", DECODED)).images
        stages = []
        for kind in ("png", "jpeg"):
            encoded = [_encode(image, kind) for image in images]

            def decode_all(encoded: list[bytes] = encoded) -> None:
                for data in encoded:
                    decode(data, self.prepared.image_size, self.config.data.resize)

            seconds = repeat(decode_all, self.budget, torch.device("cpu"))
            stages.append(Stage.of("decode", f"{kind}, one process", seconds, images=len(encoded)))
        return stages

    def loading(self) -> list[Stage]:
        """Batches from either loader without Ray; the resident one only if the data fit in memory."""
        kinds = ["streaming"] if self.loader_kind == "streaming" else ["resident", "streaming"]
        return [self._load(kind) for kind in kinds]

    def steps(self) -> tuple[list[Stage], dict[str, float]]:
        """The parts of a training step at each size and their mean over a run's; operators' shares.

        `step` is the sum of the parts: all but the loading.
        """
        sizes = steps_by_size(self.config, self.num_batches)
        parts: dict[str, list[Stage]] = {part: [] for part in (*PARTS, "step")}
        shares, spent = {}, {}
        for size, steps in sizes.items():
            flops = self._flops(size)
            stepper, batches = self.stepper(), cycle(self.batches)
            seconds = time_steps(stepper, batches, size, self.budget)
            for part in PARTS:
                parts[part].append(self._part(part, size, seconds[part], flops[part]))
            parts["step"].append(self._part("step", size, seconds["step"], sum(flops.values())))
            spent[size] = parts["step"][-1].seconds * steps
            shares[size] = operator_shares(
                lambda meter, stepper=stepper, batches=batches, size=size: stepper.step(
                    next(batches), meter, size=size
                ),
                PROFILED_STEPS,
                self.device,
            )
        stages = []
        for of_part in parts.values():
            stages += of_part if len(of_part) > 1 else []
            stages.append(weighted_mean(of_part, list(sizes.values()), "mean over a run"))
        return stages, mean_shares(shares, spent)

    def checkpoints(self, folder: Path) -> list[Stage]:
        """Saving and loading one; the last stays as `folder`."""
        saving: list[float] = []
        loading: list[float] = []
        while more_wanted([*saving, *loading], self.budget):
            started_at = time.perf_counter()
            saved = save_checkpoint(self.config, self.prepared, self.training, Position())
            saved_at = time.perf_counter()
            load_checkpoint(saved, self.training)
            synchronize(self.device)
            loading.append(time.perf_counter() - saved_at)
            saving.append(saved_at - started_at)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(saved, folder)
        variant = f"{folder_bytes(folder) / 2**20:.1f} MiB"
        return [Stage.of("checkpoint save", variant, saving), Stage.of("checkpoint load", variant, loading)]

    def evaluation(self, model: Path) -> list[Stage]:
        """Answers for a batch of val by the model folder's Predictor, with its test-time augmentation.

        After the few steps of a benchmark the network is unsure of nearly all images: the most that answers cost.
        """
        predictor = Predictor(model, device=self.device.type)
        images = next(self.prepared.batches("val", predictor.batch_size)).images
        seconds = repeat(lambda: predictor.predict(images), self.budget, self.device)
        return [Stage.of("evaluation", f"tta {self.config.model.tta}", seconds, images=len(images))]

    def start_up(self, storage: str) -> list[Stage]:
        """What a run through Ray costs beside its training: fit() to its end, less Run.train_seconds.

        The run ends after its first step, so of its training there are that step, one validation and one checkpoint.
        Ray is started for each, unless the caller has started it. The cost of importing torch in this process is not
        in it, that of the workers' is.
        """
        import ray

        config = replace(self.config, train=replace(self.config.train, max_minutes=ALMOST_NONE))
        mine = not ray.is_initialized()
        seconds: list[float] = []
        begun_at = time.perf_counter()
        while not seconds or time.perf_counter() - begun_at < START_UP_BUDGETS * self.budget:
            if mine:
                ray.shutdown()
            started_at = time.perf_counter()
            run = fit(replace(config, run=RunConfig(storage=storage, name=f"start-up-{len(seconds)}")))
            seconds.append(time.perf_counter() - started_at - run.train_seconds)
        return [Stage.of("start-up", "Ray started" if mine else "Ray was up", seconds)]

    def sharding(self) -> list[Stage]:
        """The driver's put into the object store, and a single worker's way from there to its loader; Ray is up."""
        import ray

        from cifar.ray_job import Blocks

        store = min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"])
        data_bytes = self.prepared.num_bytes("train") + self.prepared.num_bytes("val")
        if choose_loader(self.config, data_bytes, store)[0] == "streaming":
            return []  # a run puts nothing there
        total = self.prepared.counts["train"]
        blocks = Blocks.put(self.prepared, "train")

        def put() -> None:
            nonlocal blocks
            blocks = Blocks.put(self.prepared, "train")  # lets go of those before

        def read() -> None:
            table = blocks.read(*share(total, 0, 1))
            ResidentLoader(table, total=total, device=self.device, **self._common())

        putting = repeat(put, self.budget, torch.device("cpu"))
        reading = repeat(read, self.budget, self.device)
        return [
            Stage.of("shard", "driver puts train", putting, images=total),
            Stage.of("shard", "one worker reads it", reading, images=total),
        ]

    def _dtype(self) -> torch.dtype:
        device = self.device.type
        with autocast(self.config.train.precision, self.device):
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32

    def _loader(self, kind: str) -> Loader:
        if kind == "streaming":
            return StreamingLoader(
                self.prepared, read_stream(self.prepared), epochs=MOST, device=self.device, **self._common()
            )
        table = self.prepared.table("train", ["image", "label", "index"])
        return ResidentLoader(table, total=len(table), device=self.device, **self._common())

    def _common(self) -> dict[str, Any]:
        train = self.config.train
        weights = sampling_weights(self.config, self.prepared.class_counts["train"])
        return {"batch_size": train.batch_size, "seed": train.seed, "rank": 0, "world_size": 1, "weights": weights}

    def _load(self, kind: str) -> Stage:
        """A repetition is an epoch, or what the budget leaves of it: single batches of a stream come in bursts."""
        spent: list[float] = []
        seconds: list[float] = []
        with closing(self._loader(kind)) as loader:
            while more_wanted(spent, self.budget):
                started_at, batches = time.perf_counter(), 0
                for _ in loader.epoch(len(spent)):
                    batches += 1
                    if time.perf_counter() - started_at >= self.budget:
                        break
                synchronize(self.device)
                spent.append(time.perf_counter() - started_at)
                seconds.append(spent[-1] / batches)
        return Stage.of("load", kind, seconds, images=self.config.train.batch_size)

    def _part(self, part: str, size: int, seconds: list[float], flops: int) -> Stage:
        idle = part == "resize" and size == self.config.data.image_size
        images = 0 if idle else self.config.train.batch_size
        return Stage.of(part, f"{size} px", seconds, images=images, flops=flops)

    def _flops(self, size: int) -> dict[str, int]:
        """Of a step, part by part. The network bare: what a compiled one does inside, the counter does not see."""
        meter = FlopMeter()
        bare = replace(self.training, model=self.training.network)
        self.stepper(bare).step(self.batches[0], meter, size=size)
        return {part: meter.flops[part] for part in PARTS}


def time_steps(stepper: Stepper, batches: Iterator[Batch], size: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each step, for each part and their sum as `step`, until the steps sum to `budget`."""
    if stepper.config.train.compile:
        torch._dynamo.reset()  # it gives up on a network that came in too many shapes
    for _ in range(COMPILE_STEPS):  # the first also makes the optimizer's state
        stepper.step(next(batches), Stopwatch(stepper.device), size=size)
    measured: dict[str, list[float]] = {part: [] for part in (*PARTS, "step")}
    while more_wanted(measured["step"], budget):
        watch = Stopwatch(stepper.device)
        stepper.step(next(batches), watch, size=size)
        for part in PARTS:
            measured[part].append(watch.seconds[part])
        measured["step"].append(sum(watch.seconds.values()))
    return measured


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _encode(image: np.ndarray, kind: str) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, kind)
    return sink.getvalue()
