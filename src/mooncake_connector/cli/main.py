"""Run the ``mooncake`` command: pick the verb, load only its module, end with a clear error or an exit code."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from mooncake_connector.cli.errors import EXIT_OK, CommandParser, Terminated, UsageError, exit_code, print_error
from mooncake_connector.config import ConnectorConfig
from mooncake_store import __version__
from mooncake_store.config import load_config, wants_debug
from mooncake_store.log import set_up_logging

logger = logging.getLogger(__name__)


class Verb(NamedTuple):
    """One row of ``mooncake --help``. The module has ``add_parser(subparsers)`` and ``run(args) -> exit code``."""

    name: str
    group: str
    help: str
    is_server: bool = False

    @property
    def module(self) -> str:
        """Return the module to load when the verb is used."""
        return f"mooncake_connector.cli.{self.name}"

    def exists(self) -> bool:
        """Tell whether this installation has the verb."""
        return importlib.util.find_spec(self.module) is not None


VERBS = (
    Verb("demo", "Try it", "run everything on this machine and show what is shared", is_server=True),
    Verb("etcd", "Run a deployment", "run an etcd for development", is_server=True),
    Verb("store", "Run a deployment", "run a capacity node: memory for the pool without an engine", is_server=True),
    Verb("router", "Run a deployment", "run the gateway in front of prefill and decode engines", is_server=True),
    Verb("simulate", "Look at it", "replay a trace of requests through the router's decisions"),
    Verb("status", "Look at it", "show the members of a cell and what each holds"),
    Verb("bench", "Look at it", "measure how fast this machine moves blocks"),
    Verb("doctor", "Look at it", "check this machine and say what to change"),
    Verb("config", "Look at it", "show every setting with its origin, or the schema"),
)

EXAMPLES = """\
examples:
  mooncake etcd                                      start a directory on this machine
  mooncake store serve --memory 2GiB                 lend 2 GiB to the pool
  mooncake router --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
  mooncake status --watch                            see who holds what
  mooncake doctor                                    find out what does not work here, and why

settings: flags, then MOONCAKE_* variables, then the file named by MOONCAKE_CONFIG; see `mooncake config --show`
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 = done, 1 = it failed, 2 = bad input, 130 = Ctrl-C, 143 = SIGTERM. Errors are three lines on standard error; a
    traceback appears only with ``MOONCAKE_DEBUG=1``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = "mooncake"
    try:
        verb = _pick(arguments)
        if verb is None:
            return EXIT_OK
        command = f"mooncake {verb.name}"
        return _run(verb, arguments)
    except SystemExit as done:  # argparse after --help or --version
        return done.code if isinstance(done.code, int) else EXIT_OK
    except BrokenPipeError:  # the reader of our output left: `mooncake status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt as error:
        print(f"{command}: {'terminated' if isinstance(error, Terminated) else 'interrupted'}", file=sys.stderr)
        return exit_code(error)
    except Exception as error:
        # the process's border: a user sees three lines, never a traceback
        logger.debug("%s failed", command, exc_info=True)
        print_error(error, command=command, is_debug=wants_debug())
        return exit_code(error)


def _pick(arguments: Sequence[str]) -> Verb | None:
    """Return the verb asked for; None when help or the version was all that was wanted.

    Raises:
        UsageError: no such verb, or one that this installation lacks.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(format_help(), end="")
        return None
    if arguments[0] in ("-V", "--version"):
        print(f"mooncake {__version__}")
        return None
    names = [verb.name for verb in VERBS if verb.exists()]
    if arguments[0] not in names:
        near = difflib.get_close_matches(arguments[0], names, n=1)
        hint = f"did you mean `mooncake {near[0]}`?" if near else f"choose one of: {', '.join(names)}"
        kind = "option" if arguments[0].startswith("-") else "command"
        raise UsageError(f"there is no {kind} {arguments[0]!r}", where="mooncake", hint=hint)
    return next(verb for verb in VERBS if verb.name == arguments[0])


def _run(verb: Verb, arguments: Sequence[str]) -> int:
    module = importlib.import_module(verb.module)
    parser = CommandParser(prog="mooncake")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    module.add_parser(commands)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:  # parse_args would blame `mooncake` for what the verb does not know
        commands.choices[verb.name].error(f"unrecognized arguments: {' '.join(unknown)}")
    # Also rejects a bad environment or file before anything starts.
    config = load_config(ConnectorConfig, file=getattr(args, "config_file", None))
    level = "debug" if config.debug else config.log_level
    # A command's output is its answer: only a server narrates.
    set_up_logging("error" if level == "info" and not verb.is_server else level)
    return int(module.run(args))


def format_help() -> str:
    """Return the text of ``mooncake --help``: verbs by what one wants to do."""
    lines = ["usage: mooncake COMMAND [options]", "", "Share KV cache between inference engines.", ""]
    for group in dict.fromkeys(verb.group for verb in VERBS):
        verbs = [verb for verb in VERBS if verb.group == group and verb.exists()]
        if verbs:
            lines += [f"{group}:", *(f"  {verb.name:<10} {verb.help}" for verb in verbs), ""]
    lines += ["`mooncake COMMAND --help` explains one; `mooncake --version` prints the version.", "", EXAMPLES]
    return "\n".join(lines)
