"""Storage that cannot be used is refused before anything is computed, with the flag, the node and the remedy."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from cifar.config import ConfigError
from cifar.data.prepared import filesystem, write_file
from cifar.probe import other_nodes, probe, probe_source, require_seen
from tests.processes import wait_for


def test_a_folder_that_can_be_used_passes_and_nothing_is_left(tmp_path: Path) -> None:
    probe(str(tmp_path), "--storage")
    probe(str(tmp_path / "new"), "--storage")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--storage .*/file/runs: cannot be written"):
        probe(str(tmp_path / "file/runs"), "--storage")


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cifar.probe.write_file", full)
    with pytest.raises(ConfigError, match=r"--output .*No space left.*free some space"):
        probe(str(tmp_path), "--output")


def test_a_bucket_passes_and_is_left_empty(s3_server: str, tmp_path: Path) -> None:
    folder = f"s3://bucket/{tmp_path.name}{s3_server}"
    probe(folder, "--storage")
    files, root = filesystem(folder)
    assert [info.path for info in files.get_file_info(fs.FileSelector(root, allow_not_found=True))] == []


def test_a_missing_bucket_is_refused(s3_server: str) -> None:
    with pytest.raises(ConfigError, match=r"--store s3://nowhere/x.*cannot be written.*make the bucket"):
        probe(f"s3://nowhere/x{s3_server}", "--store")


def test_a_process_that_sees_another_folder_is_refused(tmp_path: Path) -> None:
    write_file(str(tmp_path / "config.json"), b"{}")
    require_seen(str(tmp_path), "config.json", "--storage")
    with pytest.raises(ConfigError, match=r"--storage .*does not see what the job wrote there; name a folder that all"):
        require_seen(str(tmp_path / "other"), "config.json", "--storage")


@pytest.fixture
def two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster of two nodes, of which the second sees another folder at the path given; at all others, the same."""
    import ray
    from ray.cluster_utils import Cluster

    own = tmp_path / "own"
    own.mkdir()
    mount = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    joined = None
    try:
        ray_command = Path(sys.executable).with_name("ray")
        script = (
            f"mount -t tmpfs none {own} && exec {ray_command} start --block --address {cluster.address} --num-cpus 1 "
            "--object-store-memory 100000000 --disable-usage-stats"
        )
        joined = subprocess.Popen(
            [*mount, "bash", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        ray.init(address=cluster.address, log_to_driver=False)
        wait_for(lambda: len(ray.nodes()) == 2, "the second node")
        yield own
    finally:
        ray.shutdown()
        if joined is not None:
            os.killpg(joined.pid, 15)
            joined.wait(30)
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_each_node_of_a_cluster_is_asked(two_hosts: Path, tmp_path: Path) -> None:
    nodes = other_nodes()
    assert len(nodes) == 1
    probe(str(tmp_path), "--storage", nodes)
    assert list(tmp_path.iterdir()) == [two_hosts]
    with pytest.raises(ConfigError, match=r"--storage .*/own: node \S+ does not see .*s3:// or gs://"):
        probe(str(two_hosts), "--storage", nodes)
    (two_hosts / "data").mkdir()
    with pytest.raises(ConfigError, match=r"--data .*/own/data: node \S+ does not see it"):
        probe_source(str(two_hosts / "data"), "--data", nodes)
    (tmp_path / "data").mkdir()
    probe_source(str(tmp_path / "data"), "--data", nodes)
