"""The cluster, seen from one of its nodes: what the others have, whether the plan fits, whether storage is shared."""

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar.autoscaler import cluster_nodes
from cifar.cluster import make_plan
from cifar.config import Config, ConfigError
from cifar.doctor.dashboard import ask, exposure
from cifar.doctor.finding import Finding, ok, problem
from cifar.doctor.machine import IMPORTS, needed
from cifar.probe import other_nodes, probe

FREE_BYTES = 2 << 30
CLOCK_SECONDS = 60.0
"""S3 refuses requests whose time is off by 15 minutes; a minute is a clock that nobody sets."""
ANSWER_SECONDS = 60.0
SAME = ("ray", "torch", "torchvision", "numpy", "pyarrow")
"""Packages whose versions must be alike where objects are pickled and networks are trained together."""


def check_cluster(config: Config) -> list[Finding]:
    """Look at the cluster that Ray is connected to, for a run by `config`."""
    facts = ask_nodes()
    return [*check_nodes(facts), check_plan(config), check_storage(config), *check_exposure()]


def ask_nodes() -> dict[str, dict[str, Any] | str]:
    """By address: what `look_around` says there, or why there is no answer."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(look_around)
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    asked = {}
    for identifier, node in nodes.items():
        place = NodeAffinitySchedulingStrategy(identifier, soft=False)
        asked[task.options(scheduling_strategy=place).remote(time.time(), needed(), node["Resources"])] = node
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    facts: dict[str, dict[str, Any] | str] = {}
    for ref in answered:
        try:
            answer: Any = ray.get(ref)
        except Exception as error:  # whatever a node with other packages raises
            answer = f"cannot run this package's code: {str(error).strip().splitlines()[-1]}"
        facts[_name(asked[ref])] = answer
    return facts | {_name(asked[ref]): f"did not answer in {ANSWER_SECONDS:.0f} s" for ref in silent}


def _name(node: Mapping[str, Any]) -> str:
    """Several nodes of a machine have one address."""
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def look_around(asked_at: float, packages: Sequence[str], resources: Mapping[str, float]) -> dict[str, Any]:
    """Runs on a node; `resources` are what Ray believes it to have."""
    missing = [name for name in packages if importlib.util.find_spec(IMPORTS.get(name, name)) is None]
    versions = {"python": platform.python_version()}
    for name in SAME:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    cuda = None
    if resources.get("GPU") and not missing:
        import torch

        cuda = torch.cuda.is_available() or torch.cuda.device_count() > 0
    return {
        "versions": versions,
        "missing": missing,
        "late": time.time() - asked_at,
        "free": shutil.disk_usage(tempfile.gettempdir()).free,
        "cpus": resources.get("CPU", 0.0),
        "cores": len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1,
        "cuda": cuda,
    }


def check_nodes(facts: Mapping[str, dict[str, Any] | str]) -> list[Finding]:
    """Findings on all nodes together; those with the same trouble are named in one line."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    versions: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node, fact in facts.items():
        if isinstance(fact, str):
            found["problem", "nodes", fact].append(node)
            continue
        for package, number in fact["versions"].items():
            versions[package, number].append(node)
        if fact["missing"]:
            remedy = "install requirements.lock there, or use the image of cluster/Dockerfile"
            found["problem", "packages", f"without {', '.join(fact['missing'])}; {remedy}"].append(node)
        if fact["cuda"] is False:
            remedy = "install a torch with CUDA and a driver that suits it"
            found["problem", "GPU", f"Ray has a GPU that torch does not see; {remedy}"].append(node)
        if fact["free"] < FREE_BYTES:
            text = f"less than {FREE_BYTES >> 30} GiB free in the temporary folder, where Ray spills; free some"
            found["warning", "disk", text].append(node)
        if fact["late"] > CLOCK_SECONDS or fact["late"] < -CLOCK_SECONDS:
            found["warning", "clock", "more than a minute off this node's; set it by NTP, or S3 refuses it"].append(
                node
            )
        if fact["cpus"] > fact["cores"]:
            text = "Ray counts more CPUs than there are cores, whose threads get in each other's way"
            found["warning", "CPU", text].append(node)
    for package in ("python", *SAME):
        numbers = {number: nodes for (name, number), nodes in versions.items() if name == package}
        if len(numbers) > 1:
            told = "; ".join(f"{number} on {_list(nodes)}" for number, nodes in numbers.items())
            found["problem", "versions", f"{package} differs: {told}; use one image or one requirements.lock"] = []
    findings = [
        Finding(level=level, check=check, text=f"{_list(nodes)}: {text}" if nodes else text)  # pyright: ignore[reportArgumentType]
        for (level, check, text), nodes in found.items()
    ]
    alike = ok("nodes", f"{len(facts)} with the same versions and all packages")
    return findings or [alike]


def _list(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")


def check_plan(config: Config) -> Finding:
    """Resources alone: how much the data weigh is known once they are prepared."""
    if config.run.workers == "0":
        return ok("plan", "--workers 0 trains in its own process")
    try:
        return ok("plan", make_plan(config, 0, *cluster_nodes()).workers)
    except ConfigError as error:
        return problem("plan", str(error))


def check_storage(config: Config) -> Finding:
    try:
        probe(config.run.storage, "--storage", other_nodes())
    except ConfigError as error:
        return problem("storage", str(error))
    return ok("storage", f"{config.run.storage}: written and read by all nodes that compute")


def check_exposure() -> list[Finding]:
    """Whether the dashboard lets strangers in; nothing where there is none."""
    from ray._private.worker import global_worker  # Ray has no other way to ask

    address = getattr(global_worker.node, "webui_url", "")
    if not address:
        return []
    url = f"http://{address}"
    status = ask(url, "").status
    return [exposure(url, status)] if status else []
