"""Spaces, plans, the ledger and the study of a sweep, without Ray."""

import json
import logging
import shutil
import socket
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import ray.tune
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.exceptions import OutOfMemoryError
from ray.tune.schedulers import FIFOScheduler
from rich.console import Console

from cifar.config import (
    Config,
    ConfigError,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RunFailed,
    TrainConfig,
    TransferConfig,
)
from cifar.data import Prepared
from cifar.recipes import RECIPES, fast, notebook
from cifar.run_dir import RunDir
from cifar.tune import Choice, Float, Int
from cifar.tune.execute import Recorder, clipped, environment, execute, make_scheduler, rungs, setting_of, unchangeable
from cifar.tune.folder import claim_folder
from cifar.tune.folds import make_folds
from cifar.tune.ledger import BUDGET, Ledger, Trial
from cifar.tune.plan import make_sweep_plan
from cifar.tune.progress import SweepDisplay
from cifar.tune.run import Searching, claim, default_name, keep, locked_sweep
from cifar.tune.settings import TuneConfig
from cifar.tune.space import (
    MUTABLE,
    Space,
    apply,
    check_space,
    describe,
    flags_of,
    lines,
    load_space,
    settings_of,
    without_fixed,
)
from cifar.tune.spaces import SPACES, space_for
from cifar.tune.study import Study, check_free
from cifar.tune.summary import Setup, max_epochs
from cifar.tune.trial import SweepJob, TrialContext, explain, mean_history
from jobs.tune import main

SPACE: Space = {
    "lr": Float(0.01, 1.0, log=True),
    "epochs": Int(2, 9),
    "widths": Choice((8, 16), (8, 16, 32)),
    "flip": Choice("alternating", "random"),
}


@pytest.mark.parametrize("name", SPACES)
def test_every_shipped_space_is_valid_for_its_recipe(name: str) -> None:
    check_space(SPACES[name], name, notebook() if name == "notebook" else fast())


def test_each_recipe_has_a_space_that_suits_it() -> None:
    for recipe in RECIPES.values():
        config = recipe()
        check_space(SPACES[space_for(config.model.model)], "auto", config)


def test_values_become_settings() -> None:
    config = apply(fast(), SPACE, {"lr": 0.1, "epochs": 5, "widths": "8 16 32", "flip": "random"})
    assert (config.optim.lr, config.train.epochs, config.model.widths, config.augment.flip) == (
        *(0.1, 5, (8, 16, 32), "random"),
    )
    assert config.data == fast().data


def test_a_users_space_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        'from cifar.tune import Choice, Float, Int\nSPACE = {"lr": Float(0.01, 0.1), "cutout": Int(0, 8)}\n'
    )
    space = load_space(str(file), SPACES)
    assert lines(space) == ["lr      0.01 to 0.1", "cutout  0 to 8, whole"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SPACE = {", "SyntaxError"),
        ("x = 1", "defines no SPACE"),
        ("SPACE = {}", "defines no SPACE"),
        ("from cifar.tune import *; SPACE = {'learning_rate': Float(0, 1)}", "learning_rate: no setting.*lr"),
        ("from cifar.tune import *; SPACE = {'seed': Int(0, 9)}", "seed: no setting"),
        ("from cifar.tune import *; SPACE = {'lr': (0, 1)}", "lr:.*no Float, Int or Choice"),
        ("from cifar.tune import *; SPACE = {'lr': Float(0.5, 0.1)}", "lr:.*low must be less than high"),
        ("from cifar.tune import *; SPACE = {'lr': Float(0, 1, log=True)}", "lr:.*positive if log"),
        ("from cifar.tune import *; SPACE = {'lr': Float(0, float('nan'))}", "lr:.*numbers"),
        ("from cifar.tune import *; SPACE = {'lr': Choice()}", "lr: a Choice without options"),
        ("from cifar.tune import *; SPACE = {'lr': Choice(0.1, 0.1)}", "lr:.*twice"),
        (
            "from cifar.tune import *; SPACE = {'widths': Choice([8, 16], [16, 32])}",
            r"widths: \[8, 16\] is no option.*tuple",
        ),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("from cifar.tune import *; SPACE = {'epochs': Float(1, 5)}", "epochs:.*another type"),
        ("from cifar.tune import *; SPACE = {'epochs': Choice(1, '5')}", "epochs:.*another type"),
        ("from cifar.tune import *; SPACE = {'dropout': Float(0, 1.5)}", "dropout: --dropout 1.5"),
        ("from cifar.tune import *; SPACE = {'optimizer': Choice('sgd', 'ADAM')}", "optimizer:.*ADAM"),
    ],
)
def test_a_wrong_space_is_one_error_that_names_the_setting(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"--space {file}.*{message}"):
        check_space(load_space(str(file), SPACES), str(file), fast())


def test_an_unknown_space_names_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="--space fat: no such space; use fast, notebook"):
        load_space("fat", SPACES)


def test_a_flag_fixes_what_it_names() -> None:
    space, fixed = without_fixed(SPACE, {"lr", "data"})
    assert fixed == ["lr"]
    assert set(space) == {"epochs", "widths", "flip"}


@pytest.mark.parametrize("flags", [["--lr", "{lr}"], ["--lr={lr}"], ["--label_smoothing", "0.1", "--lr", "{lr}"]])
def test_a_flag_of_the_recipes_own_value_is_not_searched(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def remember(*values: Any) -> None:
        seen.append(values[-1])
        raise ConfigError("enough")

    monkeypatch.setattr("cifar.tune.run.sweep", remember)
    assert main([flag.format(lr=fast().optim.lr) for flag in flags]) == 2
    assert "lr" not in without_fixed(SPACE, seen[0])[0]


def test_the_command_of_a_trial_makes_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by jobs/train.py's own flags."""
    from jobs import train as job

    config = replace(fast(), model=replace(fast().model, tta="none"))
    config = apply(config, SPACE, {"lr": 0.1, "epochs": 5, "widths": "8 16 32", "flip": "random"})
    config = replace(config, train=replace(config.train, compile=True), transfer=TransferConfig(train_blocks=2))
    seen: list[Config] = []

    def remember(config: Config) -> dict[str, Any]:
        """Nothing is trained."""
        seen.append(config)
        return {}

    monkeypatch.setattr(job, "train", remember)
    assert job.main(["--recipe", "fast", *flags_of(config, fast())]) == 0
    assert seen == [config]


def test_settings_that_may_change_in_a_run_are_settings() -> None:
    assert settings_of(fast()).keys() >= MUTABLE
    assert unchangeable(SPACES["augment"]) == []
    assert unchangeable(SPACE) == ["epochs", "flip", "widths"]


def test_changed_values_stay_in_their_range() -> None:
    """Tune multiplies by 0.8 or 1.2."""
    space: Space = {"lr": Float(0.1, 1.0), "cutout": Int(2, 8), "optimizer": Choice("sgd", "adam")}
    setting = {"key": "00001", "values": {"lr": 1.2, "cutout": 1, "optimizer": "adam"}}
    assert clipped(setting, space) == {"key": "00001", "values": {"lr": 1.0, "cutout": 2, "optimizer": "adam"}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trials", "0"], "--trials 0: use 1"),
        (["--folds", "1"], "--folds 1: use 2 to 100"),
        (["--reduction", "1"], "--reduction 1: use 2 or more"),
        (["--confirm", "3"], "--confirm 3: use K,S"),
        (["--publish", "a/b"], "--publish a/b: use letters"),
        (["--publish", ".."], "--publish ..: use letters"),
        (["--publish", "aliases"], "--publish aliases: use letters"),
        (["--promote", "--publish", "none"], "--promote: the champion is a published version"),
        (["--search", "pbt", "--folds", "3"], "drop --folds"),
        (["--search", "pbt", "--trials", "3"], "--trials 3"),
        (["--search", "pbt", "--data", "digits", "--space", "fast"], "widths cannot change while a network trains"),
        (["--space", "nowhere.py"], "--space nowhere.py: no such file"),
        (["--search", "grid"], "--search"),
    ],
)
def test_bad_flags_are_one_clear_error(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    shown = capsys.readouterr().err
    assert message in " ".join(shown.split())
    assert "Traceback" not in shown


ONE_DEPTH = replace(fast(), model=replace(fast().model, depths=(2,)))
NODE = {"CPU": 2.0, "memory": 16e9, "object_store_memory": 4e9}


def plan_of(config: Config, tune: TuneConfig, *nodes: dict[str, float], data: int = 1000) -> Any:
    return make_sweep_plan(config, tune, data, nodes or (NODE,))


def on(config: Config, **run: Any) -> Config:
    return replace(config, run=RunConfig(**run))


def test_as_many_trials_as_cores_each_with_its_threads() -> None:
    plan = plan_of(fast(), TuneConfig())
    assert (plan.at_once, plan.cpus, plan.gpus, plan.threads) == (2, 1, 0, 1)
    plan = plan_of(fast(), TuneConfig(at_once=1))
    assert (plan.at_once, plan.cpus, plan.threads) == (1, 2, 2)
    plan = plan_of(fast(), TuneConfig(at_once=4))
    assert (plan.at_once, plan.cpus, plan.threads) == (4, 0.5, 1)
    assert plan_of(fast(), TuneConfig(trials=1)).at_once == 1
    assert plan_of(fast(), TuneConfig(), {**NODE, "memory": 1.2e9}).at_once == 1, "memory for one"


def test_gpus_are_shared_by_fractions() -> None:
    node = {**NODE, "CPU": 16.0, "GPU": 2.0}
    assert (plan_of(fast(), TuneConfig(), node).at_once, plan_of(fast(), TuneConfig(), node).gpus) == (2, 1)
    plan = plan_of(fast(), TuneConfig(at_once=6), node)
    assert plan.gpus == 0.33
    assert plan.resources == {"CPU": 2, "GPU": 0.33}
    apart = plan_of(fast(), TuneConfig(), node, {**NODE, "CPU": 64.0})
    assert (apart.at_once, apart.resources) == (2, {"CPU": 8, "GPU": 1})


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("workers", ["auto", "2"])
@pytest.mark.parametrize("nodes", [(NODE,), (NODE, NODE, {**NODE, "CPU": 5.0})])
def test_what_runs_at_a_time_fits_at_once(at_once: int, workers: str, nodes: tuple[dict[str, float], ...]) -> None:
    """Else trials would hold what they have and wait for what others hold, for ever."""
    tune = TuneConfig(at_once=at_once, trials=100)
    plan = make_sweep_plan(on(fast(), workers=workers), tune, 1000, nodes)
    assert plan.at_once == at_once
    processes = [plan.cpus] * plan.at_once * max(plan.workers, 1)
    free = sorted((node["CPU"] for node in nodes), reverse=True)
    for need in processes:
        place = next(place for place, room in enumerate(free) if room >= need - 1e-6)
        free[place] -= need
    assert sum(free) >= plan.at_once * plan.resources["CPU"] * (plan.workers > 0) - 1e-6


@pytest.mark.parametrize(
    ("config", "tune", "message"),
    [
        (on(fast(), gpu=True), TuneConfig(), "--gpu: the cluster has no GPU"),
        (on(fast(), workers="4"), TuneConfig(), "--workers 4: a trial needs 4 CPUs, the cluster has 2"),
        (on(fast(), workers="1:2"), TuneConfig(), "--workers 1:2"),
        (replace(fast(), train=replace(fast().train, loader="streaming")), TuneConfig(folds=3), "--folds 3"),
        (on(fast(), workers="2"), TuneConfig(folds=3), "--folds 3"),
        (on(fast(), workers="2"), TuneConfig(search="pbt"), "--search pbt"),
        (replace(fast(), augment=replace(fast().augment, augment_on="data")), TuneConfig(), "--augment-on data"),
    ],
)
def test_what_can_never_run_is_refused(config: Config, tune: TuneConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(config, tune)


def row(epoch: int, accuracy: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "train_loss": 1.0,
        "train_accuracy": accuracy,
        "val_loss": 1.0,
        "val_accuracy": accuracy,
        "train_seconds": 2.0 * epoch,
    }


def test_the_ledger_outlives_the_driver(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    first = ledger.add(Trial(number=0, values={"lr": 0.1}, epochs_planned=3))
    second = ledger.add(Trial(number=1, values={"lr": 0.2}, epochs_planned=3))
    ledger.add(Trial(number=2, values={"lr": 0.3}, epochs_planned=3))
    ledger.started(first)
    for epoch, accuracy in ((1, 0.5), (2, 0.7), (2, 0.1), (3, 0.6)):  # the third is heard twice, after a resume
        ledger.progressed(first, row(epoch, accuracy))
    (tmp_path / "00000/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first.history))
    ledger.ended(first, "completed", "all epochs done")
    ledger.progressed(first, row(4, 0.9))  # repeated for the scheduler, after its end
    ledger.started(second)
    ledger.ended(second, "failed", "out of memory")
    again = Ledger(str(tmp_path))
    assert [trial.state for trial in again.trials.values()] == ["completed", "failed", "waiting"]
    assert again["00000"].score == 0.7
    assert (again["00000"].epochs, again["00000"].train_seconds) == (3, 6.0)
    assert again["00001"].score is None
    assert again["00001"].reason == "out of memory"


def test_the_score_with_folds_is_their_mean(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    trial = ledger.add(Trial(number=0, values={}, epochs_planned=2))
    for fold, accuracy in enumerate((0.5, 0.7), 1):
        ledger.progressed(trial, {"epoch": fold, "fold_accuracy": accuracy, "history": [row(1, 0.4), row(2, accuracy)]})
    assert trial.score == pytest.approx(0.6)
    assert trial.train_seconds == 8.0
    again = Ledger(str(tmp_path))["00000"]
    assert (again.folds, len(again.history)) == ([0.5, 0.7], 2)


@pytest.mark.parametrize("file", ["trial.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", ["{", "[]", '{"number": 3}x'])
def test_a_damaged_trial_is_named(tmp_path: Path, file: str, text: str) -> None:
    Ledger(str(tmp_path)).add(Trial(number=3, values={}))
    (tmp_path / "00003" / file).write_text(text)
    with pytest.raises(ConfigError, match=rf"00003/{file}: damaged.*; delete this trial's folder"):
        Ledger(str(tmp_path))


def test_what_ran_when_the_driver_was_killed_waits(tmp_path: Path) -> None:
    """Else a search that ends without it, or one with other trials to confirm, would take it for stopped."""
    ledger = Ledger(str(tmp_path))
    ledger.started(ledger.add(Trial(number=0, values={"lr": 0.1})))
    again = Ledger(str(tmp_path))
    assert (again["00000"].state, again["00000"].attempts) == ("waiting", 1)
    again.started(again["00000"])
    assert Ledger(str(tmp_path))["00000"].attempts == 2, "told as resumed"


def test_a_trial_of_other_values_makes_room(tmp_path: Path) -> None:
    """A population's trial that went on has come to other values than those that were confirmed."""
    ledger = Ledger(str(tmp_path))
    old = ledger.add(Trial(number=0, values={"lr": 0.1}, seed=101))
    ledger.ended(old, "completed", "all epochs done")
    (tmp_path / "00000-seed101/config.json").write_text("{}")
    assert ledger.add(Trial(number=0, values={"lr": 0.1}, seed=101)) is old
    new = ledger.add(Trial(number=0, values={"lr": 0.2}, seed=101))
    assert not new.done
    assert [path.name for path in (tmp_path / "00000-seed101").iterdir()] == ["trial.json"]


def setup(config: Config, prepared: Prepared, path: str, tune: TuneConfig) -> Setup:
    return Setup(
        config=config,
        tune=tune,
        recipe_name="fast",
        recipe=fast(),
        source="mine",
        space=SPACE,
        prepared=prepared,
        plan=make_sweep_plan(config, TuneConfig(), 1000, [NODE]),
        path=path,
    )


def searching(config: Config, prepared: Prepared, path: Path, tune: TuneConfig | None = None) -> Searching:
    return Searching(setup(config, prepared, str(path), tune or TuneConfig(confirm="0")), 0.0)


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_deleted_trial_is_proposed_anew(tmp_path: Path, config: Config, prepared: Prepared, search: Any) -> None:
    """As the error about a damaged one asks for; the others keep their numbers."""

    def trials_of(path: Path, wanted: int) -> list[Trial]:
        one = searching(config, prepared, path)
        by_number = {trial.number: trial for trial in one.trials.trials.values()}
        study = Study(path / "study.log", "s", SPACE, search, 3)
        known = one._known(study, by_number)
        following = one._next(known, study, wanted)
        while trial := following():
            trial.history = [row(1, (trial.number * 7 % 10) / 10)]
            one.trials.ended(trial, "completed", "all epochs done")
            study.end(trial)
        return sorted(one.trials.trials.values(), key=lambda trial: trial.number)

    before = trials_of(tmp_path, 4)
    shutil.rmtree(tmp_path / "trials/00001")
    again = trials_of(tmp_path, 5)
    assert [trial.number for trial in again] == list(range(5))
    assert [trial.values for trial in again[:4]] == [trial.values for trial in before]


def test_the_winner_is_tried_again_when_it_trained_on(tmp_path: Path, config: Config, prepared: Prepared) -> None:
    """Not when nothing changed: then test is not read again, and nothing is published."""
    one = searching(config, prepared, tmp_path)
    trial = one.trials.add(Trial(number=0, values={"lr": 0.1, "epochs": 3, "widths": "8 16", "flip": "random"}))
    one.trials.progressed(trial, row(1, 0.5))
    (tmp_path / "trials/00000/metrics.jsonl").write_text(json.dumps(row(1, 0.5)) + "\n")
    one.trials.ended(trial, "stopped", BUDGET)
    one.finish()
    keep(str(tmp_path), test={"accuracy": 0.4}, published="x/1", published_to="/models")
    assert searching(config, prepared, tmp_path).finish()["test"] == {"accuracy": 0.4}
    more = [row(1, 0.5), row(2, 0.7)]
    (tmp_path / "trials/00000/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    summary = searching(config, prepared, tmp_path).finish()
    assert (summary["test"], summary["published"]) == (None, None)


def test_a_summary_counts_all_calls(tmp_path: Path, config: Config, prepared: Prepared) -> None:
    """Of a sweep that went on with fewer --trials; its clock is that of the first trial."""
    first = searching(config, prepared, tmp_path)
    for number in range(3):
        first.trials.started(first.trials.add(Trial(number=number, values={"lr": 0.1})))
    time.sleep(0.01)
    summary = searching(config, prepared, tmp_path, TuneConfig(trials=1)).finish()
    assert summary["trials_wanted"] == 3
    assert summary["trials"][0]["started"] == 0
    assert all(trial["started"] >= 0 for trial in summary["trials"])


def test_a_trial_whose_process_dies_again_and_again_has_failed(tmp_path: Path, capfd: Any) -> None:
    """In one sentence, and without Tune's traceback for each of them."""
    ledger = Ledger(str(tmp_path))
    trial = ledger.add(Trial(number=0, values={"lr": 0.1}))
    tunes = SimpleNamespace(trial_id="a", config={"trial": {"key": trial.key}}, get_error=lambda: None)
    with environment(verbose=False):
        logging.getLogger("ray.tune.tune").error("Traceback")
        Recorder(ledger, str, release=False).on_trial_error(1, [], tunes)
    assert (trial.state, trial.reason) == ("failed", "its process died 4 times")
    assert "Traceback" not in capfd.readouterr().err


def test_a_node_without_memory_is_one_error_and_the_trials_wait(
    tmp_path: Path, config: Config, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray kills the process; Tune starts again what died otherwise, but not this."""
    ledger = Ledger(str(tmp_path / "sweep/trials"))
    trial = ledger.add(Trial(number=0, values={}))

    class Killed:
        def __init__(self, *trainable: Any, **settings: Any):
            pass

        def fit(self) -> None:
            ledger.started(trial)
            raise RuntimeError("Caught unexpected exception") from OutOfMemoryError("1 worker(s) were killed")

    for name in ("with_parameters", "with_resources"):
        monkeypatch.setattr(ray.tune, name, lambda trainable, *more, **job: trainable)
    monkeypatch.setattr(ray.tune, "Tuner", Killed)
    plan = make_sweep_plan(config, TuneConfig(at_once=2), 0, [{"CPU": 4.0, "memory": 2**34}])
    job = SweepJob(config=config, space={}, prepared=prepared, path=ledger.path, plan=plan, train=None, val=None)
    with pytest.raises(RunFailed, match=r"sweep: a node had no memory left for 2 trials.*--at-once 1 the same command"):
        execute(job, ledger, FIFOScheduler(), lambda: None, 1, None, lambda trial: "")
    assert Ledger(ledger.path)["00000"].state == "waiting"


def test_a_search_with_trials_to_go_on_with_is_not_finished(tmp_path: Path, config: Config, prepared: Prepared) -> None:
    one = searching(config, prepared, tmp_path, TuneConfig(trials=1))
    one.trials.started(one.trials.add(Trial(number=0, values={"lr": 0.1})))
    assert searching(config, prepared, tmp_path, TuneConfig(trials=1)).finish()["state"] == "budget spent"


def test_a_folder_is_of_one_sweep(tmp_path: Path, config: Config, prepared: Prepared) -> None:
    path = str(tmp_path / "one")
    claim(path, config, TuneConfig(), SPACE, prepared)
    claim(path, config, TuneConfig(trials=99), SPACE, prepared)
    with pytest.raises(ConfigError, match="one: holds a sweep with another folds, space; give the same flags"):
        claim(path, config, TuneConfig(folds=3), {"lr": SPACE["lr"]}, prepared)
    with pytest.raises(ConfigError, match="one: holds several runs, not one; give another --name"):
        RunDir(path).open(config, prepared)
    file = tmp_path / "one/sweep-config.json"
    older = json.loads(file.read_text())
    del older["transfer"]
    file.write_text(json.dumps(older))
    claim(path, config, TuneConfig(), SPACE, prepared)
    with pytest.raises(ConfigError, match="one: holds a sweep, not a comparison; give another --name"):
        claim_folder(path, "comparison", {})
    assert not (tmp_path / "one/config.json").exists()
    RunDir(str(tmp_path / "two")).open(config, prepared)
    with pytest.raises(ConfigError, match="two: holds a run, not a sweep; give another --name"):
        claim(str(tmp_path / "two"), config, TuneConfig(), SPACE, prepared)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"sweep-config.json: damaged.*delete it"):
        claim(path, config, TuneConfig(), SPACE, prepared)
    (tmp_path / "one/sweep.json").write_text('{"test"')
    with pytest.raises(ConfigError, match=r"sweep.json: damaged.*delete it"):
        searching(config, prepared, tmp_path / "one")
    with pytest.raises(ConfigError, match=r"--storage .*: cannot be written"):
        claim(str(tmp_path / "one/sweep.json/x"), config, TuneConfig(), SPACE, prepared)


def test_a_sweep_has_one_driver_and_says_how_it_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with locked_sweep(str(tmp_path)):
        second = locked_sweep(str(tmp_path))
        with pytest.raises(ConfigError, match="another process works on this sweep"):
            second.__enter__()
    with pytest.raises(KeyboardInterrupt), locked_sweep(str(tmp_path)):
        raise KeyboardInterrupt
    assert f"{tmp_path}: keeps what was trained; the same command goes on" in caplog.text


def test_a_sweep_is_called_by_its_folder_alone(config: Config, prepared: Prepared, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/sweep?endpoint_override=http%3A%2F%2F127.0.0.1"
    assert setup(config, prepared, uri, TuneConfig()).name == "sweep"


def test_what_ended_is_repeated_to_the_scheduler() -> None:
    trial = Trial(number=1, values={"lr": 0.1}, state="stopped", history=[row(1, 0.5), row(2, 0.6)])
    rows = [{"epoch": 1, "val_accuracy": 0.5}, {"epoch": 2, "val_accuracy": 0.6}]
    assert setting_of(trial)["rows"] == rows
    assert setting_of(replace(trial, state="running"))["rows"] == []
    folded = setting_of(replace(trial, folds=[0.5, 0.7]))["rows"]
    assert [one["val_accuracy"] for one in folded] == pytest.approx([0.5, 0.6])


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_resumed_study_proposes_what_an_uninterrupted_one_would(tmp_path: Path, search: Any) -> None:
    def propose(study: Study, trials: list[Trial], numbers: range) -> None:
        for number in numbers:
            trial = Trial(number=number, values=study.propose(number))
            trial.history = [row(1, (number * 7 % 10) / 10)]
            trial.state = "completed"
            study.report(trial)
            study.end(trial)
            trials.append(trial)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole: list[Trial] = []
        propose(Study(tmp_path / "a.log", "s", SPACE, search, 3), whole, range(16))
        pieces: list[Trial] = []
        propose(Study(tmp_path / "b.log", "s", SPACE, search, 3), pieces, range(13))
        # A driver that was killed while it wrote leaves Optuna's lock, for which Optuna would wait half a minute.
        (tmp_path / "b.log.lock").symlink_to(tmp_path / "b.log")
        begun = time.monotonic()
        resumed = Study(tmp_path / "b.log", "s", SPACE, search, 3)
        for trial in pieces:
            resumed.add(trial)
        assert time.monotonic() - begun < 10
        propose(resumed, pieces, range(13, 16))
    assert [trial.values for trial in pieces] == [trial.values for trial in whole]
    assert len({json.dumps(trial.values) for trial in whole}) == 16
    for trial in whole:
        apply(ONE_DEPTH, SPACE, trial.values)


def test_the_study_is_what_optuna_dashboard_reads(tmp_path: Path) -> None:
    trials = [
        Trial(number=0, values={"lr": 0.1}, state="completed", history=[row(1, 0.5), row(2, 0.7)], started=9, ended=12),
        Trial(number=1, values={"lr": 0.2}, state="stopped", reason="asha", history=[row(1, 0.3)]),
        Trial(number=2, values={"lr": 0.3}, state="failed", reason="out of memory"),
        Trial(number=3, values={"lr": 0.4}, state="running", history=[row(1, 0.6)]),
    ]
    file = tmp_path / "study.log"
    study = Study(file, "sweep", {"lr": Float(0.01, 1.0)}, "random", 0)
    for trial in trials:
        study.add(trial)
    study.report(trials[3])
    storage = JournalStorage(JournalFileBackend(str(file)))
    found = optuna.load_study(study_name="sweep", storage=storage).trials
    assert optuna.load_study(study_name="sweep", storage=storage).metric_names == ["val accuracy"]
    assert [trial.state.name for trial in found] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [trial.params["lr"] for trial in found] == [0.1, 0.2, 0.3, 0.4]
    assert found[0].value == 0.7
    assert found[0].duration is not None
    assert found[0].duration.total_seconds() == 3, "also when it is told again"
    assert found[0].intermediate_values == {1: 0.5, 2: 0.7}
    assert found[2].user_attrs["ended"] == "out of memory"
    assert found[3].intermediate_values == {1: 0.6}
    trials[3].state, trials[3].reason = "completed", "all epochs done"
    study.end(trials[3])
    assert optuna.load_study(study_name="sweep", storage=storage).trials[3].value == 0.6


def test_a_dashboard_may_follow_another_at_once() -> None:
    """A browser was connected when the last one ended; only who listens has taken the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--dashboard-port {port}: taken.*use another"):
            check_free(port)
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()
    check_free(port)


def test_a_copied_trial_is_of_the_one_it_copied_and_of_nothing_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting's key is no sign of it: of a trial that copies one which once copied it, it is its own."""
    heard: list[dict[str, Any]] = []
    brought: list[Path] = []
    monkeypatch.setattr(ray.tune, "report", lambda metrics, checkpoint=None: heard.append(metrics))
    monkeypatch.setattr(
        ray.tune, "get_checkpoint", lambda: ray.tune.Checkpoint.from_directory(str(brought[0])) if brought else None
    )

    def context(key: str, lr: float) -> TrialContext:
        (tmp_path / key / "checkpoints").mkdir(parents=True, exist_ok=True)
        run_dir = RunDir(str(tmp_path / key))
        run_dir.own()
        return TrialContext(run_dir, torch.device("cpu"), key, {"lr": lr})

    def train(one: TrialContext, epoch: int, accuracy: float) -> None:
        folder = tmp_path / "new"
        (folder / "model").mkdir(parents=True)
        (folder / "model/config.json").write_text(str(accuracy))
        one.begin()
        one.report({"epoch": epoch, "val_accuracy": accuracy, "score": accuracy}, folder)

    train(context("00000", 0.1), 1, 0.9)
    train(context("00001", 0.2), 1, 0.5)
    brought.append(tmp_path / "00000/checkpoints/checkpoint_000000")
    train(context("00001", 0.3), 2, 0.4)
    assert heard[-1]["copied"] == {"from": 0, "values": {"lr": 0.3}}
    assert [path.name for path in (tmp_path / "00001/checkpoints").glob("*_*")] == ["checkpoint_000001"]
    assert (tmp_path / "00001/model/config.json").read_text() == "0.4", "of the values that it has now"
    brought[0] = tmp_path / "00001/checkpoints/checkpoint_000001"
    train(context("00001", 0.3), 3, 0.3)
    assert "copied" not in heard[-1], "its own, brought after a pause"
    assert (tmp_path / "00001/model/config.json").read_text() == "0.4"
    brought[0] = tmp_path / "00001/checkpoints/checkpoint_000002"
    train(context("00000", 0.36), 4, 0.6)
    assert heard[-1]["copied"] == {"from": 1, "values": {"lr": 0.36}}


def test_folds_are_stratified_and_every_image_is_val_once(prepared: Prepared) -> None:
    table, folds = make_folds(prepared, 4, seed=0)
    labels = table.column("label").to_numpy()
    assert len(table) == prepared.counts["train"] + prepared.counts["val"]
    assert np.array_equal(np.sort(np.concatenate([fold.val for fold in folds])), np.arange(len(table)))
    for fold in folds:
        assert not set(fold.train) & set(fold.val)
        assert len(fold.train) + len(fold.val) == len(table)
        assert np.ptp(np.bincount(labels[fold.val])) <= 1
    with pytest.raises(ConfigError, match=r"--folds 200: a class has 110 images only; use --folds 110"):
        make_folds(prepared, 200, seed=0)


def test_rungs_are_where_asha_asks() -> None:
    assert rungs(TuneConfig(), 9) == [1, 3]
    assert rungs(TuneConfig(), 27) == [3, 9]
    assert rungs(TuneConfig(), 3) == [1]
    assert rungs(TuneConfig(), 1) == []
    assert rungs(TuneConfig(scheduler="none"), 9) == []
    assert rungs(TuneConfig(grace_epochs=2, reduction=2), 17) == [2, 4, 8, 16]


@pytest.mark.parametrize("max_epochs", [2, 3, 9, 10, 27, 28, 81, 82, 125, 300])
@pytest.mark.parametrize("reduction", [2, 3, 4, 5])
@pytest.mark.parametrize("grace", [0, 1, 2])
def test_asha_asks_at_the_rungs_that_we_show(max_epochs: int, reduction: int, grace: int) -> None:
    """Tune counts them by logarithms, which may be a hair too small."""
    tune = TuneConfig(grace_epochs=grace, reduction=reduction)
    if grace >= max_epochs:
        assert isinstance(make_scheduler(tune, SPACE, max_epochs), FIFOScheduler)
        return
    scheduler: Any = make_scheduler(tune, SPACE, max_epochs)
    asked = sorted(milestone for milestone, _ in scheduler._brackets[0]._rungs)
    assert asked == rungs(tune, max_epochs)
    assert asked[-1] < max_epochs


def test_most_epochs_of_a_space() -> None:
    assert max_epochs(fast(), SPACE) == 9
    assert max_epochs(fast(), {"epochs": Choice(5, 50, 10)}) == 50
    assert max_epochs(fast(), {"lr": Float(0, 1)}) == fast().train.epochs


def test_the_same_flags_give_the_same_name(prepared: Prepared, config: Config) -> None:
    """More trials, minutes or seeds to confirm go on with the sweep; another search is another one."""
    name = default_name(config, TuneConfig(), "fast", SPACE, prepared)
    assert name == default_name(
        config, TuneConfig(trials=99, confirm="1,2", at_once=1, dashboard=True), "fast", SPACE, prepared
    )
    assert name != default_name(config, TuneConfig(search="optuna"), "fast", SPACE, prepared)
    assert name != default_name(config, TuneConfig(folds=3), "fast", SPACE, prepared)
    assert name != default_name(config, TuneConfig(), "augment", SPACE, prepared)
    assert name != default_name(config, TuneConfig(), "fast", {"lr": SPACE["lr"]}, prepared), "flags fix the others"
    other = replace(config, train=replace(config.train, seed=1))
    assert name != default_name(other, TuneConfig(), "fast", SPACE, prepared)


def test_reasons_are_one_line() -> None:
    assert explain(MemoryError()).startswith("out of memory")
    alloc = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried\nto allocate"
    assert explain(RuntimeError(alloc)).startswith("out of memory")
    assert explain(ConfigError("--lr -1: use 1")) == "--lr -1: use 1"
    assert explain(KeyError("x")) == "KeyError: 'x'"


def test_mean_history_is_over_the_folds_that_got_there() -> None:
    rows = mean_history([[row(1, 0.2), row(2, 0.4)], [row(1, 0.4)]])
    assert [one["epoch"] for one in rows] == [1, 2]
    assert [one["val_accuracy"] for one in rows] == pytest.approx([0.3, 0.4])


def test_the_terminal_says_how_each_trial_ended(capsys: pytest.CaptureFixture[str]) -> None:
    trial = Trial(number=7, values={"lr": 0.123456, "widths": "8 16"}, epochs_planned=3, history=[row(1, 0.5)])
    with SweepDisplay(2, 1, None) as display:
        display.changed(trial)
        trial.state, trial.reason = "failed", "out of memory"
        display.changed(trial)
        display.changed(trial)
    shown = capsys.readouterr().err
    assert shown.count("trial 00007") == 1
    assert "failed: out of memory" in shown
    assert "lr 0.1235  widths 8 16" in shown


def test_the_table_of_many_settings_fits_a_terminal() -> None:
    values: dict[str, Any] = dict.fromkeys(SPACES["fast"], 0.123456) | {"widths": "64 128 256"}
    with SweepDisplay(9, 2, None) as display:
        for number in range(9):
            display.changed(Trial(number=number, values=values, epochs_planned=12, history=[row(1, number / 10)]))
    console = Console(width=100)
    with console.capture() as captured:
        console.print(display._table())
    shown = captured.get()
    assert "…" not in shown
    assert shown.count("\n") == 5 + len(values)
    for text in ("00008", "0.8000", "label_smoothing", "64 128 256", "1/12", "0.1235"):
        assert text in shown


def test_describe_is_json() -> None:
    described = json.loads(json.dumps(describe(SPACE)))
    assert described["widths"] == {"kind": "choice", "choices": ["8 16", "8 16 32"]}
    assert described["lr"] == {"kind": "float", "low": 0.01, "high": 1.0, "log": True}


def test_config_errors_of_a_trial_do_not_end_the_sweep_at_once() -> None:
    """What two settings make impossible together is the trial's failure, not the space's."""
    config = Config(model=ModelConfig(depths=(2, 2, 2)), optim=OptimConfig(), train=TrainConfig())
    check_space(SPACE, "mine", config)
    with pytest.raises(ConfigError, match="--depths"):
        apply(config, SPACE, {"widths": "8 16"})
