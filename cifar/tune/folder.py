"""The folder of several runs, a sweep's or a comparison's: whose it is, and what it is called."""

import hashlib
import json
import re
from typing import Any, Literal

from cifar.config import Config, ConfigError
from cifar.data.prepared import Prepared, join, parent, read_file, read_object, write_file
from cifar.run_dir import SWEEP_CONFIG

Kind = Literal["sweep", "comparison"]


def claim_folder(path: str, kind: Kind, wanted: dict[str, Any]) -> None:
    """Write into the folder what it is for; ConfigError if that is another thing already."""
    wanted = {"kind": kind} | wanted
    file = join(path, SWEEP_CONFIG)
    found = read_object(file, "delete it if the flags are those of before, or give another --name")
    if found is None:
        if read_file(join(path, "config.json")) is not None:
            raise ConfigError(f"{path}: holds a run, not a {kind}; give another --name")
        try:
            write_file(file, (json.dumps(wanted, indent=1) + "\n").encode())
        except OSError as error:
            raise ConfigError(f"--storage {parent(path)}: cannot be written ({error})") from error
        return
    found = {"kind": "sweep"} | found  # written before there were others
    if found["kind"] != kind:
        raise ConfigError(f"{path}: holds a {found['kind']}, not a {kind}; give another --name")
    found, wanted = _comparable(found), _comparable(wanted)
    differing = sorted(name for name, value in wanted.items() if found.get(name) != value)
    if differing:
        raise ConfigError(
            f"{path}: holds a {kind} with another {', '.join(differing)}; "
            "give the same flags to resume it, or another --name"
        )


def _comparable(values: dict[str, Any]) -> dict[str, Any]:
    """With the settings of a run, where there are any, whatever version wrote them down."""
    groups = Config().identity().keys()
    return values | Config.from_dict({name: values[name] for name in groups if name in values}).identity()


def name_folder(prepared: Prepared, kind: Kind, identity: Any) -> str:
    """The same data and identity, of JSON types, give the same name, so that the same command resumes."""
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()
    data = re.sub(r"[^\w.\-]+", "-", prepared.source.rstrip("/").rsplit("/", 1)[-1]) or "data"
    return f"{data}-{kind}-{digest}"
