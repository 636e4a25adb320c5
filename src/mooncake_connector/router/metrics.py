"""Declare every metric of the router in one table."""

from __future__ import annotations

from mooncake_store.metrics import MetricSpec

ROUTER_METRICS: dict[str, MetricSpec] = {
    "mooncake_router_requests_total": MetricSpec("counter", "Client requests, by how they ended", ("outcome",)),
    "mooncake_router_legs_total": MetricSpec("counter", "Legs sent to engines, by how they ended", ("leg", "result")),
    "mooncake_router_retries_total": MetricSpec("counter", "Legs sent again to another engine", ("leg",)),
    "mooncake_router_colocated_total": MetricSpec("counter", "Requests run whole on one engine, by why", ("reason",)),
    "mooncake_router_rejected_total": MetricSpec("counter", "Requests refused to keep promises, by why", ("reason",)),
    "mooncake_router_class_requests_total": MetricSpec(
        "counter", "Requests of a service class, by whether its promise of a first token was kept", ("kept", "service")
    ),
    "mooncake_router_held_requests": MetricSpec("gauge", "Requests that wait for an engine"),
    "mooncake_router_held_seconds": MetricSpec("histogram", "Time that requests waited for an engine, if they did"),
    "mooncake_router_drain_seconds": MetricSpec("gauge", "Predicted time until all work of now is prefilled"),
    "mooncake_router_prediction_error": MetricSpec(
        "gauge", "Recent mean error of predictions, relative to the prediction", ("what",)
    ),
    "mooncake_router_prediction_bias": MetricSpec(
        "gauge", "The same with its sign: positive when things take longer than predicted", ("what",)
    ),
    "mooncake_router_prompt_tokens_total": MetricSpec("counter", "Prompt tokens, by whether computed", ("source",)),
    "mooncake_router_output_tokens_total": MetricSpec("counter", "Tokens or events of answers"),
    "mooncake_router_token_seconds": MetricSpec("histogram", "Mean time between events of one stream"),
    "mooncake_router_decision_seconds": MetricSpec("histogram", "Time of one placement decision"),
    "mooncake_router_ttft_seconds": MetricSpec("histogram", "Request in to first byte of the answer out", ("kind",)),
    "mooncake_router_prefill_seconds": MetricSpec("histogram", "Time of one prefill leg that succeeded"),
    "mooncake_router_outstanding_tokens": MetricSpec("gauge", "Placed and unfinished work of all engines", ("leg",)),
    "mooncake_router_open_placements": MetricSpec("gauge", "Placements that are not finished"),
    "mooncake_router_open_requests": MetricSpec("gauge", "Client requests being served"),
    "mooncake_router_engines": MetricSpec("gauge", "Engines by state", ("state",)),
    "mooncake_router_breaker_opened_total": MetricSpec("counter", "Engines put aside after failures in a row"),
    "mooncake_router_config_reloads_total": MetricSpec("counter", "Times the file was read again", ("result",)),
    "mooncake_router_introductions_total": MetricSpec("counter", "Introductions asked of engines", ("result",)),
    "mooncake_router_prefix_entries": MetricSpec("gauge", "Prefix hashes remembered, over all engines"),
    "mooncake_router_indexed_blocks": MetricSpec("gauge", "Blocks known by the engines' own events, each copy counted"),
    "mooncake_router_event_streams": MetricSpec(
        "gauge", "KV-event streams: all that are followed, and those stale", ("state",)
    ),
    "mooncake_router_events_total": MetricSpec(
        "counter", "What KV events told: batches, blocks, and what went wrong", ("kind",)
    ),
    "mooncake_router_event_replays_total": MetricSpec("counter", "Times that missed KV events were asked for again"),
    "mooncake_router_event_garbage_total": MetricSpec("counter", "KV-event messages rejected as malformed"),
    "mooncake_router_messages_total": MetricSpec("counter", "Placement messages answered, by kind", ("kind",)),
    "mooncake_router_garbage_total": MetricSpec("counter", "Placement frames rejected", ("reason",)),
    "mooncake_router_expired_total": MetricSpec("counter", "Placements that nobody finished in time"),
    "mooncake_router_disconnects_total": MetricSpec("counter", "Clients that left before their answer was complete"),
}
