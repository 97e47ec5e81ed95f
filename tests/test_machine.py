"""A process takes no more cores than its container may use."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from cifar.machine import available_memory, peak_memory, usable_cpus


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu.max": "what?\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
@pytest.mark.parametrize("affinity", [True, False], ids=["linux", "macos"])
def test_the_quota_bounds_the_cores_of_the_affinity(
    files: dict[str, str], expected: int, affinity: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16 if affinity else 8)
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == expected


MIB = 1 << 20


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000),
        ({"memory.max": "max\n", "memory.current": f"{MIB}\n", "memory.stat": "inactive_file 0\n"}, 1000),
        ({"memory.max": f"{300 * MIB}\n", "memory.current": f"{200 * MIB}\n", "memory.stat": "file 9\n"}, 1000),
        (
            {
                "memory.max": f"{300 * MIB}\n",
                "memory.current": f"{200 * MIB}\n",
                "memory.stat": f"active_file 7\ninactive_file {50 * MIB}\n",
            },
            150,
        ),
        (
            {
                "memory/memory.limit_in_bytes": f"{300 * MIB}\n",
                "memory/memory.usage_in_bytes": f"{310 * MIB}\n",
                "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {5 * MIB}\n",
            },
            0,
        ),
    ],
    ids=["machine", "no limit", "unreadable", "version 2", "version 1"],
)
def test_the_limit_of_the_container_bounds_the_memory(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal:  {9000 * 1024} kB\nMemAvailable:  {1000 * 1024} kB\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path, meminfo) == expected * MIB


def test_without_proc_there_is_the_machines_memory_and_no_peak(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path / "none") == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert peak_memory(tmp_path / "none") == 0


def test_the_peak_is_what_the_kernel_counts(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmPeak:\t   9000 kB\nVmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\n")
    assert peak_memory(tmp_path / "status") == 2 * MIB
    if platform.system() == "Linux":
        assert peak_memory() > 10 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc's malloc")
def test_kept_memory_is_not_paged_in_again() -> None:
    """In a process of its own, because there is no way back."""
    code = """if True:
        import resource, torch
        from cifar.machine import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                torch.ones(2**24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        first = faults()
        assert keep_freed_memory()
        faults(), faults()  # until the heap is large enough
        print(first, faults())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 100
    assert after < before / 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc's malloc")
def test_kept_memory_can_be_returned() -> None:
    code = """if True:
        import torch
        from cifar.machine import keep_freed_memory, resident_memory, return_freed_memory
        assert keep_freed_memory()
        torch.ones(2**24), torch.ones(2**24)
        before = resident_memory()
        assert return_freed_memory()
        assert resident_memory() < before - 2**25, (before, resident_memory())
    """
    subprocess.run([sys.executable, "-c", code], check=True)
