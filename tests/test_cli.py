"""The door of every job: flags, exit codes, what goes to stdout and what to stderr."""

import json
import logging
import os
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cifar.cli import SUBMITTED, command_line, run_job
from cifar.config import AugmentConfig, Config, ConfigError, DataConfig, RunConfig, RunFailed, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Flags:
    model: str
    """A model."""
    data: DataConfig = field(default_factory=DataConfig)
    output: str = "./out"
    """A folder."""


RECIPES = {
    "fast": Config(train=TrainConfig(epochs=5)),
    "long": Config(train=TrainConfig(epochs=100), augment=AugmentConfig(rotate=15.0)),
}


def collect(found: list[Any]):
    def job(flags: Any) -> dict[str, Any]:
        """Does a thing."""
        found.append(flags)
        logging.getLogger("cifar.somewhere").info("at work")
        print("done")
        return {"answer": 42}

    return job


def test_groups_are_flat_and_what_is_not_given_keeps_its_default():
    found = []
    assert run_job(collect(found), Flags, ["--model", "m", "--image-size", "64"]) == 0
    assert found == [Flags(model="m", data=DataConfig(image_size=64))]


def test_a_recipe_is_the_default_and_flags_win_over_it():
    recipe = RECIPES["long"]
    found = []
    flags = ["--widths", "32", "64", "--lr", "0.1", "--scales", "0.75", "1", "--gpu"]
    assert run_job(collect(found), recipe, flags) == 0
    expected = replace(
        recipe,
        model=replace(recipe.model, widths=(32, 64)),
        optim=replace(recipe.optim, lr=0.1),
        train=replace(recipe.train, scales=(0.75, 1.0)),
        run=RunConfig(gpu=True),
    )
    assert run_job(collect(found), expected, ["--no-gpu"]) == 0
    assert found == [expected, replace(expected, run=RunConfig())]


def test_no_flags_give_the_recipe_itself():
    found = []
    assert run_job(collect(found), RECIPES["fast"], []) == 0
    assert found == [RECIPES["fast"]]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], RECIPES["fast"]),
        (["--recipe", "long"], RECIPES["long"]),
        (["--epochs", "7", "--recipe=long"], replace(RECIPES["long"], train=TrainConfig(epochs=7))),
    ],
)
def test_a_recipe_is_picked_by_name_wherever_it_stands_and_the_first_is_the_default(argv, expected):
    found = []
    assert run_job(collect(found), RECIPES, argv) == 0
    assert found == [expected]


def test_json_is_the_last_line_of_stdout_and_progress_goes_to_stderr(capsys):
    assert run_job(collect([]), Flags, ["--model", "m", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "done"
    assert json.loads(out.splitlines()[-1]) == {"answer": 42}
    assert err == "at work\n"


def test_without_json_there_is_none(capsys):
    run_job(collect([]), Flags, ["--model", "m"])
    assert capsys.readouterr().out == "done\n"


def test_logging_is_left_as_it_was_found():
    package = logging.getLogger("cifar")
    before = package.level, package.propagate, list(package.handlers)
    run_job(collect([]), Flags, ["--model", "m"])
    assert (package.level, package.propagate, package.handlers) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "-1"], "error: --lr -1.0: use a positive number"),
        (["--widths", "0"], "error: --widths 0: give one channel count"),
        (["--batch-size", "7", "--accumulate", "2"], "error: --batch-size 7: make it a multiple of --accumulate 2"),
        (["--recipe", "long", "--workers", "x"], "error: --workers x: use a count"),
    ],
)
def test_a_value_that_the_config_refuses_is_one_line_and_exit_code_2(argv, message, capsys):
    found = []
    assert run_job(collect(found), RECIPES, argv) == 2
    out, err = capsys.readouterr()
    assert (found, out) == ([], "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nope", "3"], "--nope"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs"], "--epochs"),
        (["--flip", "up"], "alternating"),
        (["--recipe", "none"], "fast"),
    ],
)
def test_a_flag_that_cannot_be_read_is_named_and_exit_code_2(argv, words, capsys):
    found = []
    assert run_job(collect(found), RECIPES, argv) == 2
    out, err = capsys.readouterr()
    assert (found, out) == ([], "")
    assert words in err
    assert "Traceback" not in err


def test_a_missing_required_flag_is_named(capsys):
    assert run_job(collect([]), Flags, []) == 2
    assert "--model" in capsys.readouterr().err


def test_help_shows_the_text_of_the_job_and_the_recipes_own_defaults(capsys):
    assert run_job(collect([]), RECIPES, ["--recipe", "long", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Does a thing." in text
    assert "Passes over the training split. (default: 100)" in text
    assert "--crop-padding" in text
    assert "crop_padding" not in text
    assert "(default: 64 256 256)" in text


def failing(error: BaseException):
    def job(flags: Flags) -> dict[str, Any]:
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("--data x: not found"), 2, "error: --data x: not found\n"),
        (ConfigError("cat\n\x1b[2J\x1b]0;me\x07\x9b\rdog.png"), 2, "error: cat ]0;me dog.png\n"),
        (RunFailed("loss is nan; lower --lr"), 1, "failed: loss is nan; lower --lr\n"),
        (RuntimeError("loss is \x1b[31mnan"), 1, "RuntimeError: loss is nan\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_job_raises_decides_the_exit_code(error, code, words, capsys):
    assert run_job(failing(error), Flags, ["--model", "m"]) == code
    err = capsys.readouterr().err
    assert err.endswith(words)
    assert ("Traceback" in err) == (type(error) is RuntimeError)
    assert (err.count("\n") == 1) == (type(error) is not RuntimeError)


def test_names_in_progress_lines_cannot_command_the_terminal(capsys):
    def job(flags: Flags) -> dict[str, Any]:
        logging.getLogger("cifar.data").warning("bad: %s", "\x1b[1;31mcat\x07\x1b[0m\ngood: dog\x7f.png")
        return {}

    assert run_job(job, Flags, ["--model", "m"]) == 0
    assert capsys.readouterr().err == "bad: cat good: dog.png\n"


def test_the_command_to_repeat_a_job_survives_a_shell(monkeypatch):
    monkeypatch.setattr("sys.argv", ["jobs/train.py", "--data", "my data"])
    assert command_line() == "python jobs/train.py --data 'my data'"
    assert command_line(["--lr", "1"]) == "python jobs/train.py --lr 1"


@pytest.mark.parametrize(("submitted", "threads", "left"), [(True, "1", None), (True, "3", "3"), (False, "1", "1")])
def test_a_submitted_job_is_not_held_to_one_thread(submitted, threads, left, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    if submitted:
        monkeypatch.setenv(SUBMITTED, "{}")
    seen = []

    def job(flags: Flags) -> dict[str, Any]:
        """Look."""
        seen.append(os.environ.get("OMP_NUM_THREADS"))
        return {}

    assert run_job(job, Flags, ["--model", "m"]) == 0
    assert seen == [left]
