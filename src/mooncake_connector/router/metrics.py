"""Declare every metric of the router in one table."""

from __future__ import annotations

from mooncake_store.metrics import MetricSpec

ROUTER_METRICS: dict[str, MetricSpec] = {
    "mooncake_router_requests_total": MetricSpec("counter", "Client requests, by how they ended", ("outcome",)),
    "mooncake_router_legs_total": MetricSpec("counter", "Legs sent to engines, by how they ended", ("leg", "result")),
    "mooncake_router_retries_total": MetricSpec("counter", "Legs sent again to another engine", ("leg",)),
    "mooncake_router_colocated_total": MetricSpec("counter", "Requests run whole on one engine, by why", ("reason",)),
    "mooncake_router_decision_seconds": MetricSpec("histogram", "Time of one placement decision"),
    "mooncake_router_ttft_seconds": MetricSpec("histogram", "Request in to first byte of the answer out", ("kind",)),
    "mooncake_router_prefill_seconds": MetricSpec("histogram", "Time of one prefill leg that succeeded"),
    "mooncake_router_outstanding_tokens": MetricSpec("gauge", "Placed and unfinished work of all engines", ("leg",)),
    "mooncake_router_open_placements": MetricSpec("gauge", "Placements that are not finished"),
    "mooncake_router_open_requests": MetricSpec("gauge", "Client requests being served"),
    "mooncake_router_engines": MetricSpec("gauge", "Engines by state", ("state",)),
    "mooncake_router_introductions_total": MetricSpec("counter", "Introductions asked of engines", ("result",)),
    "mooncake_router_prefix_entries": MetricSpec("gauge", "Prefix hashes remembered, over all engines"),
    "mooncake_router_messages_total": MetricSpec("counter", "Placement messages answered, by kind", ("kind",)),
    "mooncake_router_garbage_total": MetricSpec("counter", "Placement frames rejected", ("reason",)),
    "mooncake_router_expired_total": MetricSpec("counter", "Placements that nobody finished in time"),
    "mooncake_router_disconnects_total": MetricSpec("counter", "Clients that left before their answer was complete"),
}
