"""Move bytes between processes: one protocol, several media, chosen per peer."""
