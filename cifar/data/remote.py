"""Object stores that fail now and then: every request to one is repeated, for so long, and told to the user.

pyarrow's own client repeats a request for 6 s when it was made from a URI, and three times when it was unpickled, as
Ray hands it to workers. Here three times too, which are done in 2 to 30 s; around that, this module goes on.
"""

import errno
import logging
import os
import random
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from cifar.config import FREE_SPACE, RunFailed

PATIENCE_SECONDS = 120.0
"""After so long without an answer a request is given up; the last attempt may take half a minute more."""
SAY_SECONDS = 4.0
"""After so long the user is told that a storage does not answer."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 8.0
_NO_ANSWER = "the storage has not answered for"
_ATTEMPTS = 3
_GCS_SECONDS = 10
_BUFFER_BYTES = 64 << 20
_PASSING = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTL|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|HTTP status 200"
    r"|HTTP status (408|429|500|502|503|504)|INCOMPLETE_BODY"
    r"|Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED|ABORTED)"
    # An upload that was completed, but the answer was lost, is not known any more: it is done again from its beginning.
    r"|NO_SUCH_UPLOAD"
)
_LASTING = re.compile(r"curlCode: (51|58|60|77)\b")
"""Certificates."""

T = TypeVar("T")
logger = logging.getLogger(__name__)
_abandoned: list[Any] = []
"""Uploads that broke off. Arrow completes an upload when its stream is closed, or deleted, with the parts that arrived:
half an object. What is kept here is closed when S3 is finalized, at the end of the process, and completes no more."""


class StorageFailed(RunFailed, OSError):
    """A storage did not answer in time, or is full."""


def storage_failure(text: str) -> str:
    """From an error's text, which may come from another process: what to tell the user if the storage is to blame, as
    when it is away or full; else nothing."""
    if _NO_ANSWER in text or FREE_SPACE in text:
        return text
    full = any(os.strerror(code) in text for code in (errno.ENOSPC, errno.EDQUOT))
    return f"{text}; {FREE_SPACE}" if full else ""


def persist(name: str, request: Callable[[], T], lost: Callable[[], T] | None = None) -> T:
    """What the request gives, repeated while its errors are of the kind that passes.

    The waits grow and are drawn at random, so that many processes don't come back at once. `lost` gives the answer when
    a repeated request finds nothing: then it was done the first time, and its answer was lost. Raises StorageFailed
    with the file's `name` after PATIENCE_SECONDS, and what does not pass at once.
    """
    started_at, wait, said, repeated = time.monotonic(), FIRST_WAIT_SECONDS, False, False
    while True:
        try:
            answer = request()
            break
        except FileNotFoundError:
            if lost is None or not repeated:
                raise
            return lost()
        except OSError as error:
            text = str(error)
            if isinstance(error, StorageFailed) or not _PASSING.search(text) or _LASTING.search(text):
                raise
            spent, cause = time.monotonic() - started_at, _brief(text)
            if spent + wait > PATIENCE_SECONDS:
                raise StorageFailed(
                    f"{name}: {_NO_ANSWER} {spent:.0f} s ({cause}); "
                    "give the same command again when it does, which then goes on"
                ) from error
            if spent > SAY_SECONDS and not said:
                said = True
                logger.warning("storage %s does not answer, trying again (%s)", name, cause)
        repeated = True
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    if said:
        logger.warning("storage %s answers again, after %.0f s", name, time.monotonic() - started_at)
    return answer


def _brief(text: str) -> str:
    """An error of the store's client without its address book."""
    return " ".join(text.partition("; Details:")[0].partition(" (Request ID")[0].partition(" error_info=")[0].split())


def open_store(uri: str) -> tuple[fs.FileSystem, str]:
    """What `FileSystem.from_uri` gives, persistent if it is an object store. The bucket's region may be asked for."""
    files, root = persist(uri.partition("?")[0], lambda: fs.FileSystem.from_uri(uri))
    if not isinstance(files, fs.S3FileSystem | fs.GcsFileSystem):
        return files, root
    return fs.PyFileSystem(PersistentStore(files, uri.partition("://")[0])), root


class PersistentStore(fs.FileSystemHandler):
    """An object store of which each request is repeated; objects appear whole."""

    def __init__(self, store: Any, scheme: str):
        remake, (options,) = store.__reduce__()
        if isinstance(store, fs.S3FileSystem):
            options |= {
                "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
                "allow_delayed_open": True,  # one request for a small object instead of three
                # pyarrow.fs.copy_files would fill Arrow's threads with streams that wait for a thread to write.
                "background_writes": False,
            }
        else:
            options |= {"retry_time_limit": timedelta(seconds=_GCS_SECONDS)}
        self._store, self._scheme = remake(options), scheme

    def __reduce__(self) -> Any:
        return PersistentStore, (self._store, self._scheme)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PersistentStore) and self._store.equals(other._store)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def _name(self, path: str) -> str:
        return f"{self._scheme}://{path}"

    def get_type_name(self) -> str:
        return self._store.type_name

    def normalize_path(self, path: str) -> str:
        return self._store.normalize_path(path)

    def get_file_info(self, paths: Sequence[str]) -> Any:
        return persist(self._name(paths[0]), lambda: self._store.get_file_info(list(paths)))

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return persist(self._name(selector.base_dir), lambda: self._store.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        persist(self._name(path), lambda: self._store.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        persist(self._name(path), lambda: self._store.delete_dir(path), lost=lambda: None)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        def delete() -> None:
            self._store.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

        persist(self._name(path), delete, lost=lambda: None)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        persist(self._name(path), lambda: self._store.delete_file(path), lost=lambda: None)

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        persist(self._name(dest), lambda: self._store.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Reader(self._store, path, self._name(path)), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Writer(self._store, path, self._name(path), metadata), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError


class WholeFiles(PersistentStore):
    """This machine's file system, where a file appears when it is closed; of a failed one nothing is left.

    Ray Train overwrites its list of checkpoints in place: on a full disk it would leave none to resume from.
    """

    def __init__(self) -> None:
        self._store, self._scheme = fs.LocalFileSystem(), "file"

    def __reduce__(self) -> Any:
        return WholeFiles, ()

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self._store.open_input_file(path)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self._store.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_WholeFile(path), mode="w")


class _WholeFile:
    """A local file that is renamed into place when it is closed."""

    def __init__(self, path: str):
        self._path, self._temporary = path, f"{path}.{uuid.uuid4().hex}.tmp"
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            while len(view):
                view = view[self._file.write(view) :]
        except BaseException:
            self._file.close()
            os.unlink(self._temporary)
            raise
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            os.replace(self._temporary, self._path)


class _Reader:
    """What pa.PythonFile asks of an open object."""

    def __init__(self, store: fs.FileSystem, path: str, name: str):
        self._name, self._at, self.closed = name, 0, False
        self._file = persist(name, lambda: store.open_input_file(path))
        self._size = self._file.size()

    def read(self, size: int = -1) -> pa.Buffer:
        def read() -> pa.Buffer:
            self._file.seek(self._at)
            return self._file.read_buffer(size if size >= 0 else self._size - self._at)

        data = persist(self._name, read)
        self._at += len(data)
        return data

    read_buffer = read

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self.closed = True
        self._file.close()


class _Writer:
    """Collects an object, and stores it when it is closed."""

    def __init__(self, store: fs.FileSystem, path: str, name: str, metadata: Any):
        self._store, self._path, self._name, self._metadata = store, path, name, metadata
        self._data = tempfile.SpooledTemporaryFile(_BUFFER_BYTES)  # noqa: SIM115
        self.closed = False

    def write(self, data: Any) -> int:
        return self._data.write(data)

    def tell(self) -> int:
        return self._data.tell()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with self._data:
                persist(self._name, self._put)

    def _put(self) -> None:
        self._data.seek(0)
        stream = self._store.open_output_stream(self._path, metadata=self._metadata)
        try:
            while chunk := self._data.read(_BUFFER_BYTES):
                stream.write(chunk)
        except BaseException:
            _abandoned.append(stream)
            raise
        stream.close()
