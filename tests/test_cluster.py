"""The plan: who gets what, and what is refused before anything starts."""

from dataclasses import replace
from typing import Any

import pytest

from cifar.cluster import make_plan
from cifar.config import Config, ConfigError

MB, GB = 2**20, 2**30
LAPTOP = {"CPU": 2.0}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0}


def with_flags(workers: str = "auto", gpu: bool = False, **train: Any) -> Config:
    config = Config()
    return replace(
        config, run=replace(config.run, workers=workers, gpu=gpu), train=replace(config.train, batch_size=480, **train)
    )


def test_a_laptop_gets_one_worker_and_room_for_data() -> None:
    plan = make_plan(with_flags(), 150 * MB, LAPTOP, 2 * GB)
    assert (plan.max_workers, plan.gpus_per_worker, plan.loader) == (1, 0, "resident")
    assert plan.cpus_per_worker <= 1.5
    assert "1 worker" in str(plan)
    assert "resident" in str(plan)


def test_gpus_get_a_worker_each() -> None:
    plan = make_plan(with_flags(), 150 * MB, GPU_NODE, 8 * GB)
    assert (plan.max_workers, plan.gpus_per_worker) == (4, 1)


def test_auto_takes_fewer_gpus_when_the_batch_does_not_divide() -> None:
    config = with_flags()
    config = replace(config, train=replace(config.train, batch_size=500))
    assert make_plan(config, MB, {"CPU": 16.0, "GPU": 8.0}, GB).max_workers == 5


def test_large_data_streams() -> None:
    assert make_plan(with_flags(), 6 * GB, LAPTOP, 2 * GB).loader == "streaming"
    assert make_plan(with_flags(loader="resident"), 6 * GB, LAPTOP, 2 * GB).loader == "resident"


@pytest.mark.parametrize("workers", ["1", "2", "1:2"])
@pytest.mark.parametrize("cpus", [2.0, 3.0, 8.0])
def test_streaming_always_leaves_ray_data_a_cpu(workers: str, cpus: float) -> None:
    plan = make_plan(with_flags(workers, loader="streaming"), GB, {"CPU": cpus}, 2 * GB)
    assert plan.max_workers * plan.cpus_per_worker <= cpus - 1


def test_elastic_range() -> None:
    plan = make_plan(with_flags("1:4"), MB, LAPTOP, GB)
    assert (plan.min_workers, plan.max_workers, plan.elastic) == (1, 4, True)
    assert plan.max_workers * plan.cpus_per_worker <= 2


@pytest.mark.parametrize(
    ("config", "resources", "message"),
    [
        (with_flags("8"), LAPTOP, r"--workers 8: needs 8 CPUs, the cluster has 2; use --workers 2"),
        (with_flags("2", gpu=True), {"CPU": 8.0, "GPU": 1.0}, r"--workers 2 --gpu: needs 2 GPUs.*use --workers 1"),
        (with_flags("1", gpu=True), LAPTOP, r"--gpu: needs 1 GPUs, the cluster has 0; drop --gpu"),
        (with_flags("1", loader="streaming"), {"CPU": 1.0}, r"no CPU for reading"),
        (with_flags("7"), {"CPU": 8.0}, r"--batch-size 480: does not divide among 7 workers; use --batch-size 483"),
        (
            replace(with_flags(loader="resident"), augment=replace(Config().augment, augment_on="data")),
            LAPTOP,
            r"--loader resident: --augment-on data streams",
        ),
    ],
)
def test_impossible_plans_are_refused_with_the_remedy(
    config: Config, resources: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(config, MB, resources, GB)
