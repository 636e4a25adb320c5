"""``mooncake router`` as a user meets it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mooncake_connector.cli.errors import CommandParser
from mooncake_connector.cli.main import main
from mooncake_connector.cli.router import add_parser, load_router_config
from mooncake_connector.router.config import RouterConfig
from mooncake_store.config import describe_fields

SRC = Path(__file__).resolve().parents[3] / "src"


def config_of(*flags: str) -> RouterConfig:
    parser = CommandParser(prog="mooncake")
    add_parser(parser.add_subparsers())
    return load_router_config(parser.parse_args(["router", *flags]))


def test_flags_come_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "router.toml"
    file.write_text('port = 9000\nhost = "0.0.0.0"\ndecode = ["http://d:1"]\nbody_max_bytes = "1MiB"\n')
    config = config_of("--prefill", "http://p:1/", "http://p:2", "--prefill", "http://p:3", "--port", "9001",
                       "--config", str(file))
    assert config.prefill == ("http://p:1", "http://p:2", "http://p:3")
    assert (config.decode, config.port, config.host) == (("http://d:1",), 9001, "0.0.0.0")
    assert config.body_max_bytes == 1 << 20
    assert config.min_split_tokens == 0


def test_the_environment_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_HOST", "10.9.9.9")
    assert config_of("--engine", "http://e:1").host == "127.0.0.1"


def test_every_setting_is_explained() -> None:
    described = describe_fields(RouterConfig)  # type: ignore[arg-type]
    assert set(described) == set(RouterConfig.__struct_fields__)


BAD = [
    [],
    ["--prefill"],
    ["--prefill", "not a url"],
    ["--engine", "http://e:1/v1"],
    ["--engine", "ftp://e:1"],
    ["--engine", "http://e:1", "--decode", "http://e:1"],
    ["--engine", "http://e:1", "--port", "70000"],
    ["--engine", "http://e:1", "--min-split-tokens", "-1"],
    ["--engine", "http://e:1", "--total-timeout", "nan"],
    ["--engine", "http://e:1", "--placement", "udp://x", "--port", "0"],
    ["--engine", "http://e:1", "--config", "/no/such/file.json"],
    ["--engin", "http://e:1"],
]


@pytest.mark.parametrize("flags", BAD, ids=lambda flags: " ".join(flags) or "nothing")
def test_bad_input_ends_with_2_and_three_lines(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["router", *flags]) == 2
    what, where, do = capsys.readouterr().err.strip().splitlines()
    assert what.startswith("mooncake: ") and where.startswith("  where: ") and do.startswith("  do: ")


@pytest.mark.parametrize(
    ("text", "named"),
    [('{"prot": 1}', "port"), ('{"port": "x"}', "$.port"), ('{"decode": ["x"]}', "$.decode"), ("{", "not JSON"),
     ("[]", "object")],
)
def test_a_bad_file_is_explained(text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "router.json"
    file.write_text(text)
    assert main(["router", "--engine", "http://e:1", "--config", str(file)]) == 2
    assert named in capsys.readouterr().err


def test_a_port_in_use_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["router", "--engine", "http://127.0.0.1:9", "--placement", "", "--port", port]) == 2
    assert "--port" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    router = subprocess.Popen(
        [sys.executable, "-m", "mooncake_connector.cli", "router", "--engine", "http://127.0.0.1:9",
         "--port", str(port), "--placement", "tcp://127.0.0.1:0"],
        env={**os.environ, "PYTHONPATH": str(SRC)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        asyncio.run(_wait_health(port))
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
        assert json.loads(refused.value.read())["engines"] == {"http://127.0.0.1:9": "unknown"}
        router.send_signal(number)
        _, log = router.communicate(timeout=10)
        assert router.returncode == 0, log
        assert "Traceback" not in log
        assert "waiting for engine http://127.0.0.1:9" in log
    finally:
        router.kill()
        router.wait()


async def _wait_health(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            except OSError:
                await asyncio.sleep(0.05)
