"""Run ``mooncake config``: every setting with its origin, or the schema."""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec

from mooncake_connector.cli.errors import EXIT_OK
from mooncake_connector.cli.options import add_config_options, load_from
from mooncake_connector.config import ConnectorConfig
from mooncake_store.config import Loaded, config_schema, unknown_environment


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "config",
        help="show every setting with its origin, or the schema",
        description="Show what a process started here would use: flags, then MOONCAKE_* variables, then the file, then "
        "defaults.",
    )
    add_config_options(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="each value with its origin (the default)")
    what.add_argument("--schema", action="store_true", help="JSON Schema of the configuration file")
    parser.add_argument("--json", action="store_true", help="print --show as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the settings; return the exit code.

    Raises:
        ConfigError: a setting cannot be used.
    """
    if args.schema:
        print(json.dumps(config_schema(ConnectorConfig), indent=2))
        return EXIT_OK
    loaded = load_from(args)
    if args.json:
        values = msgspec.to_builtins(loaded.config)
        rows = {key: {"value": values[key], "origin": origin} for key, origin in loaded.origins.items()}
        print(json.dumps(rows, indent=2))
    else:
        print(format_settings(loaded))
    return EXIT_OK


def format_settings(loaded: Loaded[ConnectorConfig]) -> str:
    """Return a table: key, value, origin; then variables with our prefix that set nothing."""
    rows = [(key, format_value(key, getattr(loaded.config, key)), origin) for key, origin in loaded.origins.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}".rstrip() for key, value, origin in rows]
    for name, near in unknown_environment(ConnectorConfig).items():
        lines.append(f"\n{name} sets nothing here" + (f"; did you mean {near}?" if near else ""))
    return "\n".join(lines)


def format_value(key: str, value: object) -> str:
    """Return a setting's value as it may be written in the environment."""
    if isinstance(value, bool):
        return str(value).lower()
    if key.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    return ",".join(value) if isinstance(value, tuple) else str(value)


def format_size(size_bytes: int) -> str:
    """Return a size as it may be written in a setting: ``1073741824`` -> ``1GiB``; exact or in bytes."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)
