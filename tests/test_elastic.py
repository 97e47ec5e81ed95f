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


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Growth:
    """Of one to four workers of a CPU each, which looks for room at each poll."""
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0)
    monkeypatch.setattr(Growth, "_maybe_send_resource_request", lambda self: None)
    monkeypatch.setattr(Growth, "_get_reserved_resources", lambda self: self.room)
    monkeypatch.setattr(elastic, "WAITING_SECONDS", 0.0)
    policy = Growth(scaling, [1, 2, 3, 4])
    give_room(policy, 2)
    return policy


def give_room(policy: Growth, cpus: int) -> None:
    policy.room = {"node": {"CPU": float(cpus)}}  # pyright: ignore[reportAttributeAccessIssue]


def decide(policy: Growth, group: Group) -> int | None:
    """The workers to go on with; None: as it is."""
    decision = policy.make_decision_for_running_worker_group(group, None)
    assert isinstance(decision, ResizeDecision | NoopDecision)
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


def test_a_run_grows_from_a_checkpoint_that_it_was_asked_for(policy: Growth) -> None:
    group = Group(2)
    assert decide(policy, group) is None
    assert group.asked == 0
    give_room(policy, 4)
    assert decide(policy, group) is None
    assert group.asked == 2
    commit()
    policy.scaling_config.elastic_resize_monitor_interval_s = 60  # the checkpoint is not waited for so long
    assert decide(policy, group) == 4


def test_room_that_is_gone_when_the_checkpoint_is_there_is_not_taken(policy: Growth) -> None:
    group = Group(2)
    give_room(policy, 3)
    decide(policy, group)
    commit()
    policy.scaling_config.elastic_resize_monitor_interval_s = 60
    give_room(policy, 2)
    assert decide(policy, group) is None
    give_room(policy, 3)
    assert decide(policy, group) is None, "it has to be asked anew"


def test_what_the_group_before_was_asked_for_does_not_count(policy: Growth) -> None:
    give_room(policy, 3)
    decide(policy, Group(2))
    commit()
    policy.scaling_config.elastic_resize_monitor_interval_s = 60
    assert decide(policy, Group(2)) is None


def test_healthy_workers_are_not_ended_for_a_smaller_group(policy: Growth) -> None:
    give_room(policy, 1)
    assert decide(policy, Group(2)) is None


def test_parts_of_cpus_are_counted_without_rounding_errors(policy: Growth) -> None:
    policy.scaling_config.resources_per_worker = {"CPU": 0.1}
    assert policy._count_possible_workers({"a": {"CPU": 0.3}}) == 3
    assert policy._count_possible_workers({"a": {"CPU": 0.3}, "b": {"GPU": 1.0}, "c": {"CPU": 0.9}}) == 4


def test_a_group_has_as_many_workers_as_the_batch_divides_among(policy: Growth) -> None:
    policy._counts = [1, 2, 4]
    group = Group(2)
    give_room(policy, 3)
    decide(policy, group)
    assert group.asked == 0
    assert [policy._count_possible_workers({"a": {"CPU": cpus}}) for cpus in range(6)] == [0, 1, 2, 2, 4, 4]


def test_a_new_group_is_as_large_as_fits(policy: Growth) -> None:
    give_room(policy, 3)
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 3
    give_room(policy, 0)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
