"""The nodes of cluster/local.yaml: processes on this machine, which Ray's autoscaler starts and ends."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LocalNodes(FakeMultiNodeProvider):
    """Ray's provider for its own tests, which cannot start a node whose type says how much memory it has.

    A type must say it: an autoscaler adds no node for who asks for memory, as the service's replicas do, without.
    """

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        started = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, started, labels)
