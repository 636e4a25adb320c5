"""The placement service on a real socket: any client, any frame, one answer each."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import zmq
import zmq.asyncio

from mooncake_connector.router.admission import ServiceClass
from mooncake_connector.router.engines import EngineState
from mooncake_connector.router.messages import (
    FRAME_MAX_BYTES,
    Accepted,
    Admit,
    Answer,
    Busy,
    Finished,
    LoadReport,
    Place,
    Placed,
    Question,
    Refused,
    Register,
    Unregister,
    decode_answer,
    encode,
)
from unit.router.cell import Cell, eventually, running_cell
from unit.router.fake_engine import MODEL, FakeEngine


class Client:
    """A DEALER that asks and waits."""

    def __init__(self, context: zmq.asyncio.Context, address: str, kind: int = zmq.DEALER) -> None:
        self.socket = context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    async def ask(self, question: Question | bytes) -> Answer:
        await self.socket.send(question if isinstance(question, bytes) else encode(question))
        return await self.receive()

    async def receive(self) -> Answer:
        return decode_answer((await asyncio.wait_for(self.socket.recv_multipart(), 5))[-1])


@asynccontextmanager
async def placing(**kwargs: object) -> AsyncIterator[tuple[Cell, Client]]:
    async with running_cell(placement="tcp://127.0.0.1:0", **kwargs) as cell:  # type: ignore[arg-type]
        context = zmq.asyncio.Context()
        assert cell.app.service is not None
        try:
            yield cell, Client(context, cell.app.service.address)
        finally:
            context.destroy(linger=0)


async def test_place_and_finish() -> None:
    async with placing() as (cell, client):
        placed = await client.ask(Place("r1", num_prompt_tokens=100, num_output_tokens=10, model=MODEL))
        assert isinstance(placed, Placed) and placed.prefill_params and placed.decode_params
        assert (placed.prefill_url, placed.decode_url) == (cell.prefill.url, cell.decode.url)
        assert placed.prefill_params.transfer_id == placed.decode_params.transfer_id == placed.transfer_id
        assert placed.decode_params.remote_engine_id == cell.prefill.engine_id
        prefill = cell.app.placer.table.get(cell.prefill.url)
        decode = cell.app.placer.table.get(cell.decode.url)
        assert prefill and decode and (prefill.prefill_tokens, decode.decode_tokens) == (100, 110)
        assert await client.ask(Finished(placed.transfer_id, leg="prefill")) == Accepted(placed.transfer_id)
        assert (prefill.prefill_tokens, decode.decode_tokens) == (0, 110)
        assert await client.ask(Finished(placed.transfer_id)) == Accepted(placed.transfer_id)
        again = await client.ask(Finished(placed.transfer_id))
        assert isinstance(again, Refused) and again.code == "unknown"


async def test_a_req_client_is_answered_too() -> None:
    async with placing(is_idle_checked=False) as (cell, _):
        context = zmq.asyncio.Context()
        assert cell.app.service is not None
        client = Client(context, cell.app.service.address, zmq.REQ)
        assert isinstance(await client.ask(Place("r", 1)), Placed)
        assert isinstance(await client.ask(b"junk"), Refused)
        assert isinstance(await client.ask(Place("r", 1)), Placed)
        context.destroy(linger=0)


async def test_an_engine_that_registers_is_probed_and_used_until_it_unregisters() -> None:
    async with placing(num_decodes=2) as (cell, client):
        second = cell.decodes[1]
        assert await client.ask(Unregister(second.url)) == Accepted(second.url)
        assert second.url not in {each.url for each in cell.app.placer.table}
        assert isinstance(await client.ask(Unregister(second.url)), Refused)
        assert await client.ask(Register(second.url, "decode")) == Accepted(second.url)
        await cell.wait_state(second, EngineState.UP)
        placed = await client.ask(Place("r", 10, excluded=(cell.decode.url,)))
        assert isinstance(placed, Placed) and placed.decode_url == second.url
        await client.ask(Finished(placed.transfer_id))


async def test_an_engine_that_tells_its_addresses_is_usable_at_once() -> None:
    async with placing(num_prefills=0, is_idle_checked=False) as (cell, client):
        silent = await FakeEngine(health_s=30.0).start()
        cell.prefills.append(silent)
        await client.ask(Register(silent.url, "prefill", MODEL, "engine-x", ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")))
        placed = await client.ask(Place("r", 10))
        assert isinstance(placed, Placed) and placed.decode_params
        assert placed.decode_params.remote_addresses == ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
        await silent.stop()


async def test_a_load_report_moves_work_elsewhere() -> None:
    async with placing(num_decodes=2) as (cell, client):
        assert isinstance(await client.ask(LoadReport("http://nobody:1", 1, 1)), Refused)
        await client.ask(LoadReport(cell.decodes[0].url, 0, 1_000_000))
        for number in range(3):
            placed = await client.ask(Place(f"r{number}", 10))
            assert isinstance(placed, Placed) and placed.decode_url == cell.decodes[1].url
            await client.ask(Finished(placed.transfer_id))


def send_garbage(address: str, num_frames: int) -> list[Answer]:
    """Send noise and damaged questions, a hundred at a time to stay below the socket's queue; return every answer."""
    rng = random.Random(7)
    good = encode(Place("r", 5))
    answers = []
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.setsockopt(zmq.LINGER, 0)
        client.setsockopt(zmq.RCVTIMEO, 5000)
        client.connect(address)
        for number in range(num_frames):
            frame = bytearray(good)
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
            noise = rng.randbytes(rng.randrange(200)) if number % 3 else bytes(frame)
            client.send_multipart([noise] * (1 + (number % 50 == 0)))
            if number % 100 == 99:
                answers += [decode_answer(client.recv_multipart()[-1]) for _ in range(100)]
    return answers


async def test_a_question_that_waits_for_its_turn() -> None:
    async with placing(hold_above_s=0.02) as (cell, client):
        first = await client.ask(Admit(Place("same", 30_000)))
        assert isinstance(first, Placed) and first.request_id == "same" and first.prefill_url
        await client.socket.send(encode(Admit(Place("same", 30_000))))
        await client.socket.send(encode(Admit(Place("short", 100))))
        await eventually(lambda: cell.app.dispatcher.num_held == 2, 3, "both to wait")
        other = await client.ask(Place("at once", 10))
        assert isinstance(other, Placed), "others are answered meanwhile"
        await client.ask(Finished(other.transfer_id))
        await client.ask(Finished(first.transfer_id, leg="prefill"))
        second = await client.receive()
        assert isinstance(second, Placed) and second.request_id == "short", "the shorter one goes first"
        await client.ask(Finished(second.transfer_id))
        third = await client.receive()
        assert isinstance(third, Placed) and third.request_id == "same" and third.transfer_id != first.transfer_id
        for placed in (first, third):
            await client.ask(Finished(placed.transfer_id))


async def test_a_question_that_waits_too_long_or_cannot_be_served_in_time() -> None:
    promise = {"fast": ServiceClass(ttft_s=0.5, tbt_s=60.0)}
    async with placing(hold_above_s=0.02, classes=promise) as (cell, client):
        first = await client.ask(Admit(Place("first", 100_000)))
        assert isinstance(first, Placed)
        late = await client.ask(Admit(Place("patient", 100_000), wait_ms=100))
        assert isinstance(late, Busy) and late.subject == "patient" and "100 ms" in late.reason
        never = await client.ask(Admit(Place("hasty", 100_000), "fast"))
        assert isinstance(never, Busy) and never.retry_after_s >= 1
        nowhere = await client.ask(Admit(Place("lost", 10, model="no such")))
        assert isinstance(nowhere, Refused) and (nowhere.subject, nowhere.code) == ("lost", "no_model")
        assert cell.app.dispatcher.num_held == 0
        await client.ask(Finished(first.transfer_id))


async def test_ten_thousand_garbage_frames() -> None:
    async with placing() as (cell, client):
        assert cell.app.service is not None
        answers = await asyncio.to_thread(send_garbage, cell.app.service.address, 10_000)
        for answer in answers:
            if isinstance(answer, Placed):
                cell.app.placer.finish(answer.transfer_id)
            else:
                assert isinstance(answer, Refused | Accepted)
        placed = await client.ask(Place("after", 5))
        assert isinstance(placed, Placed)
        await client.ask(Finished(placed.transfer_id))
        garbage = sum(value for name, value in cell.app.metrics.snapshot().items() if "garbage_total" in name)
        assert garbage > 9000
        assert (await cell.ask())[0] == 200


async def test_an_oversized_frame_costs_its_sender_the_connection_and_nobody_else() -> None:
    async with placing() as (cell, client):
        context = zmq.asyncio.Context()
        assert cell.app.service is not None
        rude = Client(context, cell.app.service.address)
        await rude.socket.send(b"\x01" * (FRAME_MAX_BYTES + 1))
        await asyncio.sleep(0.05)
        placed = await client.ask(Place("r", 5))
        assert isinstance(placed, Placed)
        await client.ask(Finished(placed.transfer_id))
        context.destroy(linger=0)


async def test_a_placement_that_nobody_finishes_expires() -> None:
    async with placing(placement_ttl_s=0.2) as (cell, client):
        await client.ask(Place("r", 5))
        assert cell.app.placer.num_open == 1
        await cell.wait_idle(timeout_s=8)
        assert cell.sample("mooncake_router_expired_total") == 1
