"""A run's folder: config.json, metrics.jsonl, tensorboard/, checkpoints/, model/; local or a URI.

Every file is written whole: a reader sees the old one or the new one.
"""

import fcntl
import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyarrow import fs

from cifar.calibration import CALIBRATION, Calibration
from cifar.config import Config, ConfigError, RunFailed
from cifar.data.prepared import Prepared, absolute, exists, filesystem, join, read_file, read_object, write_file

SCALARS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "images_per_second")

SWEEP_CONFIG = "sweep-config.json"
"""What the folder of a sweep or of a comparison holds in place of config.json."""
OWNER = ".owner"
"""Names the attempt that may add checkpoints."""


class RunDir:
    def __init__(self, path: str, hparams: dict[str, Any] | None = None, owner: str = ""):
        """`hparams` are shown by TensorBoard beside the curves; `owner` is of the process that this one works for."""
        self.path, self._hparams = path, hparams
        self.owner = owner or uuid.uuid4().hex

    def open(self, config: Config, prepared: Prepared, changing: bool = False) -> None:
        """Claim the folder for this config and data; ConfigError when it holds another run, unless it is `changing`."""
        wanted = {"config": config.to_dict(), "fingerprint": prepared.fingerprint, "source": prepared.source}
        del wanted["config"]["run"]
        found = read_object(join(self.path, "config.json"), "give another --name")
        if found is None and exists(join(self.path, SWEEP_CONFIG)):
            raise ConfigError(f"{self.path}: holds several runs, not one; give another --name")
        if found is None or changing:
            write_file(join(self.path, "config.json"), (json.dumps(wanted, indent=2) + "\n").encode())
            return
        # Where a run is kept and on how many workers it goes on may change; what it computes may not.
        before = found | {"config": Config.from_dict(found.get("config", {})).identity()}
        differing = sorted(_differences(before, wanted | {"config": config.identity()}))
        if differing:
            raise ConfigError(
                f"{self.path}: holds a run with another {', '.join(differing[:5])}; "
                "give the same flags to resume it, or another --name"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the run, and keep a second process on this machine from it, which gets a ConfigError."""
        with locked(self.path, "another process trains this run; wait, or give another --name"):
            self.own()
            yield

    def own(self) -> None:
        """From now on who trained the run before, on a host that was taken for dead, can add no checkpoint to it."""
        write_file(join(self.path, OWNER), self.owner.encode())

    def require_owned(self) -> None:
        """RunFailed if another process has taken the run over."""
        if read_file(join(self.path, OWNER)) != self.owner.encode():
            raise RunFailed(f"{self.path}: another process has taken this run over; wait, or give another --name")

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Rewrite metrics.jsonl and the TensorBoard events from all finished epochs."""
        lines = "".join(json.dumps(row) + "\n" for row in history)
        write_file(join(self.path, "metrics.jsonl"), lines.encode())
        with tempfile.TemporaryDirectory() as folder:
            name = write_events(Path(folder), history, self._hparams)
            write_file(join(self.path, "tensorboard/events.out.tfevents.run"), (Path(folder) / name).read_bytes())

    def copy_model(self, checkpoint: str, files: fs.FileSystem | None = None) -> str:
        """Copy the checkpoint's model to `model/`, config.json last, and return its path."""
        source_files, source = (files, checkpoint) if files is not None else filesystem(checkpoint)
        self.remove_calibration()
        names = [info.base_name for info in source_files.get_file_info(fs.FileSelector(f"{source}/model"))]
        for name in sorted(names, key=lambda name: name == "config.json"):
            with source_files.open_input_stream(f"{source}/model/{name}") as stream:
                write_file(join(self.path, f"model/{name}"), stream.read())
        return join(self.path, "model")

    def remove_calibration(self) -> None:
        """It was that of other weights."""
        files, path = filesystem(join(self.path, f"model/{CALIBRATION}"))
        with suppress(FileNotFoundError):
            files.delete_file(path)

    def copy_best_model(self) -> None:
        """Of a run of Ray Train that was ended in its middle: by its own list, which names whole checkpoints only."""
        file = join(self.path, "checkpoints/checkpoint_manager_snapshot.json")
        listed = read_object(file, "delete the run's folder") or {}
        found = [result for result in listed.get("checkpoint_results", []) if result["metrics"].get("score", -1) >= 0]
        if found:
            best = max(found, key=lambda result: result["metrics"]["score"])
            self.copy_model(join(self.path, f"checkpoints/{best['checkpoint_dir_name']}"))


@contextmanager
def locked(path: str, refusal: str) -> Iterator[None]:
    """Keep a second process on this machine out of an existing folder: it gets a ConfigError. A URI is not locked."""
    if "://" in path:
        yield
        return
    with open(Path(path) / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path}: {refusal}") from None
        yield


@contextmanager
def local_model(path: str) -> Iterator[Path]:
    """A model folder as a local one: itself, or a copy of what a URI holds for as long as the block runs."""
    if "://" not in path:
        yield Path(path)
        return
    files, root = filesystem(path)
    with tempfile.TemporaryDirectory() as folder:
        for info in files.get_file_info(fs.FileSelector(root)):
            if info.type != fs.FileType.File:
                continue
            with files.open_input_stream(info.path) as stream:
                (Path(folder) / info.base_name).write_bytes(stream.read())
        yield Path(folder)


def write_calibration(model: str, calibration: Calibration) -> None:
    """Into a run's model folder."""
    write_file(join(model, CALIBRATION), calibration.to_json())


@contextmanager
def writable(path: str) -> Iterator[Path]:
    """A local folder to write into: `path` itself, or one that goes to the URI when the block ends."""
    path = absolute(path)
    if "://" not in path:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for file in Path(folder).rglob("*"):
            if file.is_file():
                write_file(join(path, file.relative_to(folder).as_posix()), file.read_bytes())


def write_events(folder: Path, history: list[dict[str, Any]], hparams: dict[str, Any] | None = None) -> str:
    """Write one TensorBoard event file to the empty `folder` and return its name."""
    from tensorboardX import SummaryWriter, summary  # only at an epoch's end: their import takes a part of a second

    with SummaryWriter(str(folder), write_to_disk=True) as writer:
        if hparams is not None:
            files: Any = writer.file_writer
            for part in summary.hparams(hparams, {"val/accuracy": 0.0}):
                files.add_summary(part)
        for row in history:
            for name in SCALARS:
                writer.add_scalar(name.replace("_", "/", 1), row[name], row["epoch"])
    (path,) = folder.iterdir()
    return path.name


def _differences(found: Any, wanted: Any, name: str = "") -> set[str]:
    """Names of the leaves in which two nested dicts differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = found.keys() | wanted.keys()
        return set().union(*(_differences(found.get(key), wanted.get(key), key) for key in keys))
    return set() if found == wanted else {name}
