"""What a cluster may grow to: from the launcher's file, from KubeRay's resource, and not beyond the limits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay import node_provider

from cifar.autoscaler import autoscaling_config, coming_nodes

HEAD = {"CPU": 0.0, "node:__internal_head__": 1.0, "object_store_memory": 3e9}
GPU, CPU = {"CPU": 8, "GPU": 1}, {"CPU": 16}
CONFIG: dict[str, Any] = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "cpu": {"resources": CPU, "max_workers": 3},
        "gpu": {"resources": GPU},
    },
}


def sizes(nodes: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(node["CPU"], node.get("GPU", 0)) for node in nodes]


def test_an_empty_cluster_may_add_all_up_to_its_limit_gpus_first() -> None:
    assert sizes(coming_nodes(CONFIG, [HEAD])) == [(8, 1)] * 5
    types = CONFIG["available_node_types"] | {"gpu": {"resources": GPU, "max_workers": 2}}
    config = CONFIG | {"max_workers": 8, "available_node_types": types}
    assert sizes(coming_nodes(config, [HEAD])) == [(8, 1)] * 2 + [(16, 0)] * 3


def test_nodes_that_are_there_do_not_come_again() -> None:
    there = [HEAD, {"CPU": 8.0, "GPU": 1.0, "object_store_memory": 9e9}, {"CPU": 16.0}]
    assert sizes(coming_nodes(CONFIG | {"max_workers": 9}, there)) == [(8, 1)] + [(16, 0)] * 2
    assert coming_nodes(CONFIG | {"max_workers": 2}, there) == []


def test_a_node_that_comes_is_taken_to_have_the_smallest_object_store() -> None:
    assert {node["object_store_memory"] for node in coming_nodes(CONFIG, [HEAD, CPU])} == {3e9}


def test_a_cluster_without_an_autoscaler_does_not_grow() -> None:
    assert coming_nodes({}, [HEAD]) == []
    assert autoscaling_config("127.0.0.1:1") == {}


def test_the_autoscaler_of_this_cluster_is_asked_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-c", "input()", "--gcs-address=10.0.0.1:6379"]
    with subprocess.Popen([*command, f"--autoscaling-config={tmp_path}/config.yaml"], stdin=subprocess.PIPE) as process:
        assert autoscaling_config("10.0.0.1:6379") == CONFIG
        assert autoscaling_config("10.0.0.2:6379") == {}
        process.kill()


def test_kuberay_is_asked_for_its_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(__file__).parent.parent / "cluster/kuberay/raycluster.yaml"
    resource = yaml.safe_load(file.read_text())
    resource["metadata"]["namespace"] = "images"
    asked = []

    def get(client: Any, path: str) -> Any:
        asked.append((client._namespace, path))
        return resource

    monkeypatch.setattr(node_provider, "load_k8s_secrets", lambda: ({}, "", None))
    monkeypatch.setattr(node_provider.KubernetesHttpApiClient, "get", get)
    for name, value in (
        ("RAY_CLUSTER_NAME", "cifar"),
        ("RAY_CLUSTER_NAMESPACE", "images"),
        ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    config = autoscaling_config("10.0.0.1:6379")
    assert asked == [("images", "rayclusters/cifar")]
    assert sizes(coming_nodes(config, [HEAD])) == [(7, 1)] * 4 + [(7, 0)] * 4
    del resource["spec"]["enableInTreeAutoscaling"]
    assert autoscaling_config("10.0.0.1:6379") == {}


def test_a_pod_that_may_not_ask_kubernetes_sees_no_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.setenv(name, "none")
    assert not os.path.exists(node_provider.IN_CLUSTER_TOKEN_PATH)
    assert autoscaling_config("10.0.0.1:6379") == {}
