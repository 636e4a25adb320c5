"""Run the tests of SGLang's KV events, in the environment that has it."""

import os
import subprocess
from pathlib import Path

from engine.sglang.servers import sglang_python

HERE = Path(__file__).resolve().parent


def test_the_router_understands_what_sglang_publishes():
    root = HERE.parents[2]
    run = subprocess.run(
        [sglang_python(), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "--rootdir", str(HERE),
         "-c", os.devnull, str(HERE / "inside_sglang_events.py")],
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}"},
        capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "1 passed" in run.stdout, run.stdout[-500:]
