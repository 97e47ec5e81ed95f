"""Imports point one way, and what must run without Ray does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("cifar", "jobs")
    for path in (ROOT / folder).rglob("*.py")
}
# Lower layers never import higher ones; modules of one layer may import each other.
LAYERS = [
    {"calibration", "config", "context", "machine", "statistics", "waiting"},
    {"augment", "balance", "models", "optim", "metrics", "selection"},
    {"data", "loop", "model_dir", "probe", "transfer"},
    {
        "autoscaler",
        "cluster",
        "local_nodes",
        "checkpoints",
        "progress",
        "run_dir",
        "training",
        "distill",
        "predictor",
        "store",
    },
    {"local", "ray_job", "ray_worker", "worker", "elastic", "lean_trainer", "evaluate", "export", "soup"},
    {"train", "report", "serve", "batch"},
    {"tune"},
    {"cross_validation"},  # trains and predicts
    {"recipes", "cli", "benchmark", "compare", "doctor"},  # benchmark and compare train and ask for answers, as jobs do
]
WITHOUT_RAY = [
    "config",
    "augment",
    "balance",
    "models",
    "optim",
    "metrics",
    "selection",
    "loop",
    "model_dir",
    "context",
    "checkpoints",
    "training",
    "transfer",
    "distill",
    "worker",
    "predictor",
    "store",
    "evaluate",
    "serve.app",
    "export",
]
TRAINING = {"train", "tune", "local", "ray_worker", "training", "worker", "ray_job"}
ANSWERING = {"predictor", "evaluate", "export", "soup", "report", "batch", "serve"}


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return found


def layer(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("cifar.")])
def test_imports_point_down(module: str) -> None:
    part = module.split(".")[1]
    for name in imported(MODULES[module]):
        assert not name.startswith("jobs"), f"{module} imports {name}"
        if name.startswith("cifar."):
            other = name.split(".")[1]
            assert layer(other) <= layer(part), f"{module} imports {name}, which is above it"
            assert not (part in TRAINING and other in ANSWERING), f"{module} trains and must not import {name}"
            assert not (part in ANSWERING and other in TRAINING), f"{module} answers and must not import {name}"


@pytest.mark.parametrize("job", [name for name in MODULES if name.startswith("jobs.")])
def test_jobs_import_the_library_and_no_other_job(job: str) -> None:
    assert not any(name.startswith("jobs") for name in imported(MODULES[job]))


def test_torch_side_runs_without_ray() -> None:
    names = ", ".join(f"cifar.{name}" for name in WITHOUT_RAY)
    code = f"import sys; sys.modules['ray'] = None; import {names}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_the_package_has_no_side_effects(tmp_path: Path) -> None:
    """No folder, no Ray, no change of the environment."""
    names = ", ".join(name for name in MODULES if name != "cifar")
    code = (
        f"import os, sys; before = dict(os.environ); sys.path.insert(0, {str(ROOT)!r}); import {names}; import ray; "
        "assert not ray.is_initialized(); assert {k: v for k, v in os.environ.items() if k in before} == before; "
        "assert os.listdir('.') == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_serving_imports_no_training_search_or_data_library() -> None:
    code = (
        "import sys; import cifar.serve.deployment; "
        "assert not {'ray.train', 'ray.tune', 'ray.data'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
