"""Hosts on this machine: each in namespaces of its own (processes, mounts, network), joined by a bridge.

What happens to a host happens for real: it loses power, its link is cut, it is given notice. Files are shared, as on a
network file system; `ray start` runs under a supervisor that starts it again, as the ones of `cluster/` do.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

from tests import isolated
from tests.processes import below, wait_for

ROOT = Path(__file__).parent.parent
NETWORK = "10.88.0"
GCS = f"{NETWORK}.1:6379"
OUTSIDE = f"{NETWORK}.254"
# How soon the head takes a silent host for dead, and a host hears of it when it can be reached again; as in `cluster/`.
HEALTH_CHECK = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_raylet_liveness_self_check_interval_ms": "5000",
}
# stdin ends when the network card is there. The supervisor is process 1 of its host.
BOOT = """
mount --bind "$1" "$RAY_TMPDIR" && read -r _ && ip link set lo up && ip addr add "$2/24" dev eth0 && ip link set eth0 up
shift 2
while :; do "$@"; sleep 1; done
"""
DRAIN = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2, gcs_pb2
address, host, seconds = sys.argv[1:]
client = GcsClient(address=address)
(node,) = [
    info.node_id.hex() for info in client.get_all_node_info().values()
    if info.node_manager_address == host and info.state == gcs_pb2.GcsNodeInfo.ALIVE
]
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
accepted, why = client.drain_node(node, reason, "spot", int((time.time() + float(seconds)) * 1000))
sys.exit(0 if accepted else why)
"""


def why_not() -> str:
    """Why hosts can't be made on this machine; empty if they can."""
    if os.geteuid() != 0:
        return "hosts need root"
    if not all(shutil.which(tool) for tool in ("setpriv", "taskset")):
        return "hosts need setpriv and taskset of util-linux"
    return isolated.why_not()


class Hosts:
    """A head without work and workers of `cpus` each, running Ray with token authentication.

    All have `env`, the head has `head_env`, too. With `redis`, what the head knows is kept outside of the hosts.
    """

    def __init__(
        self,
        workers: int = 2,
        cpus: int = 1,
        store_mb: int = 200,
        env: Mapping[str, str] = {},
        head_env: Mapping[str, str] = {},
        dashboard: bool = False,
        redis: bool = False,
    ):
        self.names = ["head", *(f"w{number}" for number in range(1, workers + 1))]
        self._cpus, self._store = cpus, store_mb << 20
        self._env, self._head_env = dict(env), dict(head_env)
        self._head_flags = ["--include-dashboard", str(dashboard).lower()]
        self._redis = redis
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._pids: dict[str, int] = {}
        self._drivers: list[subprocess.Popen[bytes]] = []
        self._silent: set[str] = set()
        self._noticed: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            self.folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))  # sockets have short names
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            (self.folder / "ray").mkdir()
            (self.folder / "home").mkdir()
            self.env = dict(os.environ) | {
                "HOME": str(self.folder / "home"),
                "RAY_TMPDIR": str(self.folder / "ray"),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "1",
                "OMP_WAIT_POLICY": "PASSIVE",  # hosts share this machine's cores
                # Who waits for an answer over a dead link gives up after so long; as in `cluster/`.
                "RAY_grpc_client_keepalive_timeout_ms": "20000",
                **haproxy(self.folder / "proxy"),
            }
            switch = self._spawn(["unshare", "-p", "-f", "--mount-proc", "-n", "--kill-child", "sleep", "infinity"])
            stack.callback(self._end, switch)
            self._switch = child_of(switch.pid)
            self._ip("link add bridge type bridge")
            self._ip(f"addr add {OUTSIDE}/24 dev bridge")
            self._ip("link set bridge up")
            if self._redis:
                self._start_redis(stack)
            for names in (["head"], self.names[1:]):  # who comes before the head tries again in ever longer steps
                for name in names:
                    self._boot(name)
                for name in names:
                    self.wait_until_joined(name, 0)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        for process in [*self._drivers, *self._processes.values()]:
            process.wait(60)

    def joined(self, name: str) -> int:
        """How often the host has joined the cluster."""
        return (self.folder / f"{name}.log").read_text().count("Ray runtime started")

    def run(self, command: list[str], log: IO[bytes] | None = None, **env: str) -> subprocess.Popen[bytes]:
        """A driver on the head, in the project's folder, which writes both outputs to the log."""
        process = self._on("head", command, stdout=log, stderr=log, env={**self.env, "RAY_ADDRESS": GCS, **env})
        self._drivers.append(process)
        return process

    def run_outside(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """A process in their network that is on no host."""
        process = self._in(self._switch, command, **options)
        self._drivers.append(process)
        return process

    def processes(self, name: str, title: str) -> list[int]:
        """Ids of the host's processes whose title begins so."""
        return below(self._pids[name], title) if name in self._pids else []

    def kill(self, name: str) -> None:
        """All of its processes at once; its network says that nobody listens any more."""
        os.kill(self._pids.pop(name), signal.SIGKILL)
        self._processes.pop(name).wait(60)
        self._silent.discard(name)
        self._noticed.discard(name)

    def start(self, name: str) -> None:
        """Start a host that was killed, and wait until it has joined."""
        before = self.joined(name)
        # The kernel takes a namespace down when it has time, and a link that was cut not soon.
        self._ip(f"link del {name}", check=False)
        self._boot(name)
        self.wait_until_joined(name, before)

    def cut(self, name: str) -> None:
        """Its link is silent from now on, in both directions."""
        self._ip(f"link set {name} down")
        self._silent.add(name)

    def heal(self, name: str) -> None:
        self._ip(f"link set {name} up")
        self._silent.discard(name)

    def drain(self, name: str, seconds: float) -> None:
        """Give notice that the host will be taken away; that it is, is the caller's to do."""
        command = [sys.executable, "-c", DRAIN, GCS, self.address(name), str(seconds)]
        assert self._on("head", command, env=self.env).wait(60) == 0
        self._noticed.add(name)

    def mend(self) -> None:
        """All hosts in the cluster, whatever happened to them, and no driver."""
        while self._drivers:
            self._end(self._drivers.pop())
        for name in [*self._silent, *self._noticed]:
            self.kill(name)
        for name in self.names:
            if name not in self._pids:
                self.start(name)

    def wait_until_joined(self, name: str, before: int) -> None:
        """Once more than `before` times: a host whose link was cut is joined anew by its supervisor."""
        wait_for(lambda: self.joined(name) > before, f"{name} in the cluster: {self.folder}/{name}.log", 180)

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def _start_redis(self, stack: ExitStack) -> None:
        password = secrets.token_hex(32)
        config = self.folder / "redis.conf"
        config.write_text(f'bind {OUTSIDE}\nrequirepass {password}\nsave ""\ndir {self.folder}\n')
        with open(self.folder / "redis.log", "wb") as log:
            process = self._in(self._switch, ["redis-server", str(config)], stdout=log)
        stack.callback(self._end, process)
        wait_for(lambda: "Ready to accept" in (self.folder / "redis.log").read_text(), "Redis")
        self._head_env["RAY_REDIS_ADDRESS"] = f"{OUTSIDE}:6379"
        self._head_flags += ["--redis-password", password]

    def _core(self, name: str) -> str:
        """Workers have a core each, as far as there are cores."""
        cores = sorted(os.sched_getaffinity(0))
        if name == "head":
            return ",".join(map(str, cores))
        return str(cores[self.names.index(name) % len(cores)])

    def _boot(self, name: str) -> None:
        place = self.folder / name
        place.mkdir(exist_ok=True)
        address, head = self.address(name), name == "head"
        ray = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"),
            *("--node-ip-address", address, "--object-store-memory", str(self._store)),
            *("--num-cpus", "0" if head else str(self._cpus), "--num-gpus", "0", "--include-log-monitor", "false"),
            *(["--head", "--port", "6379", *self._head_flags] if head else ["--address", GCS]),
        ]
        boot = ["bash", "-c", BOOT, "boot", str(place), address, *ray]
        with open(self.folder / f"{name}.log", "ab") as log:
            process = self._spawn(
                [
                    *("nsenter", "-t", str(self._switch), "-p", "-m", "-n", "taskset", "-c", self._core(name)),
                    *("unshare", "-p", "-f", "--mount-proc", "-n", "--kill-child", *boot),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**self.env, **HEALTH_CHECK, **self._env, **(self._head_env if head else {})},
            )
        self._processes[name] = process
        self._pids[name] = child_of(child_of(process.pid))
        self._ip(f"link add {name} type veth peer name eth0 netns {self._pids[name]}")
        self._ip(f"link set {name} master bridge up")
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()

    def _ip(self, command: str, check: bool = True) -> None:
        enter = ["nsenter", "-t", str(self._switch), "-n"]
        subprocess.run([*enter, "ip", *command.split()], check=check, capture_output=not check)

    def _on(self, name: str, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return self._in(self._pids[name], command, **options)

    def _in(self, pid: int, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """In the namespaces of that process."""
        place = ["nsenter", "-t", str(pid), "-p", "-m", "-n", f"--wdns={ROOT}"]
        return self._spawn([*place, "setpriv", "--pdeathsig", "KILL", *command], **options)

    def _spawn(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Dies with this thread, and with it all that is in namespaces below."""
        return subprocess.Popen[bytes](["setpriv", "--pdeathsig", "KILL", *command], **options)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait(60)


def child_of(pid: int) -> int:
    """The only child of a process, once there is one."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return int(wait_for(children.read_text, f"a child of {pid}").split()[0])


def haproxy(folder: Path) -> dict[str, str]:
    """Where Serve puts the files of its proxy, in a folder for each node."""
    names = {"CONFIG_FILE_LOC": "config", "SOCKET_PATH": "admin", "METRICS_SOCKET_PATH": "metrics"}
    names |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "state"}
    return {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in names.items()}
