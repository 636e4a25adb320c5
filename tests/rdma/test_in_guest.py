"""Run the tests of the rdma medium on real verbs: inside a guest with two soft-RoCE devices, booted once.

As root what is missing is installed with apt (and the kernel package only unpacked); elsewhere one line says what was
left out. The inside tests are the `inside_*.py` next to this file.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rdma.guest import CACHE, run_in_guest
from rdma.provisions import install, obstacle

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMAND_TIMEOUT_S = 900.0
TEST_TIMEOUT_S = 1200


@pytest.mark.slow
@pytest.mark.timeout(TEST_TIMEOUT_S)
def test_rdma_on_real_verbs(capfd: pytest.CaptureFixture[str]) -> None:
    with capfd.disabled():
        missing = obstacle()
        if missing:
            line = f"rdma on real verbs was left out: {missing}. To run it: sudo make test-rdma"
            print(f"\n{line}", flush=True)
            pytest.skip(line)
        CACHE.mkdir(parents=True, exist_ok=True)
        print(flush=True)
        provisions = install(lambda line: print(line, flush=True))
        folders = (str(ROOT / name) for name in ("src", "tests", "benchmarks"))
        paths = [part for part in (provisions.path, *folders) if part]
        environment = {"PYTHONPATH": ":".join(paths), "HOME": "/root", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
        command = [str(provisions.python), "-m", "pytest", "-v", "-p", "no:cacheprovider", "--timeout=120",
                   *sorted(str(path) for path in HERE.glob("inside_*.py"))]
        result = run_in_guest(command, environment, folder=ROOT, timeout_s=COMMAND_TIMEOUT_S,
                              results=CACHE / "results",
                              write=lambda data: print(data.decode(errors="replace"), end="", flush=True))
        print(f"guest: boot {result.boot_s:.0f} s, in all {result.total_s:.0f} s, exit {result.code}", flush=True)
    assert result.code == 0, f"the tests inside the guest ended with {result.code}; its console:\n{result.console}"
