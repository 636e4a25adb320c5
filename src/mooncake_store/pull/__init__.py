"""Get blocks from peers and let peers get ours: leases, sessions, pulls."""
