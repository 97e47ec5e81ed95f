"""Publish a run's model, and say which version counts: python jobs/models.py publish runs/NAME --name flowers"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from cifar.cli import run_job
from cifar.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Common:
    store: str = "./models"
    """Folder or s3:// or gs:// URI of the published models."""


@dataclass(frozen=True, kw_only=True)
class Publish(Common):
    """Copy the model of a run to a new version."""

    source: Positional[str]
    """Folder or URI of a run or a model."""
    name: str
    """Of the published model, such as cifar10; each publication is a new version of it."""
    promote: str = ""
    """Alias to give the new version, such as champion."""
    half: bool = False
    """Store the weights in half precision, in half of the space."""


@dataclass(frozen=True, kw_only=True)
class List(Common):
    """Show all models, versions and aliases."""


@dataclass(frozen=True, kw_only=True)
class Show(Common):
    """Show one version: its numbers and settings, and its files checked."""

    version: Positional[str]
    """NAME, NAME@ALIAS or NAME/VERSION."""


@dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """Show two versions side by side: numbers, and settings that differ."""

    first: Positional[str]
    """NAME, NAME@ALIAS or NAME/VERSION."""
    second: Positional[str]


@dataclass(frozen=True, kw_only=True)
class Promote(Common):
    """Let an alias name a version."""

    version: Positional[str]
    """NAME (its newest), NAME@ALIAS or NAME/VERSION."""
    alias: str = "champion"


@dataclass(frozen=True, kw_only=True)
class RollBack(Common):
    """Let an alias name the version before."""

    name: Positional[str]
    """Of the published model."""
    alias: str = "champion"


@dataclass(frozen=True, kw_only=True)
class Delete(Common):
    """Remove a version; refused while an alias names it."""

    version: Positional[str]
    """NAME/VERSION."""


@dataclass(frozen=True, kw_only=True)
class Soup(Common):
    """Average the weights of several models of one recipe, as far as val gains by it; the result is one model."""

    models: Positional[tuple[str, ...]]
    """Two or more: folders or URIs of runs or models, or NAME, NAME@ALIAS or NAME/VERSION."""
    output: str
    """Folder for the model, new or empty."""
    data: str = ""
    """Data set, as in jobs/train.py; empty: the one that the models were trained on."""


Flags = Publish | List | Show | Compare | Promote | RollBack | Delete | Soup


def models(flags: Flags) -> dict[str, Any]:
    """Publish, list, show, compare, promote, roll back, delete and average models."""
    # Not above: --help needs no torch.
    from cifar.store import Store, check_name

    store = Store(flags.store)
    match flags:
        case Publish():
            if flags.promote:
                check_name(flags.promote, "alias")  # before anything is published
            version = store.publish(flags.source, flags.name, flags.half)
            if flags.promote:
                store.promote(version, flags.promote)
            print(f"published: {version}" + (f", as {flags.name}@{flags.promote}" if flags.promote else ""))
            return {"version": str(version), "alias": flags.promote}
        case List():
            found, versions = [], [version for name in store.names() for version in store.versions(name)]
            for version in versions:
                try:
                    model = store.describe(version)
                except ConfigError as error:  # the others are there all the same
                    print(f"{version}  damaged: {error}")
                    continue
                found.append(model)
                accuracies = {name: value for name, value in model["numbers"].items() if name.endswith("_accuracy")}
                numbers = "".join(f"  {name} {value:.4f}" for name, value in accuracies.items())
                print(model["version"] + numbers + "".join(f"  @{alias}" for alias in model["aliases"]))
            if not versions:
                print(f"no models in {store.path}; publish one: python jobs/models.py publish runs/NAME --name NAME")
            return {"models": found}
        case Show():
            version = store.resolve(flags.version)
            with store.open(version):  # checks the weights too
                found = store.describe(version)
            for name, value in _flat(found).items():
                print(f"{name}: {value}")
            return found
        case Compare():
            first, second = (store.describe(store.resolve(name)) for name in (flags.first, flags.second))
            left, right = _flat(first), _flat(second)
            for name in dict.fromkeys([*left, *right]):
                if left.get(name) != right.get(name):
                    print(f"{name}: {left.get(name)} | {right.get(name)}")
            return {"first": first, "second": second}
        case Promote():
            version = store.resolve(flags.version, bare="")
            before = store.promote(version, flags.alias)
            print(f"{version.name}@{flags.alias}: {version.version}, before {before or 'none'}")
            return {"version": str(version), "alias": flags.alias, "before": before}
        case RollBack():
            version = store.roll_back(flags.name, flags.alias)
            print(f"{flags.name}@{flags.alias}: {version.version} again")
            return {"version": str(version), "alias": flags.alias}
        case Delete():
            if "/" not in flags.version:
                raise ConfigError(f"delete {flags.version}: which version? name it as NAME/VERSION")
            version = store.resolve(flags.version)
            store.delete(version)
            print(f"deleted: {version}")
            return {"version": str(version)}
        case Soup():
            return soup(flags)


def soup(flags: Soup) -> dict[str, Any]:
    from cifar.cluster import start_ray
    from cifar.data import prepare
    from cifar.model_dir import load_model
    from cifar.soup import make_soup
    from cifar.store import find_model

    if len(flags.models) < 2:
        raise ConfigError("soup: name two models or more")
    folder = Path(flags.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {flags.output}: is there already; name a new folder")
    loaded = []
    for name in flags.models:
        with find_model(name, flags.store) as found:
            loaded.append(load_model(found.folder))
    info = loaded[0].info
    prepared = prepare(replace(info.config.data, data=flags.data or info.source), partial(start_ray, verbose=False))
    made = make_soup(loaded, prepared, folder)
    for name, accuracy in zip(flags.models, made.accuracies, strict=True):
        print(f"val accuracy {accuracy:.4f} of {name}")
    kept = [flags.models[place] for place in made.kept]
    print(f"val accuracy {made.accuracy:.4f} of the mean of {', '.join(kept)}")
    if len(kept) == 1:
        print("no other model's weights average with these; they do where all began at the same --weights")
    print(f"model: {flags.output}")
    return {"model": flags.output, "kept": kept, "val_accuracy": made.accuracy, "val_accuracies": made.accuracies}


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """What `describe` gives, as lines."""
    plain = {name: value for name, value in found.items() if not isinstance(value, dict)}
    plain |= {name: ", ".join(plain[name]) for name in ("aliases", "classes")}
    return {**plain, **found["numbers"], **found["settings"]}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(models, Flags, argv)


if __name__ == "__main__":
    sys.exit(main())
