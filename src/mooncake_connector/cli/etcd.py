"""Run ``mooncake etcd``: an etcd for development, in the foreground."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from mooncake_connector.cli.errors import UsageError, port_number
from mooncake_connector.cli.options import sigterm_unwinds
from mooncake_store.directory.server import EtcdServer
from mooncake_store.errors import DirectoryUnavailable

DEFAULT_PORT = 2379
CHECK_S = 0.5


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "etcd",
        help="run an etcd for development",
        description="Run one etcd on 127.0.0.1 until Ctrl-C, for development. Production runs its own (>= 3.5.9).",
    )
    parser.add_argument("--port", type=port_number, default=DEFAULT_PORT, metavar="N",
                        help=f"client port, 0 for any free one (default: {DEFAULT_PORT}, where engines look)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR",
                        help="keep the data and etcd.log here (default: a temporary folder, deleted at the end)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run etcd until a signal.

    Raises:
        KeyboardInterrupt: Ctrl-C, or Terminated for SIGTERM.
        UsageError: the data folder cannot be used.
        MooncakeError: etcd does not start, or ends by itself.
    """
    with tempfile.TemporaryDirectory(prefix="mooncake-etcd-") as scratch:
        data_dir = args.data_dir or Path(scratch)
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot use {data_dir}: {error.strerror}", where="mooncake etcd --data-dir",
                             hint="name a folder that you may write to") from error
        server = EtcdServer(data_dir, args.port)
        try:
            with sigterm_unwinds():
                server.start()
                print(f"etcd ready: {server.url} (log: {server.log_path}); stop with Ctrl-C", flush=True)
                while server.pid:
                    time.sleep(CHECK_S)
        finally:
            server.stop()
    # It was not us: a signal leaves the loop by an exception.
    hint = f"read {server.log_path}" if args.data_dir else "run it again with --data-dir DIR, which keeps etcd.log"
    raise DirectoryUnavailable("etcd ended by itself", where=server.url, hint=hint)
