"""Where parts are predicted: in this process, or by Ray Data on the cluster."""

import logging
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cifar.batch.part import Decoded, PartPredictor, Summary, Target, decode_part
from cifar.batch.source import Part
from cifar.config import ConfigError, RunFailed
from cifar.predictor import Predictor
from cifar.probe import other_nodes, probe, probe_source
from cifar.waiting import Request, explained, unplaced_actors

# Up to here the work is done before Ray and its workers have started.
HERE_PIXEL_BYTES = 32 << 20
HERE_ENCODED_BYTES = 64 << 20
MOST_ACTORS = 4
"""On a node without GPUs."""
LEAST_CPUS = 0.01
_AHEAD = 4
"""Decoded parts that wait for each actor, at most."""

logger = logging.getLogger(__name__)


def is_small(parts: list[Part]) -> bool:
    """Done sooner here than Ray starts?"""
    pixels = sum(len(part.indices) * part.image_size**2 * 3 for part in parts)
    encoded = sum(len(part.indices) * part.row_bytes for part in parts)
    return pixels <= HERE_PIXEL_BYTES and encoded <= HERE_ENCODED_BYTES


def predict_here(parts: list[Part], model: Path, target: Target, device: str) -> Iterator[Summary]:
    predict = PartPredictor(Predictor(model, device), target)
    for part in parts:
        yield predict(decode_part(part))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who computes what."""

    actors: int
    actor_cpus: float
    actor_gpus: int
    decode_cpus: float
    """Of each task that reads and decodes."""
    sharing: int
    """Actors among whose threads the cores of a node are divided."""

    def __str__(self) -> str:
        has = "with a GPU each" if self.actor_gpus else f"{self.sharing} on a node"
        return f"plan: {self.actors} actors predict, {has}, beside tasks that decode"


def make_plan(nodes: Sequence[Mapping[str, float]], device: str, parts: int) -> Plan:
    """A GPU for each actor where there are any, else up to MOST_ACTORS on each node, which share its cores.

    Several actors of few threads each are faster than one, whose threads wait for each other and for the one that has
    to share its core with decoding: 1.07 times on two cores without decoding (n=3), more with it. Each takes about a
    gigabyte. A CPU of every node, or the half of its only one, is left to decoding: actors that held them all would
    wait for ever. Where there are other nodes, actors of a lost one start again there beside those that they have, so
    they hold next to nothing: Ray Data spreads them evenly without. ConfigError when the cluster has not what is asked
    for.
    """
    from cifar.cluster import cpus_per_worker  # not above: it imports Ray, which small jobs do without

    gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    if device not in ("auto", "cpu") and not gpus:
        raise ConfigError(f"--device {device}: the cluster has no GPU; use auto or cpu")
    use_gpu = device != "cpu" and gpus > 0
    computing = [node for node in nodes if node.get("CPU", 0.0) >= 1]
    if not computing:
        raise ConfigError("the cluster has no node with a CPU; start one with --num-cpus 1 or more")
    decode_cpus = 1.0 if min(node["CPU"] for node in computing) >= 2 else 0.5
    each_node = min(MOST_ACTORS, int(min(node["CPU"] for node in computing)))
    actors = min(gpus if use_gpu else each_node * len(computing), parts)
    each = cpus_per_worker(computing, actors, use_gpu, spare=decode_cpus)
    if not each:
        raise ConfigError(f"the cluster has no CPU for each of {actors} GPUs; start its nodes with more --num-cpus")
    if use_gpu:
        each = min(each, 1.0)
    elif len(computing) > 1:
        each = LEAST_CPUS
    return Plan(
        actors=actors,
        actor_cpus=each,
        actor_gpus=int(use_gpu),
        decode_cpus=decode_cpus,
        # Not as many as there are actors: a part's last bits hang on the number of threads, and a resumed job that has
        # fewer parts left writes what the whole one would have written.
        sharing=1 if use_gpu else each_node,
    )


def predict_on_ray(parts: list[Part], model: Path, target: Target, device: str) -> Iterator[Summary]:
    """Summaries as they come. A row of Ray Data is a part, so that none is split or merged."""
    import ray
    import ray.data

    from cifar.autoscaler import cluster_nodes  # not above: it imports Ray

    there, coming = cluster_nodes()
    nodes = [*there, *coming]
    plan = make_plan(nodes, device, len(parts))
    logger.info("%s", plan)
    if others := other_nodes():
        probe(target.output, "--output", others)
        probe_source(parts[0].source, "--input", others)
    files = ray.put({file.name: file.read_bytes() for file in model.iterdir() if file.is_file()})
    rows = [{"part": pickle.dumps(part)} for part in parts]
    parts_of_rows = ray.data.from_items(rows, override_num_blocks=len(rows))
    largest = max(len(part.indices) * part.image_size**2 * 3 for part in parts)
    # Decoding is faster than predicting, and would fill the object store.
    limits = parts_of_rows.context.execution_options
    limits.resource_limits = limits.resource_limits.copy(
        object_store_memory=_AHEAD * plan.actors * largest + (64 << 20)
    )
    actor: Any = _Actor  # Ray's hints know functions only
    # Ray Data would put both steps into the actor, one after the other, if their numbers were the same.
    tasks = ray.data.TaskPoolStrategy(size=plan.actors + int(sum(node.get("CPU", 0.0) for node in nodes)))
    answers = parts_of_rows.map(_decode_row, compute=tasks, num_cpus=plan.decode_cpus).map(
        actor,
        fn_constructor_args=(files, target, bool(plan.actor_gpus), plan.sharing),
        # One part is predicted while another is written, and a third on its way. Ray Data restarts an actor that dies,
        # and gives what it had to the next, without end: machines may come and go for days.
        compute=ray.data.ActorPoolStrategy(
            size=plan.actors, max_tasks_in_flight_per_actor=3, max_concurrent_calls_per_actor=2
        ),
        num_cpus=plan.actor_cpus,
        num_gpus=plan.actor_gpus,
    )
    each = {"CPU": plan.actor_cpus} | ({"GPU": 1.0} if plan.actor_gpus else {})
    request = Request(name="actor", count=1, each=each, remedy="add a node")
    with explained(partial(unplaced_actors, request)) as moved:
        for answer in answers.iter_rows():
            moved()
            yield _checked(pickle.loads(answer["answer"]))


def _decode_row(row: dict[str, bytes]) -> dict[str, bytes]:
    return {"decoded": pickle.dumps(_attempt(decode_part, pickle.loads(row["part"])))}


class _Actor:
    """A PartPredictor with a model that came through the object store: this node may see no other folder."""

    def __init__(self, files: Any, target: Target, use_gpu: bool, sharing: int):
        import ray

        from cifar.cluster import node_cores

        if use_gpu and not torch.cuda.is_available():
            raise RunFailed(
                "Ray gave this actor a GPU that torch does not see; install a torch with CUDA on every node"
            )
        self._threads = max(node_cores() // sharing, 1)  # Ray's default is those that it holds
        with tempfile.TemporaryDirectory() as folder:
            contents: Any = ray.get(files)
            for name, data in contents.items():
                (Path(folder) / name).write_bytes(data)
            predictor = Predictor(folder, "auto" if use_gpu else "cpu")
        self._predict = PartPredictor(predictor, target)

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        torch.set_num_threads(self._threads)  # of the calling thread, and Ray calls from several
        decoded: Decoded | Exception = pickle.loads(row["decoded"])
        answer = decoded if isinstance(decoded, Exception) else _attempt(self._predict, decoded)
        return {"answer": pickle.dumps(answer)}


def _attempt(function: Any, argument: Any) -> Any:
    """The error of a call as a value, which crosses process boundaries unwrapped."""
    try:
        return function(argument)
    except Exception as error:
        return error


def _checked(answer: Summary | Exception) -> Summary:
    if isinstance(answer, Exception):
        raise answer
    return answer
