"""Turn every failure of a command into three lines and an exit code: what, where, do this."""

from __future__ import annotations

import argparse
import difflib
import logging
import re
import sys
import traceback
from typing import IO, NoReturn

from mooncake_store.errors import ConfigError, MooncakeError

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class UsageError(MooncakeError):
    """The command line cannot be used."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; unwinds like Ctrl-C, ends with another exit code."""


class CommandParser(argparse.ArgumentParser):
    """Parses a command line and raises UsageError instead of printing and exiting; sub-parsers do the same."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line.

        Raises:
            UsageError: always.
        """
        raise UsageError(message + self._suggestion(message), where=self.prog, hint=f"see `{self.prog} --help`")

    def _suggestion(self, message: str) -> str:
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], list(self._option_string_actions), n=1) if unknown else []
        return f" (did you mean {near[0]}?)" if near else ""


def port_number(text: str) -> int:
    """Read a TCP port, 0 meaning any free one; for ``type=`` of an argument."""
    if not (text.isascii() and text.isdigit() and int(text) < 65_536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def positive_seconds(text: str) -> float:
    """Read a time of more than 0 and at most 3,600 seconds; for ``type=`` of an argument."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds, more than 0 and at most 3600")
    return seconds


def exit_code(error: BaseException) -> int:
    """Return the exit code that a failure ends the process with."""
    if isinstance(error, UsageError | ConfigError):
        return EXIT_BAD_INPUT
    if isinstance(error, Terminated):
        return EXIT_TERMINATED
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILED


def print_error(error: BaseException, *, command: str, is_debug: bool, file: IO[str] | None = None) -> None:
    """Print a failure in three lines; with ``is_debug`` its traceback before them."""
    file = sys.stderr if file is None else file
    if is_debug:
        traceback.print_exception(error, file=file)
    if isinstance(error, MooncakeError):
        message, where, hint = error.message, error.where, error.hint
    else:
        frames = traceback.extract_tb(error.__traceback__)
        at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        message, where = f"{type(error).__name__}: {error}", f"{command}{at}"
        hint = "this is a bug: run it again with MOONCAKE_DEBUG=1 and report the traceback"
    print(f"mooncake: {message}", file=file)
    print(f"  where: {where or command}", file=file)
    print(f"  do: {hint or f'see `{command} --help`'}", file=file)
