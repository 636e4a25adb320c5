"""Declare every metric of the package in one table and keep their values.

Naming: ``mooncake_<subsystem>_<what>_<unit>[_total]``; labels come from closed sets, never a request or a key.
Threads: every method may be called from any thread.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class MetricSpec(NamedTuple):
    """One row of the table."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


STORE_METRICS: dict[str, MetricSpec] = {
    "mooncake_pull_bytes_total": MetricSpec("counter", "Bytes pulled from peers", ("medium",)),
    "mooncake_pull_blocks_total": MetricSpec("counter", "Blocks asked for, by outcome", ("result",)),
    "mooncake_pull_duration_seconds": MetricSpec("histogram", "Time of one pull", ("medium",)),
    "mooncake_pull_fallbacks_total": MetricSpec("counter", "A medium failed and the next was used",
                                                ("medium", "reason")),
    "mooncake_leases_active": MetricSpec("gauge", "Leases that peers hold on our blocks"),
    "mooncake_leases_total": MetricSpec("counter", "Leases by how they ended", ("result",)),
    "mooncake_segment_used_bytes": MetricSpec("gauge", "Bytes of our segment that hold blocks"),
    "mooncake_segment_size_bytes": MetricSpec("gauge", "Size of our segment"),
    "mooncake_segment_blocks": MetricSpec("gauge", "Blocks in our segment"),
    "mooncake_segment_evictions_total": MetricSpec("counter", "Blocks evicted to make room"),
    "mooncake_segment_dropped_total": MetricSpec("counter", "Blocks dropped because their bytes had changed"),
    "mooncake_put_blocks_total": MetricSpec("counter", "Blocks offered to our segment, by outcome", ("result",)),
    "mooncake_replicate_blocks_total": MetricSpec("counter", "Blocks offered to capacity nodes", ("result",)),
    "mooncake_directory_connected": MetricSpec("gauge", "1 while the directory's link is up"),
    "mooncake_directory_blocks": MetricSpec("gauge", "Blocks the local view knows"),
    "mooncake_directory_dropped_total": MetricSpec("counter", "Publications dropped because the queue was full"),
    "mooncake_protocol_errors_total": MetricSpec("counter", "Messages rejected", ("reason",)),
}

DURATION_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Keeps the values of a table of metrics in a registry of its own.

    Args:
        tables: the tables this process reports; a name outside them raises KeyError (a typo is a bug).
    """

    def __init__(self, *tables: dict[str, MetricSpec]) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._children: dict[tuple[object, ...], Counter | Gauge | Histogram] = {}
        for table in tables or (STORE_METRICS,):
            for name, spec in table.items():
                self._metrics[name] = _create(name, spec, self.registry)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter (or to a gauge, where ``amount`` may be negative)."""
        self._child(name, labels).inc(amount)  # type: ignore[union-attr]

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, labels).set(value)  # type: ignore[union-attr]

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        self._child(name, labels).observe(seconds)  # type: ignore[union-attr]

    def _child(self, name: str, labels: dict[str, str]) -> Counter | Gauge | Histogram:
        """Return a metric's values for these labels: finding them takes longer than adding to them."""
        key = (name, *labels.items())
        child = self._children.get(key)
        if child is None:
            metric = self._metrics[name]
            child = self._children[key] = metric.labels(**labels) if labels else metric
        return child

    def snapshot(self) -> dict[str, float]:
        """Return every sample as ``name{label="value",...}`` -> value, histograms by their sum and count."""
        samples: dict[str, float] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name.endswith(("_created", "_bucket")):
                    continue
                inner = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{inner}}}" if inner else sample.name] = sample.value
        return samples


def _create(name: str, spec: MetricSpec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if spec.kind == "counter":
        return Counter(name, spec.help, spec.labels, registry=registry)
    if spec.kind == "gauge":
        return Gauge(name, spec.help, spec.labels, registry=registry)
    return Histogram(name, spec.help, spec.labels, registry=registry, buckets=DURATION_BUCKETS_S)
