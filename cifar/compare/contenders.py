"""Who is compared: training runs of several settings, all on the same images, and classical baselines."""

import dataclasses
import re
import shlex
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar.compare.settings import CompareConfig, listed
from cifar.config import Config, ConfigError
from cifar.recipes import RECIPES, fast, notebook
from cifar.tune.space import flags_of

GROUPS = ("augment", "model", "transfer", "optim", "train")
"""Of a Config; all contenders share the data, and where runs are kept."""
SHARED = ("seed", "loader", "augment_on", "checkpoint_steps")
"""Settings of these groups that are the comparison's: they decide which runs there are, and where they compute."""
BASE = "base"
RANDOM = ("forest",)
"""Estimators that draw random numbers."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    config: Config | None = None
    """What its runs train, but for the seed; None of a baseline."""
    recipe: str = ""
    """By whose name jobs/train.py begins."""
    estimator: str = ""
    features: str = ""

    @property
    def varies(self) -> bool:
        """Whether another seed gives another run."""
        return self.config is not None or self.estimator in RANDOM

    def identity(self) -> dict[str, Any]:
        """As JSON, what it computes."""
        if self.config is None:
            return {"name": self.name, "estimator": self.estimator, "features": self.features}
        values = self.config.to_dict()
        del values["run"]
        return {"name": self.name} | values

    def command(self, seed: int | None = None) -> str:
        """What trains one of its runs by itself; empty for a baseline."""
        if self.config is None:
            return ""
        config = self.config if seed is None else with_seed(self.config, seed)
        flags = flags_of(config, RECIPES[self.recipe]())
        return shlex.join(["python", "jobs/train.py", "--recipe", self.recipe, *flags])


def find_contenders(config: Config, compare: CompareConfig, recipe: str, given: Collection[str]) -> list[Contender]:
    """In the order of the flags. `config` is the recipe but for the settings `given`, by name, on the command line.

    ConfigError for fewer than two, for two of one name, for two that are the same, and for one that cannot be.
    """
    made: list[Contender] = []

    def add(name: str, make: Callable[[], Config], of_recipe: str = recipe) -> None:
        try:
            made.append(Contender(name=name, config=make(), recipe=of_recipe))
        except ConfigError as error:
            raise ConfigError(f"contender {name}: {error}") from None

    for name in listed(compare.optimizers):
        add(name, lambda name=name: with_optimizer(config, name, given))
    for name in listed(compare.models):
        add(name, lambda name=name: with_model(config, name, given))
    for name in listed(compare.recipes):
        add(name, lambda name=name: overridden(RECIPES[name](), config, given), name)
    for text in compare.variants:
        name, changes = read_variant(text, config)
        add(name, lambda changes=changes: changed(config, changes))
    estimators = listed(compare.baselines)
    if estimators and not made:
        made.append(Contender(name=config.model.model, config=config, recipe=recipe))
    made += [
        Contender(name=f"{estimator}-{features}", estimator=estimator, features=features)
        for features in listed(compare.features)
        for estimator in estimators
    ]
    if len(made) < 2:
        found = f"only {made[0].name}" if made else "nothing"
        raise ConfigError(
            f"{found} to compare: name two or more with --optimizers, --models, --recipes or --variants, "
            "or let the command's own network meet --baselines"
        )
    refuse_twins(made)
    return made


def refuse_twins(contenders: Sequence[Contender]) -> None:
    """ConfigError for two of one name, or of the same settings."""
    for place, contender in enumerate(contenders):
        for other in contenders[:place]:
            if other.name == contender.name:
                raise ConfigError(f"two contenders are called {other.name}; give one of --variants a name of its own")
            if contender.config is not None and other.config == contender.config:
                raise ConfigError(f"{other.name} and {contender.name} are the same settings; name one of them")


def remarks(contenders: Sequence[Contender]) -> list[str]:
    """What the user may not know of contenders that differ, but compute the same."""
    by_optimizer: dict[str, list[Contender]] = {"adam": [], "adamw": []}
    for one in contenders:
        if one.config is not None and one.config.optim.optimizer in by_optimizer and not one.config.optim.weight_decay:
            by_optimizer[one.config.optim.optimizer].append(one)
    return [
        f"{adam.name} and {adamw.name} are the same here: without --weight-decay AdamW is Adam."
        for adam in by_optimizer["adam"]
        for adamw in by_optimizer["adamw"]
        if adam.config is not None and changed(adam.config, {"optimizer": "adamw"}) == adamw.config
    ]


def with_optimizer(config: Config, name: str, given: Collection[str]) -> Config:
    """A recipe's learning rate is for its own optimizer, a given one for all; another optimizer takes what suits it."""
    own = name == config.optim.optimizer or "lr" in given
    lr = config.optim.lr if own else 0.0
    return changed(config, {"optimizer": name, "lr": lr})


def with_model(config: Config, name: str, given: Collection[str]) -> Config:
    """`cnn` and `notebook` have widths and depths of their own, which are their recipes' where no flag gives any."""
    own = {"cnn": fast, "notebook": notebook}.get(name)
    if own is None or name == config.model.model:
        return changed(config, {"model": name})
    model = own().model
    kept = {field.name for field in dataclasses.fields(model) if field.name in given} | {"tta"}
    model = dataclasses.replace(model, **{field: getattr(config.model, field) for field in kept - {"model"}})
    return dataclasses.replace(config, model=model)


def overridden(recipe: Config, config: Config, given: Collection[str]) -> Config:
    """The recipe on the data of `config`, with what it was given."""
    names = {field.name for group in GROUPS for field in dataclasses.fields(getattr(config, group))}
    values = settings_of(config)
    taken = {name: values[name] for name in names if name in given or name in SHARED}
    recipe = dataclasses.replace(recipe, data=config.data, run=config.run)
    return changed(recipe, taken)


def read_variant(text: str, config: Config) -> tuple[str, dict[str, Any]]:
    """The name of a variant, which is its text where it has none, and the settings that it changes."""
    where = f"--variants {text!r}"
    named = re.fullmatch(r"\s*([\w.+\- ]+?)\s*:\s*(.*)", text)
    name, words = (named[1], named[2].split()) if named else (" ".join(text.split()), text.split())
    if not words:
        raise ConfigError(f"{where}: empty; use such as 'lr=0.1 cutout=8', or {BASE}, which changes nothing")
    changes: dict[str, Any] = {}
    for word in words if words != [BASE] else ():
        setting, sign, value = word.lstrip("-").partition("=")
        setting = setting.replace("-", "_")
        known = settings_of(config)
        if setting in SHARED:
            raise ConfigError(f"{where}: {setting} is the same for all; give it as a flag of the comparison")
        if setting not in known:
            if setting in {*vars(config.data), *vars(config.run)}:
                raise ConfigError(f"{where}: all contenders share {setting}; give it as a flag of the comparison")
            those = ", ".join(sorted(known.keys() - set(SHARED)))
            raise ConfigError(f"{where}: there is no setting {setting!r}; those are {those}")
        if not sign:
            raise ConfigError(f"{where}: {setting} has no value; use {setting}=VALUE")
        if setting in changes:
            raise ConfigError(f"{where}: gives {setting} twice")
        changes[setting] = _parsed(value, known[setting], words_of(setting, config), f"{where}: {setting}")
    return name, changes


def words_of(setting: str, config: Config) -> tuple[str, ...]:
    """Those that a setting takes, if it takes a choice of words."""
    group = next(getattr(config, group) for group in GROUPS if setting in vars(getattr(config, group)))
    hint = typing.get_type_hints(type(group))[setting]
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def settings_of(config: Config) -> dict[str, Any]:
    """Every setting that contenders may differ in, and those that are SHARED, by name."""
    return {name: value for group in GROUPS for name, value in vars(getattr(config, group)).items()}


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with these settings; ConfigError where they are wrong or do not go together."""
    groups = {}
    for group in GROUPS:
        own = {name: value for name, value in values.items() if name in vars(getattr(config, group))}
        groups[group] = dataclasses.replace(getattr(config, group), **own)
    return dataclasses.replace(config, **groups)


def with_seed(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def _parsed(text: str, current: Any, words: Sequence[str], where: str) -> Any:
    """Text as the type of the current value; several numbers have commas between them."""
    if isinstance(current, tuple):
        return tuple(_parsed(part, current[0], (), where) for part in text.split(","))
    if isinstance(current, bool):
        words = ("true", "false")
    if words and text not in words:
        raise ConfigError(f"{where}={text}: use {', '.join(words)}")
    try:
        return text == "true" if isinstance(current, bool) else type(current)(text)
    except ValueError:
        kind = "whole number" if isinstance(current, int) else "number"
        raise ConfigError(f"{where}={text}: use a {kind}") from None
