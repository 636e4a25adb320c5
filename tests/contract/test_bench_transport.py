"""Run ``mooncake bench transport`` as a user does: two real processes, figures, and nothing left after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mooncake_store.errors import TransferFailed
from mooncake_store.transport import bench
from mooncake_store.transport.bench import Case, measure

COMMAND = [sys.executable, "-m", "mooncake_connector.cli", "bench", "transport"]


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment, start_new_session=True)


def members(session: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z" and int(fields[3]) == session:
            found.append(int(stat.parent.name))
    return found


def test_a_quick_run_measures_every_medium_and_leaves_nothing(tmp_path):
    path = tmp_path / "out.json"
    process = start("--quick", "--blocks", "1MiB,16KiB", "--json", str(path))
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    rows = json.loads(path.read_text())["rows"]
    assert [(row["medium"], row["block_bytes"]) for row in rows] == [
        (medium, size) for size in (1 << 20, 16 << 10, 4096) for medium in ("shm", "cma", "tcp")]
    assert all(row["ratio"] > 0 and row["seconds"] > 0 and row["num_reads"] >= 3 and not row["note"] for row in rows)
    assert "x memcpy" in out and members(process.pid) == []


def test_ctrl_c_ends_both_processes_in_one_line():
    process = start("--reps", "100000", "--total", "4MiB", "--blocks", "1MiB", "--media", "shm,tcp")
    try:
        process.stdout.readline()  # it has begun
        wait_until(lambda: len(members(process.pid)) >= 2)
        time.sleep(1.0)  # and is reading, most likely
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130 and err.splitlines() == ["mooncake bench: interrupted"]
        wait_until(lambda: not members(process.pid))
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_medium_that_does_not_work_gets_a_row_that_says_why():
    rows = next(iter(measure(["shm", "tcp"], [Case(1 << 20, 1 << 16)], num_reps=1,
                             settings=bench.TransportSettings(host="256.0.0.1"))))
    assert rows[0].ratio > 0 and not rows[0].note
    assert rows[1].ratio == 0 and "256.0.0.1" in rows[1].note


def test_wrong_bytes_end_the_measurement(monkeypatch):
    monkeypatch.setattr(bench, "_content", lambda size: bench.np.zeros(size, "u1"))  # not what the owner serves
    with pytest.raises(TransferFailed, match="wrong bytes"):
        list(measure(["shm"], [Case(1 << 20, 1 << 16)], num_reps=1))
