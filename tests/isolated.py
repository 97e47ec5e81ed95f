"""Commands in namespaces of their own, so that clusters by `ray start` neither meet another one nor outlive a test."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
NAMESPACES = ["--pid", "--fork", "--mount-proc", "--kill-child", "--net"] + (
    [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
)


class Isolated:
    """Processes, mounts and a network of their own: loopback is up, and nothing else is reached."""

    def __init__(self, leader: int, folder: Path, ray_folder: str) -> None:
        self.folder = folder
        self.leader = leader
        """The id here of the process that is number 1 there."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CIFAR_API"))}
        self.env = kept | {
            "HOME": str(folder),
            "RAY_TMPDIR": ray_folder,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            # Two processes of torch on two cores wait for each other in turns otherwise.
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def start(self, command: str, log: Path, env: Mapping[str, str] = {}, cwd: Path = PROJECT) -> subprocess.Popen:
        """A bash command that goes on; it writes to the log. Killing it by its id leaves its children alone."""
        enter = ["nsenter", f"--target={self.leader}", "--pid", "--mount", "--net", f"--wdns={cwd}"]
        if os.geteuid():
            enter += ["--user", "--preserve-credentials"]
        with log.open("wb") as output:
            return subprocess.Popen(
                [*enter, "bash", "-c", command],
                env=self.env | dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(
        self,
        command: str,
        seconds: float = 60,
        env: Mapping[str, str] = {},
        cwd: Path = PROJECT,
        code: int | None = 0,
    ) -> str:
        """What a bash command writes, stderr included. It must exit with the code, whatever it is if None."""
        # A file, not a pipe: who waits for the end of a pipe waits for daemons that inherited it, too.
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".log")
        os.close(handle)
        process = self.start(command, Path(name), env, cwd)
        try:
            ended = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{command}: not within {seconds} s\n{Path(name).read_text()}") from None
        output = Path(name).read_text()
        assert code is None or ended == code, f"{command}: exit code {ended}\n{output}"
        return output


@contextmanager
def isolated(folder: Path) -> Iterator[Isolated]:
    """Namespaces whose HOME is the folder. All that was started in them ends with the block. Skips where the system
    permits none."""
    refused = why_not()
    if refused:
        pytest.skip(refused)
    # Ray's sockets lie there, and the path of one has at most 107 characters.
    ray_folder = tempfile.mkdtemp(prefix="ray-")
    # Bash, unlike sleep, buries the orphans that number 1 inherits.
    command = "ip link set lo up; echo up; sleep infinity; :"
    process = subprocess.Popen(["unshare", *NAMESPACES, "bash", "-c", command], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        yield Isolated(int(children.read_text()), folder, ray_folder)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(ray_folder, ignore_errors=True)


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        return "needs unshare and nsenter of util-linux, and ip of iproute2"
    tried = subprocess.run(["unshare", *NAMESPACES, "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    return f"needs namespaces: {tried.stderr.strip()}" if tried.returncode else ""
