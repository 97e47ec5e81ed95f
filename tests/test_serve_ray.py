"""The service behind Ray Serve, as a user starts it: jobs/serve.py in a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import pytest
import yaml

from cifar.config import ConfigError
from cifar.serve.config import ServeConfig
from cifar.serve.deployment import build, gpus_of, replicas_of
from cifar.serve.keys import HEADER, VARIABLE
from cifar.store import Store
from jobs import serve
from tests.images import png
from tests.processes import below, wait_for
from tests.test_serve import save

ROOT = Path(__file__).parent.parent
REPLICA = "ray::ServeReplica:"
KEY = "key-of-this-service-0123456789"
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(*flags: str) -> Iterator[tuple[httpx.Client, int]]:
    """A client of the service, and the process id of its job."""
    port = free_port()
    command = [sys.executable, "jobs/serve.py", "--port", str(port), "--device", "cpu", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        line = job.stdout.readline()
        assert f"http://127.0.0.1:{port}/" in line
        assert ("asks for an API key" in line) == ("--api-key-file" in flags)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client, job.pid
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait(30)


class Load(threading.Thread):
    """Requests one after the other until it is stopped."""

    def __init__(self, client: httpx.Client) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.statuses: list[int] = []
        self.versions: set[str] = set()
        self.running = True

    def run(self) -> None:
        while self.running:
            try:
                answer = self.client.post("/predict", content=png(0), headers={"content-type": "image/png"})
            except httpx.TransportError:
                self.statuses.append(0)
                continue
            self.statuses.append(answer.status_code)
            if answer.status_code == 200:
                self.versions.add(answer.json()["version"])


def test_versions_change_and_replicas_die_under_load(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    first = store.publish(str(save(tmp_path / "one", 1)), "flowers")
    store.promote(first)
    flags = ("--model", "flowers", "--store", store.path, "--replicas", "2", "--poll-seconds", "0.2")
    with served(*flags) as (client, job):
        loads = [Load(client) for _ in range(4)]
        for load in loads:
            load.start()
        second = store.publish(str(save(tmp_path / "two", 2)), "flowers")
        store.promote(second)
        wait_for(lambda: all(second.version in load.versions for load in loads), "the new version")
        store.roll_back("flowers")
        wait_for(lambda: client.get("/models").json()["default"] == first.version, "the old version")
        time.sleep(1)
        assert {status for load in loads for status in load.statuses} == {200}

        replicas = [*re.findall(r'cifar_requests_total\{replica="(\w+)",route="/predict"', client.get("/metrics").text)]
        assert len(set(replicas)) == 2  # any replica tells the counts of all
        os.kill(below(job, REPLICA)[0], signal.SIGKILL)
        wait_for(lambda: len(below(job, REPLICA)) == 2, "a new replica")
        for load in loads:
            load.running = False
            load.join()
        failed = [status for load in loads for status in load.statuses if status != 200]
        assert len(failed) <= len(loads)  # what was in flight on it
    wait_for(lambda: not below(job, REPLICA), "the end of all replicas")


def test_the_model_in_the_box_is_served_to_who_has_a_key_and_nothing_stays_behind(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    with served("--api-key-file", str(file)) as (client, _):
        for path in ("/models", "/metrics", "/v2/models/cifar10"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        refused = client.post("/predict", files={"files": ("x.png", png(0))}, headers={HEADER: "wrong"})
        assert refused.status_code == 401
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=5) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 30000000\r\n\r\n")
            assert slow.recv(12) == b"HTTP/1.1 401", "the body is not waited for"
        assert client.get("/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        client.headers[HEADER] = KEY
        wait_for(lambda: 'status="401"' in client.get("/metrics").text, "the count of refusals")
        (answer,) = client.post("/predict", files={"files": ("x.png", png(0))}).json()["predictions"]
        assert len(answer["probabilities"]) == 10
        assert client.get("/").status_code == 200
        assert client.get("/v2/health/ready").status_code == 200
        listening = subprocess.run(["ss", "-ltnp"], capture_output=True, text=True, check=False).stdout
        for line in listening.splitlines():
            assert "haproxy" not in line or "127.0.0.1:" in line
    left = subprocess.run(["pgrep", "-f", "cifar-haproxy"], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 2
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err


def test_the_file_for_serve_deploy_names_what_exists() -> None:
    (application,) = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())["applications"]
    assert application["import_path"] == "cifar.serve.deployment:build"
    assert build(application["args"]) is not None
    with pytest.raises(ValueError, match="unknown replica;"):
        build({"replica": 2})


def test_what_serve_lets_other_machines_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever `serve deploy`, or who started Serve before, made it listen at."""
    listening = SimpleNamespace(http_config=SimpleNamespace(host="0.0.0.0"))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1})
    monkeypatch.setattr("cifar.serve.deployment._get_global_client", lambda **_: listening)
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0: .*api-key-file"):
        build({})
    (tmp_path / "keys").write_text(KEY)
    assert build({"insecure": True}) is not None
    assert build({"api_key_file": str(tmp_path / "keys")}) is not None
    monkeypatch.setenv(VARIABLE, KEY)
    assert build({}) is not None
    monkeypatch.delenv(VARIABLE)
    for listening.http_config.host in ("127.0.0.1", None):
        assert build({}) is not None


@pytest.mark.parametrize(
    ("device", "gpus", "expected"), [("auto", 2, 1), ("auto", 1, 0), ("auto", 0, 0), ("cpu", 8, 0), ("cuda", 0, 1)]
)
def test_a_replica_gets_a_gpu_where_there_is_one_for_each(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, expected: int
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8, "GPU": gpus})
    assert gpus_of(ServeConfig(replicas="1:2", device=device)) == expected


@pytest.mark.parametrize(
    ("cpus", "gpus", "gigabytes", "expected"),
    [(2, 0, 16, "2"), (16, 0, 64, "4"), (8, 0, 9, "2"), (1, 0, 1, "1"), (8, 3, 64, "3")],
)
def test_auto_is_a_replica_for_each_gpu_or_core_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int, gigabytes: int, expected: str
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": cpus, "GPU": gpus, "memory": gigabytes * 2**30})
    config = ServeConfig()
    assert replicas_of(config, gpus_of(config)) == expected
    assert replicas_of(ServeConfig(replicas="1:3"), 0) == "1:3"
