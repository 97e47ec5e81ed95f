"""What a run costs on many GPUs: predicted from a benchmark's numbers, and from assumptions that name their sources.

The same training is predicted on every count of GPUs: the same batch, so the same steps. A step is `scaling.StepModel`,
or the wait for its data where that takes longer, since data are read ahead:

    step = max(fixed + per_image * batch / gpus + all-reduce, batch / gpus / images that storage and cores deliver)

Where the benchmark ran on a GPU, `fixed` and `per_image` are its seconds. Where it ran on a CPU, they are the FLOPs
that it counted, over a share of a GPU's peak, which is the least certain of all inputs. The all-reduce is a ring with
the latencies of NCCL's cost model; NCCL takes a tree where that is faster, and DistributedDataParallel sends while it
computes, so this errs to the slow side. To the fast side err links at their full rate, and no stragglers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from cifar.benchmark.scaling import Link, StepModel, all_reduce_bytes
from cifar.benchmark.step import steps_by_size
from cifar.cluster import choose_loader
from cifar.config import Config, ConfigError
from cifar.data.loader import STREAM_BYTES
from cifar.data.shares import num_batches

GPUS = (1, 8, 64, 512)
POWERS = [2**power for power in range(13)]
"""Among which the count is looked for at which more stop paying."""
PAYS = 0.5
"""Efficiency below which they do."""
OPEN_STREAMS = 2
"""Of each worker at a time, of `STREAM_BYTES` each."""
STORE_SHARE, STORE_MOST = 0.3, 200e9
"""What Ray gives its object store, unless told otherwise: a share of a node's memory, and bytes at most."""


def _assumed(value: float, source: str) -> Any:
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no benchmark on one machine tells. Seconds, bytes, bytes/s, FLOP/s and US dollars; a node's are of all its
    GPUs together. The defaults describe AWS's p4d.24xlarge: seconds and FLOPs of `cnn`'s model, airbench, are published
    for its A100."""

    images: float = _assumed(0, "as measured")
    val_images: float = _assumed(0, "as measured")
    epochs: float = _assumed(0, "as measured")
    batch_size: float = _assumed(0, "as measured")
    decode_rate: float = _assumed(0, "images/s a core, of files as found; as measured, of JPEG at the prepared size")
    file_bytes: float = _assumed(0, "of an image as found; unknown")
    gpu_flops: float = _assumed(312e12, "peak in bf16, dense: NVIDIA, A100 data sheet")
    gpu_share: float = _assumed(0.3, "of it: airbench94 on an A100, 3.6e14 FLOPs in 3.83 s; 96: 0.45 (Jordan 2024)")
    step_overhead: float = _assumed(6e-3, "630 to 714 kernels a step, counted, at 10 us each to launch them (a guess)")
    gpus_per_node: float = _assumed(8, "p4d.24xlarge")
    cores_per_node: float = _assumed(96, "p4d.24xlarge: vCPUs, each taken for a core of those measured")
    node_memory: float = _assumed(1152 * 2**30, "p4d.24xlarge")
    storage_rate: float = _assumed(8e9, "of a node from S3: c5n.18xlarge, 100 Gbit/s (Vassallo 2019, s3-benchmark)")
    nvlink_rate: float = _assumed(300e9, "each way: NVIDIA, A100 data sheet")
    network_rate: float = _assumed(50e9, "of a node, each way: p4d.24xlarge, 400 Gbit/s")
    nvlink_latency: float = _assumed(3.4e-6, "of a message: NCCL's cost model, ring, protocol Simple")
    network_latency: float = _assumed(14e-6, "of a message: NCCL's cost model, ring, protocol Simple")
    gradient_share: float = _assumed(1, "of the gradients' bytes that are sent; 0.5: bf16")
    sync_every: float = _assumed(1, "steps between two all-reduces; more than one: local SGD")
    fault_gpu_hours: float = _assumed(50_700, "from fault to fault: 419 in 54 days of 16,384 H100 (arXiv 2407.21783)")
    detect_seconds: float = _assumed(30, "until a lost node is noticed: 27 to 30 s with short health checks")
    gpu_hour: float = _assumed(4.1, "USD: p4d.24xlarge on demand, 32.77 until 2025, an eighth of it; ask for today's")
    core_hour: float = _assumed(0.0425, "USD: c6i.16xlarge on demand, 2.72, a 64th of it")
    terabyte_month: float = _assumed(23, "USD: S3 Standard, its first 50 TB")
    prepare_cores: float = _assumed(1024, "16 CPU nodes of 64")

    @classmethod
    def of(cls, values: Mapping[str, float]) -> "Assumptions":
        """The defaults but for `values`; ConfigError for a name that does not exist, or a value that cannot be."""
        names = {each.name for each in fields(cls)}
        for name, value in values.items():
            if name not in names:
                raise ConfigError(f"--assume {name}: no such assumption; there are {', '.join(sorted(names))}")
            if not 0 <= value < math.inf or (value == 0 and name not in MAY_BE_ZERO):
                raise ConfigError(f"--assume {name} {value:g}: use a positive number")
        return cls(**values)

    def listed(self, given: Mapping[str, float]) -> list[dict[str, Any]]:
        """Name, value and source of each; of those in `given` the source is who gave them."""
        return [
            {
                "name": each.name,
                "value": getattr(self, each.name),
                "source": "given" if each.name in given else each.metadata["source"],
            }
            for each in fields(self)
        ]


MAY_BE_ZERO = {
    *("images", "val_images", "epochs", "batch_size", "decode_rate", "file_bytes", "step_overhead"),
    *("nvlink_latency", "network_latency", "detect_seconds", "gpu_hour", "core_hour", "terabyte_month"),
}
OF_NO_GPU = {"gpu_flops", "gpu_share", "step_overhead"}
"""Assumptions that a benchmark on a GPU makes needless."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a benchmark's JSON says about a run's parts."""

    config: Config
    """With its batch size."""
    images: int
    val_images: int
    on_gpu: bool
    stages: dict[tuple[str, str], dict[str, Any]]
    """By name and variant."""
    gradient_bytes: float
    checkpoint_bytes: float
    save_seconds: float
    load_seconds: float
    start_seconds: float
    stream_rate: float
    """Images/s of the streaming loader for each core."""
    decode_rate: float
    """JPEG files of the prepared size, images/s for one core."""

    @classmethod
    def of(cls, result: Mapping[str, Any], name: str) -> "Measured":
        """From what `cifar.benchmark.run.benchmark` gives; ConfigError, naming the file, for anything else."""
        try:
            config = Config.from_dict(result["config"])
            stages = {(stage["stage"], stage["variant"]): stage for stage in result["stages"]}
            seconds = {stage["stage"]: stage["seconds"] for stage in result["stages"]}
            return cls(
                config=replace(config, train=replace(config.train, batch_size=result["batch_size"])),
                images=result["counts"]["train"],
                val_images=result["counts"]["val"],
                on_gpu=result["machine"]["device"] != "cpu",
                stages=stages,
                gradient_bytes=result["gradient_bytes"],
                checkpoint_bytes=result["checkpoint_bytes"],
                save_seconds=seconds["checkpoint save"],
                load_seconds=seconds["checkpoint load"],
                start_seconds=seconds["start-up"],
                stream_rate=stages["load", "streaming"]["images_per_second"] / result["machine"]["cores"],
                decode_rate=stages["decode", "jpeg, one process"]["images_per_second"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"--cost {name}: not what this version's jobs/benchmark.py writes; measure again"
            ) from error

    def part(self, name: str, size: int) -> dict[str, Any]:
        """A step's part at a size in pixels; where that was not measured apart, the mean over the run."""
        return self.stages.get((name, f"{size} px")) or self.stages[name, "mean over a run"]

    def sums(self, key: str, names: Sequence[str], sizes: Mapping[int, int]) -> float:
        """Seconds or FLOPs (`key`) of these parts, over a run with so many steps of each size."""
        return sum(steps * self.part(name, size)[key] for size, steps in sizes.items() for name in names)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run that is to be predicted, and the seconds that a GPU takes for its parts."""

    images: int
    val_images: int
    epochs: int
    batch_size: int
    image_bytes: int
    """As prepared, and as read."""
    loader: str
    reason: str
    steps: int
    flops_per_image: float
    """Of a training step, the mean over the run's sizes."""
    fixed: float
    """Seconds of a step that do not depend on its images."""
    per_image: float
    val_per_image: float


def work_of(measured: Measured, assumed: Assumptions) -> Work:
    """The run that was measured but for what is assumed of it. ConfigError for a batch larger than train."""
    config, train = measured.config, measured.config.train
    images = round(assumed.images) or measured.images
    val_images = round(assumed.val_images) or measured.val_images
    batch_size = round(assumed.batch_size) or train.batch_size
    image_bytes = 3 * config.data.image_size**2
    # A loader that was forced for a measurement is chosen anew for the size predicted.
    train = replace(train, epochs=round(assumed.epochs) or train.epochs, batch_size=batch_size, loader="auto")
    store = min(STORE_SHARE * assumed.node_memory, STORE_MOST)
    loader, reason = choose_loader(replace(config, train=train), (images + val_images) * image_bytes, store)
    if loader == "streaming":
        train = replace(train, skip_easy=0.0)
    sizes = steps_by_size(replace(config, train=train), num_batches(images, batch_size, 1))
    steps = sum(sizes.values())
    measured_images = steps * measured.config.train.batch_size
    flops_per_image = measured.sums("flops", ("forward", "backward"), sizes) / measured_images
    whole = {max(sizes): 1}  # val images
    if measured.on_gpu:
        fixed = measured.sums("seconds", ("optimizer",), sizes) / steps
        per_image = measured.sums("seconds", ("augment", "resize", "forward", "backward"), sizes) / measured_images
        forward = measured.sums("seconds", ("forward",), whole)
    else:
        rate = assumed.gpu_flops * assumed.gpu_share
        fixed = assumed.step_overhead + measured.sums("flops", ("optimizer",), sizes) / steps / rate
        per_image = flops_per_image / rate
        forward = measured.sums("flops", ("forward",), whole) / rate
    return Work(
        images=images,
        val_images=val_images,
        epochs=train.epochs,
        batch_size=batch_size,
        image_bytes=image_bytes,
        loader=loader,
        reason=reason,
        steps=steps,
        flops_per_image=flops_per_image,
        fixed=fixed,
        per_image=per_image,
        val_per_image=forward / measured.config.train.batch_size,
    )


def link_of(assumed: Assumptions, gpus: int) -> Link:
    """Within a node, or between nodes, whose network all of a node's GPUs share: a ring leaves a node once.

    A block of gradients goes by all GPUs, but only once for each node from one to another: the mean of the latencies.
    """
    nodes = math.ceil(gpus / assumed.gpus_per_node)
    if nodes == 1:
        return Link(latency=assumed.nvlink_latency, bytes_per_second=assumed.nvlink_rate, source="within a node")
    latency = ((gpus - nodes) * assumed.nvlink_latency + nodes * assumed.network_latency) / gpus
    rate = min(assumed.network_rate, assumed.nvlink_rate)
    return Link(latency=latency, bytes_per_second=rate, source="between nodes")


def checkpoint_interval(save_seconds: float, fault_seconds: float) -> float:
    """Seconds of training between two checkpoints that lose least, to saving and to repeating (Young 1974).

    This is the first order, for a save that is short against the time between two faults; Daly (2006) has higher ones.
    """
    return math.sqrt(2 * save_seconds * fault_seconds)


def predict_run(measured: Measured, assumed: Assumptions, gpus: int) -> dict[str, Any]:
    """Time, money and bytes of the whole run on so many GPUs, each with its share of a node.

    A fault costs a restart and half of what lies between two checkpoints, which holds while that is short against the
    time between two faults. `limit` is where most of the time goes, `serial` the most that GPUs do not shorten.
    """
    work = work_of(measured, assumed)
    streams = work.loader == "streaming"
    each = work.batch_size / gpus
    on_node = min(gpus, assumed.gpus_per_node)
    link = link_of(assumed, gpus)
    gradient_bytes = round(measured.gradient_bytes * assumed.gradient_share)
    model = StepModel(fixed=work.fixed, per_image=work.per_image, gradient_bytes=gradient_bytes, link=link)
    all_reduce = link.all_reduce_seconds(gradient_bytes, gpus) / assumed.sync_every
    busy = model.compute_seconds(each) + all_reduce
    storage = assumed.storage_rate / assumed.gpus_per_node
    stored, loaded = storage / work.image_bytes, assumed.cores_per_node / assumed.gpus_per_node * measured.stream_rate
    arrival = 1 / min(stored, loaded) if streams else 0.0
    step = max(busy, each * arrival)

    resident_bytes = 0 if streams else (work.images + work.val_images) * work.image_bytes
    start = measured.start_seconds + resident_bytes / assumed.storage_rate
    train = work.steps * step
    evaluation = work.epochs * work.val_images / gpus * max(work.val_per_image, arrival)
    save = measured.save_seconds + measured.checkpoint_bytes / storage
    fault_seconds = assumed.fault_gpu_hours * 3600 / gpus
    checkpoints = max(work.epochs, math.ceil((train + evaluation) / checkpoint_interval(save, fault_seconds)))
    interval = (train + evaluation) / checkpoints
    faults = (train + evaluation + checkpoints * save) / fault_seconds
    lost = faults * (interval / 2 + assumed.detect_seconds + start + measured.load_seconds)
    seconds = start + train + evaluation + checkpoints * save + lost

    serial = {
        "fixed part": work.steps * work.fixed,
        "all-reduce": work.steps * all_reduce,
        "start-up": start,
        "checkpoints": checkpoints * save,
        "faults": lost,
    }
    limits = serial | {"arithmetic": work.steps * work.per_image * each}
    if step > busy:
        limits["storage" if stored < loaded else "loading cores"] = train
    rate = work.batch_size / step
    sent = all_reduce_bytes(gradient_bytes, gpus) / assumed.sync_every
    return {
        "gpus": gpus,
        "seconds": seconds,
        "usd": seconds / 3600 * gpus * assumed.gpu_hour,
        "limit": max(limits, key=lambda name: limits[name]),
        "serial": max(serial, key=lambda name: serial[name]),
        "start_seconds": start,
        "train_seconds": train,
        "evaluation_seconds": evaluation,
        "save_seconds": checkpoints * save,
        "lost_seconds": lost,
        "images_per_gpu": each,
        "compute_seconds": work.per_image * each,
        "fixed_seconds": work.fixed,
        "all_reduce_seconds": all_reduce,
        "all_reduce_share": all_reduce / step,
        "data_seconds": each * arrival,
        "step_seconds": step,
        "images_per_second": rate,
        "read_rate": rate * work.image_bytes if streams else 0.0,
        "node_read_rate": rate * work.image_bytes * on_node / gpus if streams else 0.0,
        "cores_per_gpu": rate / gpus / measured.stream_rate if streams else 0.0,
        "decode_cores_per_gpu": rate / gpus / (assumed.decode_rate or measured.decode_rate),
        "epoch_read_bytes": work.images * work.image_bytes if streams else 0,
        "store_bytes": on_node * OPEN_STREAMS * STREAM_BYTES if streams else resident_bytes,
        "share_bytes": work.images * work.image_bytes / gpus,
        "all_reduce_bytes": sent,
        # What one GPU sends is what leaves its node: the ring passes on.
        "epoch_network_bytes": work.steps / work.epochs * sent if gpus > assumed.gpus_per_node else 0.0,
        "checkpoints": checkpoints,
        "checkpoint_steps": math.ceil(work.steps / checkpoints),
        "checkpoint_interval": interval,
        "checkpoint_bytes": checkpoints * measured.checkpoint_bytes,
        "faults": faults,
    }


def predict_preparation(measured: Measured, assumed: Assumptions) -> dict[str, float]:
    """Decoding every image once, on CPU nodes, and keeping the prepared set."""
    work = work_of(measured, assumed)
    images = work.images + work.val_images
    core_hours = images / (assumed.decode_rate or measured.decode_rate) / 3600
    prepared = images * work.image_bytes
    return {
        "core_hours": core_hours,
        "hours": core_hours / assumed.prepare_cores,
        "usd": core_hours * assumed.core_hour,
        "file_bytes": images * assumed.file_bytes,
        "prepared_bytes": prepared,
        "usd_per_month": prepared / 1e12 * assumed.terabyte_month,
    }


def predict_runs(measured: Measured, assumed: Assumptions, counts: Sequence[int]) -> list[dict[str, Any]]:
    """A run on each of the counts among which the batch divides; `efficiency` is the time on one GPU, over the time
    that all of them take together."""
    batch_size = work_of(measured, assumed).batch_size
    runs = [predict_run(measured, assumed, count) for count in counts if batch_size % count == 0]
    alone = predict_run(measured, assumed, 1)["seconds"]
    return [run | {"efficiency": alone / (run["seconds"] * run["gpus"])} for run in runs]


def changes(work: Work, assumed: Assumptions) -> dict[str, dict[str, float]]:
    """What one could change, by name, as assumptions. Those with a star train another model."""
    larger = {"4 times the batch *": {"batch_size": 4.0 * work.batch_size}}
    return (larger if 4 * work.batch_size <= work.images else {}) | {
        "8 steps between all-reduces: local SGD *": {"sync_every": 8 * assumed.sync_every},
        "gradients sent in bf16": {"gradient_share": assumed.gradient_share / 2},
        "messages without latency: a tree at best": {"nvlink_latency": 0, "network_latency": 0},
        "a quarter of the launches: CUDA graphs": {"step_overhead": assumed.step_overhead / 4},
        "twice the share of the GPU's peak": {"gpu_share": 2 * assumed.gpu_share},
        "4 times the storage bandwidth": {"storage_rate": 4 * assumed.storage_rate},
        "4 times the cores": {"cores_per_node": 4 * assumed.cores_per_node},
        "spot: 0.4 of the price, a node lost each day": {
            "gpu_hour": 0.4 * assumed.gpu_hour,
            "fault_gpu_hours": 24 * assumed.gpus_per_node,
        },
    }


UNCERTAIN = (
    *("gpu_share", "step_overhead", "storage_rate", "network_rate", "network_latency", "nvlink_latency"),
    *("fault_gpu_hours", "stream_rate", "gradient_bytes", "checkpoint_bytes", "start_seconds"),
)
"""Inputs, measured and assumed, whose weight is shown."""


def sensitivity(measured: Measured, assumed: Assumptions, counts: Sequence[int]) -> list[dict[str, Any]]:
    """The run's seconds with one input halved and doubled, over those with all as they are; largest effect first."""

    def seconds(name: str, factor: float, count: int) -> float:
        if hasattr(measured, name):
            return predict_run(replace(measured, **{name: factor * getattr(measured, name)}), assumed, count)["seconds"]
        return predict_run(measured, replace(assumed, **{name: factor * getattr(assumed, name)}), count)["seconds"]

    usual = [predict_run(measured, assumed, count)["seconds"] for count in counts]
    rows: list[dict[str, Any]] = []
    for name in UNCERTAIN:
        row: dict[str, Any] = {"input": name, "gpus": list(counts)}
        for way, factor in (("halved", 0.5), ("doubled", 2.0)):
            row[way] = [seconds(name, factor, count) / as_is for count, as_is in zip(counts, usual, strict=True)]
        rows.append(row)
    return sorted(rows, key=lambda row: -max(abs(math.log(factor)) for factor in row["halved"] + row["doubled"]))


def predict_cost(result: Mapping[str, Any], name: str, values: Mapping[str, float]) -> dict[str, Any]:
    """All of it as one dict of JSON types, from the numbers of a benchmark in the file `name` and from assumptions."""
    measured, assumed = Measured.of(result, name), Assumptions.of(values)
    if measured.on_gpu and (needless := sorted(OF_NO_GPU & values.keys())):
        raise ConfigError(f"--assume {needless[0]}: leave it out; {name} has the seconds of a GPU")
    work = work_of(measured, assumed)
    runs = predict_runs(measured, assumed, GPUS)
    most = runs[-1]["gpus"]
    changed = []
    for change, different in changes(work, assumed).items():
        if not (measured.on_gpu and OF_NO_GPU & different.keys()):
            (run,) = predict_runs(measured, replace(assumed, **different), [most])
            keys = ("seconds", "usd", "efficiency", "limit", "serial")
            changed.append({"change": change} | {key: run[key] for key in keys})
    tried = predict_runs(measured, assumed, POWERS)
    return {
        "machine": result["machine"],
        "on_gpu": measured.on_gpu,
        "data": result["data"],
        "image_size": measured.config.data.image_size,
        **{key: getattr(measured, key) for key in ("gradient_bytes", "checkpoint_bytes", "start_seconds")},
        **{key: getattr(measured, key) for key in ("stream_rate", "decode_rate")},
        "work": asdict(work),
        "preparation": predict_preparation(measured, assumed),
        "runs": runs,
        "indivisible": [count for count in GPUS if work.batch_size % count],
        "pays_up_to": max(run["gpus"] for run in tried if run["efficiency"] >= PAYS),
        "fastest": min(tried, key=lambda run: run["seconds"])["gpus"],
        "changes": changed,
        "sensitivity": sensitivity(measured, assumed, sorted({runs[0]["gpus"], most})),
        "assumptions": [each for each in assumed.listed(values) if not (measured.on_gpu and each["name"] in OF_NO_GPU)],
    }
