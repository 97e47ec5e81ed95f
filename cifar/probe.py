"""Whether a folder or URI can be used where a job needs it, found out before anything is computed."""

import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cifar.config import FREE_SPACE, ConfigError, RunFailed
from cifar.data.prepared import absolute, exists, filesystem, join, read_file, write_file

SHARED = "name a folder that all nodes share, or an s3:// or gs:// URI"
_ANSWER_SECONDS = 60.0
_REMEDIES = {
    "NO_SUCH_BUCKET": "make the bucket, or correct its name",
    "ACCESS_DENIED": "check the credentials, and what they may do there",
    "INVALID_ACCESS_KEY_ID": "check the credentials",
    "SIGNATURE_DOES_NOT_MATCH": "check the credentials",
    "Read-only file system": "name a folder that can be written",
    "Permission denied": "name a folder that you may write to",
    "No space left": "free some space, or name another folder",
}


def other_nodes() -> list[str]:
    """Ids of the nodes of Ray's cluster, without this process's own, that have a processor to compute with."""
    import ray  # takes a second, which jobs that need no Ray do without

    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    return [node["NodeID"] for node in nodes if {"CPU", "GPU"} & node["Resources"].keys()]


def probe(path: str, flag: str, nodes: Sequence[str] = ()) -> None:
    """Write a small file to a folder or URI, read it back and delete it; the same from each of Ray's `nodes`, by id.

    What one process writes, all others have to see. Nothing is left behind. ConfigError names the flag, the node and
    the remedy.
    """
    path = absolute(path)
    token = f".probe-{uuid.uuid4().hex}"
    answers = {node: f"{token}-{number}" for number, node in enumerate(nodes)}
    made = "://" not in path and not os.path.exists(path)
    problem, problems = _use(path, token), {}
    try:
        if not problem:
            problems = _ask(_use, {node: (path, answer, token) for node, answer in answers.items()})
        for node in [node for node, found in problems.items() if not found]:
            if read_file(join(path, answers[node])) is None:
                problems[node] = f"writes files there that this process does not see; {SHARED}"
    finally:
        undeleted = [_delete(path, name) for name in (token, *answers.values())]
        if made:
            with suppress(OSError):
                os.rmdir(path)
    if problem := problem or undeleted[0]:
        raise ConfigError(f"{flag} {path}: {problem}")
    _refuse(f"{flag} {path}", problems)


def probe_source(path: str, flag: str, nodes: Sequence[str]) -> None:
    """Each of Ray's `nodes` has to see this folder, file or URI, which this process reads; else ConfigError."""
    path = absolute(path)
    _refuse(f"{flag} {path}", _ask(_see, dict.fromkeys(nodes, (path,))))


def require_seen(path: str, name: str, flag: str) -> None:
    """ConfigError unless this process, of a node that may have come late, sees a file that its job has written."""
    if not exists(join(path, name)):
        raise ConfigError(f"{flag} {path}: {_where()} does not see what the job wrote there; {SHARED}")


def require_room(path: str, folder: Path) -> None:
    """RunFailed unless what is in a local folder fits on the disk of `path`; of a URI nothing is known."""
    need = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if "://" not in path and (free := shutil.disk_usage(path).free) < need:
        raise RunFailed(
            f"{path}: no space left for a checkpoint of {need / 2**20:.1f} MiB ({free / 2**20:.1f} MiB are free); "
            f"{FREE_SPACE} from the last checkpoint"
        )


def _use(path: str, name: str, expected: str = "") -> str:
    """Look for the file `expected`, write `name` and read it back, on any node; what is wrong, or nothing."""
    doing = "read"
    try:
        if expected and read_file(join(path, expected)) is None:
            return f"does not see what this process writes there; {SHARED}"
        doing = "written"
        write_file(join(path, name), name.encode())
        doing = "read"
        return "" if read_file(join(path, name)) == name.encode() else "what is written there is not what is read"
    except (OSError, ConfigError) as error:
        return _explain(path, doing, error)


def _delete(path: str, name: str) -> str:
    files, file = filesystem(join(path, name))
    try:
        files.delete_file(file)
    except FileNotFoundError:
        pass
    except OSError as error:
        return _explain(path, "deleted from", error)
    return ""


def _explain(path: str, doing: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    otherwise = "check its address and your access" if "://" in path else "name another folder"
    remedy = next((remedy for cause, remedy in _REMEDIES.items() if cause in text), otherwise)
    return f"cannot be {doing} ({text}); {remedy}"


def _see(path: str) -> str:
    """What is wrong with reading a path on this node, or nothing."""
    try:
        return "" if exists(path) else f"does not see it; {SHARED}"
    except ConfigError as error:
        return f"cannot read it ({error})"


def _ask(question: Any, arguments: dict[str, tuple[Any, ...]]) -> dict[str, str]:
    """The answers of the nodes, all asked at once; nothing of one that has left."""
    if not arguments:
        return {}
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=0)(question)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*values): node
        for node, values in arguments.items()
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    late = f"has not answered in {_ANSWER_SECONDS:.0f} s; look at it with `ray status`"
    problems = {asked[ref]: late for ref in silent}
    for ref in answered:
        try:
            problems[asked[ref]] = ray.get(ref)
        except RayError as error:
            if asked[ref] in other_nodes():
                cause = str(error).strip().splitlines()[-1]
                problems[asked[ref]] = f"cannot run a task ({cause}); are this package and its dependencies there?"
    return problems


def _refuse(what: str, problems: dict[str, str]) -> None:
    bad = {node: problem for node, problem in problems.items() if problem}
    if not bad:
        return
    import ray

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    node, problem = next(iter(bad.items()))
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    raise ConfigError(f"{what}: node {addresses.get(node, node)}{more} {problem}")


def _where() -> str:
    import ray

    return f"node {ray.util.get_node_ip_address()}" if ray.is_initialized() else "this process"
