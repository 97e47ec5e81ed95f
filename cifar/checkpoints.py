"""The best checkpoint of a run and its last, for a worker that has no Ray Train to keep them: local or behind a URI."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow import fs

from cifar.data.prepared import absolute, filesystem, join, read_file, write_file

REPORT = "report.json"
"""Written last: a checkpoint without it was cut off, and is none."""


class Checkpoints:
    """`checkpoint_000000`, `checkpoint_000001` ... in a folder; of the others all but the best and the last go."""

    def __init__(self, path: str, permitted: Callable[[], None] = lambda: None):
        """`permitted` raises if none may be added any more."""
        self.path, self._permitted = absolute(path), permitted
        self._scores = self._read()

    def add(self, folder: Path, metrics: dict[str, Any], alone: bool = False) -> None:
        """Move a checkpoint in; `metrics` has its `score`. `alone`: none of those before is kept."""
        number = max(self._scores, default=-1) + 1
        (folder / REPORT).write_text(json.dumps(metrics))
        if "://" in self.path:
            files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == REPORT)
            for file in files:
                if file.name == REPORT:
                    self._permitted()
                write_file(join(self._of(number), file.relative_to(folder).as_posix()), file.read_bytes())
            shutil.rmtree(folder)
        else:
            partial = Path(self.path) / ".partial"
            shutil.rmtree(partial, ignore_errors=True)
            move(folder, partial)
            self._permitted()
            os.rename(partial, self._of(number))  # shows it whole
        self._scores[number] = metrics["score"]
        for other in self._scores.keys() - ({number} if alone else {self.best_number, number}):
            self._remove(other)

    @property
    def best_number(self) -> int:
        """Of the highest score; the earlier one of equals."""
        return max(sorted(self._scores), key=lambda number: self._scores[number])

    def best(self) -> str:
        """Path or URI of the best checkpoint."""
        return self._of(self.best_number)

    @property
    def best_score(self) -> float:
        """-1 without a checkpoint, and of one in mid-epoch."""
        return max(self._scores.values(), default=-1.0)

    @property
    def best_is_last(self) -> bool:
        return bool(self._scores) and self.best_number == max(self._scores)

    def last(self) -> Path | None:
        """The last checkpoint as a local folder, which is a copy if it is behind a URI; None if there is none."""
        if not self._scores:
            return None
        path = self._of(max(self._scores))
        if "://" not in path:
            return Path(path)
        copy = Path(tempfile.mkdtemp(prefix="cifar-resume-"))
        files, root = filesystem(path)
        for info in files.get_file_info(fs.FileSelector(root, recursive=True)):
            if info.type == fs.FileType.File:
                target = copy / os.path.relpath(info.path, root)
                target.parent.mkdir(parents=True, exist_ok=True)
                with files.open_input_stream(info.path) as stream:
                    target.write_bytes(stream.read())
        return copy

    def _of(self, number: int) -> str:
        return join(self.path, f"checkpoint_{number:06d}")

    def _read(self) -> dict[int, float]:
        files, root = filesystem(self.path)
        found = files.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        reports = [info.path for info in found if info.base_name == REPORT and "/checkpoint_" in info.path]
        scores = {}
        for path in reports:
            number = int(path.split("/")[-2].rpartition("_")[2])
            report = read_file(join(self._of(number), REPORT))
            assert report is not None
            scores[number] = json.loads(report)["score"]
        return scores

    def _remove(self, number: int) -> None:
        """Out of sight at once: a half-deleted checkpoint must not be found."""
        if "://" in self.path:
            files, root = filesystem(self._of(number))
            files.delete_file(f"{root}/{REPORT}")
            files.delete_dir(root)
        else:
            partial = Path(self.path) / ".partial"
            os.rename(self._of(number), partial)
            shutil.rmtree(partial)
        del self._scores[number]


def move(folder: Path, target: Path) -> None:
    """Move a folder, also to another file system, whose OSError is raised as it is: shutil's tells no errno, by which
    a full disk is known."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        for file in folder.rglob("*"):
            copy = target / file.relative_to(folder)
            if file.is_dir():
                copy.mkdir(parents=True, exist_ok=True)
            else:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        shutil.rmtree(folder)
