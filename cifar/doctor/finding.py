"""What the doctor says: one line for each thing that was looked at."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    level: Level
    """problem: a job would fail, or strangers could run one; warning: it may, or it is slow."""
    check: str
    """What was looked at, in a word or two."""
    text: str
    """What was found and, unless it is well, what to do."""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.check:<14} {self.text}"


def ok(check: str, text: str) -> Finding:
    return Finding(level="ok", check=check, text=text)


def warning(check: str, text: str) -> Finding:
    return Finding(level="warning", check=check, text=text)


def problem(check: str, text: str) -> Finding:
    return Finding(level="problem", check=check, text=text)
