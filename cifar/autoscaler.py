"""What the cluster's autoscaler may add: a plan counts nodes that are not there yet."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import yaml

logger = logging.getLogger(__name__)


def cluster_nodes() -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Resources of each node of the cluster that Ray is connected to, and of each that its autoscaler may add.

    The second is empty where the autoscaler's configuration is out of sight: only the head has it, which is where Ray
    runs the drivers of submitted jobs.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    coming = coming_nodes(autoscaling_config(ray.get_runtime_context().gcs_address), nodes)
    if coming:
        cpus, gpus = (sum(node.get(name, 0.0) for node in coming) for name in ("CPU", "GPU"))
        logger.info(
            "the cluster has %d nodes and may add %d, with %g CPU and %g GPU", len(nodes), len(coming), cpus, gpus
        )
    return nodes, coming


def coming_nodes(config: Mapping[str, Any], nodes: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Resources of the nodes that may be added to `nodes`, those with GPUs first.

    Their object store is taken to be no larger than the smallest that is there, unless the configuration says.
    """
    workers = [node for node in nodes if "node:__internal_head__" not in node]
    store = min((node["object_store_memory"] for node in nodes if "object_store_memory" in node), default=0.0)
    coming = []
    for name, kind in config.get("available_node_types", {}).items():
        if name == config["head_node_type"]:
            continue
        resources = kind["resources"]
        there = sum(all(node.get(key, 0) == resources.get(key, 0) for key in ("CPU", "GPU")) for node in workers)
        missing = kind.get("max_workers", config["max_workers"]) - there
        coming += [{"object_store_memory": store} | resources for _ in range(missing)]
    coming.sort(key=lambda node: -node.get("GPU", 0))
    return coming[: max(config.get("max_workers", 0) - len(workers), 0)]


def autoscaling_config(gcs_address: str) -> dict[str, Any]:
    """The configuration of the autoscaler of the cluster at this address; empty if it has none, or not here.

    Ray's own interface to it is filled in by its vendor's platform only. So this asks as the autoscaler was asked: by
    the command line of its process, which Ray's launcher starts on the head, or by KubeRay's resource.
    """
    import psutil  # pyright: ignore[reportMissingModuleSource]  # Ray's copy, on the path since Ray's import

    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        values = dict(argument.split("=", 1) for argument in command if argument.startswith("--") and "=" in argument)
        if values.get("--gcs-address") == gcs_address and "--autoscaling-config" in values:
            with open(values["--autoscaling-config"]) as file:
                return yaml.safe_load(file)
    if "RAY_CLUSTER_NAME" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
        return kuberay_config(os.environ["RAY_CLUSTER_NAME"], os.environ["RAY_CLUSTER_NAMESPACE"])
    return {}


def kuberay_config(name: str, namespace: str) -> dict[str, Any]:
    """What KubeRay's RayCluster of this name says; empty where this pod may not read it, as only the head's may."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        resource = KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
    except OSError:
        return {}
    return _derive_autoscaling_config_from_ray_cr(resource) if resource["spec"].get("enableInTreeAutoscaling") else {}
