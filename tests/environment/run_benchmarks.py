"""Run every benchmark, one after the other, and keep what each measured.

    run_benchmarks.py --out DIR [--quick] [--only NAME ...]

The engine's interpreter and the model are those of ``make`` (VLLM_VENV, SGLANG_VENV, MODEL).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SUPPORT = frozenset({"gateway_load", "harness", "transport_peers"})
TIMEOUT_S = 3600.0


def command_for(path: Path, out: Path, *, is_quick: bool) -> list[str]:
    """Return the command line of one benchmark."""
    command = [sys.executable, str(path), "--json", str(out / f"{path.stem}.json")]
    if is_quick:
        command.append("--quick")
    if "needs_engine=True" in path.read_text(encoding="utf-8"):
        engine = os.environ["SGLANG_VENV" if path.stem.startswith("sglang") else "VLLM_VENV"]
        command += ["--python", str(Path(engine, "bin", "python")), "--model", os.environ["MODEL"]]
    return command


def main() -> int:
    """Run them all; return 1 when one failed."""
    parser = argparse.ArgumentParser(description="Run every benchmark and keep its JSON.")
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--quick", action="store_true", help="a check that they run, not a measurement")
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in SUPPORT)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only:
        print(f"\n== {name}", flush=True)
        began = time.monotonic()
        command = command_for(BENCHMARKS / f"{name}.py", args.out.resolve(), is_quick=args.quick)
        code = subprocess.run(command, cwd=ROOT, check=False, timeout=TIMEOUT_S).returncode
        print(f"== {name}: exit code {code}, {time.monotonic() - began:.0f} s", flush=True)
        failed += [name] if code else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
