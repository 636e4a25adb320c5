"""Cache linker and HiCache storage against SGLang's own classes, without a server: two of a kind in one cell.

Run by test_inside_sglang.py in the engine's environment.
"""

import hashlib
import inspect
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from mooncake_connector.engines.sglang import hicache
from mooncake_connector.engines.sglang import linker as module
from mooncake_connector.engines.sglang.linker import PoolLinker
from mooncake_store.errors import ConfigError

LAYERS, PAGES, PAGE, HEADS, WIDTH = 3, 24, 16, 2, 4


class DevicePool:
    """What the linker needs of SGLang's MHATokenToKVPool."""

    layer_num, dtype = LAYERS, torch.float32

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.k_buffer, self.v_buffer = ([torch.rand(PAGES * PAGE, HEADS, WIDTH, generator=generator)
                                         for _ in range(LAYERS)] for _ in range(2))

    def get_contiguous_buf_infos(self):
        buffers = self.k_buffer + self.v_buffer
        return [b.data_ptr() for b in buffers], [b.nbytes for b in buffers], [b[:PAGE].nbytes for b in buffers]

    def page(self, page):
        rows = slice(page * PAGE, (page + 1) * PAGE)
        return [buffer[rows].clone() for buffer in self.k_buffer + self.v_buffer]


def transfer(names, pages=None):
    keys = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    slots = None if pages is None else torch.tensor([page * PAGE + i for page in pages for i in range(PAGE)])
    return [PoolTransfer(PoolName.KV, keys=keys, device_indices=slots)]


@pytest.fixture
def make(request, monkeypatch):
    monkeypatch.setattr(module, "get_parallel", lambda: types.SimpleNamespace(attn_tp_size=1, attn_tp_rank=0))
    made = []

    def make(seed=0, components=(ComponentType.FULL,), server=(), params=(), **settings):
        pool = DevicePool(seed)
        server_args = types.SimpleNamespace(**{"model_path": "org/model", "revision": None, "dtype": "float32",
                                               "device": "cpu", **dict(server)})
        described = types.SimpleNamespace(**{
            "token_to_kv_pool_allocator": types.SimpleNamespace(get_kvcache=lambda: pool), "page_size": PAGE,
            "is_eagle": False, "mtp_draft_device_pools": (), "sidecar_draft_device_pools": (),
            "tp_cache_group": None, "attn_tp_cache_group": None, "attn_cp_cache_group": None, **dict(params)})
        linker = PoolLinker(server_args, described, components=set(components), forward_stream=None, extra_config={
            "directory": "memory", "cell": f"linker-{request.node.name}"[:60], "segment_bytes": 1 << 20, **settings})
        linker.device = pool
        made.append(linker)
        return linker

    yield make
    for linker in made:
        linker.close()


def save(linker, names, pages):
    assert linker.offload(transfer(names, pages)) is True
    until(lambda: linker.num_completed_offloads() == 1)
    assert linker.pop_completed_offload() is True


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_every_method_that_sglang_asks_for_is_there():
    assert not inspect.isabstract(PoolLinker)


def test_what_one_rank_saved_another_server_loads_into_other_pages(make):
    source, target = make(1), make(2)
    save(source, "abcd", [3, 1, 20, 9])
    until(lambda: target.lookup("r", transfer("abcdx")) == [1, 2, 3, 4])
    untouched = target.device.page(5)
    assert target.load("r", transfer("abcd", [7, 2, 11, 0])) is True
    for theirs, ours in zip([3, 1, 20, 9], [7, 2, 11, 0], strict=True):
        assert all(map(torch.equal, source.device.page(theirs), target.device.page(ours)))
    assert all(map(torch.equal, untouched, target.device.page(5)))
    assert target.start_layer_wise_loading() == -1, "the forward pass waits for nothing"
    assert target.finish_layer_wise_loading(-1) is True


def test_a_load_that_lacks_a_page_is_not_accepted_so_that_sglang_computes_it(make):
    source, target = make(1), make(2)
    save(source, "ab", [3, 1])
    until(lambda: target.lookup("r", transfer("ab")) == [1, 2])
    assert target.load("r", transfer("abz", [7, 2, 11])) is False
    assert target.cancel_queued_load("r") is False


def test_a_load_may_be_cancelled_only_until_its_forward_pass_begins(make):
    source, target = make(1), make(2)
    save(source, "a", [3])
    until(lambda: target.lookup("r", transfer("a")) == [1])
    for rid in ("r", "s"):
        assert target.load(rid, transfer("a", [7])) is True
    assert target.cancel_queued_load("r") is True
    target.start_layer_wise_loading()
    assert target.cancel_queued_load("s") is False


def test_pages_that_somebody_holds_are_not_offered_again(make):
    source, target = make(1), make(2)
    save(source, "ab", [3, 1])
    until(lambda: target.lookup("r", transfer("ab")) == [1, 2])
    assert source.offload(transfer("ab", [3, 1])) is False
    assert target.offload(transfer("ab", [5, 6])) is False
    save(target, "abc", [5, 6, 7])
    assert source.device.page(3)[0].ne(target.device.page(5)[0]).any(), "else the test shows nothing"
    assert source.load("r", transfer("abc", [10, 11, 12])) is True
    assert torch.equal(source.device.page(10)[0], source.device.page(3)[0]), "what was there stays what it is"


def test_offloads_complete_in_order_and_their_pages_are_read_before_they_are_let_go(make):
    linker = make(1)
    gate, put = threading.Event(), linker._client.put
    linker._client.put = lambda *args: (gate.wait(10), put(*args))[1]
    for name, page in (("a", 1), ("b", 2), ("c", 3)):
        assert linker.offload(transfer(name, [page])) is True
    time.sleep(0.05)
    assert linker.num_completed_offloads() == 0
    gate.set()
    until(lambda: linker.num_completed_offloads() == 3)
    assert [linker.pop_completed_offload() for _ in range(3)] == [True] * 3
    assert linker.num_completed_offloads() == 0


def test_emptying_the_cache_waits_for_saves_and_keeps_the_pool(make):
    linker = make(1)
    names = [f"page {i}" for i in range(PAGES)]
    assert linker.offload(transfer(names, range(PAGES))) is True
    linker.reset()
    assert linker.num_completed_offloads() == 0, "SGLang has let the pages go itself"
    until(lambda: linker.lookup("r", transfer(names)) == list(range(1, PAGES + 1)))


def test_emptying_the_cache_drops_saves_that_take_too_long(make, monkeypatch):
    monkeypatch.setattr(module, "RESET_WAIT_S", 0.05)
    linker = make(1)
    put, calls = linker._client.put, []
    linker._client.put = lambda *args: (calls.append(1), time.sleep(0.2), put(*args))[2]
    names = [f"page {i}" for i in range(PAGES)]
    assert linker.offload(transfer(names, range(PAGES))) is True
    linker.reset()
    seen = len(calls)
    assert 0 < seen < PAGES / 4
    time.sleep(0.3)
    assert len(calls) == seen, "a page was read after SGLang had let it go"


def test_pages_of_other_weights_have_other_names(make):
    source, target = make(1), make(2)

    def load_weights(**request):
        request = types.SimpleNamespace(**{"flush_cache": True, "torch_empty_cache": False, **request})
        scheduler = types.SimpleNamespace(flush_cache=lambda empty_cache: (source.reset(), target.reset()))
        SchedulerWeightUpdaterManager.flush_cache_after_weight_update(scheduler, request, True, "")

    save(source, "ab", [3, 1])
    until(lambda: target.lookup("r", transfer("ab")) == [1, 2])
    load_weights(weight_version="2")
    assert source.lookup("r", transfer("ab")) == target.lookup("r", transfer("ab")) == []
    save(source, "ab", [5, 6])
    until(lambda: target.lookup("r", transfer("ab")) == [1, 2])     # one version, one name
    for request in ({"weight_version": None}, {"weight_version": "2", "flush_cache": False}):
        load_weights(**request)
        assert source.lookup("r", transfer("ab")) == target.lookup("r", transfer("ab")) == []
        save(source, "a", [7])
        until(lambda: source.lookup("r", transfer("ab")) == [1])
        assert target.lookup("r", transfer("ab")) == [], "nobody knows that these are the same weights"


def test_what_cannot_be_served_is_refused_at_start_by_name(make):
    for word, given in {"SWA": {"components": (ComponentType.FULL, ComponentType.SWA)},
                        "speculative": {"params": {"is_eagle": True}}, "on cuda": {"server": {"device": "cuda"}},
                        "--pp-size": {"server": {"pp_size": 2}}, "segment_byte": {"segment_byte": 1}}.items():
        with pytest.raises(ConfigError, match=word):
            make(**given)


class HostPool:
    """What the HiCache storage needs of SGLang's host pool: pages whose keys lie together, and whose values do."""

    page_size, layer_num, dtype, layout = PAGE, LAYERS, torch.float32, "page_first_direct"

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.pages = torch.rand(2, PAGES, LAYERS, PAGE, HEADS, WIDTH, generator=generator)

    def get_page_buffer_meta(self, indices):
        pages = [int(index) // PAGE for index in indices[::PAGE]]
        parts = [self.pages[which, page] for page in pages for which in range(2)]
        return [part.data_ptr() for part in parts], [part.nbytes for part in parts]


def slots(pages):
    return torch.tensor([page * PAGE + i for page in pages for i in range(PAGE)])


@pytest.fixture
def make_storage(request, monkeypatch):
    arguments = types.SimpleNamespace(model_path="org/model", revision=None, dtype="float32")
    monkeypatch.setattr(hicache, "get_server_args", lambda: arguments)
    made = []

    def make(seed=0, interface_v1=1, **changes):
        settings = {"directory": "memory", "cell": f"hicache-{request.node.name}"[:60], "segment_bytes": 1 << 20}
        storage = hicache.PoolStorage(types.SimpleNamespace(**{
            "tp_rank": 0, "tp_size": 1, "pp_size": 1, "is_mla_model": False, "model_name": "org/model",
            "extra_config": {"interface_v1": interface_v1, "mooncake": settings}, **changes}), {})
        made.append(storage)
        storage.register_mem_pool_host(HostPool(seed))
        return storage

    yield make
    for storage in made:
        storage.close()


def test_what_one_servers_host_cache_saved_another_finds(make_storage):
    source, target = make_storage(1), make_storage(2)
    keys = [hashlib.sha256(name.encode()).hexdigest() for name in "abc"]
    assert source.batch_set_v1(keys[:2], slots([3, 1])) == [True, True]
    until(lambda: target.batch_exists(keys) == 2)
    assert (target.exists(keys[0]), target.exists(keys[2])) == (True, False)
    assert target.batch_get_v1(keys, slots([7, 2, 9])) == [True, True, False]
    for theirs, ours in ((3, 7), (1, 2)):
        assert torch.equal(source.mem_pool_host.pages[:, theirs], target.mem_pool_host.pages[:, ours])


def test_a_storage_is_refused_where_it_could_give_wrong_pages(make_storage):
    for word, given in {"interface_v1 is off": {"interface_v1": 0}, "latent attention": {"is_mla_model": True},
                        "pp_size is 2": {"pp_size": 2}}.items():
        with pytest.raises(ConfigError, match=word):
            make_storage(**given)
    with pytest.raises(ConfigError, match="'swa'"):
        make_storage().register_mem_host_pool_v2(HostPool(0), "swa")


RANK = """
import sys, types
from torch import distributed
from mooncake_connector.engines.sglang.compat import is_true_on_all_ranks
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
group = distributed.new_group([0, 1])
params = types.SimpleNamespace(attn_cp_cache_group=None, attn_tp_cache_group=group, tp_cache_group=group)
print([is_true_on_all_ranks(answer, params) for answer in ([True, True, False], [True, False, False])[rank]])
"""


def test_two_ranks_accept_a_load_only_together(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    ends = [rank.communicate(timeout=120) for rank in ranks]
    assert [out.strip() for out, _ in ends] == ["[True, False, False]"] * 2, ends
