"""What Ray Train's controller decides for our runs: on how many workers to go on, and when to give up.

Imports no torch: the controller does without it.
"""

import threading
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, cast

import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.callback import ReportCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupState
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cifar.waiting import fitting

Resources = Mapping[str, Mapping[str, float]]
"""Amounts by node and name."""
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


class Growth(ScalingPolicy):
    """As many workers as there is room for on the nodes that are there now and stay.

    Ray's own policy (2.60) goes by a list of nodes that is up to 20 s old, has those on it that are being drained, and
    knows neither what other jobs hold nor, for three minutes, that an earlier run was killed. To grow, it ends the
    running workers wherever they are; here they write a checkpoint first, and no step is lost.
    """

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int]):
        """`counts`: of workers that share the batch evenly, in ascending order; the others are not taken."""
        super().__init__(scaling_config)
        self._counts = counts
        self._each = cast(dict[str, float], scaling_config._resources_per_worker_not_none)
        self._starting = False
        self._full: Set[str] = frozenset()
        """Nodes on which a group did not find the room that they have in all: others hold some of it."""
        self._group: Any = None
        self._growing, self._seen, self._looked_at = False, 0, 0.0

    def _get_num_workers_for_resource_request(self) -> int:
        return self.scaling_config.max_workers

    def make_decision_for_non_running_worker_group(self) -> ResizeDecision | NoopDecision:
        self._maybe_send_resource_request()
        nodes = staying_nodes()
        if self._starting and nodes:  # in vain
            self._full = nodes.keys()
            nodes = {node: free for node, free in free_resources().items() if node in nodes}
        workers = self._allowed(self._fitting(nodes))
        if workers < self.scaling_config.min_workers:
            time.sleep(WAITING_SECONDS)  # the controller asks again at once
            return NoopDecision()
        return self._start(workers)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: Any
    ) -> ResizeDecision | NoopDecision:
        self._maybe_send_resource_request()
        now, size = time.monotonic(), worker_group_state.num_workers
        if self._group is not worker_group_state:
            self._group, self._looked_at = worker_group_state, now
            self._starting = self._growing = False
        if self._growing and Committed.count > self._seen:
            self._growing = False
            if (workers := self._room(size)) > size:
                return self._start(workers)
        elif now - self._looked_at >= self.scaling_config.elastic_resize_monitor_interval_s:
            self._looked_at = now
            if self._room(size) > size:
                self._growing, self._seen = True, Committed.count
                for worker in worker_group_state.workers:
                    worker.execute_async(want_checkpoint)
        return NoopDecision()  # a loss shows in the workers; to end healthy ones would only lose their steps

    def _start(self, workers: int) -> ResizeDecision:
        self._starting = True
        return ResizeDecision(num_workers=workers, resources_per_worker=self._each)

    def _room(self, size: int) -> int:
        """For so many workers, with the `size` that run."""
        nodes = staying_nodes()
        room = size + self._fitting({node: free for node, free in free_resources().items() if node in nodes})
        if nodes.keys() - self._full:  # tasks that come and go may hold the room of a new node at this moment
            room = max(room, self._fitting(nodes))
        return self._allowed(room)

    def _fitting(self, nodes: Resources) -> int:
        return sum(fitting(self._each, node) for node in nodes.values())

    def _allowed(self, workers: int) -> int:
        return max((count for count in self._counts if count <= workers), default=0)


def staying_nodes() -> Resources:
    """What each node has that lives and is not being drained; none while the head does not answer."""
    with suppress(RayError):
        draining = ray_state.get_draining_nodes()
        return {
            node["NodeID"]: node["Resources"]
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in draining
        }
    return {}


def free_resources() -> Resources:
    """What each node has that nobody holds."""
    with suppress(RayError):
        return cast(Resources, ray_state.available_resources_per_node())
    return {}
