"""What all benchmarks share: arguments, the machine, a table, JSON.

A benchmark builds ``rows`` (a list of flat dictionaries with the same keys), then calls :func:`publish`.
Run one with ``python benchmarks/NAME.py [--quick] [--json PATH]``; it finds the package in ``src`` if not installed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from mooncake_connector.demo.report import describe_machine, describe_versions, format_table

TOKEN_FIRST = 100
TOKEN_LAST = 40_000


def parser(description: str, *, needs_engine: bool = False) -> argparse.ArgumentParser:
    """Build the parser that every benchmark starts from."""
    built = argparse.ArgumentParser(description=description)
    built.add_argument("--json", metavar="PATH", help="write {machine, versions, rows} here")
    built.add_argument("--quick", action="store_true", help="fewer and smaller runs: a check, not a measurement")
    if needs_engine:
        built.add_argument("--python", "--engine-python", default=sys.executable,
                           help="Python interpreter that has vLLM")
        built.add_argument("--model", required=True, help="Hugging Face model folder")
        built.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"),
                           help="auto = float32 where the processor has no bfloat16 instructions")
        built.add_argument("--run-dir", default="", help="where logs go (default: a new folder below /tmp)")
    return built


def publish(args: argparse.Namespace, rows: Sequence[dict[str, Any]], *, title: str, notes: Sequence[str] = (),
            **versions: str) -> None:
    """Print rows as a table and write them as JSON if asked."""
    print(f"\n{title}" + (" (--quick: a check, not a measurement)" if args.quick else ""))
    if rows:
        print(format_table(list(rows[0]), [[_cell(row.get(key)) for key in rows[0]] for row in rows]))
    for note in notes:
        print(note)
    sys.stdout.flush()
    if args.json:
        result = {"title": title, "quick": args.quick, "machine": describe_machine(),
                  "versions": describe_versions(**versions), "notes": list(notes), "rows": list(rows)}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {args.json}")


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; an interruption ends it in one line, after everything it started was stopped."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)


def run_dir(args: argparse.Namespace, name: str) -> Path:
    """Return the folder for the logs of one benchmark, and say where it is."""
    path = Path(args.run_dir or tempfile.mkdtemp(prefix=f"mooncake-bench-{name}-"))
    say(f"logs: {path}")
    return path


def random_prompt(length: int, rng: random.Random) -> list[int]:
    """Return token ids that nobody has cached."""
    return [rng.randint(TOKEN_FIRST, TOKEN_LAST) for _ in range(length)]


def median_ms(values: Sequence[float]) -> float:
    """Return the median of seconds, in milliseconds."""
    return round(statistics.median(values) * 1e3, 1)


def spread_ms(values: Sequence[float]) -> str:
    """Return the lowest and highest of seconds, in milliseconds."""
    return f"{min(values) * 1e3:.0f}..{max(values) * 1e3:.0f}"


def say(line: str) -> None:
    """Print a progress line at once."""
    print(line, flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 10 else f"{value:.1f}" if isinstance(
        value, float) else str(value)
