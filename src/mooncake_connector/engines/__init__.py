"""Adapt engines: one folder per engine, which alone may import it."""
