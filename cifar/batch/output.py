"""The output folder: whose it is, which parts are finished, and the manifest that says that all are."""

import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cifar.batch.part import STATE, BadRow, Summary, state_name
from cifar.config import ConfigError
from cifar.data.prepared import MANIFEST, QUARANTINE, exists, filesystem, join, read_file, write_file
from cifar.run_dir import locked

FORMAT = 1
_JOB = f"{STATE}/job.json"
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp")
_REMEDY = "give another --output"

logger = logging.getLogger(__name__)


class Output:
    """A folder or URI that holds the predictions of one job."""

    def __init__(self, path: str):
        self.path = path
        self._files, self._root = filesystem(path)

    @contextmanager
    def claim(self, job: dict[str, Any]) -> Iterator[None]:
        """Make it this job's for as long as the block runs; ConfigError if it is, or holds, that of another."""
        if isinstance(self._files, fs.LocalFileSystem):
            self._files.create_dir(self._root)
        with locked(self.path, f"another process writes its predictions here; wait, or {_REMEDY}"):
            finished = self.manifest()
            found = finished.get("job", {}) if finished else self._read(_JOB)
            if found is None:
                if exists(join(self.path, "predictions")):
                    raise ConfigError(f"{self.path}: holds predictions of a job that is not known; {_REMEDY}")
                write_file(join(self.path, _JOB), _json(job))
            elif differing := [name for name in job if found.get(name) != job[name]]:
                raise ConfigError(f"{self.path}: holds predictions of another {', '.join(differing)}; {_REMEDY}")
            yield

    def manifest(self) -> dict[str, Any] | None:
        """None before the job is finished."""
        found = self._read(MANIFEST)
        if found is not None and found.get("format_version") != FORMAT:
            raise ConfigError(f"{join(self.path, MANIFEST)}: written by another version of cifar; {_REMEDY}")
        return found

    def finished(self, numbers: Iterable[int]) -> list[Summary]:
        """Of those parts that are."""
        sizes = self._sizes()
        known = {info.base_name for info in self._list(STATE)}
        summaries = []
        for number in numbers:
            if os.path.basename(state_name(number)) not in known:
                continue
            # After a power failure a file can be there without its content: such a part is done again.
            with suppress(Exception):
                summary = Summary.from_bytes(read_file(join(self.path, state_name(number))) or b"")
                if sizes.get(summary.name) == summary.size:
                    summaries.append(summary)
        return summaries

    def write_quarantine(self, bad: list[BadRow]) -> None:
        schema = pa.schema({name: pa.string() for name in BadRow._fields})
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in bad], schema), sink)
        write_file(join(self.path, QUARANTINE), sink.getvalue())

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest: the last step, the job is not done for readers before it. Returns what it holds.

        ConfigError when files are not there in full: a node wrote them to a folder of its own.
        """
        sizes = self._sizes()
        if missing := [part["name"] for part in manifest["parts"] if sizes.get(part["name"]) != part["bytes"]]:
            raise ConfigError(
                f"--output {self.path}: {len(missing)} files of predictions, such as {missing[0]}, were written "
                "elsewhere; name a folder that every node of the cluster sees, or a URI"
            )
        data = _json({"format_version": FORMAT} | manifest)
        write_file(join(self.path, MANIFEST), data)
        self.tidy()
        return json.loads(data)

    def tidy(self) -> None:
        """Remove what a finished job needs no more, and what killed processes left behind."""
        for folder in ("", "predictions"):
            for info in self._list(folder):
                if _UNFINISHED.search(info.base_name):
                    self._files.delete_file(info.path)
        if self._list(STATE):
            self._files.delete_dir(f"{self._root}/{STATE}")

    def _sizes(self) -> dict[str, int]:
        return {f"predictions/{info.base_name}": info.size for info in self._list("predictions")}

    def _list(self, folder: str) -> list[fs.FileInfo]:
        return self._files.get_file_info(fs.FileSelector(f"{self._root}/{folder}".rstrip("/"), allow_not_found=True))

    def _read(self, name: str) -> dict[str, Any] | None:
        data = read_file(join(self.path, name))
        if data is None:
            return None
        try:
            values = json.loads(data)
            if not isinstance(values.get("job", values), dict):
                raise ValueError("its entries are no objects")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{join(self.path, name)}: damaged ({error}); {_REMEDY}") from error
        return values


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
