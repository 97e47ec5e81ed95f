"""What the user named: its files, and a fingerprint of their content."""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from pyarrow import fs

from cifar.config import ConfigError
from cifar.data import named
from cifar.data.prepared import absolute, filesystem, parent
from cifar.data.splits import TEST, TRAIN, VAL

SPLIT_FOLDERS = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
_JUNK = {"thumbs.db", "desktop.ini", "__macosx"}
_HASH_BYTES = 2 << 30


class File(NamedTuple):
    name: str
    """Path relative to the source."""
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Source:
    name: str
    """What the user named; for `auto` the set that was taken."""
    path: str
    """Folder or URI that the files are in."""
    files: list[File]
    """Sorted by name."""
    parquet: bool
    single: bool
    """A file was named, not a folder: its name says nothing about splits."""


def find(data: str) -> Source:
    """The source that `--data` names; ConfigError when there is none."""
    name, path = named.locate(data) if data in named.NAMES else (data, data)
    path = absolute(path)
    files, root = filesystem(path)
    try:
        info = files.get_file_info(root)
        if info.type == fs.FileType.File and root.endswith(".parquet"):
            return single_file(name, path, info)
        if info.type != fs.FileType.Directory:
            state = "is no folder and no Parquet file" if info.type == fs.FileType.File else "does not exist"
            raise ConfigError(f"--data {data}: {state}; named sets are {', '.join(named.NAMES)}")
        return folder(name, path)
    except OSError as error:
        raise ConfigError(f"--data {data}: cannot be listed: {error}") from error


def single_file(name: str, path: str, info: fs.FileInfo) -> Source:
    """The source of a file that was named itself: `path`, of which `info` tells."""
    file = _file(info, os.path.dirname(info.path))
    return Source(name=name, path=parent(path), files=[file], parquet=file.name.endswith(".parquet"), single=True)


def folder(name: str, path: str) -> Source:
    """The Parquet files below a folder; where there are none, all files but what is hidden or beside the images."""
    files, root = filesystem(path)
    infos = files.get_file_info(fs.FileSelector(root, recursive=True))
    # Opening a pipe, socket or device, which Arrow calls unknown, could wait for ever.
    shut = (fs.FileType.Directory, fs.FileType.Unknown)
    found = sorted(_file(info, root) for info in infos if info.type not in shut)
    found = [file for file in found if not _ignored(file.name)]
    parquet = [file for file in found if file.name.endswith(".parquet")]
    return Source(name=name, path=path, files=parquet or found, parquet=bool(parquet), single=False)


def _file(info: fs.FileInfo, root: str) -> File:
    return File(info.path[len(root) :].lstrip("/"), info.size or 0, info.mtime_ns or 0)


def _ignored(name: str) -> bool:
    """Hidden files, what operating systems leave behind, and text beside the class folders."""
    parts = name.lower().split("/")
    if any(part.startswith(".") or part in _JUNK for part in parts):
        return True
    beside = len(parts) == 1 or (len(parts) == 2 and parts[0] in SPLIT_FOLDERS)
    return beside and not name.lower().endswith((*IMAGE_SUFFIXES, ".parquet"))


def parquet_split(source: Source, file: File) -> int | None:
    """Split by folder or by the prefix of the file's name, such as test-00000-of-00001.parquet; None without one."""
    if source.single:
        return None
    for part in reversed(file.name.removesuffix(".parquet").lower().split("/")):
        match = re.match(r"(train|val|valid|validation|test)(?![a-z])", part)
        if match:
            return SPLIT_FOLDERS[match[1]]
    return None


def listing_key(source: Source) -> str:
    """Changes whenever the files do, on this machine: path, names, sizes and times of change. Reads nothing."""
    return _digest(source.path, *source.files)


def content_key(source: Source) -> str:
    """The same on every machine: names, sizes and content.

    Above 2 GiB, or on an object store, the times of change stand for the content: hashing would cost a whole read.
    """
    files, root = filesystem(source.path)
    if not isinstance(files, fs.LocalFileSystem) or sum(file.size for file in source.files) > _HASH_BYTES:
        return _digest(*source.files)

    def digest(file: File) -> str:
        try:
            with open(f"{root}/{file.name}", "rb") as stream:
                return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError:
            return "unreadable"

    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest, source.files)
        return _digest(*((file.name, file.size, content) for file, content in zip(source.files, digests, strict=True)))


def _digest(*parts: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part!r}\n".encode())
    return digest.hexdigest()
