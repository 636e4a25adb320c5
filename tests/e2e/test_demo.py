"""Run ``mooncake demo`` as a newcomer does: it must show reuse, and leave nothing behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from engine.cluster import engine_python, model_folder
from mooncake_connector.demo.cluster import verb_command

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(700)]

MARK = "MOONCAKE_DEMO_TEST"


def start(tmp_path: Path, *flags: str, python: str = "") -> subprocess.Popen[str]:
    """Start the demo; its processes can be found by an environment variable that all of them inherit."""
    command = verb_command("demo", "--python", python or engine_python(), "--model", model_folder(), "--output",
                           str(tmp_path), *flags)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, MARK: str(tmp_path)})


def left_behind(tmp_path: Path) -> list[str]:
    """Return the command lines of live processes that the demo started."""
    mark = f"{MARK}={tmp_path}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120])
        except OSError:
            continue
    return found


def until_gone(tmp_path: Path, timeout_s: float) -> list[str]:
    """Wait until nothing of the demo runs; return what still does."""
    deadline = time.monotonic() + timeout_s
    while (left := left_behind(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.3)
    return left


def test_demo_shows_reuse_and_stops_everything(tmp_path: Path) -> None:
    process = start(tmp_path, "--quick")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]
    assert left_behind(tmp_path) == []
    report: dict[str, Any] = json.loads((tmp_path / "demo.json").read_text())
    assert {"machine", "versions", "rows"} <= set(report)
    scenes = {row["name"].split()[0]: row for row in report["rows"]}
    assert list(scenes) == ["a", "b", "c", "d", "e"]
    assert scenes["a"]["num_correct"] == scenes["a"]["num_requests"]
    for row in scenes.values():
        # the router asks a restarted engine for its address with a one-token request
        told = row["device_tokens"] + row["pool_tokens"] + row["computed_tokens"]
        assert 0 <= told - row["prompt_tokens"] <= 2, row
        assert sum(row["handoff_bytes"].values()) > 0, row
    # the document was computed once and found in the engine's own cache four times
    assert scenes["c"]["device_tokens"] > 0.7 * scenes["c"]["prompt_tokens"]
    assert scenes["c"]["ttft_reused_s"] < 0.5 * scenes["c"]["ttft_cold_s"]
    # after the restart the engine's own cache is empty: nearly all of the document comes from the pool
    assert scenes["e"]["device_tokens"] == 0
    assert scenes["e"]["pool_tokens"] > 0.9 * scenes["e"]["prompt_tokens"]
    assert scenes["e"]["ttft_reused_s"] < 0.5 * scenes["c"]["ttft_cold_s"]
    assert report["media"]
    assert "exposed hand-over" in output


@pytest.mark.parametrize(("number", "wait_for"), [(signal.SIGINT, "waiting for"), (signal.SIGTERM, "waiting for"),
                                                  (signal.SIGKILL, "waiting for")])
def test_demo_leaves_nothing_when_stopped(tmp_path: Path, number: int, wait_for: str) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if wait_for in line:
            break
    assert len(left_behind(tmp_path)) > 3
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert until_gone(tmp_path, 40) == []


def test_demo_is_never_silent(tmp_path: Path) -> None:
    """While the engines start, a line comes at least every ten seconds."""
    process = start(tmp_path)
    assert process.stdout is not None
    last, widest, count = time.monotonic(), 0.0, 0
    for _ in process.stdout:
        now = time.monotonic()
        widest, last, count = max(widest, now - last), now, count + 1
        if count == 6:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert widest < 10.5
    assert until_gone(tmp_path, 40) == []
