"""Published models: `<store>/<name>/<version>/`, and aliases that name one of them, in a folder or behind a URI.

A version is the files of a model folder, with the run's report where there is one. It exists for readers from the
moment its manifest does, which is written last and holds the SHA-256 sum of every file; sums are checked whenever a
version is opened. An alias is one small file, so that moving it is atomic.
"""

import dataclasses
import hashlib
import json
import math
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyarrow import fs
from safetensors.torch import load, save

from cifar.calibration import CALIBRATION
from cifar.config import ConfigError
from cifar.data.prepared import absolute, exists, filesystem, join, read_file, read_object, write_file
from cifar.data.remote import StorageFailed
from cifar.model_dir import load_model
from cifar.run_dir import local_model

FORMAT = 1
MANIFEST = "manifest.json"
ALIASES = "aliases"
CHAMPION = "champion"
MODEL_FILES = ("config.json", "model.safetensors", "metrics.json", "README.md")
REPORT_FILES = ("report.json", "report.html")
KNOWN_FILES = {*MODEL_FILES, CALIBRATION, *REPORT_FILES}
REPORTED = ("accuracy", "count", "loss", "macro_f1", "ece")
BOX = Path(__file__).parent / "box"
"""The store that comes with the package, with one model: what answers when none is named."""
NAME = re.compile(r"[A-Za-z0-9][\w.\-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Version:
    """A published model. `name/version` is what loads it, whatever the aliases say."""

    name: str
    version: str
    """Time of publication in UTC and four random bytes."""
    published_at: str
    """ISO 8601, UTC."""
    source: str
    """The run or model folder that it was published from."""
    files: dict[str, dict[str, Any]]
    """Per file `sha256` in hex and `bytes`."""

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True)
class Alias:
    version: str
    since: str
    history: list[str]
    """Versions that it named before, oldest first."""


class Store:
    """The published models under a folder or an s3:// or gs:// URI, which need not exist yet."""

    def __init__(self, path: str):
        self.path = absolute(path)
        self._files, self._root = filesystem(self.path)

    def publish(self, source: str, name: str, half: bool = False) -> Version:
        """Copy the model of a run's or a model's folder to a new version of `name`.

        The model is loaded first: what does not load is not published. `half` halves the weights to float16; what a
        batch norm counted stays as it is. Any number of publishers may do so at once.
        """
        check_name(name)
        contents = read_model(source)
        with tempfile.TemporaryDirectory() as folder:
            for file, data in contents.items():
                (Path(folder) / file).write_bytes(data)
            model = load_model(folder).model
        if half:
            parameters = {parameter for parameter, _ in model.named_parameters()}
            contents["model.safetensors"] = halved(contents["model.safetensors"], parameters)
        contents["README.md"] = card(contents, half)
        now = datetime.now(UTC)
        version = Version(
            name=name,
            version=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}",
            published_at=now.isoformat(),
            source=source,
            files={file: {"sha256": sha256(data), "bytes": len(data)} for file, data in contents.items()},
        )
        for file, data in contents.items():
            self._write(f"{version}/{file}", data)
        values = {"format": FORMAT} | dataclasses.asdict(version)
        self._write(f"{version}/{MANIFEST}", (json.dumps(values, indent=1) + "\n").encode())
        return version

    def names(self) -> list[str]:
        """Of all models, sorted."""
        return sorted(
            info.base_name
            for info in self._list(self._root)
            if info.type == fs.FileType.Directory and NAME.fullmatch(info.base_name) and self.versions(info.base_name)
        )

    def versions(self, name: str) -> list[Version]:
        """Oldest first; without what is still being written, or was left half-written."""
        check_name(name)
        found = self._list(f"{self._root}/{name}", recursive=True)
        folders = [info.path.split("/")[-2] for info in found if info.base_name == MANIFEST]
        versions = [self._manifest(name, folder) for folder in folders if NAME.fullmatch(folder)]
        return sorted((version for version in versions if version), key=lambda one: (one.published_at, one.version))

    def aliases(self, name: str) -> dict[str, Alias]:
        check_name(name)
        found = self._list(f"{self._root}/{name}/{ALIASES}")
        names = sorted(info.base_name.removesuffix(".json") for info in found if info.base_name.endswith(".json"))
        aliases = {alias: self._alias(name, alias) for alias in names if NAME.fullmatch(alias)}
        return {alias: found for alias, found in aliases.items() if found}

    def resolve(self, reference: str, bare: str = CHAMPION) -> Version:
        """`NAME/VERSION` (its beginning or end will do), `NAME@ALIAS`, or `NAME`: its alias `bare`, else the newest.

        ConfigError lists what there is when there is no such version.
        """
        match = re.fullmatch(r"([^/@]+)(?:/([^/@]+)|@([^/@]+))?", reference)
        if not match:
            raise ConfigError(f"{reference!r}: not a version; use NAME, NAME@ALIAS or NAME/VERSION")
        name, wanted, alias = match.groups()
        versions = self.versions(name)
        if not versions:
            known = ", ".join(self.names()) or "none"
            raise ConfigError(f"{reference}: no published model of this name in {self.path}; there are: {known}")
        aliases = self.aliases(name)
        if alias and alias not in aliases:
            known = ", ".join(aliases) or "none"
            raise ConfigError(f"{reference}: {name} has no alias {alias}; there are: {known}")
        if not wanted and (named := aliases.get(alias or bare)):
            wanted = named.version
        if not wanted:
            return versions[-1]
        matching = [one for one in versions if one.version == wanted] or [
            one for one in versions if one.version.startswith(wanted) or one.version.endswith(wanted)
        ]
        if len(matching) != 1:
            among = matching or versions
            raise ConfigError(
                f"{reference}: {'several versions match' if matching else 'no such version'}; "
                f"{name} has {', '.join(one.version for one in among[-10:])}"
            )
        return matching[0]

    @contextmanager
    def open(self, version: Version) -> Iterator[Path]:
        """A local folder with the version's files, each checked against its sum; ConfigError names a damaged one.

        It is a copy, gone when the block ends: what was checked is what is read.
        """
        with tempfile.TemporaryDirectory(prefix="cifar-model-") as folder:
            for file in version.files:
                (Path(folder) / file).write_bytes(self.read(version, file))
            yield Path(folder)

    def read(self, version: Version, file: str) -> bytes:
        """One file of a version, checked against its sum."""
        expected, where = version.files[file], self._path(version, file)
        data = read_file(where)
        if data is None:
            raise ConfigError(f"{where}: missing; publish the model again")
        if len(data) != expected["bytes"] or sha256(data) != expected["sha256"]:
            raise ConfigError(f"{where}: not what was published (its SHA-256 sum differs); publish the model again")
        return data

    def promote(self, version: Version, alias: str = CHAMPION) -> str | None:
        """Let the alias name this version; returns the version that it named before."""
        check_name(alias, "alias")
        before = self._alias(version.name, alias)
        if before and before.version == version.version:
            return before.version
        history = [*before.history, before.version] if before else []
        self._write_alias(version.name, alias, version.version, history)
        return before.version if before else None

    def roll_back(self, name: str, alias: str = CHAMPION) -> Version:
        """Let the alias name again what it named before, or before that where this is deleted."""
        current = self.aliases(name).get(alias)
        if not current:
            raise ConfigError(f"{name}@{alias}: no such alias")
        there = {version.version: version for version in self.versions(name)}
        history = [version for version in current.history if version in there]
        if not history:
            raise ConfigError(f"{name}@{alias}: named no other version before that still exists")
        self._write_alias(name, alias, history[-1], history[:-1])
        return there[history[-1]]

    def withdraw(self, name: str, version: str, alias: str) -> None:
        """Remove an alias while it names this version; of another it is left alone."""
        found = self.aliases(name).get(alias)
        if found and found.version == version:
            self._files.delete_file(f"{self._root}/{name}/{ALIASES}/{alias}.json")

    def delete(self, version: Version) -> None:
        """Remove the version for good; ConfigError while an alias names it."""
        if named := self.named(version):
            raise ConfigError(f"{version}: is {' and '.join(named)}; promote or roll back to another version first")
        folder = f"{self._root}/{version.name}/{version.version}"
        self._files.delete_file(f"{folder}/{MANIFEST}")
        self._files.delete_dir(folder)

    def describe(self, version: Version) -> dict[str, Any]:
        """What the version's small files say, each checked: `numbers` of its metrics and its report, `settings` by
        dotted name, and what the manifest and the aliases know."""
        contents = {file: self.read(version, file) for file in version.files if file.endswith(".json")}
        described = json.loads(contents["config.json"])
        metrics = json.loads(contents["metrics.json"])
        report = json.loads(contents.get("report.json", b"{}"))
        numbers = {name: value for name, value in metrics.items() if type(value) in (int, float)}
        calibration = json.loads(contents.get(CALIBRATION, b"{}"))
        numbers |= {name: calibration[name] for name in ("temperature", "threshold") if name in calibration}
        numbers |= {f"{report['split']}_{name}": report[name] for name in REPORTED if name in report}
        return {
            "version": str(version),
            "aliases": self.named(version),
            "published_at": version.published_at,
            "source": version.source,
            "bytes": sum(entry["bytes"] for entry in version.files.values()),
            "classes": described["classes"],
            "data": described["data"]["source"],
            "numbers": numbers,
            "settings": dict(_leaves(described["config"])),
        }

    def named(self, version: Version) -> list[str]:
        """The aliases that name this version."""
        return [alias for alias, found in self.aliases(version.name).items() if found.version == version.version]

    def _path(self, version: Version, file: str) -> str:
        return join(self.path, f"{version.name}/{version.version}/{file}")

    def _manifest(self, name: str, version: str) -> Version | None:
        """None for one that was deleted meanwhile."""
        where = join(self.path, f"{name}/{version}/{MANIFEST}")
        values = read_object(where, "delete the folder")
        if values is None or "format" not in values:  # a manifest of something else, such as of predictions
            return None
        if values.pop("format") != FORMAT:
            raise ConfigError(f"{where}: published by another version of cifar")
        try:
            found = Version(**values)
            sums = [(entry["sha256"], entry["bytes"]) for entry in found.files.values()]
            whole = (found.name, found.version) == (name, version) and set(MODEL_FILES) <= found.files.keys()
            known = found.files.keys() <= KNOWN_FILES  # no paths out of the folder
            typed = all(type(sum_) is str and type(size) is int for sum_, size in sums)
            if not (whole and known and typed and type(found.published_at) is str):
                raise ValueError("its entries do not describe this version")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{where}: not a manifest ({error}); delete the folder") from error
        return found

    def _alias(self, name: str, alias: str) -> Alias | None:
        where = join(self.path, f"{name}/{ALIASES}/{alias}.json")
        values = read_object(where, "promote a version again")
        if values is None:
            return None
        try:
            found = Alias(**values)
            if not all(type(version) is str for version in (found.version, *found.history)):
                raise ValueError("versions are strings")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: not an alias ({error}); promote a version again") from error
        return found

    def _write_alias(self, name: str, alias: str, version: str, history: list[str]) -> None:
        values = Alias(version=version, since=datetime.now(UTC).isoformat(), history=history)
        text = json.dumps(dataclasses.asdict(values), indent=1) + "\n"
        self._write(f"{name}/{ALIASES}/{alias}.json", text.encode())

    def _list(self, folder: str, recursive: bool = False) -> list[fs.FileInfo]:
        """What is in a folder; nothing if it is not there."""
        try:
            return self._files.get_file_info(fs.FileSelector(folder, recursive=recursive, allow_not_found=True))
        except StorageFailed:
            raise
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be listed ({error}); check its address and your access") from error

    def _write(self, file: str, data: bytes) -> None:
        try:
            write_file(join(self.path, file), data)
        except StorageFailed:
            raise
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error}); check its address and your access") from error


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """What a `--model` means."""

    folder: Path
    """The model's files, on this machine."""
    name: str
    version: str
    """`NAME/VERSION` for a published one, else its folder or URI."""


@contextmanager
def find_model(reference: str, store: str) -> Iterator[FoundModel]:
    """The model that `--model` names, for as long as the block runs.

    It is the folder or URI of a run or a model, or a version in the store (NAME, NAME@ALIAS, NAME/VERSION); without a
    reference, the model in the box. ConfigError says what there is when there is no such model.
    """
    if path := model_path(reference):
        with local_model(path) as folder:
            yield FoundModel(folder=folder, name=name_of(reference), version=absolute(path))
        return
    where = Store(store if reference else str(BOX))
    try:
        version = where.resolve(reference or where.names()[0])
    except ConfigError as error:
        raise ConfigError(f"--model {reference}: no folder of a run or a model, and not in --store: {error}") from error
    with where.open(version) as folder:
        yield FoundModel(folder=folder, name=version.name, version=str(version))


def model_path(reference: str) -> str | None:
    """The model's folder or URI if the reference is one, or is the run's around it."""
    for path in map(absolute, (join(reference, "model"), reference) if reference else ()):
        if exists(join(path, "config.json")) and exists(join(path, "model.safetensors")):
            return path
    return None


def name_of(path: str) -> str:
    """A name for a model that was never published: its run's."""
    parts = [part for part in absolute(path).partition("?")[0].split("/") if part and part != "model"]
    return re.sub(r"[^\w.\-]", "-", parts[-1], flags=re.ASCII).lstrip("-._") or "model"


def check_name(name: str, what: str = "name") -> None:
    if not NAME.fullmatch(name) or (what == "name" and name == ALIASES):
        raise ConfigError(f"{what} {name!r}: use letters, digits, dots, dashes and underscores")


def read_model(source: str) -> dict[str, bytes]:
    """The files of a run's or a model's folder or URI that a version holds; ConfigError if there is no model."""
    contents = {}
    base = model_path(source) or source
    for file in MODEL_FILES:
        data = read_file(join(base, file))
        if data is None:
            raise ConfigError(f"{join(base, file)}: not found; name the folder of a run or of a model")
        contents[file] = data
    for folder, file in ((base, CALIBRATION), *((source, file) for file in REPORT_FILES)):
        if (data := read_file(join(folder, file))) is not None:
            contents[file] = data
    return contents


def card(contents: dict[str, bytes], half: bool) -> bytes:
    """The model's card with what the report and the publication add."""
    text = contents["README.md"].decode()
    if "report.json" in contents:
        report = json.loads(contents["report.json"])
        low, high = report.get("accuracy_ci95", (math.nan, math.nan))
        text += f"\nAccuracy on {report['split']}: {report['accuracy']:.4f} ({low:.4f} to {high:.4f})"
        text += f" of {report['count']:,} images.\n"
        for name in ("command", "machine"):
            if report.get(name):
                text += f"\n{name.capitalize()}: `{report[name]}`\n"
    if half:
        text += "\nThe weights are stored in half precision (float16).\n"
    return text.encode()


def halved(weights: bytes, parameters: set[str]) -> bytes:
    """Safetensors with the `parameters` as float16; running variances and the like may exceed its range."""
    return save({name: value.half() if name in parameters else value for name, value in load(weights).items()})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
