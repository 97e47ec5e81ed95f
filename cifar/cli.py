"""What every job shares: flags from dataclasses, errors to exit codes, progress on stderr, results on stdout.

    @dataclass(frozen=True, kw_only=True)
    class Flags:
        data: DataConfig = field(default_factory=DataConfig)    # groups are flattened: --image-size
        output: str = "./data-report"
        \"""Folder for the result.\"""                            # the flag's help

    def prepare_data(flags: Flags) -> dict[str, Any]:
        \"""Text of --help.\"""
        ...                                                     # progress: logging.getLogger("cifar...").info(...)
        print(f"report: {path}")                                # results
        return {"report": str(path)}                            # what --json prints as the last line

    def main(argv: Sequence[str] | None = None) -> int:
        return run_job(prepare_data, Flags, argv)

    if __name__ == "__main__":
        sys.exit(main())

`Flags` may be a dataclass, a union of several, each a subcommand, an instance of one (its values are the defaults: a
recipe such as `Config(...)`), or a dict of named instances, of which `--recipe NAME` picks one and the first is the
default. Every job gets `--json`.
"""

import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from cifar.config import FREE_SPACE, ConfigError, RunFailed

Flags = TypeVar("Flags")

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f]")

OK, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the process that `ray job submit` starts."""

logger = logging.getLogger(__name__)


def run_job(
    job: Callable[[Flags], dict[str, Any]],
    flags: type[Flags] | types.UnionType | Flags | Mapping[str, Flags],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv` (None: the process's), call the job, return the exit code: 0 done, 1 failed, 2 bad usage.

    A ConfigError, from the flags or from the job, is one line on stderr and 2; RunFailed one line and 1; any other
    exception a traceback and 1, but for a full disk, which is one line too.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = False
    if SUBMITTED in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]  # by Ray, whose job holds no CPU; a driver evaluates by all cores of its node
    with _log_to_stderr():
        try:
            parsed, as_json = _parse(flags, argv, job.__doc__ or "")
            result = job(parsed)
            if as_json:
                print(json.dumps(result))
            sys.stdout.flush()
        except SystemExit as stop:  # tyro, after --help or its own error message
            return stop.code if isinstance(stop.code, int) else FAILED
        except ConfigError as error:
            print(_plain(f"error: {error}"), file=sys.stderr)
            return BAD_USAGE
        except RunFailed as error:
            if as_json and error.result is not None:
                print(json.dumps(error.result))
            print(_plain(f"failed: {error}"), file=sys.stderr)
            return FAILED
        except BrokenPipeError:  # who reads stdout has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
            return FAILED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                print(_plain(f"failed: {error}; {FREE_SPACE}"), file=sys.stderr)
                return FAILED
            logger.exception("the job failed")
            return FAILED
    return OK


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command that repeats this process's job, quoted for a shell."""
    return shlex.join(["python", sys.argv[0], *(sys.argv[1:] if argv is None else argv)])


def given_flags(argv: Sequence[str] | None = None) -> frozenset[str]:
    """Names of the flags on the command line, as fields of a config.

    Not told by a value that differs from the recipe's: who writes --lr 0.2 wants 0.2, even where that is the default.
    """
    words = sys.argv[1:] if argv is None else argv
    given = {word.partition("=")[0].strip("-").replace("-", "_") for word in words if word.startswith("--")}
    return frozenset(given | {name.removeprefix("no_") for name in given})


def _parse(flags: Any, argv: list[str], description: str) -> tuple[Any, bool]:
    fields: list[Any] = []
    if isinstance(flags, Mapping):
        chosen = _choose(tuple(flags), argv)
        recipe = Annotated[Literal[tuple(flags)], tyro.conf.arg(help="Named defaults for all the other flags.")]
        fields = [("recipe", recipe, dataclasses.field(default=chosen))]
        flags = flags[chosen]
    if isinstance(flags, type | types.UnionType):
        fields.append(("flags", Annotated[flags, tyro.conf.arg(name="")]))
    else:
        fields.append(("flags", Annotated[type(flags), tyro.conf.arg(name="")], dataclasses.field(default=flags)))
    as_json = Annotated[
        bool, tyro.conf.arg(help="Print one JSON object as the last line."), tyro.conf.FlagCreatePairsOff
    ]
    fields.append(("json", as_json, dataclasses.field(default=False)))
    outer = dataclasses.make_dataclass("Job", fields, kw_only=True, frozen=True)
    parsed = _tyro(outer, argv, description)
    return parsed.flags, parsed.json


def _choose(names: tuple[str, ...], argv: list[str]) -> str:
    """The recipe decides the defaults of the other flags, so it is looked for before they are parsed."""
    outer = dataclasses.make_dataclass("Recipe", [("recipe", Literal[names], dataclasses.field(default=names[0]))])
    chosen, _ = tyro.cli(outer, args=argv, return_unknown_args=True, add_help=False)
    return chosen.recipe


def _tyro(outer: type, argv: list[str], description: str) -> Any:
    """tyro prints what a dataclass's validation raises as a box around it; take the ConfigError from inside instead."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                outer,
                args=argv,
                prog=Path(sys.argv[0]).name,
                description=description,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
            )
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause := cause.__cause__ or cause.__context__:
            if isinstance(cause, ConfigError):
                raise cause from None
        sys.stderr.write(messages.getvalue())
        raise


def _plain(text: str) -> str:
    """One line without what commands a terminal: names of files and classes may come from anyone."""
    return _CONTROL.sub("", " ".join(text.splitlines()))


class _PlainFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return _plain(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(_plain, super().formatException(ei).split("\n")))


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show the messages of `cifar` alone, as plain lines; other libraries keep their own ways."""
    package = logging.getLogger("cifar")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(message)s"))
    level, propagate = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        package.propagate = propagate
