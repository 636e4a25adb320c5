"""Adapt vLLM 0.32 and newer."""
