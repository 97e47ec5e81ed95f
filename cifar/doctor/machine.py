"""This machine: packages, shared memory, and what `ray job submit --working-dir .` would send."""

import importlib
import os
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from cifar.doctor.finding import Finding, ok, problem, warning

SHM_BYTES = 1 << 30
UPLOAD_BYTES = 100 << 20
"""Of a request to Ray's dashboard, which answers larger ones with 413."""
IMPORTS = {
    "fastapi-offline": "fastapi_offline",
    "optuna-dashboard": "optuna_dashboard",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
    "python-multipart": "python_multipart",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "tensorboardx": "tensorboardX",
}
"""Modules that are not called as their package is."""


def check_machine() -> list[Finding]:
    return [check_packages(), check_shared_memory()]


def check_packages(load: Callable[[str], object] = importlib.import_module) -> Finding:
    """Imports all that this package needs; `load` does it."""
    failed = {}
    for package in needed():
        try:
            load(IMPORTS.get(package, package))
        except Exception as error:  # an import can raise anything, as torchvision does beside a strange torch
            failed[package] = " ".join(str(error).split())
    if failed:
        told = "; ".join(f"{package} ({error})" for package, error in failed.items())
        return problem(
            "packages", f"cannot be imported: {told}; install requirements.lock with uv, as the Makefile does"
        )
    return ok("packages", ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "torchvision")))


def needed() -> list[str]:
    """Names of the packages that this one depends on; the extras are not."""
    try:
        declared = requires("cifar") or []
    except PackageNotFoundError:  # in a working folder that was uploaded
        import tomllib

        text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        declared = tomllib.loads(text)["project"]["dependencies"]
    names = [line.lower() for line in declared if "extra ==" not in line]
    return sorted(
        "".join(c for c in name.split("[")[0].split("=")[0].split(";")[0] if c not in " <>~!") for name in names
    )


def check_shared_memory(path: str = "/dev/shm") -> Finding:
    """Ray's object store lies there, or else on disk, which is slow."""
    if not os.path.isdir(path):
        return ok("shared memory", "no /dev/shm on this system")
    total = shutil.disk_usage(path).total
    if total < SHM_BYTES:
        return warning(
            "shared memory",
            f"/dev/shm has {total / 2**20:,.0f} MiB, so Ray keeps images on disk; "
            "give a container more of it (--shm-size=8g, or an emptyDir of medium Memory)",
        )
    return ok("shared memory", f"{total / 2**30:,.1f} GiB")


def check_working_dir(folder: Path) -> Finding:
    """Whether the folder is small enough to be sent with a job, as Ray would pack it."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            first = path.relative_to(folder).parts[0]
            sizes[first] = sizes.get(first, 0) + path.stat().st_size

    _dir_travel(folder, [_get_excludes(folder, get_runtime_env_default_excludes())], add, include_gitignore=True)
    total = sum(sizes.values())
    if total > UPLOAD_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        return problem(
            "working dir",
            f"{folder} has {total / 2**20:,.0f} MiB, and Ray refuses more than {UPLOAD_BYTES / 2**20:,.0f}; "
            f"name what no job needs in .rayignore, first of all {largest} ({sizes[largest] / 2**20:,.0f} MiB)",
        )
    if not (folder / "jobs").is_dir() or not (folder / "cifar").is_dir():
        return warning("working dir", f"{folder} is not the project's; run `ray job submit` where jobs/ is")
    return ok("working dir", f"{total / 2**20:,.1f} MiB to send")
