"""Publish a run's model, and say which version counts: python jobs/models.py publish runs/NAME --name flowers"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
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


Flags = Publish | List | Show | Compare | Promote | RollBack | Delete


def models(flags: Flags) -> dict[str, Any]:
    """Publish, list, show, compare, promote, roll back and delete models."""
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


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """What `describe` gives, as lines."""
    plain = {name: value for name, value in found.items() if not isinstance(value, dict)}
    plain |= {name: ", ".join(plain[name]) for name in ("aliases", "classes")}
    return {**plain, **found["numbers"], **found["settings"]}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(models, Flags, argv)


if __name__ == "__main__":
    sys.exit(main())
