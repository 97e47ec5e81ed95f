"""What Ray Train's controller decides for our runs: on how many workers to go on, and when to give up.

Imports no torch: the controller does without it.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.callback import ReportCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
)
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

WAITING_SECONDS = 0.5

checkpoint_wanted = threading.Event()
"""In a worker: the controller waits for a checkpoint, to go on from it with more workers."""


def want_checkpoint() -> None:
    """The controller has workers call this."""
    checkpoint_wanted.set()


class Leaving(Exception):
    """How a worker ends before its run does: its steps are in a checkpoint, and a node is about to be taken away."""


class Committed(ReportCallback):
    """Counts the checkpoints that this process, a run's controller, has on its list."""

    count = 0

    def after_report(self, training_report: Any, metrics: Any) -> None:
        Committed.count += training_report.checkpoint is not None


class Patience(DefaultFailurePolicy):
    """Gives up after `max_failures` deaths without a checkpoint in between: where machines come and go for days, a run
    goes on as long as it gets anywhere, and what fails at the same step each time ends. Ray (2.60) counts over all."""

    _seen = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if isinstance(training_failed_error, WorkerGroupError) and any(
            isinstance(error, Leaving) for error in training_failed_error.worker_failures.values()
        ):
            return FailureDecision.RETRY
        if Committed.count > self._seen:
            self._seen, self._worker_group_failures = Committed.count, 0
        return super().make_decision(training_failed_error)


class Growth(ElasticScalingPolicy):
    """As many workers as fit on the nodes that are there now and stay.

    Ray's own policy (2.60) goes by a list of nodes that is up to 20 s old and has those on it that are being drained.
    To grow, it ends the running workers wherever they are; here they write a checkpoint first, and no step is lost.
    """

    _growing = False
    _seen = 0
    _group: Any = None

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int]):
        """`counts`: of workers that share the batch evenly, in ascending order; the others are not taken."""
        super().__init__(scaling_config)
        self._counts = counts

    def make_decision_for_non_running_worker_group(self) -> Any:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(WAITING_SECONDS)  # the controller asks again at once
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        if self._group is not worker_group_state:
            self._group, self._growing = worker_group_state, False
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        size = worker_group_state.num_workers
        if isinstance(decision, ResizeDecision) and decision.num_workers > size:
            self._growing, self._seen = True, Committed.count
            for worker in worker_group_state.workers:
                worker.execute_async(want_checkpoint)
        elif self._growing and Committed.count > self._seen:
            self._growing = False
            workers = self._count_possible_workers(self._get_reserved_resources() or {})
            if workers > size:
                return self._get_resize_decision(workers)
        return NoopDecision()  # a loss shows in the workers; to end healthy ones would only lose their steps

    def _get_reserved_resources(self) -> Any:
        """By node; None if they can't be had now."""
        now = time.monotonic()
        if now - self._latest_reserved_resources_query_time < self.GET_RESERVED_RESOURCES_INTERVAL_S:
            return self._latest_reserved_resources
        self._latest_reserved_resources_query_time, self._latest_reserved_resources = now, None
        with contextlib.suppress(RayError):
            ask: Any = self._autoscaling_coordinator.get_reserved_resources
            answer = ray.get(ask.remote(self._requester_id, recompute=True), timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S)
            reserved = cast(dict[str, Any], answer)
            draining = ray_state.get_draining_nodes()
            staying = {node: resources for node, resources in reserved.items() if node not in draining}
            if len(staying) < len(reserved):  # other nodes may have room for what was to go there
                for node, resources in ray_state.available_resources_per_node().items():
                    if node not in draining:
                        staying.setdefault(node, resources)
            self._latest_reserved_resources = staying
        return self._latest_reserved_resources

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        each = {name: amount for name, amount in self.scaling_config._resources_per_worker_not_none.items() if amount}
        # Parts of a CPU are no binary fractions: three times 0.1 of 0.3 would be two.
        count = sum(
            min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in each.items())
            for resources in reserved_resources.values()
        )
        return max((allowed for allowed in self._counts if allowed <= count), default=0)
