"""Addresses, refusals, and what each kind of directory shares."""

import pytest

from mooncake_store.config import StoreConfig
from mooncake_store.directory.endpoints import Endpoint, parse_endpoints
from mooncake_store.directory.open import open_directory
from mooncake_store.errors import ConfigError
from mooncake_store.metrics import Metrics
from mooncake_store.testing.directory import make_keys, make_member


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("etcd://127.0.0.1:2379", [("127.0.0.1", 2379)]),
        ("etcd://a", [("a", 2379)]),
        ("etcd://a:1, b:2,c/", [("a", 1), ("b", 2), ("c", 2379)]),
        ("etcd://[::1]:99,[fe80::1]", [("::1", 99), ("fe80::1", 2379)]),
    ],
)
def test_addresses(url, expected):
    assert parse_endpoints(url) == tuple(Endpoint(*pair) for pair in expected)


def test_addresses_print_as_they_are_dialled():
    assert str(Endpoint("::1", 5)) == "[::1]:5"
    assert str(Endpoint("a", 5)) == "a:5"


@pytest.mark.parametrize(
    "url",
    [
        "", "etcd", "etcd:/a:1", "http://a:1", "etcd://", "etcd://,", "etcd://a:", "etcd://a:0", "etcd://a:65536",
        "etcd://a:x", "etcd://:1", "etcd://::1:2", "etcd://[::1", "etcd://[::1]2", "etcd://u@a:1", "etcd://a/b:1",
        "Memory", "etcd://a:²", "etcd://" + ",".join("a" * 17),
    ],
)  # fmt: skip
def test_bad_addresses(url):
    with pytest.raises(ConfigError) as raised:
        open_directory(StoreConfig(directory=url), Metrics())
    assert raised.value.where == "$.directory"
    assert "etcd://host:port" in raised.value.hint


@pytest.mark.parametrize("cell", ["", "a/b", "../x"])
@pytest.mark.parametrize("directory", ["memory", "off", "etcd://127.0.0.1:1"])
def test_bad_cells(cell, directory):
    with pytest.raises(ConfigError) as raised:
        open_directory(StoreConfig(directory=directory, cell=cell), Metrics())
    assert raised.value.where == "$.cell"


def test_memory_is_shared_within_the_process_and_off_is_not():
    opened = {}
    for kind, cell in (("memory", "x1"), ("memory", "x1"), ("memory", "x2"), ("off", "x1"), ("off", "x1")):
        opened.setdefault((kind, cell), []).append(open_directory(StoreConfig(directory=kind, cell=cell), Metrics()))
    writer = opened["memory", "x1"][0]
    writer.join(make_member("a"))
    writer.publish(make_keys(3))
    found = {name: [directory.match(make_keys(3)) for directory in pair] for name, pair in opened.items()}
    assert found == {("memory", "x1"): [3, 3], ("memory", "x2"): [0], ("off", "x1"): [0, 0]}
    for pair in opened.values():
        for directory in pair:
            directory.close()
