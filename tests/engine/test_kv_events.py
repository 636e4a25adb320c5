"""Run the tests of vLLM's KV events, in the environment that has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from engine.cluster import engine_python

HERE = Path(__file__).resolve().parent


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_the_router_understands_what_vllm_publishes() -> None:
    """Every test of inside_vllm_events.py passes beside the installed vLLM."""
    root = HERE.parents[1]
    run = subprocess.run(
        [engine_python(), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "--rootdir", str(HERE),
         "-c", os.devnull, str(HERE / "inside_vllm_events.py")],
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}"}, capture_output=True, text=True,
        timeout=280, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "2 passed" in run.stdout
