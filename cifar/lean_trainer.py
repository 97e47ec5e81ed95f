"""Ray Train's data-parallel trainer without what our runs do not use, each piece of which starts a process."""

import os

from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

# Its actor serves datasets that were given to the trainer.
UNUSED = {"DatasetsCallback"}
# Its actor frees the placement group of a driver that died, where the cluster lives on.
UNUSED_ON_OWN_CLUSTER = {"PlacementGroupCleanerCallback"}


class LeanTrainer(DataParallelTrainer):
    """Not TorchTrainer, whose backend makes the controller import torch (1.5 s) to open a process group; the workers
    open theirs. Leaving out two callbacks spares two processes of 1.4 s of CPU each (Ray 2.60)."""

    def fit(self):
        # The controller is going to ask for this actor, and would wait for its process: let both start at once.
        get_or_create_autoscaling_coordinator()
        return super().fit()

    def _create_default_callbacks(self):
        unused = UNUSED if os.environ.get("RAY_ADDRESS") else UNUSED | UNUSED_ON_OWN_CLUSTER
        callbacks = super()._create_default_callbacks()
        assert unused <= {type(callback).__name__ for callback in callbacks}, "another version of Ray"
        return [callback for callback in callbacks if type(callback).__name__ not in unused]
