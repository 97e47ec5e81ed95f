"""The config validates at construction, survives JSON, and names the flag that is wrong."""

import dataclasses
import json
from typing import Any

import pytest

from cifar.config import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from cifar.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    config = RECIPES[name]()
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_field_names_are_unique_over_the_groups() -> None:
    """The command line flattens them."""
    groups = (DataConfig, AugmentConfig, ModelConfig, OptimConfig, TrainConfig, RunConfig)
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("group", "values", "flag"),
    [
        (DataConfig, {"max_bad": 1.5}, "--max-bad 1.5"),
        (DataConfig, {"image_size": 4}, "--image-size 4"),
        (AugmentConfig, {"zoom": 1.0}, "--zoom 1.0"),
        (ModelConfig, {"widths": ()}, "--widths"),
        (ModelConfig, {"depths": (2, 3)}, "--depths"),
        (ModelConfig, {"depths": (0,)}, "--depths"),
        (TrainConfig, {"skip_easy": 1.0}, "--skip-easy"),
        (OptimConfig, {"lr": float("nan")}, "--lr nan"),
        (TrainConfig, {"epochs": 0}, "--epochs 0"),
        (RunConfig, {"workers": "4:1"}, "--workers 4:1"),
        (RunConfig, {"workers": "two"}, "--workers two"),
        (RunConfig, {"workers": "0:2"}, "--workers 0:2"),
        (RunConfig, {"name": "../up"}, "--name"),
    ],
)
def test_bad_value_names_its_flag(group: type, values: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}"):
        group(**values)


def test_batch_must_divide_into_micro_batches() -> None:
    with pytest.raises(ConfigError, match=r"--batch-size 500.*--accumulate 3"):
        Config(optim=OptimConfig(accumulate=3), train=TrainConfig(batch_size=500))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"run": RunConfig(workers="1:3"), "train": TrainConfig(batch_size=500)},
            r"--batch-size 500: does not divide among 3 workers; use --batch-size 498",
        ),
        ({"run": RunConfig(workers="0"), "augment": AugmentConfig(augment_on="data")}, "--augment-on data"),
        ({"train": TrainConfig(loader="resident"), "augment": AugmentConfig(augment_on="data")}, "--loader resident"),
        ({"model": ModelConfig(model="notebook"), "train": TrainConfig(scales=(0.5, 1.0))}, r"--scales 0\.5 1\.0"),
        ({"model": ModelConfig(model="notebook", widths=(8,) * 6)}, "--widths"),
        ({"model": ModelConfig(model="notebook", depths=(3,))}, "--depths"),
    ],
)
def test_contradicting_flags_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**changes)


def test_a_run_has_as_many_workers_as_its_batch_divides_among() -> None:
    def counts(workers: str, batch_size: int = 500) -> list[int]:
        return Config(run=RunConfig(workers=workers), train=TrainConfig(batch_size=batch_size)).worker_counts

    assert counts("auto") == counts("0") == []
    assert counts("2") == [2]
    assert counts("1:5") == [1, 2, 4, 5]
    assert counts("16:64", 512) == [16, 32, 64]


def test_an_unknown_key_is_refused_and_a_missing_one_means_its_default() -> None:
    """A model that was published before a setting existed stays readable."""
    values = Config().to_dict()
    values["train"]["lr_finder"] = True
    with pytest.raises(ConfigError, match="lr_finder"):
        Config.from_dict(values)
    values = Config(optim=OptimConfig(lr=0.5)).to_dict()
    del values["optim"]["momentum"]
    assert Config.from_dict(values) == Config(optim=OptimConfig(lr=0.5))


def test_wrong_type_is_refused() -> None:
    values = Config().to_dict()
    values["train"]["epochs"] = "8"
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("rows", "workers", "accumulate", "expected"),
    [
        (45_000, "auto", 1, 500),
        (396, "auto", 1, 49),
        (3, "0", 1, 1),
        (396, "1:3", 1, 48),
        (45_000, "3", 4, 492),
        (45_000, "1:64", 1, 448),
    ],
)
def test_batch_size_0_suits_the_data_and_divides_among_the_workers(
    rows: int, workers: str, accumulate: int, expected: int
) -> None:
    config = Config(optim=OptimConfig(accumulate=accumulate), run=RunConfig(workers=workers))
    assert config.with_batch_size(rows).train.batch_size == expected
    assert config.with_batch_size(rows).with_batch_size(10).train.batch_size == expected
