"""Run ``mooncake store serve``: memory for the pool without an engine."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from typing import Any

from mooncake_connector.config import ConnectorConfig
from mooncake_store.config import load_config
from mooncake_store.errors import MooncakeError
from mooncake_store.node import run_store_node

EXIT_BAD_INPUT = 2
_OPTIONS = {"memory": "segment_bytes", "directory": "directory", "host": "host", "cell": "cell", "media": "media"}


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("store", help="run a capacity node", description="Lend memory to the pool.")
    verbs = parser.add_subparsers(dest="store_verb", required=True, metavar="VERB")
    serve = verbs.add_parser("serve", help="run one until Ctrl-C or SIGTERM",
                             description="Lend memory to the pool: engines of the cell keep copies of their blocks "
                                         "here, which outlive them. Options left out come from MOONCAKE_* variables, "
                                         "the file named by MOONCAKE_CONFIG, or defaults (see `mooncake config`).")
    serve.add_argument("--memory", metavar="SIZE", help="memory to lend, e.g. 2GiB")
    serve.add_argument("--directory", metavar="URL", help="etcd://host:port[,host:port]")
    serve.add_argument("--host", metavar="ADDRESS", help="address to bind and announce")
    serve.add_argument("--cell", metavar="NAME", help="which deployment to join")
    serve.add_argument("--media", metavar="LIST", help="media allowed, most wanted first, e.g. shm,tcp")
    serve.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the node until a signal; return the exit code."""
    overrides: dict[str, Any] = {field: getattr(args, option) for option, field in _OPTIONS.items()
                                 if getattr(args, option) is not None}
    if "media" in overrides:
        overrides["media"] = [medium.strip() for medium in overrides["media"].split(",") if medium.strip()]
    stop_event = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop_event.set())
    try:
        run_store_node(load_config(ConnectorConfig, overrides), stop_event)
    except MooncakeError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0
