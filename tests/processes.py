"""Processes that tests wait for and kill."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120, pause: float = 0.005) -> Any:
    """What the condition gives, once it is true; `pause`: seconds between two looks."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(pause)
    raise AssertionError(f"{what}: not within {seconds} s")


def alive(pid: int) -> bool:
    """Not gone, and no zombie, which has no command line: nobody may be there to bury it."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def below(ancestor: int, name: str) -> list[int]:
    """Process ids of the processes of this title that the ancestor started, or those that it started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if not (entry / "cmdline").read_bytes().startswith(name.encode()):
                continue
            pid, parents = int(entry.name), set()
            while pid > 1:
                pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
                parents.add(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ancestor in parents:
            found.append(int(entry.name))
    return found
