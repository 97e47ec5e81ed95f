"""Distillation: the loss, which teacher is meant, and that a student learns what its teacher knows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cifar.config import Config, ConfigError, DistillConfig, ModelConfig
from cifar.distill import load_teacher, settle_teacher
from cifar.evaluate import evaluate
from cifar.local import LocalContext
from cifar.model_dir import load_model
from cifar.predictor import Predictor
from cifar.store import Store
from cifar.train import Run, fit


@pytest.fixture
def teacher(here: Config) -> Run:
    return fit(replace(here, run=replace(here.run, name="teacher")))


def student(here: Config, teacher: str, **values: Any) -> Config:
    return replace(
        here,
        distill=DistillConfig(teacher=teacher, **values),
        model=replace(here.model, widths=(8, 8)),
        train=replace(here.train, seed=1),
        run=replace(here.run, name="student"),
    )


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 4.0)])
def test_the_loss_is_hintons(here: Config, teacher: Run, weight: float, temperature: float) -> None:
    """Cross-entropy against the softened answers, less their entropy, which no student can change."""
    config = student(here, teacher.path, teacher_weight=weight, teacher_temperature=temperature)
    found = load_teacher(config, teacher.prepared, torch.device("cpu"))
    assert found is not None
    logits, taught = torch.randn(6, 10), torch.randn(6, 10)
    losses = F.cross_entropy(logits, torch.arange(6), reduction="none")
    p, q = (taught / temperature).softmax(1), (logits / temperature).softmax(1)
    expected = (1 - weight) * losses + weight * temperature**2 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(found.blend(losses, logits, taught), expected)


def test_the_teacher_sees_the_students_view_in_evaluation_mode(here: Config, teacher: Run) -> None:
    config = replace(student(here, teacher.path), train=replace(here.train, precision="fp32"))
    found = load_teacher(config, teacher.prepared, torch.device("cpu"))
    assert found is not None
    images = torch.rand(4, 3, 16, 16) * 255
    model = load_model(teacher.model).model
    torch.testing.assert_close(found.logits(images), model(images).detach())
    assert not found.logits(images).requires_grad


def test_a_student_takes_after_its_teacher(here: Config, teacher: Run) -> None:
    """The same student without one agrees with it less, on images that neither has seen."""
    config = student(here, teacher.path, teacher_weight=1.0)
    config = replace(config, train=replace(config.train, epochs=8))
    alone = replace(config, distill=DistillConfig(), run=replace(config.run, name="alone"))
    images = torch.cat([torch.from_numpy(b.images) for b in teacher.prepared.batches("test", 100)]).numpy()
    wanted = Predictor(teacher.model, "cpu").predict(images)

    def distance(run: Run) -> float:
        return float(abs(Predictor(run.model, "cpu").predict(images) - wanted).sum(1).mean())

    taught = fit(config)
    assert distance(taught) < 0.8 * distance(fit(alone))
    assert evaluate(Predictor(taught.model, "cpu"), taught.prepared).count > 0


def test_micro_batches_and_a_resume_change_nothing(here: Config, teacher: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config = student(here, teacher.path)
    config = replace(config, train=replace(config.train, epochs=2, batch_size=32, precision="fp32"))
    whole = fit(config)
    report = LocalContext.report

    def break_off(self: LocalContext, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        report(self, metrics, checkpoint)
        raise KeyboardInterrupt

    parts = replace(config, run=replace(config.run, name="parts"))
    with monkeypatch.context() as patch:
        patch.setattr(LocalContext, "report", break_off)
        with pytest.raises(KeyboardInterrupt):
            fit(parts)
    losses = [[row["train_loss"], row["val_loss"]] for row in whole.history]
    assert [[row["train_loss"], row["val_loss"]] for row in fit(parts).history] == losses


def test_an_alias_means_the_version_of_today(here: Config, teacher: Run, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "models"))
    first = store.publish(teacher.path, "digits")
    store.promote(first)
    config = student(here, "digits@champion", teacher_store=store.path)
    assert settle_teacher(config).distill.teacher == str(first)
    store.promote(store.publish(teacher.path, "digits"))
    assert settle_teacher(config).distill.teacher != str(first)
    assert settle_teacher(student(here, teacher.path)).distill.teacher == teacher.model


def test_a_teacher_that_cannot_teach_is_refused_before_training(here: Config, teacher: Run, tmp_path: Path) -> None:
    shutil.copytree(teacher.model, tmp_path / "other")
    path = tmp_path / "other/config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"classes": ["one", *described["classes"][1:]]}))
    for name, message in (
        ("nobody", "--teacher nobody: no folder of a run or a model, and not in --teacher-store"),
        (str(tmp_path / "other"), r"--teacher .*other: knows 4 classes \(one, .*, the data has 4 \(.*name a model"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(student(here, name, teacher_store=str(tmp_path / "none")))
        assert not (Path(here.run.storage) / "student").exists()
    with pytest.raises(ConfigError, match="--teacher-weight 0: use a share above 0"):
        DistillConfig(teacher_weight=0)


def test_another_kind_of_network_may_teach(here: Config) -> None:
    """Of another image size, too."""
    model = ModelConfig(model="notebook", widths=(8, 8))
    data = replace(here.data, image_size=24)
    found = fit(replace(here, data=data, model=model, run=replace(here.run, name="large")))
    run = fit(student(here, found.path))
    assert run.history[-1]["train_loss"] > 0
    assert (run.prepared.image_size, found.prepared.image_size) == (16, 24)
