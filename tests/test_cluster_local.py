"""cluster/local.sh as a newcomer uses it: nodes come and go, the service answers, and none without the token."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.isolated import Isolated, isolated
from tests.processes import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow]

TERMINAL = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
"""What the header of cluster/local.yaml exports before a job is submitted."""
ASK = """
import sys, urllib.error, urllib.request
method, url, token = sys.argv[1:]
headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
data = None if method in ("GET", "DELETE") else b'{"entrypoint": "touch /tmp/never", "applications": []}'
try:
    print(urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print(0)  # nobody listens
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Isolated]:
    folder = tmp_path_factory.mktemp("home")
    with isolated(folder) as place:
        log = folder / "cluster.log"
        place.start("exec sh cluster/local.sh", log)
        wait_for(lambda: "until terminated" in log.read_text(), "the cluster is up", 240)
        yield place


def ask(cluster: Isolated, method: str, path: str, token: str = "", port: int = 8265) -> int:
    (cluster.folder / "ask.py").write_text(ASK)
    url = f"http://127.0.0.1:{port}{path}"
    return int(cluster.run(f"python {cluster.folder}/ask.py {method} {url} '{token}'", 60))


def token(cluster: Isolated) -> str:
    return (cluster.folder / ".ray/auth_token").read_text().strip()


def nodes(cluster: Isolated) -> int:
    return int(cluster.run("pgrep --count --exact raylet", code=None))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nodes?view=summary"),
        ("GET", "/api/v0/tasks"),
        ("GET", "/api/jobs/"),
        ("POST", "/api/jobs/"),
        ("GET", "/api/serve/applications/"),
        ("PUT", "/api/serve/applications/"),
        ("DELETE", "/api/serve/applications/"),
    ],
    ids=lambda value: value.split("?")[0],
)
def test_dashboard_jobs_and_serve_answer_nobody_without_the_token(cluster: Isolated, method: str, path: str) -> None:
    assert ask(cluster, method, path) == 401
    assert ask(cluster, method, path, "0" * 64) == 403
    if method == "GET":
        assert ask(cluster, method, path, token(cluster)) == 200


def test_the_token_is_for_its_owner_alone(cluster: Isolated) -> None:
    assert (cluster.folder / ".ray/auth_token").stat().st_mode & 0o077 == 0
    assert len(token(cluster)) >= 32


def test_who_does_not_say_the_token_submits_and_deploys_nothing(cluster: Isolated) -> None:
    silent = {"RAY_API_SERVER_ADDRESS": TERMINAL["RAY_API_SERVER_ADDRESS"], "RAY_AUTH_MODE": "disabled"}
    for command in ("ray job submit -- true", "serve deploy cluster/serve.yaml", "serve shutdown --yes"):
        output = cluster.run(command, 60, silent, code=None)  # `serve shutdown` exits with 0 all the same
        assert "401" in output or "authentication is enabled" in output, output


def test_nothing_listens_beyond_this_machine(cluster: Isolated) -> None:
    listening = re.findall(r"^LISTEN\s+\S+\s+\S+\s+(\S+):\d+", cluster.run("ss --listening --tcp --numeric"), re.M)
    assert listening
    assert {address.strip("[]").removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_nodes_come_for_a_run_and_vanish_after_it(cluster: Isolated, parquet: Path) -> None:
    assert nodes(cluster) == 1
    flags = f"--data {parquet} --workers 3 --epochs 2 --storage {cluster.folder}/runs"
    flags += " --image-size 16 --widths 8 16 --depths 2 --batch-size 45"
    log = cluster.folder / "submit.log"
    job = cluster.start(f"ray job submit --working-dir . -- python jobs/train.py {flags}", log, TERMINAL)
    most, end = 1, time.monotonic() + 400
    while job.poll() is None and time.monotonic() < end:
        most = max(most, nodes(cluster))
        time.sleep(0.5)
    output = log.read_text()
    assert job.returncode == 0, output
    assert 2 <= most <= 5
    assert "the cluster may grow to 4 CPU" in output
    assert "3 workers" in output
    (run,) = (cluster.folder / "runs").iterdir()
    assert json.loads((run / "report.json").read_text())["count"] == 60
    wait_for(lambda: nodes(cluster) == 1, "only the head is left", 180, pause=1)


def test_the_service_is_deployed_and_answers(cluster: Isolated) -> None:
    cluster.run("serve deploy cluster/serve.yaml", 60, TERMINAL)
    wait_for(lambda: ask(cluster, "GET", "/readyz", port=8000) == 200, "the service is ready", 240)
    cluster.run("serve shutdown --yes", 120, TERMINAL)


def test_ctrl_c_ends_the_cluster(cluster: Isolated) -> None:
    cluster.run("pkill -INT -f 'ray start --head'")
    wait_for(lambda: nodes(cluster) == 0 and ask(cluster, "GET", "/") == 0, "all is ended", 90)
