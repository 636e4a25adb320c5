"""Run ``mooncake router``: the OpenAI-compatible gateway and the placement service in front of engines."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mooncake_connector.cli.errors import EXIT_OK, UsageError, port_number
from mooncake_connector.router.app import serve
from mooncake_connector.router.config import RouterConfig
from mooncake_connector.router.messages import URL_MAX_CHARS
from mooncake_connector.router.policy import POLICIES
from mooncake_store.config import load_config

_URL = re.compile(r"https?://[^\s/]+")
_OPTIONS = (
    "prefill", "decode", "engine", "directory", "cell", "policy", "host", "port", "placement", "min_split_tokens",
    "first_byte_timeout_s", "total_timeout_s", "drain_timeout_s",
)  # fmt: skip

_EXAMPLES = """\
examples:
  one prefill engine and one decode engine, both on this machine:
    mooncake router --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
  two of each, open to the network:
    mooncake router --prefill http://10.0.0.1:8100 http://10.0.0.2:8100 \\
                    --decode http://10.0.0.3:8200 http://10.0.0.4:8200 --host 0.0.0.0
  engines that announce themselves in etcd, found there as they come and go:
    mooncake router --directory etcd://127.0.0.1:2379
  engines that do both, and everything else from a file, which may be changed while the router runs:
    mooncake router --engine http://10.0.0.1:8100 http://10.0.0.2:8100 --config router.toml
  SGLang servers, alone or beside vLLM's; each tells whether it prefills, decodes or does both:
    mooncake router --engine http://10.0.0.1:30000 http://10.0.0.2:30000

GET /ready tells when an engine can be used; GET /metrics is for Prometheus. Options left out come from the file,
then from defaults; docs/reference/http.md lists every setting.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "router",
        help="run the gateway in front of prefill and decode engines",
        description="Answer OpenAI-style requests by prefilling on one engine and decoding on another.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    engines = parser.add_argument_group("engines", "base URLs; each flag takes several and may be repeated")
    for name, text in (
        ("prefill", "engines that compute prompts"),
        ("decode", "engines that generate"),
        ("engine", "engines that may do both"),
    ):
        engines.add_argument(f"--{name}", type=_url, nargs="+", action="extend", metavar="URL", help=text)
    engines.add_argument("--directory", metavar="ADDRESS",
                         help="etcd://host:port[,host:port] where engines announce themselves")
    engines.add_argument("--cell", metavar="NAME", help="name of their cell there (default: default)")
    listen = parser.add_argument_group("where to listen")
    listen.add_argument("--host", metavar="ADDRESS", help="for clients (default: 127.0.0.1)")
    listen.add_argument("--port", type=port_number, metavar="N", help="for clients, 0 for any free one (default: 8000)")
    listen.add_argument("--placement", metavar="ADDRESS",
                        help="ZeroMQ address for gateways of your own, '' for none (default: tcp://127.0.0.1:8001)")
    behaviour = parser.add_argument_group("behaviour")
    behaviour.add_argument("--policy", choices=POLICIES, metavar="NAME",
                           help=f"how engines are chosen: {', '.join(POLICIES)} (default: joint)")
    behaviour.add_argument("--min-split-tokens", type=_count, metavar="N",
                           help="run shorter prompts whole on one engine (default: 0, always split)")
    behaviour.add_argument("--first-byte-timeout", dest="first_byte_timeout_s", type=_seconds, metavar="SECONDS",
                           help="longest wait for the first byte of a stream (default: 300)")
    behaviour.add_argument("--total-timeout", dest="total_timeout_s", type=_seconds, metavar="SECONDS",
                           help="longest time one request may take (default: 1800)")
    behaviour.add_argument("--drain-timeout", dest="drain_timeout_s", type=_seconds, metavar="SECONDS",
                           help="how long running requests may go on after SIGTERM or Ctrl-C (default: 30)")
    behaviour.add_argument("--config", dest="router_config_file", metavar="FILE",
                           help="JSON or TOML file with any of the settings; followed while the router runs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the router until SIGTERM or Ctrl-C.

    Raises:
        UsageError: no engine is given, or one URL twice.
        ConfigError: a setting or an address cannot be used.
    """
    config = load_router_config(args)
    if not (config.engines() or config.directory):
        raise UsageError("no engine is given", where="mooncake router",
                         hint="name at least one: --prefill URL --decode URL, --engine URL, or --directory ADDRESS")
    file = Path(args.router_config_file) if args.router_config_file else None
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(config, file=file, load=lambda: load_router_config(args)))
    return EXIT_OK


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where it is installed (vLLM brings it): it takes less time; None otherwise."""
    try:
        return importlib.import_module("uvloop").new_event_loop  # type: ignore[no-any-return]
    except ImportError:
        return None


def load_router_config(args: argparse.Namespace) -> RouterConfig:
    """Return the settings: flags, then the file, then defaults. The environment plays no part.

    Raises:
        ConfigError: a key or value cannot be used.
    """
    overrides = {name: getattr(args, name) for name in _OPTIONS}
    # The loader is written for StoreConfig but needs only a struct.
    return load_config(RouterConfig, overrides, environ={}, file=args.router_config_file)


def _url(text: str) -> str:
    text = text.rstrip("/")
    if not _URL.fullmatch(text) or len(text) > URL_MAX_CHARS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a base URL such as http://127.0.0.1:8100")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, more than 0 and at most 86400")
    return value
