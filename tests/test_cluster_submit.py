"""Every job by `ray job submit`, from the project's folder to a cluster that has Ray and the dependencies."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar.data.prepared import UPLOADED, absolute
from tests.isolated import Isolated, isolated

CLIENT = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}


@pytest.fixture
def uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder as Ray unpacks it, which is the current one; HOME is beside it."""
    folder = tmp_path / f"{UPLOADED}/_ray_pkg_1".lstrip("/")
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CIFAR_STORAGE", raising=False)
    return folder


def test_what_a_job_writes_does_not_go_into_the_copy_that_ray_deletes(uploaded: Path, tmp_path: Path) -> None:
    assert absolute("./runs") == str(tmp_path / "home/cifar/runs")
    assert absolute("runs/a") == str(tmp_path / "home/cifar/runs/a")
    assert absolute("/data/runs") == "/data/runs"
    assert absolute("s3://bucket/runs") == "s3://bucket/runs"


def test_the_cluster_says_where_relative_paths_are(uploaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_STORAGE", "s3://bucket/cifar?region=x")
    assert absolute("./runs") == "s3://bucket/cifar/runs?region=x"
    monkeypatch.setenv("CIFAR_STORAGE", "/mnt/shared")
    assert absolute("./runs") == "/mnt/shared/runs"


def test_files_that_were_uploaded_are_found(uploaded: Path) -> None:
    (uploaded / "space.py").touch()
    assert absolute("./space.py") == str(uploaded / "space.py")


def test_elsewhere_relative_paths_are_what_they_always_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFAR_STORAGE", "/mnt/shared")
    assert absolute("./runs") == os.path.abspath("runs")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Isolated]:
    """One node of two CPUs, which asks for the token."""
    with isolated(tmp_path_factory.mktemp("cluster")) as place:
        place.run("ray get-auth-token --generate > /dev/null")
        place.run("ray start --head --num-cpus=2 --disable-usage-stats", 120, {"RAY_AUTH_MODE": "token"})
        yield place


def submit(cluster: Isolated, command: str, seconds: float = 240) -> str:
    return cluster.run(f"ray job submit --working-dir . -- {command}", seconds, CLIENT)


def result_of(log: str, key: str) -> dict:
    """The JSON object with this key that a job printed last."""
    lines = [line for line in log.splitlines() if line.startswith("{") and f'"{key}"' in line]
    return json.loads(lines[-1])


SMALL = "--data digits --image-size 16 --widths 8 16 --depths 1 --scales 1 --epochs 2"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
def test_data_to_predictions_by_submitted_jobs(cluster: Isolated) -> None:
    home = cluster.folder / "cifar"
    steps = [
        "python jobs/prepare.py --data digits",
        f"python jobs/train.py {SMALL} --name first --json",
        "python jobs/evaluate.py --model runs/first --split val",
        "python jobs/models.py publish runs/first --name digits",
        "python jobs/models.py list",
        "python jobs/predict.py --model digits --input photos",
    ]
    photos = home / "photos"
    photos.mkdir(parents=True)
    cluster.run(
        "python -c 'from PIL import Image; import sys; "
        '[Image.new("L", (8, 8), 20 * i).save(f"{sys.argv[1]}/{i}.png") for i in range(9)]\' ' + str(photos)
    )
    log = submit(cluster, f'bash -c "{" && ".join(steps)}"')
    trained = result_of(log, "run")
    assert trained["run"] == str(home / "runs/first")
    assert trained["accuracy"] > 0.15
    for kept in ("runs/first/report.html", "data-report/data_report.html", "report/report.html"):
        assert (home / kept).stat().st_size > 1000, kept
    assert list((home / "models/digits").glob("*/manifest.json"))
    assert json.loads((home / "predictions/manifest.json").read_text())["predicted"] == 9


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
def test_the_doctor_looks_from_outside_and_from_inside(cluster: Isolated) -> None:
    log = cluster.run("python jobs/doctor.py --json", 200, CLIENT)
    found = {finding["check"]: finding["level"] for finding in result_of(log, "findings")["findings"]}
    assert found["nodes"] == found["plan"] == found["storage"] == found["Ray"] == found["working dir"] == "ok"
    log = cluster.run("python jobs/doctor.py --workers 8 --json", 200, CLIENT, code=1)
    assert "--workers 8: needs 8 CPUs" in log
    log = cluster.run("python jobs/doctor.py", 60, {**CLIENT, "RAY_AUTH_MODE": "disabled"}, code=1)
    assert "export RAY_AUTH_MODE=token" in log


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
def test_a_submitted_sweep_and_a_service_that_stays(cluster: Isolated) -> None:
    log = submit(cluster, f"python jobs/tune.py {SMALL} --trials 2 --confirm 0 --scheduler none --json")
    assert result_of(log, "sweep")["trials"] == {"completed": 2}
    log = submit(cluster, "python jobs/serve.py --replicas 1")
    assert "serving: http://127.0.0.1:8000/" in log
    answer = cluster.run("curl -sf http://127.0.0.1:8000/models")
    assert "cifar10" in answer
