"""What every engine does with the pool, against a pool that can do anything wrong."""

import types

import pytest

from mooncake_connector.metrics import CONNECTOR_METRICS
from mooncake_connector.transfer.pool import PoolBlocks
from mooncake_store.client import GetOutcome
from mooncake_store.metrics import STORE_METRICS, Metrics


class Client:
    """A pool that holds some keys here, some elsewhere, has room for some, and breaks where asked."""

    def __init__(self, here="", elsewhere="", room=100, broken=()):
        self.here, self.elsewhere, self.room, self.broken, self.offered = set(here), set(elsewhere), room, broken, []
        self.directory = types.SimpleNamespace(locate=self.locate)

    def locate(self, keys):
        return [("other",) if key in self.elsewhere else () for key in keys]

    def match(self, keys):
        known = [key in self.here | self.elsewhere for key in keys]
        return (*known, False).index(False)

    def has(self, key):
        return key in self.here

    def put(self, keys, sources):
        assert sources == [f"at {key}" for key in keys]
        if "put" in self.broken:
            raise RuntimeError("broken")
        stored = [index < self.room for index in range(len(keys))]
        self.here.update(key for key, is_stored in zip(keys, stored, strict=True) if is_stored)
        return stored

    def get(self, keys, targets, *, deadline_ns):
        assert targets == [f"at {key}" for key in keys]
        if "get" in self.broken:
            raise RuntimeError("broken")
        return [GetOutcome("ok" if key in self.here | self.elsewhere else "miss", "shm", 1, "") for key in keys]

    def replicate(self, keys):
        self.offered += keys


@pytest.fixture
def metrics():
    return Metrics(STORE_METRICS, CONNECTOR_METRICS)


def blocks(client, metrics, **options):
    return PoolBlocks(client, metrics=metrics, timeout_s=5.0, **options)


def locate(keys):
    return lambda positions: [f"at {keys[position]}" for position in positions]


def counted(metrics, name):
    return {key.split('"')[1]: value for key, value in metrics.snapshot().items() if key.startswith(name + "{")}


def test_only_what_nobody_holds_is_saved_and_offered_to_store_nodes(metrics):
    client = Client(here="a", elsewhere="c")
    assert blocks(client, metrics).save("abcd", locate("abcd")) == [True] * 4
    assert client.here == {"a", "b", "d"}
    assert client.offered == ["b", "d"]
    assert counted(metrics, "mooncake_save_blocks_total") == {"present": 2, "stored": 2}


def test_what_finds_no_room_is_said_and_not_offered(metrics):
    client = Client(here="a", room=1)
    assert blocks(client, metrics).save("abc", locate("abc")) == [True, True, False]
    assert client.offered == ["b"]
    assert counted(metrics, "mooncake_save_blocks_total") == {"present": 1, "stored": 1, "no_room": 1}


def test_a_failure_while_saving_is_counted_and_never_raised(metrics):
    assert blocks(Client(broken={"put"}), metrics).save("ab", locate("ab")) == [False, False]
    assert counted(metrics, "mooncake_save_blocks_total")["error"] == 2


def test_a_load_says_of_each_block_whether_it_is_there(metrics):
    client = Client(here="a", elsewhere="c")
    assert blocks(client, metrics).load("abc", locate("abc")) == [True, False, True]
    assert counted(metrics, "mooncake_load_blocks_total") == {"ok": 2, "miss": 1}


def test_a_failure_while_loading_is_a_miss_and_never_raised(metrics):
    assert blocks(Client(broken={"get"}), metrics).load("ab", locate("ab")) == [False, False]
    assert counted(metrics, "mooncake_load_blocks_total") == {"error": 2}


@pytest.mark.parametrize(("min_blocks", "found"), [(1, 2), (2, 2), (3, 0)])
def test_short_hits_are_not_worth_a_load(metrics, min_blocks, found):
    assert blocks(Client(here="a", elsewhere="b"), metrics, min_blocks=min_blocks).match("abx") == found
    assert counted(metrics, "mooncake_prefix_lookups_total") == {"hit" if found else "miss": 1}
