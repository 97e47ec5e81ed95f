"""Runs in this process: what a run leaves behind, how it ends, and that it resumes to the same bits."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from cifar.config import Config, ConfigError, DataConfig, RunConfig, RunFailed
from cifar.context import Wish
from cifar.data import Prepared
from cifar.local import LocalContext
from cifar.loop import epoch_size, resize
from cifar.model_dir import load_model
from cifar.recipes import fast
from cifar.run_dir import RunDir, local_model, writable
from cifar.train import Run, default_name, fit
from cifar.training import compile_ahead


class Interrupted(Exception):
    pass


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(f"{run.model}/model.safetensors")


def assert_same_weights(one: Run, other: Run) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def named(config: Config, name: str, **train: Any) -> Config:
    return replace(config, run=replace(config.run, name=name), train=replace(config.train, **train))


def test_a_run_learns_and_leaves_its_folder(here: Config) -> None:
    run = fit(here)
    folder = Path(run.path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["step"] == 27
    assert all(row["val_count"] == 44 for row in rows)
    assert rows[-1]["val_accuracy"] > 0.9, "four colours are easy"
    assert run.history == rows
    assert run.train_seconds == rows[-1]["train_seconds"] > 0
    assert list((folder / "tensorboard").iterdir())
    model = load_model(run.model)
    assert model.info.config == replace(here, run=RunConfig())  # where it was kept is not in the model
    assert model.metrics["val_accuracy"] == max(row["val_accuracy"] for row in rows)
    assert 1 <= len(list((folder / "checkpoints").iterdir())) <= 2, "the best and the last"


def test_grey_images_train_and_evaluate_in_bf16(here: Config) -> None:
    """Their whitening has filters of huge gain, for the directions in which grey does not vary."""
    grey = replace(fast(), data=DataConfig(data="digits"), run=here.run)
    run = fit(replace(grey, train=replace(grey.train, epochs=4, scales=(1.0,), precision="bf16")))
    assert run.history[-1]["val_accuracy"] > 0.9


def test_tensorboard_reads_the_events(here: Config) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = fit(here)
    events = event_accumulator.EventAccumulator(f"{run.path}/tensorboard")
    events.Reload()
    values = [event.value for event in events.Scalars("val/accuracy")]
    assert values == pytest.approx([row["val_accuracy"] for row in run.history])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c,
        lambda c: replace(c, optim=replace(c.optim, optimizer="muon", lr=0.1, average="ema", average_decay=0.9)),
        lambda c: replace(c, optim=replace(c.optim, optimizer="sgd", lr=0.02, average="lookahead", accumulate=2)),
        lambda c: replace(c, model=replace(c.model, model="notebook", dropout=0.3)),
        lambda c: replace(c, augment=replace(c.augment, mixup=0.4, cutmix=1.0, policy="trivial")),
        lambda c: replace(c, train=replace(c.train, loader="streaming")),
        lambda c: replace(c, train=replace(c.train, skip_easy=0.3, epochs=4)),
        lambda c: replace(c, train=replace(c.train, skip_easy=0.3, epochs=4, balance="sampling")),
        lambda c: replace(c, train=replace(c.train, loader="streaming", balance="sampling")),
        lambda c: replace(c, train=replace(c.train, balance="loss"), optim=replace(c.optim, label_smoothing=0.1)),
    ],
    ids=[
        *("adam", "muon-ema", "sgd-lookahead", "dropout", "mixed", "streaming", "skip-easy"),
        *("balanced", "balanced-streaming", "balanced-loss"),
    ],
)
def test_interrupted_often_ends_with_the_same_bits(
    here: Config, change: Callable[[Config], Config], imbalanced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after a checkpoint in mid-epoch, after the one of an epoch, and in the middle of the third."""
    config = change(replace(here, train=replace(here.train, checkpoint_steps=4)))
    if config.train.balance != "none":
        config = replace(config, data=replace(config.data, data=str(imbalanced)))
    whole = fit(named(config, "whole"))
    report = LocalContext.report
    reports = 0

    def report_and_die(self: LocalContext, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        nonlocal reports
        report(self, metrics, checkpoint)
        reports += 1
        if reports in (2, 6, 7):
            raise Interrupted

    monkeypatch.setattr(LocalContext, "report", report_and_die)
    for _ in range(3):
        with pytest.raises(Interrupted):
            fit(named(config, "pieces"))
    pieces = fit(named(config, "pieces"))
    assert_same_weights(whole, pieces)
    timeless = [
        [
            {key: row[key] for key in ("epoch", "step", "val_loss", "val_accuracy", "train_accuracy")}
            for row in run.history
        ]
        for run in (whole, pieces)
    ]
    assert timeless[0] == timeless[1]


def test_easy_images_are_left_out_of_the_epochs_between(here: Config) -> None:
    """9 batches in a full epoch; the schedule of the learning rate ends with the steps that there are."""
    history = fit(named(here, "skipping", skip_easy=0.5, epochs=5)).history
    assert [row["step"] for row in history] == [9, 18, 22, 26, 35]
    assert history[-1]["lr"] == pytest.approx(0.01 / 35)
    assert history[-1]["val_accuracy"] > 0.9


def test_another_seed_gives_other_weights(here: Config) -> None:
    one, other = fit(named(here, "a")), fit(named(here, "b", seed=1))
    assert not torch.equal(weights(one)["network.head.weight"], weights(other)["network.head.weight"])


def test_the_same_command_on_a_finished_run_trains_nothing(here: Config) -> None:
    first, second = fit(here), fit(here)
    assert second.history == first.history
    assert_same_weights(first, second)


def test_a_run_of_an_older_version_goes_on(here: Config) -> None:
    """Its config.json does not know the settings that came later."""
    path = Path(fit(here).path) / "config.json"
    values = json.loads(path.read_text())
    del values["config"]["transfer"], values["config"]["model"]["stem"]
    path.write_text(json.dumps(values))
    assert fit(here).stopped


def test_another_config_under_the_same_name_is_refused(here: Config) -> None:
    fit(named(here, "taken"))
    with pytest.raises(ConfigError, match=r"taken.*epochs.*--name"):
        fit(named(here, "taken", epochs=4))


def test_time_budget_ends_cleanly_with_a_model(here: Config) -> None:
    run = fit(named(here, "short", epochs=1000, max_minutes=0.02))
    assert run.stopped.startswith("time budget spent")
    assert 1.2 <= run.train_seconds < 30
    assert len(run.history) < 1000
    load_model(run.model)


def test_patience_stops_early_and_keeps_the_best(here: Config) -> None:
    run = fit(named(here, "patient", epochs=200, patience=2))
    accuracies = [row["val_accuracy"] for row in run.history]
    assert run.stopped.startswith("no better val accuracy")
    assert len(accuracies) < 200
    assert accuracies.index(max(accuracies)) == len(accuracies) - 3
    assert load_model(run.model).metrics["val_accuracy"] == max(accuracies)


def test_broken_loss_names_step_and_remedy(here: Config) -> None:
    config = replace(here, optim=replace(here.optim, optimizer="sgd", lr=1e20))
    with pytest.raises(RunFailed, match=r"after step [1-9] .*--lr"):
        fit(config)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "muon"])
def test_every_optimizer_learns(here: Config, optimizer: str) -> None:
    lr = {"sgd": 0.02, "muon": 0.1}.get(optimizer, 0.005)
    run = fit(replace(here, optim=replace(here.optim, optimizer=optimizer, lr=lr, clip_norm=5.0)))
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]


def test_micro_batches_do_the_step_of_the_whole_batch(here: Config) -> None:
    """Without batch norm's dependence on the batch there would be no difference; with it, losses stay close."""
    one = fit(named(here, "one"))
    two = fit(replace(named(here, "two"), optim=replace(here.optim, accumulate=2)))
    assert two.history[0]["step"] == one.history[0]["step"]
    assert two.history[-1]["train_loss"] == pytest.approx(one.history[-1]["train_loss"], rel=0.5)


def test_scales_hold_for_equal_parts_of_the_epochs(here: Config) -> None:
    train = replace(here.train, epochs=5, scales=(0.5, 0.75, 1.0))
    assert [epoch_size(train, 16, epoch) for epoch in range(5)] == [8, 8, 12, 12, 16]
    assert epoch_size(replace(train, scales=(0.25,)), 16, 0) == 8, "no less than the networks take"
    images = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    torch.testing.assert_close(resize(images, 12), torch.full((2, 3, 12, 12), 100.0))
    assert resize(images, 16) is images
    assert len(fit(named(here, "scales", scales=(0.5, 1.0))).history) == 3


def test_default_name_is_that_of_the_same_command_on_the_same_data(prepared: Prepared) -> None:
    config = Config()
    moved = replace(config, run=replace(config.run, storage="/elsewhere", workers="2"))
    name = default_name(config, prepared)
    assert default_name(moved, prepared) == name
    assert default_name(replace(config, train=replace(config.train, seed=1)), prepared) != name
    assert default_name(config, replace(prepared, fingerprint="other")) != name


def test_a_batch_larger_than_the_data_is_refused_before_the_run_folder_exists(here: Config) -> None:
    with pytest.raises(ConfigError, match=r"--batch-size 400.*--batch-size 396"):
        fit(named(here, "large", batch_size=400))
    assert not Path(here.run.storage).exists()


def test_a_second_process_on_the_same_run_is_refused(here: Config) -> None:
    run = fit(named(here, "busy"))
    with RunDir(run.path).lock(), pytest.raises(ConfigError, match="another process"):
        fit(named(here, "busy"))


def test_time_budget_holds_in_epochs_of_one_step(here: Config) -> None:
    run = fit(named(here, "steps", epochs=10_000, batch_size=396, max_minutes=0.02))
    assert run.stopped.startswith("time budget spent")


@pytest.mark.parametrize("wish", [Wish.CHECKPOINT, Wish.LEAVE])
def test_what_the_cluster_wishes_is_done_in_mid_epoch_at_once(
    here: Config, monkeypatch: pytest.MonkeyPatch, wish: Wish
) -> None:
    """One checkpoint, which never counts as the best, and then the end if it is to be one; the rest loses no step."""
    config = named(here, "wish", batch_size=12, epochs=1)  # 33 steps
    whole = fit(named(config, "whole"))
    reported: list[tuple[int, bool]] = []
    report = LocalContext.report

    def record(self: LocalContext, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        reported.append((metrics["step"], metrics["score"] < 0))
        report(self, metrics, checkpoint)

    def wished(self: LocalContext) -> Wish:
        return wish if not reported else Wish.NOTHING

    def leave(self: LocalContext) -> NoReturn:
        raise Interrupted

    monkeypatch.setattr(LocalContext, "report", record)
    monkeypatch.setattr(LocalContext, "wish", wished)
    monkeypatch.setattr(LocalContext, "leave", leave)
    with pytest.raises(Interrupted) if wish is Wish.LEAVE else nullcontext():
        fit(config)
    assert reported[0] == (1, True)
    assert_same_weights(fit(config), whole)
    assert reported == [(1, True), (33, False)]


@pytest.mark.slow
def test_compiling_ahead_leaves_the_code_and_nothing_else(here: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run compiles nothing after it, and ends with the weights of one that compiles on the way."""
    settings = {"compile": True, "epochs": 2, "scales": (0.5, 1.0), "skip_easy": 0.5}

    def ahead_only(*arguments: Any) -> None:
        compile_ahead(*arguments)
        torch.compiler.set_stance("fail_on_recompile")

    monkeypatch.setattr("cifar.worker.compile_ahead", ahead_only)
    try:
        ahead = fit(named(here, "ahead", **settings))
    finally:
        torch.compiler.set_stance("default")
    assert load_model(ahead.model).info.config.train.compile
    monkeypatch.setattr("cifar.worker.compile_ahead", lambda *_: None)
    assert_same_weights(ahead, fit(named(here, "on-the-way", **settings)))


def test_a_uri_gets_what_is_written_and_gives_it_back(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/far"
    with writable(f"{uri}/run") as folder:
        (folder / "figures").mkdir()
        (folder / "figures/one.png").write_bytes(b"png")
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text("{}")
    assert (tmp_path / "far/run/figures/one.png").read_bytes() == b"png"
    with local_model(f"{uri}/run/model") as folder:
        assert (folder / "config.json").read_text() == "{}"
