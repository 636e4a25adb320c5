"""Run ``mooncake bench transport``: how fast this machine moves blocks between two processes, medium by medium."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mooncake_connector.cli.errors import EXIT_FAILED, EXIT_OK, UsageError
from mooncake_connector.cli.options import sigterm_unwinds
from mooncake_connector.config import ConnectorConfig
from mooncake_connector.demo.report import describe_machine, describe_versions, format_table
from mooncake_store.config import load_config, parse_size
from mooncake_store.errors import ConfigError, LocalProtocolError
from mooncake_store.transport.bench import Case, Row, check_case, measure
from mooncake_store.transport.media import TRANSPORTS, TransportSettings

MEDIA = "shm,cma,tcp"
TOTAL, BLOCKS = "64MiB", "1MiB,64KiB,16KiB"
NUM_REPS = 15
NUM_REPS_QUICK = 3
TOTAL_QUICK = "4MiB"
LONE_BLOCK_BYTES = 4096
HEADER = ("read", "medium", "threads", "median", "99 %", "GiB/s", "x memcpy")


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("bench", help="measure how fast this machine moves blocks",
                                   description="Measure one part of Mooncake on this machine.")
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    transport = parts.add_parser(
        "transport", help="read blocks of another process over each medium",
        description="Start a second process that serves memory, read blocks of it over each medium in turn, and "
                    "compare with one memcpy of the same bytes. Blocks lie in random order at both ends. Exit code 1 "
                    "when a medium could not be measured.")
    transport.add_argument("--media", default=MEDIA, metavar="NAMES",
                           help=f"any of {','.join(TRANSPORTS)} (default: {MEDIA})")
    transport.add_argument("--total", default=TOTAL, metavar="SIZE", help=f"bytes of one read (default: {TOTAL})")
    transport.add_argument("--blocks", default=BLOCKS, metavar="SIZES", help=f"sizes of one block (default: {BLOCKS})")
    transport.add_argument("--threads", default="1", metavar="NUMBERS", help="readers at a time (default: 1)")
    transport.add_argument("--reps", type=int, default=NUM_REPS, metavar="NUMBER",
                           help=f"repetitions of each; the median counts (default: {NUM_REPS})")
    transport.add_argument("--quick", action="store_true",
                           help=f"{TOTAL_QUICK} and {NUM_REPS_QUICK} repetitions: a check, not a measurement")
    transport.add_argument("--json", metavar="PATH", help="write {machine, versions, rows} here")
    transport.add_argument("--png", metavar="PATH", help="draw it here; needs matplotlib")
    transport.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, printing each case as it is done; return the exit code.

    Raises:
        UsageError: sizes, media or numbers that cannot be used.
        MooncakeError: the second process failed, or wrong bytes arrived.
    """
    media = _media(args.media)
    cases = plan_cases(TOTAL_QUICK if args.quick else args.total, args.blocks, args.threads)
    num_reps = NUM_REPS_QUICK if args.quick else args.reps
    if num_reps < 1:
        raise UsageError(f"--reps is {num_reps}, must be at least 1")
    config = load_config(ConnectorConfig)
    settings = TransportSettings(config.host, config.rdma_devices, config.rdma_gid_index)
    rows: list[Row] = []
    with sigterm_unwinds():
        print(f"{len(cases)} cases of {num_reps} repetitions over {', '.join(media)}", flush=True)
        for done in measure(media, cases, num_reps=num_reps, settings=settings):
            rows += done
            print("\n".join(f"  {describe(row)}: {row.medium} {_result(row)}" for row in done), flush=True)
    print(f"\n{format_rows(rows)}")
    if args.json:
        write_json(rows, Path(args.json), is_quick=args.quick)
    if args.png and not write_plot(rows, Path(args.png)):
        print("no plot: matplotlib is not installed (pip install matplotlib)")
    return EXIT_FAILED if any(row.note for row in rows) else EXIT_OK


def plan_cases(total: str, blocks: str, threads: str) -> list[Case]:
    """Return what to read: every block size with every number of threads, then one block of 4 KiB alone.

    Raises:
        UsageError: a size or a number that cannot be used.
    """
    try:
        total_bytes = parse_size(total, where="--total")
        sizes = [parse_size(size, where="--blocks") for size in blocks.split(",")]
        numbers = [int(number) for number in threads.split(",")]
        cases = [Case(total_bytes, size, num_threads=number) for size in sizes for number in numbers]
        for case in cases:
            check_case(case)
    except ConfigError as error:
        raise UsageError(error.message, where=error.where, hint=error.hint) from error
    except (LocalProtocolError, ValueError) as error:
        raise UsageError(str(error), where="mooncake bench transport",
                         hint="use sizes that divide --total, and at most one thread per block") from error
    return [*cases, Case(LONE_BLOCK_BYTES, LONE_BLOCK_BYTES)]


def describe(row: Row) -> str:
    """Return what was read, for people."""
    if row.block_bytes == row.total_bytes:
        return size_text(row.total_bytes)
    return f"{size_text(row.total_bytes)} in {size_text(row.block_bytes)}"


def size_text(num_bytes: int) -> str:
    """Return a size as people write it."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit and num_bytes % unit == 0:
            return f"{num_bytes // unit} {name}"
    return f"{num_bytes} B"


def format_rows(rows: Sequence[Row]) -> str:
    """Return the table, the memcpy of each case as a line of its own and notes below."""
    cells: list[Sequence[object]] = []
    for index, row in enumerate(rows):
        if index == 0 or row.block_bytes != rows[index - 1].block_bytes:
            copy_s = next((other.memcpy_s for other in rows if other.block_bytes == row.block_bytes and not other.note),
                          0.0)
            if copy_s:
                cells.append((describe(row), "memcpy", 1, _time(copy_s), "", f"{_rate(row, copy_s):.2f}", "1.00"))
        values = ("-",) * 4 if row.note else (_time(row.seconds), _time(row.p99_s), f"{_rate(row, row.seconds):.2f}",
                                              f"{row.ratio:.2f}")
        cells.append((describe(row), row.medium, row.num_threads, *values))
    notes = dict.fromkeys(f"{row.medium}: {row.note}" for row in rows if row.note)
    return "\n".join([format_table(HEADER, cells), *notes])


def write_json(rows: Sequence[Row], path: Path, *, is_quick: bool) -> None:
    """Write the rows with the machine they are from."""
    result = {"title": "transport", "quick": is_quick, "machine": describe_machine(), "versions": describe_versions(),
              "rows": msgspec.to_builtins(list(rows))}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


def write_plot(rows: Sequence[Row], path: Path) -> bool:
    """Draw time over memcpy by block size, one bar per medium and number of threads; False without matplotlib."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return False
    rows = [row for row in rows if not row.note and row.total_bytes > LONE_BLOCK_BYTES]
    labels = list(dict.fromkeys(describe(row) for row in rows))
    series = list(dict.fromkeys((row.medium, row.num_threads) for row in rows))
    figure, axes = pyplot.subplots(figsize=(10, 4.5))
    width = 0.8 / max(1, len(series))
    for number, (medium, num_threads) in enumerate(series):
        bars = [(labels.index(describe(row)) + number * width, row.ratio) for row in rows
                if (row.medium, row.num_threads) == (medium, num_threads)]
        name = medium if num_threads == 1 else f"{medium}, {num_threads} threads"
        axes.bar([place for place, _ in bars], [ratio for _, ratio in bars], width, label=name)
    axes.axhline(1.0, color="#333333", linewidth=1, linestyle="--")
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(labels))], labels)
    axes.set_ylabel("time / memcpy of the same bytes")
    if series:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"wrote {path}")
    return True


def _media(text: str) -> list[str]:
    media = list(dict.fromkeys(text.split(",")))
    unknown = [medium for medium in media if medium not in TRANSPORTS]
    if unknown:
        raise UsageError(f"unknown medium {', '.join(map(repr, unknown))}", where="--media",
                         hint=f"choose from {', '.join(TRANSPORTS)}")
    return media


def _result(row: Row) -> str:
    return row.note or f"{_time(row.seconds)}, {row.ratio:.2f} x memcpy"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _rate(row: Row, seconds: float) -> float:
    return row.total_bytes / seconds / (1 << 30)
