"""SchedulerSide against stand-ins for vLLM's request and scheduler output: what is ordered, held and answered."""

import dataclasses
import enum
import time
import types

import pytest

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.engines.vllm.scheduler import NEWS_WAIT_S, SchedulerSide
from mooncake_connector.transfer.doorbell import Ringer
from mooncake_connector.transfer.prefix import PoolView
from mooncake_store.directory.memory import MemoryDirectory
from mooncake_store.types import HostIdentity, Member, NodeId, block_key

BLOCK = 16
NAMESPACE = b"n" * 16
ADDRESS = "tcp://127.0.0.1:9"


class Status(enum.Enum):
    FINISHED_STOPPED = 1
    FINISHED_LENGTH_CAPPED = 2
    FINISHED_ABORTED = 3


@dataclasses.dataclass
class Request:
    request_id: str
    num_prompt_tokens: int
    kv_transfer_params: dict | None = None
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    status: Status = Status.FINISHED_LENGTH_CAPPED
    pooling_params: None = None

    @property
    def num_tokens(self):
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def block_hashes(self):
        return [f"h{i}".encode() * 8 for i in range(self.num_tokens // BLOCK)]


class Blocks:
    def __init__(self, num_blocks):
        self.ids = [100 + i for i in range(num_blocks)]

    def get_block_ids(self):
        return (self.ids,)


def output(request=None, num_tokens=0, num_blocks=0, preempted=()):
    state = types.SimpleNamespace(get_block_ids=lambda request_id: (Blocks(num_blocks).ids,))
    scheduled = {request.request_id: num_tokens} if request else {}
    return types.SimpleNamespace(total_num_scheduled_tokens=num_tokens, num_scheduled_tokens=scheduled,
                                 preempted_req_ids=set(preempted), kv_connector_block_state=state)


@pytest.fixture
def directory():
    directory = MemoryDirectory()
    directory.join(Member(NodeId("n1"), "store", "tcp://127.0.0.1:1", HostIdentity("b", 1), 1, 1, "0"))
    yield directory
    directory.close()


@pytest.fixture
def side(directory):
    made = []

    def make(*, producer=True, consumer=True, **config):
        made.append(SchedulerSide(
            ConnectorConfig(**config), engine_id=f"e-{time.monotonic_ns()}", is_producer=producer, is_consumer=consumer,
            pool=PoolView(directory, min_blocks=1), namespace=NAMESPACE, num_parts=1, block_size=BLOCK))
        made[-1].addresses = [ADDRESS]
        return made[-1]

    yield make
    for one in made:
        one.close()


def keys(request):
    return [block_key(NAMESPACE, 0, content) for content in request.block_hashes]


def prefill_params(transfer="t"):
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}


def decode_params(transfer="t"):
    return {"do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer,
            "remote_addresses": [ADDRESS]}


def test_a_pool_hit_loads_whole_blocks_and_leaves_a_token_to_compute(side, directory):
    request, one = Request("r", 64), side()
    directory.publish(keys(request))
    directory.flush(1)
    one.on_new_request(request)
    assert one.match(request, 0) == (48, True), "64 tokens are 4 blocks, but one token must be computed"
    assert one.match(request, 16) == (32, True)
    one.allocated(request, Blocks(4), 32)
    (load,) = one.build(output()).pool_loads
    assert (load.block_ids, load.keys) == ([101, 102], [keys(request)[1:3]])


def test_a_failed_load_is_not_tried_for_ever(side, directory):
    request, one = Request("r", 64), side()
    directory.publish(keys(request))
    directory.flush(1)
    one.on_new_request(request)
    one.match(request, 0)
    one.allocated(request, Blocks(3), 48)
    one.update(set(), {"r"})
    assert one.match(request, 0) == (0, False)


def test_only_blocks_that_the_pool_lacks_are_saved_and_they_hold_the_request(side, directory):
    request, one = Request("r", 64), side()
    directory.publish(keys(request)[:1])
    directory.flush(1)
    one.on_new_request(request)
    one.allocated(request, Blocks(4), 0)
    plan = one.build(output(request, 40, 4))
    (save,) = plan.pool_saves
    assert (save.block_ids, save.keys) == ([101], [keys(request)[1:2]]), "the third block is not full yet"
    request.num_computed_tokens = 40
    (save,) = one.build(output(request, 24, 4)).pool_saves
    assert save.block_ids == [102, 103]
    assert one.finished(request, 4) == (True, None)
    (item,) = one.build(output()).finished
    assert (item.held, item.delivered, item.transfer_id) == (True, False, "")


def test_a_prefill_is_announced_computed_held_and_answered(side):
    request, one = Request("r", 64, prefill_params()), side(consumer=False, pool=True, publish="step")
    one.on_new_request(request)
    one.allocated(request, Blocks(4), 0)
    plan = one.build(output(request, 64, 4))
    assert [(item.request_id, item.transfer_id) for item in plan.expected] == [("r", "t")]
    (step,) = plan.prefills
    assert (step.tokens_before, step.tokens_after, step.tokens_needed, step.per_layer) == (0, 64, 63, False)
    held, answer = one.finished(request, 4)
    assert held
    assert answer == {"do_remote_prefill": True, "do_remote_decode": False, "transfer_id": "t", "block_size": BLOCK,
                      "remote_addresses": [ADDRESS], "remote_engine_id": answer["remote_engine_id"]}


def test_a_first_token_that_ends_the_text_is_still_handed_over(side):
    request, one = Request("r", 64, prefill_params(), status=Status.FINISHED_STOPPED), side(pool=False)
    one.on_new_request(request)
    one.build(output(request, 64, 4))
    assert one.finished(request, 4)[0]


def test_an_aborted_prefill_is_not_held(side):
    request, one = Request("r", 8, prefill_params(), status=Status.FINISHED_ABORTED), side()
    one.on_new_request(request)
    one.build(output(request, 8, 1))
    assert one.finished(request, 1) == (False, None)
    (item,) = one.build(output()).finished
    assert (item.held, item.delivered, item.transfer_id) == (False, False, "t")


def test_a_decode_pulls_all_but_the_last_token(side):
    request, one = Request("r", 65, decode_params()), side(producer=False)
    one.on_new_request(request)
    assert one.match(request, 16) == (48, True)
    one.allocated(request, Blocks(5), 48)
    plan = one.build(output())
    assert [item.transfer_id for item in plan.announced] == ["t"]
    (load,) = plan.handoffs
    assert (load.block_ids, load.first_block, load.tokens_needed) == ([100, 101, 102, 103], 1, 64)
    one.allocated(request, Blocks(5), 0)
    assert one.build(output()).handoffs == [], "vLLM calls again when the load is done"


def test_a_one_token_prompt_pulls_nothing_and_frees_the_prefill(side):
    request, one = Request("r", 1, decode_params()), side()
    one.on_new_request(request)
    assert one.match(request, 0) == (0, False)
    one.allocated(request, Blocks(1), 0)
    (load,) = one.build(output()).handoffs
    assert load.block_ids == []


def test_an_abort_while_parked_is_left_to_the_worker(side):
    request, one = Request("r", 64, decode_params(), status=Status.FINISHED_ABORTED), side()
    one.on_new_request(request)
    one.match(request, 0)
    one.allocated(request, Blocks(4), 63)
    one.build(output())
    assert one.finished(request, 4) == (False, None)
    assert one.has_unsent, "the worker must hear of it although nothing runs"
    assert one.build(output()).cancelled == ["r"]
    assert not one.has_unsent


def test_a_request_rejected_before_admission_frees_the_prefill(side):
    request, one = Request("r", 64, decode_params(), status=Status.FINISHED_ABORTED), side()
    one.on_new_request(request)
    one.finished(request, 0)
    assert one.build(output()).cancelled == ["r"]


@pytest.mark.parametrize("params", [
    {"do_remote_prefill": True, "transfer_id": "t"},
    {"do_remote_prefill": True, "transfer_id": 5, "remote_addresses": [ADDRESS]},
    {"do_remote_prefill": True, "transfer_id": "t", "remote_addresses": ["http://x"]},
    {"do_remote_decode": True},
    {"do_remote_decode": "yes", "transfer_id": "t"},
])
def test_unusable_parameters_cost_the_hand_over_not_the_request(side, caplog, params):
    request, one = Request("r", 64, params), side()
    one.on_new_request(request)
    assert one.match(request, 0) == (0, False)
    assert "served without a hand-over" in caplog.text
    assert one.finished(request, 4) == (False, None)


def test_a_transfer_id_used_twice_hands_over_once(side, caplog):
    one = side()
    for name in ("a", "b"):
        one.on_new_request(Request(name, 64, prefill_params()))
    assert [item.request_id for item in one.build(output()).expected] == ["a"]
    assert "under way already" in caplog.text


def test_the_introduction_names_the_addresses(side):
    request, one = Request("r", 1, {"introduce": True}), side()
    one.on_new_request(request)
    held, answer = one.finished(request, 1)
    assert (held, answer["remote_addresses"]) == (False, [ADDRESS])


def test_an_empty_step_waits_for_news_only_while_something_is_parked(side):
    request, one = Request("r", 64, decode_params()), side()
    started = time.monotonic()
    one.build(output())
    assert time.monotonic() - started < NEWS_WAIT_S / 2
    one.on_new_request(request)
    one.match(request, 0)
    one.allocated(request, Blocks(4), 63)
    one.build(output())
    started = time.monotonic()
    one.build(output())
    assert time.monotonic() - started >= NEWS_WAIT_S * 0.9
    ringer = Ringer(one._engine_id)
    ringer.ring()
    started = time.monotonic()
    one.build(output())
    assert time.monotonic() - started < NEWS_WAIT_S / 2
    ringer.close()


def test_a_prefix_that_the_same_step_computes_is_not_ready_before_it(side):
    """vLLM lets a request hit blocks that another one of its batch is about to write."""
    one = side(pool=False)
    first, second = Request("a", 40), Request("b", 64, prefill_params(), num_computed_tokens=32)
    for request in (first, second):
        one.on_new_request(request)
    tables = {"a": [7, 8, 9], "b": [7, 8, 20, 21]}
    scheduled = types.SimpleNamespace(
        total_num_scheduled_tokens=72, num_scheduled_tokens={"a": 40, "b": 32}, preempted_req_ids=set(),
        kv_connector_block_state=types.SimpleNamespace(get_block_ids=lambda request_id: (tables[request_id],)))
    (step,) = one.build(scheduled).prefills
    assert (step.tokens_before, step.tokens_after) == (0, 64)
    first.num_computed_tokens = 16      # now the first block was written by an earlier step
    scheduled.num_scheduled_tokens = {"a": 24, "b": 32}
    (step,) = one.build(scheduled).prefills
    assert step.tokens_before == 16
