"""What a sweep searches: settings of a Config by their names, each with its range or its options.

A user's own space is a Python file that defines SPACE:

    from cifar.tune import Choice, Float, Int

    SPACE = {
        "lr": Float(0.02, 0.5, log=True),
        "widths": Choice((32, 64, 128), (64, 128, 256)),
        "epochs": Int(4, 12),
    }
"""

import dataclasses
import math
import runpy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cifar.config import Config, ConfigError

GROUPS = ("augment", "model", "optim", "train")
"""Of a Config; the others say which data, and where the run is kept."""
FIXED = {"seed", "loader", "compile", "checkpoint_steps", "augment_on", "max_minutes", "tta"}
"""These decide where and how a run computes or is judged, not how good its model is."""
MUTABLE = {
    *("lr", "head_lr", "momentum", "weight_decay", "label_smoothing", "clip_norm", "dropout"),
    *("crop_padding", "cutout", "rotate", "shift", "shear", "zoom", "mixup", "cutmix"),
}
"""What may change from one epoch to the next of a run, as population based training has it."""

Value: TypeAlias = float | int | str | bool
"""Of a setting, as JSON has it; several numbers, such as widths, are one string as on the command line."""


@dataclass(frozen=True)
class Float:
    """Numbers from `low` to `high`, evenly in their logarithm if `log`."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"


@dataclass(frozen=True)
class Int:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low} to {self.high}, whole{', logarithmic' if self.log else ''}"


@dataclass(frozen=True, init=False)
class Choice:
    """One of the options."""

    options: tuple[Any, ...]

    def __init__(self, *options: Any):
        object.__setattr__(self, "options", options)

    def __str__(self) -> str:
        return " | ".join(map(str, self.labels))

    @property
    def labels(self) -> list[Value]:
        return [label_of(option) for option in self.options]

    def option(self, label: Value) -> Any:
        return self.options[self.labels.index(label)]


Domain: TypeAlias = Float | Int | Choice
Space: TypeAlias = Mapping[str, Domain]


def label_of(option: Any) -> Value:
    """A tuple as on the command line; anything else as it is."""
    return " ".join(map(str, option)) if isinstance(option, tuple) else option


def settings_of(config: Config) -> dict[str, Any]:
    """Every setting that a space may hold, by name; names are unique over the groups."""
    return {
        field.name: getattr(getattr(config, group), field.name)
        for group in GROUPS
        for field in dataclasses.fields(getattr(config, group))
        if field.name not in FIXED
    }


def apply(config: Config, space: Space, values: Mapping[str, Value]) -> Config:
    """The config with these values; ConfigError where they do not go together."""
    parsed = {}
    for name, value in values.items():
        domain = space[name]
        parsed[name] = domain.option(value) if isinstance(domain, Choice) else value
    groups = {}
    for group in GROUPS:
        current = getattr(config, group)
        changed = {f.name: parsed[f.name] for f in dataclasses.fields(current) if f.name in parsed}
        groups[group] = dataclasses.replace(current, **changed) if changed else current
    return dataclasses.replace(config, **groups)


def load_space(source: str, shipped: Mapping[str, Space]) -> Space:
    """A shipped space by its name, or SPACE of a Python file; ConfigError says what is wrong with it."""
    if source in shipped:
        return shipped[source]
    if not source.endswith(".py"):
        raise ConfigError(f"--space {source}: no such space; use {', '.join(shipped)}, or a Python file that has SPACE")
    if not Path(source).is_file():
        raise ConfigError(f"--space {source}: no such file")
    try:
        space = runpy.run_path(source).get("SPACE")
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--space {source}: {type(error).__name__}: {error}") from error
    if not isinstance(space, dict) or not space:
        raise ConfigError(f"--space {source}: defines no SPACE = {{name: Float, Int or Choice}}")
    return space


def check_space(space: Space, source: str, config: Config) -> None:
    """Every name a setting, every domain right by itself, every end and option valid in the config."""
    known = settings_of(config)
    for name, domain in space.items():
        where = f"--space {source}: {name}"
        if name not in known:
            raise ConfigError(f"{where}: no setting that can be searched; those are {', '.join(sorted(known))}")
        if not isinstance(domain, Float | Int | Choice):
            raise ConfigError(f"{where}: {domain!r} is no Float, Int or Choice")
        for value in _extremes(domain, where):
            _check_type(known[name], domain, value, where)
            single: Space = {name: domain}
            try:
                applied = apply(config, single, {name: label_of(value)})
            except ConfigError as error:
                # What one setting makes impossible another one may allow: dropout with another network, say. A trial
                # that cannot be is recorded as failed; what is wrong by itself is said here.
                if str(error).startswith(f"--{name.replace('_', '-')} "):
                    raise ConfigError(f"{where}: {error}") from None
                continue
            try:
                Config.from_dict(applied.to_dict())  # knows the words that a setting takes
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None


def _extremes(domain: Domain, where: str) -> list[Any]:
    if isinstance(domain, Choice):
        if not domain.options:
            raise ConfigError(f"{where}: a Choice without options")
        for option in domain.options:
            if not isinstance(option, float | int | str | tuple):
                raise ConfigError(f"{where}: {option!r} is no option; use a number, a string, True, False or a tuple")
        if len(set(domain.labels)) < len(domain.options):
            raise ConfigError(f"{where}: {domain} names an option twice")
        return list(domain.options)
    ends = [domain.low, domain.high]
    kinds = (int,) if isinstance(domain, Int) else (int, float)
    if any(type(end) not in kinds or not math.isfinite(end) for end in ends):
        raise ConfigError(f"{where}: {domain!r} takes {'whole ' if isinstance(domain, Int) else ''}numbers")
    if not domain.low < domain.high or (domain.log and domain.low <= 0):
        raise ConfigError(f"{where}: {domain!r}: low must be less than high, and positive if log")
    return ends


def _check_type(current: Any, domain: Domain, value: Any, where: str) -> None:
    kinds = {float: (int, float), int: (int,), bool: (bool,), str: (str,), tuple: (tuple,)}[type(current)]
    if type(value) not in kinds or (isinstance(domain, Float) and not isinstance(current, float)):
        raise ConfigError(f"{where}: {value!r} is of another type than the default, {current!r}")


def without_fixed(space: Space, given: Collection[str]) -> tuple[Space, list[str]]:
    """The space less the settings that a flag gives, and their names."""
    fixed = [name for name in space if name in given]
    return {name: domain for name, domain in space.items() if name not in fixed}, fixed


def flags_of(config: Config, recipe: Config) -> list[str]:
    """The flags of jobs/train.py that make the recipe this config; of `run`, none."""
    flags: list[str] = []
    for group in ("data", "transfer", *GROUPS):
        ours, theirs = getattr(config, group), getattr(recipe, group)
        for field in dataclasses.fields(ours):
            value = getattr(ours, field.name)
            if value == getattr(theirs, field.name):
                continue
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flags


def describe(space: Space) -> dict[str, dict[str, Any]]:
    """As JSON, for the report and the sweep's own file."""
    described = {}
    for name, domain in space.items():
        if isinstance(domain, Choice):
            described[name] = {"kind": "choice", "choices": domain.labels}
        else:
            kind = "int" if isinstance(domain, Int) else "float"
            described[name] = {"kind": kind, "low": domain.low, "high": domain.high, "log": domain.log}
    return described


def lines(space: Space) -> list[str]:
    """One a setting."""
    width = max(map(len, space), default=0)
    return [f"{name:<{width}}  {domain!s}" for name, domain in space.items()]
