"""What the controller of an elastic run decides, without a cluster."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import FailureConfig, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from cifar import elastic
from cifar.elastic import Committed, Growth, Leaving, Patience


@pytest.fixture(autouse=True)
def _no_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Committed, "count", 0)


def commit(checkpoint: object = "one") -> None:
    Committed().after_report(SimpleNamespace(checkpoint=checkpoint), [])


def death(error: Exception) -> WorkerGroupError:
    return WorkerGroupError("a worker died", {1: error})


def test_a_run_survives_any_number_of_deaths_while_it_gets_anywhere() -> None:
    policy = Patience(FailureConfig(max_failures=2))
    for _ in range(3):
        assert [policy.make_decision(death(OSError())) for _ in range(2)] == [FailureDecision.RETRY] * 2
        commit()


def test_a_run_that_gets_nowhere_ends() -> None:
    policy = Patience(FailureConfig(max_failures=2))
    decisions = []
    for _ in range(3):
        commit(checkpoint=None)  # a report without one is no progress
        decisions.append(policy.make_decision(death(OSError())))
    assert decisions == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]


def test_leaving_a_node_is_no_death() -> None:
    policy = Patience(FailureConfig(max_failures=0))
    assert [policy.make_decision(death(Leaving())) for _ in range(3)] == [FailureDecision.RETRY] * 3


class Group:
    """Ray's state of a worker group, whose workers are asked for checkpoints."""

    def __init__(self, num_workers: int):
        self.num_workers, self.start_time, self.asked = num_workers, float("-inf"), 0
        self.workers = [SimpleNamespace(execute_async=self._ask) for _ in range(num_workers)]

    def _ask(self, function: Any) -> None:
        assert function is elastic.want_checkpoint
        self.asked += 1


class Nodes:
    """What the nodes have in all, and what of it is free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.all: dict[str, float] = {"a": 2}
        self.free: dict[str, float] = {"a": 0}
        monkeypatch.setattr(elastic, "staying_nodes", lambda: {node: {"CPU": cpus} for node, cpus in self.all.items()})
        monkeypatch.setattr(
            elastic, "free_resources", lambda: {node: {"CPU": cpus} for node, cpus in self.free.items()}
        )


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    monkeypatch.setattr(Growth, "_maybe_send_resource_request", lambda self: None)
    monkeypatch.setattr(elastic, "WAITING_SECONDS", 0.0)
    return Nodes(monkeypatch)


def growth(*counts: int) -> Growth:
    """Of workers of a CPU each, which looks for room at each poll."""
    scaling = ScalingConfig(
        num_workers=(counts[0], counts[-1]), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0
    )
    return Growth(scaling, counts)


def size(decision: object) -> int | None:
    """The workers to go on with; None: as it is."""
    assert isinstance(decision, ResizeDecision | NoopDecision)
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


def running(policy: Growth, group: Group) -> int | None:
    return size(policy.make_decision_for_running_worker_group(group, None))  # pyright: ignore[reportArgumentType]


def stopped(policy: Growth) -> int | None:
    return size(policy.make_decision_for_non_running_worker_group())


def test_a_run_grows_from_a_checkpoint_that_it_was_asked_for(nodes: Nodes) -> None:
    policy, group = growth(1, 2, 3, 4), Group(2)
    assert running(policy, group) is None
    assert group.asked == 0
    nodes.all["b"] = nodes.free["b"] = 2
    assert running(policy, group) is None
    assert group.asked == 2
    assert running(policy, group) is None
    commit()
    assert running(policy, group) == 4


def test_room_that_is_gone_when_the_checkpoint_is_there_is_not_taken(nodes: Nodes) -> None:
    policy, group = growth(1, 2, 3), Group(2)
    nodes.free["a"] = 1
    assert running(policy, group) is None
    nodes.free["a"] = 0
    commit()
    assert running(policy, group) is None
    nodes.free["a"] = 1
    assert running(policy, group) is None, "it has to be asked anew"
    assert group.asked == 4


def test_what_the_group_before_was_asked_for_does_not_count(nodes: Nodes) -> None:
    policy = growth(1, 2, 3)
    nodes.free["a"] = 1
    running(policy, Group(2))
    commit()
    assert running(policy, Group(2)) is None


def test_healthy_workers_are_not_ended_for_a_smaller_group(nodes: Nodes) -> None:
    nodes.all["a"] = 1
    assert running(growth(1, 2), Group(2)) is None


def test_a_group_has_as_many_workers_as_fit_and_the_batch_divides_among(nodes: Nodes) -> None:
    def with_cpus(cpus: float) -> int | None:
        nodes.all["a"] = cpus
        return stopped(growth(1, 2, 4))

    assert [with_cpus(cpus) for cpus in range(6)] == [None, 1, 2, 2, 4, 4]


def test_a_group_that_finds_no_place_is_planned_by_what_others_leave_free(nodes: Nodes) -> None:
    """And room that only looked so is tried once, and again when there are other nodes."""
    policy = growth(1, 2, 3, 4)
    nodes.all["a"], nodes.free["a"] = 3, 2
    assert stopped(policy) == 3
    assert stopped(policy) == 2
    group = Group(2)
    nodes.free["a"] = 0
    assert running(policy, group) is None
    assert group.asked == 0
    nodes.all["b"] = 2
    assert running(policy, group) is None
    assert group.asked == 2
    commit()
    assert running(policy, group) == 4
    nodes.free["a"] = 2
    assert stopped(policy) == 2
