"""Run the tests that import vLLM, in the environment that has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from engine.cluster import engine_python

HERE = Path(__file__).resolve().parent


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_what_we_rely_on_inside_vllm() -> None:
    """Every test of inside_vllm.py passes beside the installed vLLM."""
    run = subprocess.run(
        [engine_python(), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "--rootdir", str(HERE),
         "-c", os.devnull, str(HERE / "inside_vllm.py")],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src")}, capture_output=True, text=True, timeout=280,
        check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "7 passed" in run.stdout
