"""Check what the demo makes of each engine's own figures, and how it would start its servers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mooncake_connector.cli.demo import WAYS
from mooncake_connector.demo.cluster import Cell, EngineOptions
from mooncake_connector.demo.processes import Supervisor
from mooncake_store.errors import ConfigError

METRICS = {
    "vllm": {'vllm:prompt_tokens_by_source_total{source="local_cache_hit"}': 30.0,
             'vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}': 50.0,
             'vllm:prompt_tokens_by_source_total{source="local_compute"}': 20.0},
    "sglang": {"sglang:prompt_tokens_total": 100.0, 'sglang:cached_tokens_total{source="device"}': 30.0,
               'sglang:cached_tokens_total{source="host"}': 50.0, "sglang:kv_transfer_total_mb_sum": 2.0},
}


@pytest.mark.parametrize("name", WAYS)
def test_where_the_tokens_came_from(name: str) -> None:
    sources = WAYS[name].sources(METRICS[name])
    assert (sources.device, sources.pool, sources.computed, sources.reused) == (30, 50, 20, 80)
    assert WAYS[name].sources({}) == (0, 0, 0)


def test_handed_over_bytes_are_the_readers_or_else_the_servers() -> None:
    members = {'mooncake_handoff_bytes_total{medium="cma"}': 7.0}
    for ways in WAYS.values():
        assert ways.handoff_bytes(METRICS["sglang"], members) == {"cma": 7.0}
    assert WAYS["sglang"].handoff_bytes(METRICS["sglang"], {}) == {"": 2 << 20}


@pytest.mark.parametrize("name", WAYS)
def test_servers_differ_in_role_and_port_and_know_the_directory(name: str, tmp_path: Path) -> None:
    options = EngineOptions(python="python", model="model", dtype="float32")
    cell = Cell(Supervisor(tmp_path), options=options, connector={"segment_bytes": "1MiB"}, server=WAYS[name].server)
    prefill, decode = (WAYS[name].server(cell, role) for role in ("prefill", "decode"))
    assert str(cell.prefill_port) in prefill.command and str(cell.decode_port) in decode.command
    assert (prefill.name, decode.name) == ("prefill", "decode")
    settings = [json.loads(word) for word in prefill.command if word.startswith("{")]
    assert cell.directory in json.dumps(settings) and "1MiB" in json.dumps(settings)
    if name == "sglang":
        assert {"prefill", str(cell.spare_port), "mooncake_pull"} <= set(prefill.command)
        assert "decode" in decode.command and not any("linker" in word for word in decode.command)


@pytest.mark.parametrize("name", WAYS)
def test_an_interpreter_without_the_engine_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model in"):
        WAYS[name].options(sys.executable, str(tmp_path), dtype="auto")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="works"):
        WAYS[name].options("/nowhere/python", str(tmp_path), dtype="auto")
    with pytest.raises(ConfigError, match="has no"):
        WAYS[name].options(sys.executable, str(tmp_path), dtype="auto")
