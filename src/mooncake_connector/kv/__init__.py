"""Give the bytes of a KV cache their meaning: layouts, fingerprints, keys, plans. Pure."""
