"""Run ``mooncake demo``: the whole road on this machine, with real text and honest figures."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mooncake_connector.cli.errors import UsageError
from mooncake_connector.cli.options import sigterm_unwinds
from mooncake_connector.demo import report as reports
from mooncake_connector.demo.client import session
from mooncake_connector.demo.cluster import SERVED_NAME, Cell
from mooncake_connector.demo.media import describe_media
from mooncake_connector.demo.processes import Supervisor
from mooncake_connector.demo.scenes import HandoffNote, Stage
from mooncake_connector.demo.sglang import SglangWays
from mooncake_connector.demo.status import CellStatus
from mooncake_connector.demo.vllm import VllmWays
from mooncake_connector.demo.ways import Ways
from mooncake_store.config import StoreConfig, load_config

STORE_JOIN_TIMEOUT_S = 30.0
KEEP_CHECK_S = 2.0
ENGINE_SEGMENT = "512MiB"
WAYS: dict[str, Ways] = {ways.name: ways for ways in (VllmWays(), SglangWays())}


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("demo", help="run everything on this machine and show what is shared",
                                   description="Start etcd, a store node, a prefill and a decode engine and a router; "
                                               "ask questions; print where the tokens came from; stop everything.")
    parser.add_argument("--engine", default="vllm", choices=tuple(WAYS), help="whose servers (default: vllm)")
    parser.add_argument("--model", default="", metavar="DIR", help="Hugging Face model folder (`make demo` makes one)")
    parser.add_argument("--python", "--engine-python", default=sys.executable, metavar="PATH",
                        help="Python interpreter that has the engine (default: this one)")
    parser.add_argument("--output", default=".", metavar="DIR", help="where demo.json and demo.png go (default: here)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"),
                        help="the engines' data type (default: auto, float32 where bfloat16 is slow)")
    parser.add_argument("--memory", default="1GiB", metavar="SIZE", help="memory of the store node (default: 1GiB)")
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--keep", action="store_true", help="leave everything running until Ctrl-C")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; return the exit code.

    Raises:
        ConfigError: an option cannot be used.
        MooncakeError: a process did not start, or a request failed.
        KeyboardInterrupt: Ctrl-C before the end (with ``--keep``, Ctrl-C is the end).
    """
    began = time.monotonic()
    output = Path(args.output)
    if args.memory:
        load_config(StoreConfig, {"segment_bytes": args.memory})
    ways = WAYS[args.engine]
    options = ways.options(args.python, args.model, dtype=args.dtype)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {output}: {error.strerror}", where="mooncake demo --output",
                         hint="name a folder that you may write to") from error
    run_dir = Path(tempfile.mkdtemp(prefix="mooncake-demo-"))
    _say(f"logs: {run_dir}")
    with sigterm_unwinds(), Supervisor(run_dir, report=_say) as supervisor:
        _say(f"starting etcd, a store node and two engines in {options.dtype} (a minute or two on two cores)")
        cell = Cell(supervisor, options=options, memory=args.memory, connector={"segment_bytes": ENGINE_SEGMENT},
                    server=ways.server)
        cell.start()
        report = _play(cell, ways, args, began)
        _publish(report, output)
        if args.keep:
            with contextlib.suppress(KeyboardInterrupt):
                _keep(cell)
        _say("stopping everything")
    _say(f"done in {time.monotonic() - began:.0f} s")
    return 0


def _play(cell: Cell, ways: Ways, args: argparse.Namespace, began: float) -> reports.Report:
    """Play all scenes and restart the prefill engine between the last two."""
    with CellStatus(cell.directory) as status:
        if args.memory and status.wait_member(cell.supervisor.children["store"].pids(), STORE_JOIN_TIMEOUT_S) is None:
            raise cell.supervisor.children["store"].failure("did not join the cell")
        stage = Stage(cell, status, ways=ways, is_quick=args.quick, report=_say)
        scenes = asyncio.run(_with_session(stage.play))
        _say("hand-over, both legs sent straight to the engines:")
        handoff: list[HandoffNote] = asyncio.run(_with_session(stage.measure_handoff))
        stage.wait_saved()
        _say("restarting the prefill engine: its own cache is gone, the pool is not")
        cell.supervisor.restart("prefill")
        scenes.append(asyncio.run(_with_session(stage.play_again)))
        media = describe_media(status.ask(), [child.log_path for child in cell.supervisor.children.values()])
    versions = reports.describe_versions(**{ways.name: ways.version(args.python)})
    return reports.Report(machine=reports.describe_machine(), versions=versions, model=args.model, media=media,
                          seconds=time.monotonic() - began, rows=scenes, handoff=handoff)


async def _with_session(play: Any) -> Any:
    async with session() as http:
        return await play(http)


def _publish(report: reports.Report, output: Path) -> None:
    print("\n" + reports.format_report(report) + "\n", flush=True)
    reports.write_json(report, output / "demo.json")
    _say(f"wrote {output / 'demo.json'}")
    if reports.write_plot(report, output / "demo.png"):
        _say(f"wrote {output / 'demo.png'}")
    else:
        _say("no plot: matplotlib is not installed (pip install matplotlib)")


def _keep(cell: Cell) -> None:
    """Leave everything running until Ctrl-C or until a process ends."""
    _say("everything keeps running; stop with Ctrl-C. Try:")
    print(f"curl -s {cell.router_url}/v1/chat/completions -H 'Content-Type: application/json' -d "
          f"'{{\"model\": \"{SERVED_NAME}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}], "
          f"\"max_tokens\": 32}}'", flush=True)
    _say(f"metrics: {cell.prefill_url}/metrics {cell.decode_url}/metrics; logs: {cell.supervisor.run_dir}")
    while True:
        cell.supervisor.check_alive()
        time.sleep(KEEP_CHECK_S)


def _say(line: str) -> None:
    print(line, flush=True)
