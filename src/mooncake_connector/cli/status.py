"""Run ``mooncake status``: who is in the cell, and what each member holds."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import msgspec

from mooncake_connector.cli.errors import EXIT_FAILED, EXIT_OK, positive_seconds
from mooncake_connector.cli.options import add_config_options, load_from
from mooncake_store.config import StoreConfig
from mooncake_store.directory.base import Directory
from mooncake_store.directory.open import open_directory
from mooncake_store.errors import ConfigError, DirectoryUnavailable, MooncakeError
from mooncake_store.metrics import Metrics
from mooncake_store.pull.control import query_status
from mooncake_store.types import Member

CONNECT_TIMEOUT_S = 5.0
QUERY_TIMEOUT_S = 3.0
WATCH_S = 2.0
QUERIES_MAX = 16
POLL_S = 0.05
MIB = 1 << 20


class MemberStatus(msgspec.Struct):
    """One member and its answer; ``error`` is set when it gave none."""

    member: Member
    samples: dict[str, float] = {}
    info: dict[str, str] = {}
    error: str = ""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "status",
        help="show the members of a cell and what each holds",
        description="Read the members from the directory and ask each one. Exit code 1 when one does not answer.",
    )
    add_config_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object (with --watch: one per line)")
    parser.add_argument("--watch", nargs="?", type=positive_seconds, const=WATCH_S, metavar="SECONDS",
                        help=f"repeat until Ctrl-C (default: every {WATCH_S:g} s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the cell's state once, or repeatedly; return the exit code.

    Raises:
        ConfigError: the directory is not one that others can see.
        DirectoryUnavailable: it does not answer.
    """
    config = load_from(args).config
    with closing(connect(config, CONNECT_TIMEOUT_S)) as directory:
        while True:
            statuses = ask_all(list(directory.members().values()))
            if args.json:
                print(json.dumps(to_json(statuses), indent=None if args.watch else 2), flush=True)
            else:
                print(format_table(config, statuses, num_blocks=directory.health().num_blocks), flush=True)
            if not args.watch:
                return EXIT_FAILED if any(status.error for status in statuses) else EXIT_OK
            time.sleep(args.watch)


def connect(config: StoreConfig, timeout_s: float) -> Directory:
    """Open the directory as an onlooker and wait for its mirror.

    Raises:
        ConfigError: the directory is not one that others can see.
        DirectoryUnavailable: it does not answer in time.
    """
    if config.directory in ("memory", "off"):
        raise ConfigError(f"directory `{config.directory}` lives in one process; nobody else can look at it",
                          where="$.directory", hint="use --directory etcd://host:port")
    directory = open_directory(config, Metrics())
    deadline = time.monotonic() + timeout_s
    while not directory.health().connected:
        if time.monotonic() > deadline:
            reason = directory.health().error or "no answer"
            directory.close()
            raise DirectoryUnavailable(f"no directory within {timeout_s:g} s: {reason}", where=config.directory,
                                       hint="start one with `mooncake etcd`, or name yours with --directory")
        time.sleep(POLL_S)
    return directory


def ask_all(members: Sequence[Member]) -> list[MemberStatus]:
    """Ask every member at the same time; ordered by kind and name."""
    if not members:
        return []
    with ThreadPoolExecutor(max_workers=min(QUERIES_MAX, len(members))) as pool:
        found = list(pool.map(_ask, members))
    return sorted(found, key=lambda status: (status.member.kind, status.member.node_id))


def _ask(member: Member) -> MemberStatus:
    try:
        reply = query_status(member.control, QUERY_TIMEOUT_S)
    except MooncakeError as error:
        return MemberStatus(member, error=error.message)
    return MemberStatus(member, reply.samples, reply.info)


def to_json(statuses: Sequence[MemberStatus]) -> dict[str, Any]:
    """Return everything that is known, as plain values."""
    return {"members": [_plain(status) for status in statuses]}


def _plain(value: Any) -> Any:
    """Turn structs into objects with names, also those that travel as arrays."""
    if isinstance(value, msgspec.Struct):
        return {key: _plain(inner) for key, inner in msgspec.structs.asdict(value).items()}
    return value


def format_table(config: StoreConfig, statuses: Sequence[MemberStatus], *, num_blocks: int) -> str:
    """Return one row per member, and a line on the cell above."""
    lines = [f"cell {config.cell} at {config.directory}: {len(statuses)} members, {num_blocks} blocks known"]
    if not statuses:
        return lines[0] + "\nno member yet: start an engine with the connector, or `mooncake store serve`"
    rows = [("kind", "node", "pid", "blocks", "used MiB", "of MiB", "leases", "pulled MiB", "media"),
            *(_row(status) for status in statuses)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    silent = [status for status in statuses if status.error]
    lines += [f"{status.member.node_id} at {status.member.control}: {status.error}" for status in silent]
    return "\n".join(lines)


def _row(status: MemberStatus) -> tuple[str, ...]:
    member = status.member
    if status.error:
        return (member.kind, member.node_id, str(member.pid), *(["-"] * 5), "no answer")

    def total(name: str, unit: int = 1) -> str:
        values = [value for key, value in status.samples.items() if key == name or key.startswith(name + "{")]
        return f"{sum(values) / unit:.0f}"

    return (member.kind, member.node_id, str(member.pid), total("mooncake_segment_blocks"),
            total("mooncake_segment_used_bytes", MIB), total("mooncake_segment_size_bytes", MIB),
            total("mooncake_leases_active"), total("mooncake_pull_bytes_total", MIB), status.info.get("media", ""))
