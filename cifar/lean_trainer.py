"""Ray Train's data-parallel trainer without what our runs do not use, each piece of which starts a process."""

import os
import time
from collections.abc import Sequence

import ray
from ray._private import state as ray_state
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.experimental import internal_kv
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from cifar.elastic import Committed, Growth, Patience

# Its actor serves datasets that were given to the trainer.
UNUSED = {"DatasetsCallback"}
# Its actor frees the placement group of a driver that died, where the cluster lives on.
UNUSED_ON_OWN_CLUSTER = {"PlacementGroupCleanerCallback"}
RELEASE_SECONDS = 60.0
"""Within which a controller is dead whose trial was killed; on busy cores it took more than two."""


class LeanTrainer(DataParallelTrainer):
    """Not TorchTrainer, whose backend makes the controller import torch (1.5 s) to open a process group; the workers
    open theirs. Leaving out two callbacks spares two processes of 1.4 s of CPU each (Ray 2.60)."""

    noted_as = ""
    """Name under which `release_workers` finds what the workers hold."""
    worker_counts: Sequence[int] = ()
    """Of an elastic run, those that its batch divides among."""

    def fit(self):
        # The controller is going to ask for this actor, and would wait for its process: let both start at once.
        get_or_create_autoscaling_coordinator()
        return super().fit()

    def _register_sigint_handler(self, controller):
        """Ctrl-C is the job's, which says so and exits with 130; Ray's own handler, which it leaves in place for what
        comes after the run, exits with 0."""

    def _initialize_and_run_controller(self, **parts):
        assert self.run_config.failure_config is not None
        parts["failure_policy"] = Patience(self.run_config.failure_config)
        if self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = Growth(self.scaling_config, self.worker_counts)
        return super()._initialize_and_run_controller(**parts)

    def _create_default_callbacks(self):
        unused = UNUSED if os.environ.get("RAY_ADDRESS") else UNUSED | UNUSED_ON_OWN_CLUSTER
        callbacks = super()._create_default_callbacks()
        assert unused <= {type(callback).__name__ for callback in callbacks}, "another version of Ray"
        callbacks = [callback for callback in callbacks if type(callback).__name__ not in unused]
        return [*callbacks, Committed(), *([PlacementNote(self.noted_as)] if self.noted_as else [])]


class PlacementNote(WorkerGroupCallback):
    """Runs in the controller, and notes who it is, and the workers' placement group, where another process finds it."""

    def __init__(self, name: str):
        self._name = name

    def after_worker_group_start(self, worker_group):
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        note = f"{ray.get_runtime_context().get_actor_id()} {group.id.hex()}"
        internal_kv._internal_kv_put(_key(self._name), note.encode(), overwrite=True)


def release_workers(name: str) -> bool:
    """Free what the workers of an ended trainer hold; False as long as its controller lives, which would start others.

    A controller that is killed, as Tune kills a trial's, leaves its placement group behind, and the next trial would
    wait for it for ever; Ray's own cleaner needs the dashboard.
    """
    note = internal_kv._internal_kv_get(_key(name))
    if note:
        controller, group = note.decode().split()
        if ray_state.actors(controller).get("State", "DEAD") != "DEAD":
            return False
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
        internal_kv._internal_kv_del(_key(name))
    return True


def release_workers_soon(name: str) -> None:
    """The same, as soon as the controller is dead, who dies with the process that started it."""
    end = time.monotonic() + RELEASE_SECONDS
    while not release_workers(name) and time.monotonic() < end:
        time.sleep(0.2)


def _key(name: str) -> bytes:
    return f"cifar-placement-{name}".encode()
