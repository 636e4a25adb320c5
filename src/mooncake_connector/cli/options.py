"""Share the options that every verb with settings takes."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mooncake_connector.cli.errors import Terminated
from mooncake_connector.config import ConnectorConfig
from mooncake_store.config import Loaded, load_with_origins


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, ``--directory`` and ``--cell``."""
    parser.add_argument("--config", dest="config_file", metavar="FILE", help="JSON or TOML file with settings")
    parser.add_argument("--directory", metavar="URL", help="etcd://host:port[,host:port], memory or off")
    parser.add_argument("--cell", metavar="NAME", help="which deployment of that directory")


def load_from(args: argparse.Namespace) -> Loaded[ConnectorConfig]:
    """Load the settings, the options of :func:`add_config_options` first.

    Raises:
        ConfigError: as for ``load_config``.
    """
    overrides = {"directory": args.directory, "cell": args.cell}
    return load_with_origins(ConnectorConfig, overrides, file=args.config_file)


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM raise Terminated in the main thread, so that ``finally`` blocks run as for Ctrl-C."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
