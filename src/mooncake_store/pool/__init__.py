"""Lend memory to the pool: which block is where in our segment, and which leaves first."""
