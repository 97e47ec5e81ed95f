"""What the doctor finds, and that it says what to do."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cifar.doctor.cluster import check_nodes
from cifar.doctor.dashboard import check_dashboard, exposure
from cifar.doctor.machine import check_packages, check_working_dir, needed
from cifar.doctor.submitted import findings_of

TOKEN = "0123456789abcdef"


@pytest.fixture
def dashboard() -> Iterator[str]:
    """Answers as Ray's does to who has the token, and is of version 2.60.0."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization")
            self.send_response(200 if given == f"Bearer {TOKEN}" else 403 if given else 401)
            self.end_headers()
            self.wfile.write(b'{"version": "4", "ray_version": "2.60.0"}')

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_token_that_is_sent_and_accepted_is_well(dashboard: str) -> None:
    found = check_dashboard(dashboard, {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token"}, "2.60.0")
    assert {finding.level for finding in found} == {"ok"}


@pytest.mark.parametrize(
    ("environment", "version", "text"),
    [
        ({"RAY_AUTH_TOKEN": TOKEN}, "2.60.0", "export RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "other", "RAY_AUTH_MODE": "token"}, "2.60.0", "is not this cluster's"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere", "RAY_AUTH_MODE": "token"}, "2.60.0", "put the cluster's into"),
        ({"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token"}, "2.59.0", "the cluster has 2.60.0, this machine 2.59.0"),
    ],
)
def test_what_keeps_a_job_from_being_submitted(
    dashboard: str, environment: dict[str, str], version: str, text: str
) -> None:
    (found,) = [f for f in check_dashboard(dashboard, environment, version) if f.level == "problem"]
    assert text in found.text


def test_a_dashboard_that_is_not_there() -> None:
    (found,) = check_dashboard("http://127.0.0.1:9", {}, "2.60.0")
    assert found.level == "problem"
    assert "no dashboard answers" in found.text


def test_a_token_file_that_others_may_read(dashboard: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    found = check_dashboard(dashboard, {"RAY_AUTH_TOKEN_PATH": str(file), "RAY_AUTH_MODE": "token"}, "2.60.0")
    assert [f.text for f in found if f.level == "warning"] == [
        f"others on this machine may read {file}; chmod 600 {file}"
    ]


def test_an_open_dashboard_is_a_problem_beyond_this_machine() -> None:
    assert exposure("http://10.0.0.1:8265", 200).level == "problem"
    assert exposure("http://127.0.0.1:8265", 200).level == "warning"
    assert exposure("http://127.0.0.1:8265", 401).level == "ok"
    assert "clear text" in exposure("http://10.0.0.1:8265", 401).text


def test_packages_that_fail_are_named_with_their_error() -> None:
    def load(name: str) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    found = check_packages(load)
    assert found.level == "problem"
    assert "torchvision (operator torchvision::nms does not exist)" in found.text
    assert {"ray", "torch", "scikit-learn", "pillow"} <= set(needed())


def test_all_packages_can_be_imported_here() -> None:
    assert check_packages().level == "ok"


def test_a_working_dir_that_is_too_large_names_what_to_leave_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with (tmp_path / "data/images.bin").open("wb") as file:
        file.truncate(101 << 20)
    found = check_working_dir(tmp_path)
    assert found.level == "problem"
    assert "first of all data (101 MiB)" in found.text
    (tmp_path / ".rayignore").write_text("/data/\n")
    assert check_working_dir(tmp_path).level == "warning"  # not the project's


def test_this_project_is_small_enough_to_be_sent() -> None:
    assert check_working_dir(Path(__file__).parents[1]).level == "ok"


def facts(**changed: Any) -> dict[str, Any]:
    versions = {"python": "3.11.2", "ray": "2.60.0"} | changed.pop("versions", {})
    well = {"missing": [], "late": 0.1, "free": 1 << 40, "cpus": 2.0, "cores": 2, "cuda": None}
    return {"versions": versions} | well | changed


def test_alike_nodes_are_well() -> None:
    (found,) = check_nodes({"a": facts(), "b": facts()})
    assert found.level == "ok"


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        (facts(versions={"ray": "2.59.0"}), "ray differs: 2.60.0 on a; 2.59.0 on b"),
        (facts(missing=["optuna"]), "b: without optuna; install requirements.lock there"),
        (facts(cuda=False), "b: Ray has a GPU that torch does not see"),
        (facts(free=1 << 20), "b: less than 2 GiB free"),
        (facts(late=-3600.0), "b: more than a minute off"),
        (facts(cpus=8.0), "b: Ray counts more CPUs than there are cores"),
        ("did not answer in 60 s", "b: did not answer"),
    ],
)
def test_a_node_that_is_not_as_the_others_is_named(fact: Any, text: str) -> None:
    (found,) = check_nodes({"a": facts(), "b": fact})
    assert found.level != "ok"
    assert text in found.text


def test_findings_are_read_from_a_jobs_log() -> None:
    log = 'noise\n{"findings": [{"level": "ok", "check": "nodes", "text": "2"}]}\nfailed: 1 problem\n'
    assert [finding.check for finding in findings_of(log) or []] == ["nodes"]
    assert findings_of("Traceback\nModuleNotFoundError: No module named 'tyro'\n") is None
