"""Draw runs: who got the first token when, and how goodput falls with load."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mooncake_connector.router.simulation.report import Result
from mooncake_store.errors import ConfigError


def write_plot(results: Sequence[Result], path: Path) -> None:
    """Write a PNG with the TTFT distribution at the highest load, and goodput over load.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigError("no plot without matplotlib", where="--png", hint="pip install matplotlib") from error
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    load_max = max(each.row.load for each in results)
    for each in results:
        if each.row.load == load_max:
            times = np.sort(each.ttfts_s[~np.isnan(each.ttfts_s)])
            share = np.arange(1, len(times) + 1) / len(each.ttfts_s)
            left.plot(np.maximum(times, 0.01), 100 * share, label=f"{each.row.policy} ({each.row.admission})")
    left.set(
        xscale="log",
        xlabel="time to first token, s",
        ylabel="% of all requests",
        ylim=(0, 100),
        title=f"at {load_max:g}x load",
    )
    for name in dict.fromkeys(each.row.policy for each in results):
        rows = sorted((each.row for each in results if each.row.policy == name), key=lambda row: row.load)
        right.plot([row.load for row in rows], [100 * row.goodput for row in rows], marker="o", label=name)
    right.set(xlabel="load, x", ylabel="% answered in time", ylim=(0, 101), title="goodput")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120, metadata={"Software": None})
    except OSError as error:
        raise ConfigError(
            f"cannot write the plot: {error.strerror}", where=str(path), hint="choose another path"
        ) from error
    finally:
        pyplot.close(figure)
