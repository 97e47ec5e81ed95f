"""The plan: who gets what, and what is refused before anything starts."""

from dataclasses import replace
from typing import Any

import pytest

from cifar.cluster import make_plan
from cifar.config import Config, ConfigError

MB, GB = 2**20, 2**30


def node(cpus: float, gpus: float = 0, store: float = 2 * GB) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "object_store_memory": store}


LAPTOP = [node(2)]
GPU_NODE = [node(16, 4, 8 * GB)]


def with_flags(workers: str = "auto", gpu: bool = False, **train: Any) -> Config:
    config = Config()
    return replace(
        config, run=replace(config.run, workers=workers, gpu=gpu), train=replace(config.train, batch_size=480, **train)
    )


def test_a_laptop_gets_one_worker_and_room_for_data() -> None:
    plan = make_plan(with_flags(), 150 * MB, LAPTOP)
    assert (plan.max_workers, plan.gpus_per_worker, plan.loader) == (1, 0, "resident")
    assert plan.cpus_per_worker <= 1.5
    assert "1 worker" in str(plan)
    assert "resident" in str(plan)


def test_gpus_get_a_worker_each() -> None:
    plan = make_plan(with_flags(), 150 * MB, GPU_NODE)
    assert (plan.max_workers, plan.gpus_per_worker) == (4, 1)


def test_auto_takes_fewer_gpus_when_the_batch_does_not_divide() -> None:
    config = with_flags()
    config = replace(config, train=replace(config.train, batch_size=500))
    assert make_plan(config, MB, [node(16, 8)]).max_workers == 5


def test_large_data_streams() -> None:
    assert make_plan(with_flags(), 6 * GB, LAPTOP).loader == "streaming"
    assert make_plan(with_flags(loader="resident"), 6 * GB, LAPTOP).loader == "resident"


@pytest.mark.parametrize("workers", ["1", "2", "1:2"])
@pytest.mark.parametrize("cpus", [2.0, 3.0, 8.0])
def test_streaming_always_leaves_ray_data_a_cpu(workers: str, cpus: float) -> None:
    plan = make_plan(with_flags(workers, loader="streaming"), GB, [node(cpus)])
    assert plan.max_workers * plan.cpus_per_worker <= cpus - 1


def test_elastic_range() -> None:
    plan = make_plan(with_flags("1:4"), MB, LAPTOP)
    assert (plan.min_workers, plan.max_workers, plan.elastic) == (1, 4, True)
    assert plan.max_workers * plan.cpus_per_worker <= 2


def test_a_worker_fits_on_a_node_not_only_on_their_sum() -> None:
    assert make_plan(with_flags(), MB, [node(8), node(8)]).cpus_per_worker <= 7
    plan = make_plan(with_flags(), MB, [node(64), node(16, 4), node(16, 4)])
    assert (plan.max_workers, plan.gpus_per_worker) == (8, 1)
    assert plan.cpus_per_worker <= 3


def test_an_elastic_run_that_outgrows_the_cluster_starts_with_what_fits() -> None:
    plan = make_plan(with_flags("1:6", gpu=True), MB, [node(8, 2)])
    assert (plan.min_workers, plan.max_workers) == (1, 6)
    assert plan.cpus_per_worker >= 1


@pytest.mark.parametrize(
    ("config", "nodes", "message"),
    [
        (with_flags("8"), LAPTOP, r"--workers 8: needs 8 CPUs, the cluster has 2; use --workers 2"),
        (with_flags("2", gpu=True), [node(8, 1)], r"--workers 2 --gpu: needs 2 GPUs.*use --workers 1"),
        (with_flags("1", gpu=True), LAPTOP, r"--gpu: needs 1 GPUs, the cluster has 0; drop --gpu"),
        (with_flags("1", loader="streaming"), [node(1)], r"no CPU for reading"),
    ],
)
def test_impossible_plans_are_refused_with_the_remedy(
    config: Config, nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(config, MB, nodes)


def test_nodes_that_may_come_count_and_are_named() -> None:
    plan = make_plan(with_flags("3"), MB, [node(0)], [node(1)] * 4)
    assert plan.cpus_per_worker * 3 <= 4
    assert "the cluster may grow to 4 CPU" in str(plan)
    with pytest.raises(ConfigError, match=r"--workers 6: needs 6 CPUs, the cluster may grow to 4; use --workers 4"):
        make_plan(with_flags("6"), MB, [node(0)], [node(1)] * 4)


@pytest.mark.parametrize(("there", "workers"), [([node(0)], 1), ([node(0), node(8, 2)], 2)])
def test_unasked_a_run_takes_the_gpus_that_are_there_and_adds_one_at_most(
    there: list[dict[str, float]], workers: int
) -> None:
    plan = make_plan(with_flags(), MB, there, [node(8, 1)] * 4)
    assert (plan.max_workers, plan.gpus_per_worker) == (workers, 1)
