"""Carry our metrics through vLLM's statistics to its log line and its /metrics page.

vLLM sends a KVConnectorStats per step from the workers to the front-end; it aggregates across workers and over the log
interval with the same method, so counters travel as deltas and gauges as values per rank.
"""

from __future__ import annotations

import copy
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from mooncake_connector.metrics import CONNECTOR_METRICS
from mooncake_store.metrics import STORE_METRICS, MetricSpec

TABLE: dict[str, MetricSpec] = {
    name: spec for name, spec in {**STORE_METRICS, **CONNECTOR_METRICS}.items() if spec.kind != "histogram"
}


class MooncakeStats(KVConnectorStats):
    """Payload: ``{"counters": {sample: delta}, "gauges": {"rank": {sample: value}}}``."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Forget everything."""
        self.data = {"counters": {}, "gauges": {}}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add the other's counters and take over its gauges."""
        if not self.data:
            self.reset()
        counters = self.data["counters"]
        for sample, delta in other.data.get("counters", {}).items():
            counters[sample] = counters.get(sample, 0.0) + delta
        self.data["gauges"].update(other.data.get("gauges", {}))
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what the interval's log line shows."""
        counters = self.data.get("counters", {})
        pulled = sum(value for name, value in counters.items() if name.startswith("mooncake_handoff_bytes_total"))
        loaded = sum(value for name, value in counters.items() if name.startswith("mooncake_pull_bytes_total"))
        saved = counters.get('mooncake_save_blocks_total{result="stored"}', 0.0)
        return {"handed_over_mib": round(pulled / 2**20, 1), "pool_loaded_mib": round(loaded / 2**20, 1),
                "pool_saved_blocks": saved}

    def is_empty(self) -> bool:
        """Return whether nothing happened in the interval."""
        return not self.data or not any(self.data.get("counters", {}).values())


class StatsSource:
    """Turns one process's samples into what changed since the last time, at most every EVERY_S. Threads: one.

    Args:
        rank: names the process among those of its engine.
        has_gauges: False where another process of the engine reports the same gauges.
    """

    EVERY_S = 1.0

    def __init__(self, rank: str, *, has_gauges: bool = True) -> None:
        self._rank = rank
        self._has_gauges = has_gauges
        self._taken_at = 0.0
        self._seen: dict[str, float] = {}
        self._gauges: dict[str, float] = {}

    def is_due(self, now: float) -> bool:
        """Return whether it is time to take samples; collecting them costs a millisecond or two."""
        if now - self._taken_at < self.EVERY_S:
            return False
        self._taken_at = now
        return True

    def take(self, samples: dict[str, float]) -> MooncakeStats | None:
        """Return the changes; None when there are none."""
        counters: dict[str, float] = {}
        gauges: dict[str, float] = {}
        for sample, value in samples.items():
            spec = TABLE.get(sample.partition("{")[0])
            if spec is None:
                continue
            if spec.kind == "gauge":
                if self._has_gauges:
                    gauges[sample] = value
            elif value != self._seen.get(sample, 0.0):
                counters[sample] = value - self._seen.get(sample, 0.0)
                self._seen[sample] = value
        if not counters and gauges == self._gauges:
            return None
        self._gauges = gauges
        return MooncakeStats(data={"counters": counters, "gauges": {self._rank: gauges} if gauges else {}})


class MooncakePromMetrics(KVConnectorPromMetrics):
    """Shows the table on vLLM's /metrics page, histograms left out: they are on the status socket."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str],
                 per_engine_labelvalues: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, Any] = {}
        self._gauges: dict[int, dict[str, dict[str, float]]] = {}
        for name, spec in TABLE.items():
            cls = metric_types[Counter if spec.kind == "counter" else Gauge]
            labels = [*labelnames, *spec.labels]
            kwargs: dict[str, Any] = {"name": name, "documentation": spec.help, "labelnames": labels}
            if spec.kind == "gauge":
                kwargs["multiprocess_mode"] = "mostrecent"
            self._metrics[name] = cls(**kwargs)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the counters' deltas and set the gauges to their sum over ranks."""
        for sample, delta in transfer_stats_data.get("counters", {}).items():
            self._child(sample, engine_idx).inc(delta)
        ranks = self._gauges.setdefault(engine_idx, {})
        ranks.update(copy.copy(transfer_stats_data.get("gauges", {})))
        totals: dict[str, float] = {}
        for gauges in ranks.values():
            for sample, value in gauges.items():
                totals[sample] = totals.get(sample, 0.0) + value
        for sample, value in totals.items():
            self._child(sample, engine_idx).set(value)

    def _child(self, sample: str, engine_idx: int) -> Any:
        name, _, rest = sample.partition("{")
        labels = dict(item.split("=", 1) for item in rest.rstrip("}").split(",")) if rest else {}
        values = [labels[label].strip('"') for label in TABLE[name].labels]
        return self._metrics[name].labels(*self.per_engine_labelvalues[engine_idx], *values)
