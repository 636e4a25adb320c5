"""Run ``mooncake demo --engine sglang`` as a newcomer does: the same scenes, the same figures, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e2e.test_demo import left_behind, start
from engine.sglang.servers import sglang_python

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def test_demo_shows_reuse_and_stops_everything(tmp_path: Path) -> None:
    process = start(tmp_path, "--quick", "--engine", "sglang", python=sglang_python())
    output, _ = process.communicate(timeout=840)
    assert process.returncode == 0, output[-4000:]
    assert left_behind(tmp_path) == []
    report: dict[str, Any] = json.loads((tmp_path / "demo.json").read_text())
    assert report["versions"]["sglang"]
    scenes = {row["name"].split()[0]: row for row in report["rows"]}
    assert list(scenes) == ["a", "b", "c", "d", "e"]
    assert scenes["a"]["num_correct"] == scenes["a"]["num_requests"]
    for row in scenes.values():
        assert row["device_tokens"] + row["pool_tokens"] + row["computed_tokens"] == row["prompt_tokens"], row
        assert sum(row["handoff_bytes"].values()) > 0, row
    # the document was computed once and found in the server's own cache four times
    assert scenes["c"]["device_tokens"] > 0.7 * scenes["c"]["prompt_tokens"]
    assert scenes["c"]["ttft_reused_s"] < 0.5 * scenes["c"]["ttft_cold_s"]
    # after the restart the server's own cache is empty: nearly all of the document comes from the pool
    assert scenes["e"]["device_tokens"] == 0
    assert scenes["e"]["pool_tokens"] > 0.9 * scenes["e"]["prompt_tokens"]
    assert scenes["e"]["ttft_reused_s"] < 0.5 * scenes["c"]["ttft_cold_s"]
    assert "exposed hand-over" in output
