"""Show settings with their origins, and the schema."""

from __future__ import annotations

import json

import pytest

from mooncake_connector.cli.config import format_size, format_value
from mooncake_connector.cli.main import main
from mooncake_connector.config import ConnectorConfig
from mooncake_store.config import environment_name, load_config, parse_size


def test_show_prints_every_value_with_its_origin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONCAKE_SEGMENT_BYTES", "2048KiB")
    monkeypatch.setenv("MOONCAKE_SEGMENT_BITES", "1")
    assert main(["config", "--show", "--cell", "mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["segment_bytes"] == ["2MiB", "environment", "MOONCAKE_SEGMENT_BYTES"]
    assert rows["cell"] == ["mine", "explicit"]
    assert rows["lease_s"][-1] == "default"
    assert set(ConnectorConfig.__struct_fields__) <= set(rows)
    assert lines[-1] == "MOONCAKE_SEGMENT_BITES sets nothing here; did you mean MOONCAKE_SEGMENT_BYTES?"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--json", "--directory", "off"]) == 0
    assert json.loads(capsys.readouterr().out)["directory"] == {"value": "off", "origin": "explicit"}


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "ConnectorConfig"


@pytest.mark.parametrize(
    "arguments", [["--show", "--schema"], ["--directory", "redis://x"], ["--config", "/nowhere.json"]]
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["config", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_what_is_shown_can_be_set() -> None:
    """Every shown value, put into the environment, gives the same configuration."""
    config = ConnectorConfig()
    keys = ConnectorConfig.__struct_fields__
    environ = {environment_name(key): format_value(key, getattr(config, key)) for key in keys}
    assert load_config(ConnectorConfig, {}, environ) == config


@pytest.mark.parametrize("size_bytes", [0, 1, 1023, 1024, 1536, 1 << 20, 3 << 30, (1 << 30) + 1])
def test_size_is_exact(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes
