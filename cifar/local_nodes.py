"""The nodes of cluster/local.yaml: processes on this machine, which Ray's autoscaler starts and ends."""

from functools import partial
from typing import Any
from unittest.mock import patch

import ray._private.parameter as parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LocalNodes(FakeMultiNodeProvider):
    """Ray's provider for its own tests, which starts nodes with all but these two settings.

    The memory that their type says: an autoscaler adds no node for who asks for memory, as the service's replicas do,
    without. And a folder of their own for uploaded working folders: every node that unpacks one deletes what it finds
    there, and without its working folder the driver of a job died of `Cannot load libtorch_cpu.so`.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        with self.lock:
            settings = {
                "memory": resources.get("memory"),
                "runtime_env_dir_name": f"runtime_resources_{self._next_node_id + 1}",
            }
            others = {name: amount for name, amount in resources.items() if name != "memory"}
            with patch.object(parameter, "RayParams", partial(parameter.RayParams, **settings)):
                super()._create_node_with_resources_and_labels(node_config, tags, count, others, labels)
