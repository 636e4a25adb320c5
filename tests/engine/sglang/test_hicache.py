"""HiCache over the pool: what one server computed, another life of it finds, and nothing that is not the same."""

import json
import time

import pytest

from engine.sglang.conftest import report
from engine.sglang.servers import PAGE_TOKENS, PROMPTS, ask, ask_all, server_spec, settle
from mooncake_connector.demo.cluster import etcd_spec, store_spec
from mooncake_connector.demo.processes import Supervisor, free_ports
from mooncake_connector.demo.status import CellStatus, total

MODULE = "mooncake_connector.engines.sglang.hicache"
LONG = [i for i, prompt in enumerate(PROMPTS) if len(prompt) > 2 * PAGE_TOKENS]


def hicache_flags(directory):
    extra = {"backend_name": "mooncake", "module_path": MODULE, "class_name": "PoolStorage", "interface_v1": 1,
             "prefetch_threshold": PAGE_TOKENS, "mooncake": {"directory": directory, "segment_bytes": "64MiB"}}
    return ("--enable-hierarchical-cache", "--hicache-size", "1", "--hicache-io-backend", "direct",
            "--hicache-mem-layout", "page_first_direct", "--hicache-storage-prefetch-policy", "wait_complete",
            "--hicache-storage-backend", "dynamic", "--hicache-storage-backend-extra-config", json.dumps(extra))


class Pool:
    """A server with HiCache, etcd, and a store node."""

    def __init__(self, run_dir):
        self.supervisor = Supervisor(run_dir, report=report)
        etcd, self.port = free_ports(2)
        self.directory = f"etcd://127.0.0.1:{etcd}"
        self.url = f"http://127.0.0.1:{self.port}"
        self.supervisor.start(etcd_spec(etcd, run_dir / "etcd"))
        self.supervisor.wait_ready()
        self.supervisor.start(store_spec("store", directory=self.directory, memory="512MiB"))

    def start(self, name, **environment):
        self.supervisor.start(server_spec(name, self.port, *hicache_flags(self.directory), **environment))
        self.supervisor.wait_ready([name])

    def wait_saved(self, num_blocks):
        """Wait until the store node has that many blocks."""
        status, deadline, held = CellStatus(self.directory), time.monotonic() + 60, 0.0
        try:
            while time.monotonic() < deadline:
                stores = [member for member in status.ask() if member.member.kind == "store"]
                held = sum(total(member.samples, "mooncake_segment_blocks") for member in stores)
                if held >= num_blocks:
                    return
                time.sleep(0.5)
        finally:
            status.close()
        raise AssertionError(f"{held} of {num_blocks} blocks reached the store node")


@pytest.fixture(scope="module")
def pool(tmp_path_factory, expected):
    pool = Pool(tmp_path_factory.mktemp("pool"))
    with pool.supervisor:
        yield pool


def test_a_restarted_server_finds_what_it_had_computed(pool, expected):
    pool.start("first")
    cold = ask_all(lambda prompt: ask(pool.url, prompt), PROMPTS)
    assert [answer.tokens for answer in cold] == expected, [answer.text for answer in cold]
    pool.wait_saved(sum(len(prompt) // PAGE_TOKENS for prompt in PROMPTS) * 9 // 10)
    pool.supervisor.stop("first")
    pool.start("second")
    warm = ask_all(lambda prompt: ask(pool.url, prompt), PROMPTS)
    assert [answer.tokens for answer in warm] == expected
    hits = [warm[i].meta["cached_tokens"] for i in LONG]
    assert all(hit >= PAGE_TOKENS for hit in hits), hits
    details = warm[LONG[-1]].meta["cached_tokens_details"]
    assert details["storage"] >= PAGE_TOKENS and details["storage_backend"] == "PoolStorage", details
    settle(pool.url)
    again = ask(pool.url, PROMPTS[-1])
    assert (again.tokens, again.meta["cached_tokens"] > 0) == (expected[-1], True), "emptied, and found in the pool"
    pool.supervisor.stop("second")


def test_delays_and_failures_of_the_storage_cost_hits_and_never_tokens(pool, expected):
    pool.start("faulty", SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY="0.2",
               SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE="0.3")
    for _ in range(2):
        answers = ask_all(lambda prompt: ask(pool.url, prompt), PROMPTS)
        assert [answer.tokens for answer in answers] == expected, [answer.text for answer in answers]
        settle(pool.url)
    pool.supervisor.stop("faulty")
