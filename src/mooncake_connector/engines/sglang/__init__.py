"""Adapt SGLang: a transfer backend for prefill/decode disaggregation, and a HiCache storage for the pool."""
