"""Declare the connector's metrics; names follow mooncake_store.metrics."""

from __future__ import annotations

from mooncake_store.metrics import MetricSpec

CONNECTOR_METRICS: dict[str, MetricSpec] = {
    "mooncake_transfers_active": MetricSpec("gauge", "Hand-overs in progress, by our role in them", ("role",)),
    "mooncake_transfers_total": MetricSpec("counter", "Hand-overs by role and outcome", ("role", "result")),
    "mooncake_blocks_held": MetricSpec("gauge", "KV blocks of finished requests kept for a peer or a save"),
    "mooncake_handoff_bytes_total": MetricSpec("counter", "Bytes pulled out of a prefill's KV cache", ("medium",)),
    "mooncake_handoff_seconds": MetricSpec("histogram", "From subscription to the last byte of a hand-over"),
    "mooncake_handoff_stale_total": MetricSpec("counter", "Copies thrown away because the epoch had moved"),
    "mooncake_handoff_refused_total": MetricSpec("counter", "Peers refused", ("reason",)),
    "mooncake_verify_blocks_total": MetricSpec("counter", "Blocks compared with their source", ("result",)),
    "mooncake_prefix_lookups_total": MetricSpec("counter", "Pool lookups by result", ("result",)),
    "mooncake_prefix_hit_tokens_total": MetricSpec("counter", "Prompt tokens found in the pool"),
    "mooncake_load_blocks_total": MetricSpec("counter", "Blocks loaded from the pool, by outcome", ("result",)),
    "mooncake_load_seconds": MetricSpec("histogram", "Time of one pool load"),
    "mooncake_save_blocks_total": MetricSpec("counter", "Blocks saved to the pool, by outcome", ("result",)),
    "mooncake_save_queue_blocks": MetricSpec("gauge", "Blocks waiting to be saved"),
}
