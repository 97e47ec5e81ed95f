"""What the service promises when something happens to a host of its cluster, tried under load on hosts of this
machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cifar.serve.keys import HEADER
from cifar.serve.run import find_haproxy
from cifar.store import Store
from tests.hosts import ROOT, Hosts, why_not
from tests.images import png
from tests.processes import wait_for
from tests.test_cluster_files import environment, resource
from tests.test_serve import save

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow]
# What the head knows is kept in a folder.
ROCKSDB = {"RAY_gcs_storage": "rocksdb"}
KEY = "key-of-this-service-0123456789"
REPLICA = "ray::ServeReplica"
# A client for each address, one request after the other. A request that takes 10 s has failed.
LOAD = """
import http.client, json, sys, threading, time
image, log, headers, *addresses = sys.argv[1:]
body = open(image, "rb").read()
def ask(address):
    try:
        connection = http.client.HTTPConnection(address, 8000, timeout=10)
        connection.request("POST", "/predict", body, json.loads(headers))
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content)["version"] if answer.status == 200 else repr(content)
    except (OSError, http.client.HTTPException) as error:
        return 0, repr(error)
def load(address):
    while True:
        at = time.time()
        status, said = ask(address)
        lines.write(json.dumps([address, at, time.time(), status, said]) + chr(10))
        time.sleep(0.02)
lines = open(log, "w", buffering=1)
for address in addresses:
    threading.Thread(target=load, args=[address]).start()
"""


class Answer(NamedTuple):
    address: str
    at: float
    """Seconds since the epoch at which it was asked for."""
    until: float
    status: int
    said: str
    """The version, or what went wrong."""


class Load:
    """Clients that are on no host, one for the proxy of each name."""

    def __init__(self, service: "Service", *names: str):
        self._log = service.folder / f"load-{time.monotonic_ns()}"
        self._hosts = service.hosts
        headers = json.dumps({"content-type": "image/png", HEADER: KEY})
        image = service.folder / "image.png"
        image.write_bytes(png(0))
        command = [sys.executable, "-c", LOAD, str(image), str(self._log), headers, *map(self._hosts.address, names)]
        self._process = self._hosts.run_outside(command)
        wait_for(lambda: all(self.answers(name) for name in names), "an answer to each")

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait(60)

    def all(self, name: str) -> list[Answer]:
        text = self._log.read_text() if self._log.exists() else ""
        answers = [Answer(*json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [answer for answer in answers if answer.address == self._hosts.address(name)]

    def answers(self, name: str) -> list[Answer]:
        return [answer for answer in self.all(name) if answer.status == 200]

    def failed(self, name: str) -> list[Answer]:
        return [answer for answer in self.all(name) if answer.status != 200]

    def wait_for_version(self, version: str, *names: str) -> None:
        for name in names:
            wait_for(lambda name=name: self.answers(name)[-1].said == version, f"{version} by {name}", 60, pause=0.2)


class Service:
    """cluster/serve.yaml by `serve deploy`, with keys, and a published model whose champion it follows."""

    def __init__(self, hosts: Hosts, folder: Path, replicas: int):
        self.hosts, self.folder = hosts, folder
        self._replicas = replicas
        self._store = Store(str(folder / "store"))
        self._promoted = 0
        keys = folder / "keys"
        keys.write_text(KEY)
        keys.chmod(0o600)
        settings = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
        settings["http_options"]["host"] = "0.0.0.0"
        args = {"model": "flowers", "store": self._store.path, "replicas": str(replicas), "api_key_file": str(keys)}
        settings["applications"][0]["args"] = args
        (folder / "serve.yaml").write_text(yaml.safe_dump(settings))
        self.promote()
        self.deploy()

    def promote(self) -> str:
        """A new champion."""
        self._promoted += 1
        version = self._store.publish(str(save(self.folder / f"{self._promoted}", self._promoted)), "flowers")
        self._store.promote(version)
        return version.version

    def deploy(self) -> None:
        code, said = self._serve("deploy", str(self.folder / "serve.yaml"))
        assert code == 0, said
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """All replicas run, and the proxies of the head and of their hosts answer."""

        def ready() -> bool:
            replicas = self.replicas()
            places = ["head", *(name for name, count in replicas.items() if count)]
            running = f"RUNNING: {self._replicas}"
            return (
                sum(replicas.values()) == self._replicas
                and all(map(self.healthy, places))
                and running in self._serve("status")[1]
            )

        wait_for(ready, "all replicas and their proxies", 240, pause=0.5)

    def spread(self) -> None:
        """A replica on each of the workers, as they are on a new cluster."""
        if max(self.replicas().values()) > 1:
            self._serve("shutdown", "--yes")
            self.deploy()

    def replicas(self) -> dict[str, int]:
        """How many are on each worker."""
        return {name: len(self.replicas_of(name)) for name in self.hosts.names[1:]}

    def replicas_of(self, *names: str) -> list[int]:
        """Process ids."""
        return [pid for name in names for pid in sorted(self.hosts.processes(name, REPLICA))]

    def _serve(self, *command: str) -> tuple[int, str]:
        """Exit code and output."""
        log = self.folder / "cli.log"
        with log.open("wb") as output:
            process = self.hosts.run([str(Path(sys.executable).with_name("serve")), *command], output)
        return process.wait(120), log.read_text()

    def healthy(self, name: str) -> bool:
        url = f"http://{self.hosts.address(name)}:8000/-/healthz"
        command = [sys.executable, "-c", f"import urllib.request; urllib.request.urlopen({url!r}, timeout=3)"]
        return self.hosts.run_outside(command, stderr=subprocess.DEVNULL).wait(60) == 0


@contextmanager
def served(folder: Path, workers: int, **options: Any) -> Iterator[Service]:
    """A replica on each of the workers, and proxies with the settings of cluster/kuberay/rayservice.yaml."""
    if reason := why_not():
        pytest.skip(reason)
    head = resource("RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    env = {name: value for name, value in environment(head).items() if name.startswith("RAY_SERVE_")} | {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(ROOT / "cifar/serve/haproxy.sh"),
        "CIFAR_HAPROXY": find_haproxy() or pytest.skip("needs HAProxy"),
    }
    with Hosts(workers, cpus=2, env=env, dashboard=True, **options) as hosts:
        yield Service(hosts, folder, replicas=workers)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serve")
    with served(folder, 2, head_env=ROCKSDB | {"RAY_gcs_storage_path": str(folder / "gcs")}) as service:
        yield service


@pytest.fixture
def service(cluster: Service) -> Service:
    cluster.hosts.mend()
    cluster.wait_until_ready()
    return cluster


def test_a_host_is_lost_and_what_it_had_not_answered_fails(service: Service) -> None:
    service.spread()
    with Load(service, "head", "w1") as load:
        service.hosts.kill("w2")
        wait_for(lambda: service.replicas() == {"w1": 2, "w2": 0}, "the replica elsewhere", pause=0.2)
        service.wait_until_ready()
        for name in ("head", "w1"):
            assert len(load.failed(name)) <= 1, "one client, one request at a time"


def test_a_host_gives_notice_and_no_answer_is_lost(service: Service) -> None:
    staying, leaving = sorted(("w1", "w2"), key=service.replicas().__getitem__)
    with Load(service, "head") as load:
        service.hosts.drain(leaving, 600)
        wait_for(lambda: service.replicas() == {leaving: 0, staying: 2}, "all replicas on the other", pause=0.2)
        service.hosts.kill(leaving)
        service.wait_until_ready()
        assert not load.failed("head")


def test_a_replica_is_killed_and_what_it_had_not_answered_fails(service: Service) -> None:
    before = service.replicas_of("w1", "w2")
    with Load(service, "head") as load:
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: service.replicas_of("w1", "w2") != before, "its end", pause=0.05)
        service.wait_until_ready()
        assert len(load.failed("head")) <= 1, "one client, one request at a time"


def test_the_head_is_lost_and_workers_answer_all_the_time(service: Service) -> None:
    lose_head(service)


def test_the_head_is_lost_where_redis_keeps_what_it_knows(tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server")
    with served(tmp_path, 1, redis=True) as service:
        lose_head(service)


def lose_head(service: Service) -> None:
    """Its own proxy is away as long as it is; replicas go on and follow the champion before and after."""
    workers = service.hosts.names[1:]
    before = service.replicas_of(*workers)
    (name, *_) = [name for name, count in service.replicas().items() if count]
    with Load(service, "head", name) as load:
        service.hosts.kill("head")
        load.wait_for_version(service.promote(), name)
        service.hosts.start("head")
        service.wait_until_ready()
        load.wait_for_version(service.promote(), "head", name)
        assert not load.failed(name)
    assert service.replicas_of(*workers) == before
