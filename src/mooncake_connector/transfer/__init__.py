"""Move KV cache for any engine: hand-over from prefill to decode, and the pooled prefix cache."""
