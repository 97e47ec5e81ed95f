"""The jobs as commands: help, exit codes, outputs, and the README's promises."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cifar.config import Config
from jobs import evaluate, prepare, train
from tests.flags import TINY
from tests.images import png

ROOT = Path(__file__).parent.parent
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
FLAGS = [*TINY, "--epochs", "2", "--scales", "1"]


@pytest.mark.parametrize("job", [*(job for job in JOBS if job != "models"), "models publish", "models roll-back"])
def test_help_names_every_flag_with_its_default(job: str) -> None:
    name, *subcommand = job.split()
    command = [sys.executable, f"jobs/{name}.py", *subcommand, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--json" in done.stdout
    options = done.stdout.count("\n│ --")
    assert options >= 3
    assert (
        done.stdout.count("(default:") + done.stdout.count("(required)") + done.stdout.count("(unset)") >= options - 1
    )


def test_train_then_evaluate(here: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = str(tmp_path / "runs")
    flags = ["--data", here.data.data, *FLAGS, "--workers", "0", "--storage", storage, "--name", "r", "--json"]
    assert train.main(flags) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    on_disk = json.loads((tmp_path / "runs/r/report.json").read_text())
    for key in (
        *("data", "split", "count", "accuracy", "accuracy_ci95", "loss", "macro_f1", "per_class", "confusion_matrix"),
        *("top5_accuracy", "ece", "train_seconds"),
    ):
        assert on_disk[key] == report[key]
    assert on_disk["count"] == 60
    assert on_disk["train_seconds"] > 0
    for name in ("config.json", "metrics.jsonl", "curves.png", "report.html", "model/README.md", "tensorboard"):
        assert (tmp_path / "runs/r" / name).exists(), name
    assert evaluate.main(["--model", f"{storage}/r", "--output", str(tmp_path / "again"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["confusion_matrix"] == report["confusion_matrix"]


def test_evaluate_an_ensemble(here: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage, output = str(tmp_path / "runs"), str(tmp_path / "report")
    flags = ["--data", here.data.data, *FLAGS, "--workers", "0", "--storage", storage]
    for seed in ("1", "2"):
        assert train.main([*flags, "--seed", seed, "--name", seed]) == 0
    runs = [f"{storage}/1", f"{storage}/2"]
    capsys.readouterr()
    assert evaluate.main(["--models", *runs, "--tta", "none", "--output", output, "--json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown.splitlines()[-1])
    assert list(found["members"]) == runs
    assert all(f"of {run} by itself" in shown for run in runs)
    assert found["calibration"]["split"] == "val"
    page = (tmp_path / "report/report.html").read_text()
    assert "SmoothGrad" in page or not found["mistakes"]
    assert len(found["robustness"]["corruptions"]) == 15
    assert "Frost" in page
    assert (
        evaluate.main(["--models", *runs, "--without", "robustness", "saliency", "neighbours", "--output", output]) == 0
    )
    page = (tmp_path / "report/report.html").read_text()
    assert "SmoothGrad" not in page
    assert "Frost" not in page
    assert "The nearest training images" not in page
    for wrong, message in (
        (["--model", runs[0], "--models", *runs], "--model .*: name it among --models"),
        (["--models", runs[0]], "--models .*: an ensemble has 2 or more"),
    ):
        assert evaluate.main(wrong) == 2
        assert re.search(message, capsys.readouterr().err)


def test_prepare_reports(here: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report"
    assert prepare.main(["--data", here.data.data, "--image-size", "16", "--output", str(output), "--json"]) == 0
    *text, values = capsys.readouterr().out.splitlines()
    assert json.loads(values)["counts"] == {"train": 418, "val": 22, "test": 60}
    assert not any(line.startswith("imbalanced") for line in text)
    assert (output / "data_report.html").stat().st_size > 1000


def test_prepare_and_train_share_one_prepared_set(
    here: Config, imbalanced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of classes of unequal size both the text and the page name the remedy."""
    flags = ["--data", str(imbalanced), "--image-size", "16", "--recipe", "notebook"]
    assert prepare.main([*flags, "--output", str(tmp_path), "--json"]) == 0
    *text, values = capsys.readouterr().out.splitlines()
    assert any(re.match("imbalanced: .* 20 times .*--balance logits", line) for line in text)
    assert "has 20 times as many" in (tmp_path / "data_report.html").read_text()
    assert json.loads((tmp_path / "data_report.json").read_text())["imbalance"] == 20
    flags += ["--epochs", "1", "--widths", "8", "--workers", "0", "--storage", str(tmp_path), "--name", "r", "--json"]
    assert train.main(flags) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "r/report.json").read_text())["fingerprint"] == json.loads(values)["fingerprint"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "-1"], "--lr -1.0: use a positive number"),
        (["--epochs", "0"], "--epochs 0: use 1 or more"),
        (["--data", "/no/such/folder", "--workers", "0"], "/no/such/folder"),
        (["--epoch", "3"], "--epoch"),
        (["--recipe", "fastest"], "fastest"),
    ],
)
def test_bad_usage_is_one_clear_error_and_exit_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_cifar10_that_cannot_be_had_names_the_remedies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "nowhere"))
    assert train.main(["--workers", "0"]) == 2
    assert "CIFAR10_DIR" in capsys.readouterr().err


@pytest.mark.ray
def test_the_readmes_commands_do_what_they_say(parquet: Path, tmp_path: Path) -> None:
    """As they stand there, but for fewer epochs, hasty measurements and a CIFAR-10 of 500 images."""
    section = (ROOT / "README.md").read_text().split("## Jobs")[1]
    commands = [line.split("#")[0].split() for line in section.split("```")[1].splitlines()[1:]]
    assert sorted({Path(command[1]).stem for command in commands}) == JOBS
    environment = os.environ | {"CIFAR10_DIR": str(parquet)}
    shorter = {"jobs/train.py": ["--epochs", "2"], "jobs/benchmark.py": ["--epochs", "2", "--budget", "0.05"]}
    shorter["jobs/tune.py"] = ["--trials", "2", "--epochs", "2", "--widths", "8", "--depths", "2", "--confirm", "1,1"]
    shorter["jobs/compare.py"] = ["--seeds", "2", "--epochs", "2", "--widths", "8", "--depths", "2"]
    (tmp_path / "photo.jpg").write_bytes(png(0))
    for command in commands:
        _, job, *flags = command
        flags += shorter.get(job, [])
        run = next(tmp_path.glob("runs/*/report.html"), tmp_path).parent.name
        named = [flag.replace("NAME", run) for flag in flags]
        command = [sys.executable, str(ROOT / job), *named]
        if job == "jobs/serve.py":
            serve_once(command, tmp_path)
            continue
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, command
    assert (tmp_path / "data-report/data_report.html").exists()
    assert len(list(tmp_path.glob("runs/*/report.html"))) == 2
    assert len(list(tmp_path.glob("runs/*/sweep.html"))) == 1
    assert len(list(tmp_path.glob("runs/*/compare.html"))) == 1
    assert (tmp_path / "report/report.html").exists()
    assert json.loads((tmp_path / "benchmark/benchmark.json").read_text())["stages"]
    assert (tmp_path / "predictions/photo.png").exists()
    assert list(tmp_path.glob("*.onnx"))


def serve_once(command: list[str], folder: Path) -> None:
    """Start the service, ask it once, end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = subprocess.Popen([*command, "--port", port], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        assert "serving" in job.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/models", timeout=30) as answer:
            assert json.loads(answer.read())["name"] == "cifar10"
    finally:
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=30)
    assert job.returncode == 0


def test_output_that_nobody_reads_is_no_traceback() -> None:
    command = f"{sys.executable} jobs/train.py --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1)
    assert done.stderr == ""
