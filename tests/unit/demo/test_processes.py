"""Check that the supervisor notices failures, says what to do, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mooncake_connector.demo.processes import (
    ProcessFailed,
    ProcessSpec,
    Supervisor,
    cpu_seconds,
    free_ports,
    session_pids,
)

SLEEPER = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def python(name: str, code: str, **more: object) -> ProcessSpec:
    """Describe a child that runs a line of Python."""
    return ProcessSpec(name=name, command=(sys.executable, "-c", code), **more)  # type: ignore[arg-type]


def until(condition: object, timeout_s: float = 10.0) -> bool:
    """Wait until ``condition()`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_child_that_ends_early_tells_why(tmp_path: Path) -> None:
    with Supervisor(tmp_path, report=lambda line: None) as supervisor:
        supervisor.start(python("broken", "import sys; print('no such model'); sys.exit(3)", ready_port=1,
                                hint="name a model"))
        with pytest.raises(ProcessFailed) as caught:
            supervisor.wait_ready()
    text = str(caught.value)
    assert "broken ended with code 3" in text
    assert "no such model" in text
    assert "do: name a model" in text
    assert str(tmp_path / "broken.log") in text


def test_a_child_that_never_answers_is_given_up(tmp_path: Path) -> None:
    port, = free_ports(1)
    with Supervisor(tmp_path, report=lambda line: None) as supervisor:
        child = supervisor.start(python("mute", "import time; time.sleep(60)", ready_port=port, ready_timeout_s=0.5))
        with pytest.raises(ProcessFailed, match=r"not ready after"):
            supervisor.wait_ready()
    assert session_pids(child.pid) == []


def test_http_readiness_waits_for_200(tmp_path: Path) -> None:
    port, = free_ports(1)
    code = ("import http.server, time\nclass H(http.server.BaseHTTPRequestHandler):\n"
            " n = 0\n def do_GET(self):\n  H.n += 1; self.send_response(200 if H.n > 2 else 503); self.end_headers()\n"
            f"http.server.HTTPServer(('127.0.0.1', {port}), H).serve_forever()")
    with Supervisor(tmp_path, report=lambda line: None) as supervisor:
        child = supervisor.start(python("web", code, ready_url=f"http://127.0.0.1:{port}/health"))
        supervisor.wait_ready()
        assert child.log_path.read_text().count(" 503 ") == 2


def test_closing_stops_grandchildren_and_the_stubborn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mooncake_connector.demo.processes.STOP_TIMEOUT_S", 0.5)
    with Supervisor(tmp_path, report=lambda line: None) as supervisor:
        family = supervisor.start(python("family", SLEEPER))
        stubborn = supervisor.start(python("stubborn", STUBBORN))
        assert until(lambda: "up" in "".join(family.log_tail()) and "up" in "".join(stubborn.log_tail()))
        assert len(family.pids()) == 2
    assert session_pids(family.pid) == [] and session_pids(stubborn.pid) == []


def test_kill_and_restart_keep_the_spec_and_the_log(tmp_path: Path) -> None:
    with Supervisor(tmp_path, report=lambda line: None) as supervisor:
        first = supervisor.start(python("again", SLEEPER, environment={"COLOUR": "blue"}))
        assert until(lambda: first.log_tail() == ["up"])
        supervisor.kill("again")
        assert first.has_ended() and session_pids(first.pid) == []
        with pytest.raises(ProcessFailed, match="again ended with code -9"):
            supervisor.check_alive()
        second = supervisor.restart("again")
        assert until(lambda: second.log_tail() == ["up", "up"])
        assert b"COLOUR=blue" in Path(f"/proc/{second.pid}/environ").read_bytes()
        with pytest.raises(ProcessFailed, match="running already"):
            supervisor.start(second.spec)


def test_children_follow_a_killed_parent(tmp_path: Path) -> None:
    """SIGKILL leaves no chance to clean up: the kernel must do it."""
    code = (f"import sys, time; sys.path[:0] = {sys.path!r}\n"
            "from pathlib import Path\nfrom mooncake_connector.demo.processes import ProcessSpec, Supervisor\n"
            f"s = Supervisor(Path({str(tmp_path)!r}))\n"
            "print(s.start(ProcessSpec(name='child', command=('sleep', '60'))).pid, flush=True)\ntime.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert until(lambda: b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()[:6])
    parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=10)
    assert until(lambda: session_pids(pid) == [])


def test_waiting_is_never_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mooncake_connector.demo.processes.PROGRESS_S", 0.1)
    port, = free_ports(1)
    lines: list[str] = []
    with Supervisor(tmp_path, report=lines.append) as supervisor:
        supervisor.start(python("slow", "import time; print('loading', flush=True); time.sleep(60)", ready_port=port,
                                ready_timeout_s=1.5))
        with pytest.raises(ProcessFailed):
            supervisor.wait_ready()
    assert len([line for line in lines if "waiting for slow" in line]) >= 3
    assert "loading" in lines[-1]


def test_cpu_seconds_counts_work_and_ignores_the_dead() -> None:
    began = cpu_seconds([os.getpid()])
    deadline = time.process_time() + 0.1
    while time.process_time() < deadline:
        pass
    assert 0.05 < cpu_seconds([os.getpid()]) - began < 1.0
    assert cpu_seconds([2 ** 22 + 1]) == 0.0
