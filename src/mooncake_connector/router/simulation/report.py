"""Sum up a run: how many requests got what they were promised, and how long the others took.

Pure: no sockets, threads or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from mooncake_connector.router.admission import ServiceClass
from mooncake_connector.router.simulation.loop import Outcome
from mooncake_connector.router.simulation.trace import TraceRequest

SOON_S = 10.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One run in numbers. Shares are between 0 and 1 and count every request of the trace, refused ones included.

    Attributes:
        goodput: answered within both times of their class.
        within_10s: first token within 10 s.
        ttft_mean_s, ttft_p50_s, ttft_p99_s: over requests that got a first token; NaN becomes 0 when there is none.
        rejected: refused, before or after they were sent to an engine.
        wasted_prefill: part of the prefill time spent on requests that were refused or late.
        cached: part of the prompt tokens of those sent to an engine that was not computed.
        rejected_after_s: longest time from a request's arrival to its refusal.
        prefill_error: mean relative error of the predicted prefill times.
        goodput_by_class: the same per class, where there are several.
    """

    policy: str
    admission: str
    load: float
    num_requests: int
    goodput: float
    within_10s: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    rejected: float
    wasted_prefill: float
    cached: float
    rejected_after_s: float
    prefill_error: float
    goodput_by_class: dict[str, float]


class Result(NamedTuple):
    """A row, and every time to first token for a plot; NaN where there was none."""

    row: Row
    ttfts_s: npt.NDArray[np.float64]


def summarise(
    requests: Sequence[TraceRequest],
    outcomes: Sequence[Outcome],
    classes: Mapping[str, ServiceClass],
    *,
    policy: str,
    admission: str,
    load: float,
    prefill_error: float,
) -> Result:
    """Return the numbers of one run."""
    services = [classes.get(each.service_class) or classes[""] for each in requests]
    arrived = np.array([each.arrived_s for each in outcomes])
    prefilled = np.array([each.prefilled_s for each in outcomes])
    finished = np.array([each.finished_s for each in outcomes])
    handed = np.array([each.handed_over_s for each in outcomes])
    outputs = np.array([max(each.num_output_tokens, 1) for each in requests])
    ttft = np.where(prefilled >= 0, prefilled - arrived, np.nan)
    tbt = np.where(finished >= 0, (finished - handed) / outputs, np.inf)
    ttft_max = np.array([each.ttft_s for each in services])
    tbt_max = np.array([each.tbt_s for each in services])
    is_good = (np.nan_to_num(ttft, nan=np.inf) <= ttft_max) & (tbt <= tbt_max)
    rejected = np.array([each.rejected_s for each in outcomes])
    work = np.array([each.prefill_work_s for each in outcomes])
    known = ttft[~np.isnan(ttft)]
    mean, p50, p99 = (float(known.mean()), *map(float, np.percentile(known, (50, 99)))) if len(known) else (0.0,) * 3
    sent_tokens = sum(
        each.num_prompt_tokens for each, out in zip(requests, outcomes, strict=True) if out.prefilled_s >= 0
    )
    names = [each.service_class if each.service_class in classes else "" for each in requests]
    by_class = {name: float(is_good[[each == name for each in names]].mean()) for name in sorted(set(names))}
    row = Row(
        policy=policy,
        admission=admission,
        load=load,
        num_requests=len(requests),
        goodput=float(is_good.mean()),
        within_10s=float((np.nan_to_num(ttft, nan=np.inf) <= SOON_S).mean()),
        ttft_mean_s=mean,
        ttft_p50_s=p50,
        ttft_p99_s=p99,
        rejected=float((rejected >= 0).mean()),
        wasted_prefill=float(work[~is_good].sum() / work.sum()) if work.sum() else 0.0,
        cached=sum(each.num_cached for each in outcomes if each.prefilled_s >= 0) / sent_tokens if sent_tokens else 0.0,
        rejected_after_s=float((rejected - arrived)[rejected >= 0].max(initial=0.0)),
        prefill_error=prefill_error,
        goodput_by_class=by_class if len(by_class) > 1 else {},
    )
    return Result(row, ttft)


HEADINGS = ("policy", "admission", "load", "goodput", "<=10 s", "mean", "p50", "p99", "refused", "wasted", "cached")


def format_heading() -> str:
    """Return the table's first line; TTFTs in seconds, shares in percent."""
    return _line(HEADINGS)


def format_row(row: Row) -> str:
    """Return one line of the table."""
    shares = [f"{100 * each:.1f}" for each in (row.goodput, row.within_10s)]
    times = [f"{each:.2f}" for each in (row.ttft_mean_s, row.ttft_p50_s, row.ttft_p99_s)]
    costs = [f"{100 * each:.1f}" for each in (row.rejected, row.wasted_prefill, row.cached)]
    classes = "".join(f"  {name or 'default'} {100 * each:.1f}" for name, each in row.goodput_by_class.items())
    return _line((row.policy, row.admission, f"{row.load:g}x", *shares, *times, *costs)) + classes


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:<15}{cells[1]:<11}" + "".join(f"{each:>9}" for each in cells[2:])
