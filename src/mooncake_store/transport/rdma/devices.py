"""Read from sysfs which RDMA ports this machine has. Needs no RDMA library, and costs nothing where there is none."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from mooncake_store.transport.rdma.gids import Gid, GidKind, LinkLayer, family, ip_text, parse_gid
from mooncake_store.transport.rdma.rails import NUMA_UNKNOWN, Place, Rail

SYS = Path("/sys")
NO_DEVICE = "this machine has no RDMA device"
GIDS_MAX = 256
"""Entries of a port's table that are looked at."""


def find_rails(sys: Path = SYS) -> list[Rail]:
    """Return every active port, sorted by device name and port; empty when there is none."""
    rails: list[Rail] = []
    for device in sorted(_names(sys / "class/infiniband")):
        for port in sorted(_names(device / "ports"), key=lambda path: int(path.name)):
            if "ACTIVE" in _text(port / "state"):
                rails.append(_read_rail(device, port))
    return rails


def explain_absence(sys: Path = SYS) -> str:
    """Return why ``find_rails`` found nothing."""
    devices = _names(sys / "class/infiniband")
    if not devices:
        return NO_DEVICE
    return f"no port is active on {', '.join(sorted(device.name for device in devices))}"


def current_place(sys: Path = SYS) -> Place:
    """Return the NUMA node that this process is bound to, unknown when it may run on several."""
    ours = os.sched_getaffinity(0)
    nodes = [int(node.name[4:]) for node in _names(sys / "devices/system/node")
             if re.fullmatch(r"node\d+", node.name) and ours & _cpus(_text(node / "cpulist"))]
    return Place(nodes[0] if len(nodes) == 1 else NUMA_UNKNOWN)


def is_routed(own: Gid, peer: Gid) -> bool:
    """Tell whether the kernel has a route from our address to the peer's; sends nothing."""
    version = socket.AF_INET if family(own) == "v4" else socket.AF_INET6
    try:
        with socket.socket(version, socket.SOCK_DGRAM) as probe:
            probe.bind((ip_text(own), 0))
            probe.connect((ip_text(peer), 9))
    except OSError:
        return False
    return True


def _read_rail(device: Path, port: Path) -> Rail:
    layer: LinkLayer = "infiniband" if "InfiniBand" in _text(port / "link_layer") else "ethernet"
    hardware = device / "device"
    numa_node = _text(hardware / "numa_node")
    rate = re.match(r"[\d.]+", _text(port / "rate"))
    return Rail(
        device.name, int(port.name), layer,
        int(numa_node) if numa_node else NUMA_UNKNOWN,
        os.path.realpath(hardware) if hardware.exists() else "",
        float(rate[0]) if rate else 0.0,
        int(_text(port / "lid") or "0", 16),
        tuple(_read_gids(port, layer)),
    )


def _read_gids(port: Path, layer: LinkLayer) -> list[Gid]:
    gids: list[Gid] = []
    for entry in sorted(_names(port / "gids"), key=lambda path: int(path.name))[:GIDS_MAX]:
        text = _text(entry)
        if not text.strip("0:"):
            continue
        kind: GidKind = "ib"
        if layer == "ethernet":
            kind = "roce2" if "v2" in _text(port / "gid_attrs/types" / entry.name) else "roce1"
        gids.append(Gid(int(entry.name), kind, parse_gid(text)))
    return gids


def _names(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    # sysfs answers EINVAL for the type of an entry that is not set
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _cpus(text: str) -> set[int]:
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
