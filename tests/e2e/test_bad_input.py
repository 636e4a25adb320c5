"""Give every command bad input: exit code 2, an error that says what, where and what to do, never a traceback."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mooncake_connector.demo.cluster import verb_command

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

TIMEOUT_S = 30
BAD = (
    ("demo", "--model", "/nonexistent"),
    ("demo", "--python", "/nonexistent/python", "--model", "MODEL"),
    ("demo", "--python", "/bin/false", "--model", "MODEL"),
    ("demo", "--dtype", "float7"),
    ("demo", "--memory", "lots", "--model", "MODEL"),
    ("demo", "--no-such-flag"),
    ("etcd", "--port", "99999999"),
    ("etcd", "--port", "word"),
    ("store", "serve", "--memory", "lots"),
    ("store", "serve", "--memory", "-1"),
    ("store", "serve", "--memory", "1GiB", "--directory", "redis://nowhere"),
    ("store",),
    ("router", "--prefill", "not a url", "--decode", "http://127.0.0.1:1"),
    ("router", "--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2", "--port", "word"),
    ("router", "--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2", "--placement", "udp://x"),
    ("router",),
    ("status", "--directory", "redis://nowhere"),
    ("config", "--no-such-flag"),
    ("no-such-verb",),
)


@pytest.mark.parametrize("arguments", BAD, ids=lambda arguments: " ".join(arguments))
def test_bad_input_ends_with_code_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = verb_command(*(str(tmp_path) if word == "MODEL" else word for word in arguments))
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=tmp_path)
    assert done.returncode == 2, f"code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert done.stderr.strip(), "nothing says what was wrong"
