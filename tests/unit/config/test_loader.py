"""Load settings from every source: precedence, parsing, origins, and errors that name the culprit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from mooncake_connector.config import ConnectorConfig
from mooncake_store import config as store_config
from mooncake_store.config import (
    StoreConfig,
    config_schema,
    describe_fields,
    environment_name,
    load_config,
    load_with_origins,
    parse_size,
    unknown_environment,
    wants_debug,
)
from mooncake_store.errors import ConfigError

CLASSES = (StoreConfig, ConnectorConfig)


def fails(*arguments: object, **options: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments, **options)  # type: ignore[arg-type]
    assert caught.value.hint, "every error says what to do"
    return caught.value


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_pass_their_own_checks(cls: type[StoreConfig]) -> None:
    """A default is not converted when nobody sets the key, so it must be valid as it stands."""
    given = msgspec.to_builtins(cls())
    assert load_config(cls, given, {}) == cls()


def test_precedence_is_explicit_environment_file_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"cell": "file", "lease_s": 1, "host": "file", "checksum": False}))
    environ = {"MOONCAKE_CELL": "environment", "MOONCAKE_LEASE_S": "2", "MOONCAKE_CONFIG": str(file)}
    config, origins = load_with_origins(StoreConfig, {"cell": "explicit", "directory": None}, environ)
    assert (config.cell, config.lease_s, config.host, config.checksum) == ("explicit", 2.0, "file", False)
    assert config.pull_timeout_s == StoreConfig().pull_timeout_s
    assert origins["cell"] == "explicit"
    assert origins["lease_s"] == "environment MOONCAKE_LEASE_S"
    assert origins["host"] == f"file {file}"
    assert origins["pull_timeout_s"] == origins["directory"] == "default"


def test_given_file_wins_over_the_named_one(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('cell = "a"\nmedia = ["tcp"]\nsegment_bytes = "3MiB"\n')
    (tmp_path / "b.json").write_text('{"cell": "b"}')
    config = load_config(StoreConfig, {}, {"MOONCAKE_CONFIG": str(tmp_path / "b.json")}, tmp_path / "a.toml")
    assert (config.cell, config.media, config.segment_bytes) == ("a", ("tcp",), 3 << 20)


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_CELL", "from-process")
    assert load_config(StoreConfig).cell == "from-process"
    assert load_config(StoreConfig, {}, {}).cell == "default"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("segment_bytes", "2GiB", 2 << 30),
        ("segment_bytes", "0", 0),
        ("media", "tcp, shm", ("tcp", "shm")),
        ("checksum", "false", False),
        ("checksum", "1", True),
        ("lease_s", "2.5", 2.5),
        ("membership_ttl_s", "30", 30),
        ("publish", "step", "step"),
    ],
)
def test_text_is_parsed_alike_from_environment_and_overrides(key: str, text: str, value: object) -> None:
    assert getattr(load_config(ConnectorConfig, {}, {environment_name(key): text}), key) == value
    assert getattr(load_config(ConnectorConfig, {key: text}, {}), key) == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lease_s", "soon"),
        ("lease_s", -1),
        ("lease_s", 0),
        ("membership_ttl_s", 1.5),
        ("membership_ttl_s", 0),
        ("checksum", "maybe"),
        ("checksum", 1),
        ("segment_bytes", -1),
        ("segment_bytes", "2 gigs"),
        ("segment_bytes", "1.3B"),
        ("media", ["smoke signals"]),
        ("media", []),
        ("media", 5),
        ("directory", "http://127.0.0.1"),
        ("cell", ""),
        ("log_level", "chatty"),
        ("publish", "sometimes"),
    ],
)
def test_bad_value_names_its_path_and_origin(key: str, value: object) -> None:
    error = fails(ConnectorConfig, {key: value}, {})
    assert error.where.startswith(f"$.{key}")
    assert error.where.endswith("(explicit)")


def test_bad_value_in_the_environment_names_the_variable() -> None:
    error = fails(StoreConfig, {}, {"MOONCAKE_LEASE_S": "soon"})
    assert error.where == "$.lease_s (environment MOONCAKE_LEASE_S)"


def test_bad_element_names_its_index() -> None:
    assert fails(StoreConfig, {"media": ["shm", "rdmaa"]}, {}).where == "$.media[1] (explicit)"


def test_wrong_choice_lists_the_right_ones() -> None:
    assert "layer, step" in fails(ConnectorConfig, {"publish": "sometimes"}, {}).message


def test_unknown_key_suggests_the_nearest(tmp_path: Path) -> None:
    error = fails(StoreConfig, {"segment_byte": 1}, {})
    assert "did you mean `segment_bytes`" in error.hint
    assert error.where == "$.segment_byte (explicit)"
    file = tmp_path / "settings.json"
    file.write_text('{"lese_s": 1, "frobnicate": 2}')
    error = fails(StoreConfig, {}, {}, file)
    assert "lese_s" in error.message and "frobnicate" in error.message
    assert str(file) in error.where
    assert "`lease_s`" in error.hint


def test_unknown_key_without_neighbour_lists_all() -> None:
    assert "segment_bytes" in fails(StoreConfig, {"frobnicate": 1}, {}).hint


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", "{"), ("a.toml", "a = "), ("a.json", "[1]"), ("a.json", "\udcff"), ("missing.json", None), (".", None)],
)
def test_unusable_file_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    assert str(path) in fails(StoreConfig, {}, {}, path).where


def test_file_that_is_no_settings_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    with path.open("wb") as file:
        file.truncate(store_config.FILE_MAX_BYTES + 1)
    assert "longer" in fails(StoreConfig, {}, {}, path).message


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4096", 4096), ("1KiB", 1024), (" 1.5 GiB ", 3 << 29), ("2gib", 2 << 30), ("1MB", 10**6), ("7b", 7)],
)
def test_size(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


def test_misspelt_variable_is_reported_but_no_error() -> None:
    environ = {"MOONCAKE_LESE_S": "3", "MOONCAKE_SOMETHING_ELSE": "x", "MOONCAKE_CELL": "c", "HOME": "/"}
    assert load_config(StoreConfig, {}, environ).cell == "c"
    found = unknown_environment(StoreConfig, environ)
    assert found == {"MOONCAKE_LESE_S": "MOONCAKE_LEASE_S", "MOONCAKE_SOMETHING_ELSE": ""}


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("False", False), ("1", True), ("y", True)])
def test_debug_can_be_asked_for_before_settings_are_loaded(value: str, expected: bool) -> None:
    assert wants_debug({"MOONCAKE_DEBUG": value}) is expected


@pytest.mark.parametrize("cls", CLASSES)
def test_every_setting_is_described(cls: type[StoreConfig]) -> None:
    descriptions = describe_fields(cls)
    assert set(descriptions) == set(cls.__struct_fields__)
    assert all(len(text) > 10 for text in descriptions.values())


def test_schema_accepts_sizes_as_text_and_refuses_unknown_keys() -> None:
    schema = config_schema(ConnectorConfig)
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(ConnectorConfig.__struct_fields__)
    number, text = schema["properties"]["segment_bytes"]["anyOf"]
    assert number == {"type": "integer", "minimum": 0}
    assert re.fullmatch(text["pattern"], "2GiB", re.IGNORECASE)
    json.dumps(schema)
