"""Run ``mooncake simulate``: replay a trace through the router's own decisions, against modelled engines."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from mooncake_connector.cli.errors import EXIT_OK, UsageError
from mooncake_connector.router.admission import ServiceClass
from mooncake_connector.router.policy import POLICIES
from mooncake_connector.router.simulation.cluster import ClusterSpec
from mooncake_connector.router.simulation.loop import RunSpec, Simulation
from mooncake_connector.router.simulation.plot import write_plot
from mooncake_connector.router.simulation.report import Result, format_heading, format_row, summarise
from mooncake_connector.router.simulation.trace import TraceRequest, cut, draw_class, read_trace
from mooncake_store import __version__
from mooncake_store.errors import ConfigError

PAID = "paid"
DEFAULT_POLICIES = "joint,mooncake_paper,least_loaded"
DEFAULT_LOADS = "1,2,2.5"
RUNS_MAX = 1000


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "simulate",
        help="replay a trace through the router's decisions",
        description="Replay a trace of requests through the router's own placement and admission, against a modelled "
        "cluster, and show policies side by side. The defaults are the cluster of the Mooncake paper.",
    )
    parser.add_argument("trace", metavar="TRACE", help="file with one JSON object per request")
    parser.add_argument(
        "--policies",
        default=DEFAULT_POLICIES,
        metavar="LIST",
        help=f"of {', '.join(POLICIES)} (default: {DEFAULT_POLICIES})",
    )
    parser.add_argument(
        "--load",
        default=DEFAULT_LOADS,
        metavar="LIST",
        help=f"how many times as fast requests arrive (default: {DEFAULT_LOADS})",
    )
    parser.add_argument("--no-reject", action="store_true", help="refuse nobody, however late they will be")
    parser.add_argument("--ttft", type=float, default=30.0, metavar="S", help="promised first token (default: 30)")
    parser.add_argument(
        "--tbt", type=float, default=0.1, metavar="S", help="promised time between tokens (default: 0.1)"
    )
    parser.add_argument(
        "--paid",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="part of the requests, drawn by seed, that is in a class of its own",
    )
    parser.add_argument(
        "--paid-weight", type=float, default=10.0, metavar="W", help="how much that class counts (default: 10)"
    )
    parser.add_argument(
        "--part", default="0:1", metavar="FROM:TO", help="part of the trace, such as 0:0.5 for the first half"
    )
    _add_cluster_options(parser.add_argument_group("cluster"))
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same result (default: 0)")
    parser.add_argument(
        "--json", metavar="PATH", help="write the rows here; - for standard output instead of the table"
    )
    parser.add_argument("--png", metavar="PATH", help="draw TTFT distribution and goodput over load")
    parser.set_defaults(run=run)


def _add_cluster_options(cluster: argparse._ArgumentGroup) -> None:
    cluster.add_argument("--prefill", type=int, default=8, metavar="N", help="prefill engines (default: 8)")
    cluster.add_argument("--decode", type=int, default=8, metavar="N", help="decode engines (default: 8)")
    cluster.add_argument(
        "--link", type=float, default=87.0, metavar="GB/S", help="network of an engine, each way (default: 87)"
    )
    cluster.add_argument(
        "--cache-tokens", type=int, default=3_000_000, metavar="N", help="prefix cache of a prefill engine"
    )
    cluster.add_argument(
        "--decode-tokens", type=int, default=1_300_000, metavar="N", help="KV memory of a decode engine"
    )
    cluster.add_argument("--no-pool", action="store_true", help="engines cannot fetch prefixes from each other")
    cluster.add_argument(
        "--noise",
        type=float,
        default=0.15,
        metavar="SIGMA",
        help="spread of real over modelled prefill time (default: 0.15)",
    )


def run(args: argparse.Namespace) -> int:
    """Simulate every policy at every load; return the exit code.

    Raises:
        UsageError, ConfigError: an option or the trace cannot be used.
    """
    policies, loads = _policies(args.policies), _numbers(args.load, "--load")
    if len(policies) * len(loads) > RUNS_MAX:
        raise UsageError(f"more than {RUNS_MAX} runs", where="--policies, --load", hint="ask for fewer at once")
    cluster, classes = _cluster(args), _classes(args)
    begin, end = _part(args.part)
    trace = read_trace(Path(args.trace))
    if args.paid:
        trace = draw_class(trace, PAID, share=args.paid, seed=args.seed)
    is_quiet = args.json == "-"
    if not is_quiet:
        print(format_heading())
    results = []
    for load in loads:
        requests = cut(trace, begin=begin, end=end, load=load)
        for policy in policies:
            result = _simulate(requests, cluster, _run_spec(args, policy, classes), load)
            results.append(result)
            if not is_quiet:
                print(format_row(result.row), flush=True)
    _write(args, cluster, results)
    return EXIT_OK


def _simulate(requests: list[TraceRequest], cluster: ClusterSpec, spec: RunSpec, load: float) -> Result:
    begun_s = time.monotonic()

    def show(num_arrived: int, num_requests: int) -> None:
        print(
            f"{spec.policy} {load:g}x: {num_arrived} of {num_requests} requests, {time.monotonic() - begun_s:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    simulation = Simulation(requests, cluster, spec)
    outcomes = simulation.run(show)
    return summarise(
        requests,
        outcomes,
        spec.classes,
        policy=spec.policy,
        admission=spec.mode if spec.is_rejecting else f"{spec.mode}*",
        load=load,
        prefill_error=simulation.scheduler.placer.predictor.prefill_error.mean,
    )


def _run_spec(args: argparse.Namespace, policy: str, classes: dict[str, ServiceClass]) -> RunSpec:
    """Return how a policy is run: ours with its queue; the classic ones decide on arrival, as published."""
    if policy == "joint":
        return RunSpec(policy=policy, mode="queue", is_rejecting=not args.no_reject, classes=classes, seed=args.seed)
    return RunSpec(policy=policy, mode="none" if args.no_reject else "early", classes=classes, seed=args.seed)


def _write(args: argparse.Namespace, cluster: ClusterSpec, results: list[Result]) -> None:
    if args.json:
        settings = {
            key: value
            for key, value in sorted(vars(args).items())
            if key not in ("run", "verb", "trace", "json", "png", "config_file")
        }
        report = {
            "version": __version__,
            "trace": Path(args.trace).name,
            "settings": settings,
            "cluster": msgspec.to_builtins(cluster),
            "rows": [msgspec.to_builtins(each.row) for each in results],
        }
        text = json.dumps(report, indent=2) + "\n"
        if args.json == "-":
            print(text, end="")
        else:
            try:
                Path(args.json).write_text(text)
            except OSError as error:
                raise ConfigError(
                    f"cannot write: {error.strerror}", where=args.json, hint="choose another path"
                ) from error
    if args.png:
        write_plot(results, Path(args.png))


def _policies(text: str) -> list[str]:
    names = [each.strip() for each in text.split(",") if each.strip()]
    unknown = [each for each in names if each not in POLICIES]
    if unknown or not names:
        raise UsageError(
            f"there is no policy {unknown[0] if unknown else text!r}",
            where="--policies",
            hint=f"choose from: {', '.join(POLICIES)}",
        )
    return list(dict.fromkeys(names))


def _numbers(text: str, where: str) -> list[float]:
    try:
        numbers = [float(each) for each in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < each <= 1000 for each in numbers):
        raise UsageError(
            f"{text!r} is not a list of numbers above 0, at most 1000", where=where, hint="such as 1,2,2.5"
        )
    return numbers


def _part(text: str) -> tuple[float, float]:
    try:
        begin, end = (float(each) for each in text.split(":"))
    except ValueError:
        begin, end = 1.0, 0.0
    if not 0 <= begin < end <= 1:
        raise UsageError(f"{text!r} is not a part of the trace", where="--part", hint="such as 0:0.5 or 0.5:1")
    return begin, end


def _cluster(args: argparse.Namespace) -> ClusterSpec:
    wanted = {
        "num_prefill": args.prefill,
        "num_decode": args.decode,
        "link_bytes_per_s": args.link * 1e9,
        "cache_tokens": args.cache_tokens,
        "decode_tokens": args.decode_tokens,
        "has_pool": not args.no_pool,
        "noise": args.noise,
    }
    try:
        return msgspec.convert(wanted, ClusterSpec)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"no such cluster: {error}", where="mooncake simulate", hint="see `mooncake simulate --help`"
        ) from error


def _classes(args: argparse.Namespace) -> dict[str, ServiceClass]:
    wanted: dict[str, dict[str, float]] = {"": {"ttft_s": args.ttft, "tbt_s": args.tbt}}
    if not 0 <= args.paid <= 1:
        raise UsageError(f"{args.paid:g} is not a share between 0 and 1", where="--paid", hint="such as 0.3")
    if args.paid:
        wanted[PAID] = {**wanted[""], "weight": args.paid_weight}
    try:
        return msgspec.convert(wanted, dict[str, ServiceClass])
    except msgspec.ValidationError as error:
        raise UsageError(
            f"no such class: {error}", where="--ttft, --tbt, --paid-weight", hint="times in seconds, above 0"
        ) from error
