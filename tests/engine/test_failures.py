"""Break every part of a running cell: each time an answer or a clear error in time, right tokens, nothing left held."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.cluster import ANSWER_TIMEOUT_S, LEASE_S, Fleet, checked, random_prompt, run
from mooncake_connector.demo.client import Answer, complete, introduce, post
from mooncake_connector.demo.cluster import SERVED_NAME
from mooncake_connector.demo.processes import cpu_seconds
from mooncake_connector.demo.status import by_label, difference, scrape, total

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

MIDDLE_TOKENS = 900     # several seconds, so that it is hit in the middle; recomputed in 15 s on one slow core
EOS = 2
BUSY_S = 1.5


def external_tokens(grown: dict[str, float]) -> float:
    """Return how many prompt tokens came from elsewhere."""
    return by_label(grown, "vllm:prompt_tokens_by_source_total").get("external_kv_transfer", 0)


async def until_computing(fleet: Fleet, timeout_s: float = 10.0) -> None:
    """Wait until the prefill engine is in the middle of a step: vLLM's metrics do not show one before it ends."""
    pids = fleet.supervisor.children["prefill"].pids()
    began, deadline = cpu_seconds(pids), time.monotonic() + timeout_s
    while cpu_seconds(pids) - began < BUSY_S:
        assert time.monotonic() < deadline, "the prefill engine never started to compute"
        await asyncio.sleep(0.05)


def test_first_token_is_eos(healthy: Fleet) -> None:
    """The prefill engine finishes with STOPPED instead of LENGTH_CAPPED; the hand-over must work all the same."""
    async def ask(http: Any) -> tuple[Answer, float]:
        began = time.monotonic()
        found = await healthy.split(http, random_prompt(300, 1), logit_bias={str(EOS): 100})
        assert not found.prefill_error
        assert found.prefill["choices"][0]["finish_reason"] == "stop"
        return found.decode, time.monotonic() - began

    before = scrape(healthy.cell.decode_url)
    answer, seconds = run(ask)
    assert (answer.error, answer.finish_reason) == ("", "stop")
    assert answer.token_ids in ([], [EOS])
    assert seconds < ANSWER_TIMEOUT_S
    assert external_tokens(difference(scrape(healthy.cell.decode_url), before)) >= 299


def test_request_aborted_while_parked(healthy: Fleet) -> None:
    """The decode request is given up before its prefill has begun; the late prefill must not keep its blocks."""
    prompt = random_prompt(300, 2)

    async def ask(http: Any) -> None:
        peer = await introduce(http, healthy.cell.prefill_url)
        params = {"do_remote_prefill": True, "do_remote_decode": False, "transfer_id": "parked", **peer}
        task = asyncio.create_task(complete(http, healthy.cell.decode_url, prompt, max_tokens=4,
                                            kv_transfer_params=params))
        await asyncio.sleep(2)
        assert not task.done(), task.result().error
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(1)
        await post(http, f"{healthy.cell.prefill_url}/v1/completions", {
            "model": SERVED_NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0, "kv_transfer_params": {
                "do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "parked"}})

    run(ask)
    healthy.assert_nothing_held()


def test_decode_never_comes(healthy: Fleet) -> None:
    """Blocks of a prefill that nobody fetches are freed when the lease ends, not before."""
    async def ask(http: Any) -> None:
        await post(http, f"{healthy.cell.prefill_url}/v1/completions", {
            "model": SERVED_NAME, "prompt": random_prompt(300, 3), "max_tokens": 1, "kv_transfer_params": {
                "do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "lonely"}})

    run(ask)
    time.sleep(1)
    assert total(healthy.process_samples("prefill"), "mooncake_blocks_held") == 3
    healthy.assert_nothing_held(LEASE_S + 10)


def test_prefill_never_comes(healthy: Fleet) -> None:
    """A decode request whose transfer the prefill engine never hears of stays parked, but only so long."""
    async def ask(http: Any) -> Answer:
        peer = await introduce(http, healthy.cell.prefill_url)
        params = {"do_remote_prefill": True, "do_remote_decode": False, "transfer_id": "nobody", **peer}
        task = asyncio.create_task(complete(http, healthy.cell.decode_url, random_prompt(200, 4), max_tokens=4,
                                            kv_transfer_params=params))
        await asyncio.sleep(3)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return checked(await complete(http, healthy.cell.decode_url, random_prompt(200, 5), max_tokens=4))

    run(ask)


def test_client_disconnects_mid_stream(healthy: Fleet) -> None:
    """Both engines forget the request."""
    async def ask(http: aiohttp.ClientSession) -> None:
        body = {"model": SERVED_NAME, "prompt": random_prompt(300, 6), "max_tokens": 2000, "ignore_eos": True,
                "stream": True, "temperature": 0}
        async with http.post(f"{healthy.cell.router_url}/v1/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            seen = 0
            async for line in reply.content:
                seen += line.startswith(b"data: {")
                if seen == 3:
                    break
            reply.close()

    run(ask)
    healthy.assert_nothing_held()


def test_client_disconnects_during_prefill(healthy: Fleet) -> None:
    """A client that leaves before its first token leaves nothing parked."""
    async def ask(http: aiohttp.ClientSession) -> None:
        task = asyncio.create_task(complete(http, healthy.cell.router_url, random_prompt(MIDDLE_TOKENS, 7),
                                            max_tokens=8))
        await until_computing(healthy)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(ask)
    healthy.assert_nothing_held()


def test_peer_with_another_fingerprint_is_refused(healthy: Fleet, fleet_bfloat16: Fleet) -> None:
    """Bytes of a bfloat16 cache must never enter a float32 one; the request is computed instead."""
    prompt = random_prompt(200, 8)

    async def ask(http: Any) -> tuple[Any, Answer]:
        peer = await introduce(http, fleet_bfloat16.cell.prefill_url)
        return await asyncio.gather(
            healthy.split(http, prompt, peer=peer, prefill_url=fleet_bfloat16.cell.prefill_url),
            healthy.lone(http, prompt))

    before = healthy.samples()
    split, lone = run(ask)
    grown = difference(healthy.samples(), before)
    assert split.decode.token_ids == lone.token_ids, split.decode.error
    assert total(grown, "mooncake_handoff_refused_total") >= 1
    logs = healthy.supervisor.children["decode"].log_path.read_text() + (
        fleet_bfloat16.supervisor.children["prefill"].log_path.read_text())
    refusal = next(line for line in logs.splitlines() if "differ" in line and "dtype" in line)
    assert "float32" in refusal and "bfloat16" in refusal


def test_etcd_killed_and_restarted_costs_no_request(healthy: Fleet) -> None:
    """Without etcd everything goes on with what is known; after its return new blocks are announced again."""
    prompt = random_prompt(300, 9)

    async def ask(http: Any, seed: int) -> None:
        wanted = random_prompt(200, seed)
        split, lone = await asyncio.gather(healthy.split(http, wanted), healthy.lone(http, wanted))
        assert split.decode.token_ids == lone.token_ids, split.decode.error

    healthy.supervisor.kill("etcd")
    run(lambda http: ask(http, 90))
    run(lambda http: healthy.split(http, prompt))       # saved while etcd is away
    healthy.supervisor.restart("etcd")
    run(lambda http: ask(http, 91))
    deadline = time.monotonic() + 20
    while total(healthy.process_samples("prefill"), "mooncake_directory_connected") != 1:
        assert time.monotonic() < deadline, "the prefill engine did not find the restarted etcd"
        time.sleep(0.5)
    time.sleep(3)

    async def again(http: Any) -> tuple[Answer, Answer]:
        await healthy.forget(http)
        return checked(await complete(http, healthy.cell.prefill_url, prompt, max_tokens=16)), (
            await healthy.lone(http, prompt))

    before = scrape(healthy.cell.prefill_url)
    answer, lone = run(again)
    assert answer.token_ids == lone.token_ids
    assert external_tokens(difference(scrape(healthy.cell.prefill_url), before)) == 256


def test_corrupted_pool_blocks_are_misses(healthy: Fleet) -> None:
    """Flip a byte in every page of every pool segment: checksums turn each hit into a miss, and tokens stay right."""
    prompt = random_prompt(400, 10)

    async def first(http: Any) -> None:
        checked(await complete(http, healthy.cell.prefill_url, prompt, max_tokens=1))

    async def second(http: Any) -> tuple[Answer, Answer]:
        await healthy.forget(http)
        return await asyncio.gather(complete(http, healthy.cell.decode_url, prompt, max_tokens=16),
                                    healthy.lone(http, prompt))

    run(first)
    healthy.wait_saved()
    num_flipped = sum(flip_segments(pid) for name in ("store", "prefill", "decode")
                      for pid in healthy.supervisor.children[name].pids())
    assert num_flipped, "found no pool segment to corrupt"
    before = healthy.samples()
    answer, lone = run(second)
    grown = difference(healthy.samples(), before)
    assert answer.token_ids == lone.token_ids, answer.error
    corrupt = by_label(grown, "mooncake_pull_blocks_total").get("corrupt", 0)
    assert corrupt >= 1, f"no corrupt block was noticed: {grown}"


def test_store_node_killed(healthy: Fleet) -> None:
    """Blocks that only the store node had are misses from now on, also while the directory still names it."""
    prompt = random_prompt(400, 11)
    run(lambda http: complete(http, healthy.cell.prefill_url, prompt, max_tokens=1))
    healthy.wait_saved()
    healthy.supervisor.restart("prefill")       # its own segment is gone, the store node's copy is left
    healthy.supervisor.kill("store")
    began = time.monotonic()

    async def ask(http: Any) -> tuple[Any, Answer]:
        return await asyncio.gather(healthy.split(http, prompt), healthy.lone(http, prompt))

    split, lone = run(ask)
    assert split.decode.token_ids == lone.token_ids, split.decode.error
    assert split.decode.times[0] - began < ANSWER_TIMEOUT_S


def test_prefill_killed_mid_prefill(healthy: Fleet) -> None:
    """The decode engine notices at once and computes the prompt itself."""
    prompt = random_prompt(MIDDLE_TOKENS, 12)
    killed_at = 0.0

    async def ask(http: Any) -> tuple[Any, Answer]:
        nonlocal killed_at
        task = asyncio.create_task(healthy.split(http, prompt))
        await until_computing(healthy)
        healthy.supervisor.kill("prefill")
        killed_at = time.monotonic()
        split = await task
        return split, await healthy.lone(http, prompt)

    split, lone = run(ask)
    assert split.prefill_error
    assert split.decode.token_ids == lone.token_ids, split.decode.error
    assert split.decode.times[0] - killed_at < ANSWER_TIMEOUT_S
    run(lambda http: complete(http, healthy.cell.decode_url, random_prompt(64, 13), max_tokens=2))
    assert total(healthy.process_samples("decode"), "mooncake_transfers_active") == 0


def test_prefill_killed_behind_the_router(healthy: Fleet) -> None:
    """The client gets an answer although no prefill engine is left: the decode engine serves it alone."""
    prompt = random_prompt(200, 14)
    healthy.supervisor.kill("prefill")

    async def ask(http: Any) -> tuple[Answer, Answer]:
        return await asyncio.gather(complete(http, healthy.cell.router_url, prompt, max_tokens=16),
                                    healthy.lone(http, prompt))

    answer, lone = run(ask)
    assert answer.error or answer.token_ids == lone.token_ids
    assert not answer.error, f"HTTP {answer.status}: {answer.error}"
    assert answer.ttft_s < ANSWER_TIMEOUT_S


def test_decode_killed_mid_pull(healthy: Fleet) -> None:
    """The prefill answers as if nothing had happened, and frees the blocks; the decode client gets a clear error."""
    prompt = random_prompt(MIDDLE_TOKENS, 15)

    async def ask(http: Any) -> Any:
        task = asyncio.create_task(healthy.split(http, prompt))
        await until_computing(healthy)
        healthy.supervisor.kill("decode")
        return await task

    found = run(ask)
    assert not found.prefill_error
    assert found.decode.error and not found.decode.token_ids
    deadline = time.monotonic() + 30
    while left := total(healthy.process_samples("prefill"), "mooncake_blocks_held"):
        assert time.monotonic() < deadline, f"{left} blocks are still held for a dead engine"
        time.sleep(0.5)


def test_worker_killed_alone_ends_its_engine(healthy: Fleet) -> None:
    """A dead worker must end the whole engine, not leave a server that never answers."""
    child = healthy.supervisor.children["decode"]
    worker = max(child.pids())
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not child.has_ended():
        assert time.monotonic() < deadline, "the engine outlives its worker"
        time.sleep(0.3)


def flip_segments(pid: int) -> int:
    """Flip one byte of every 64 KiB of a process's own pool segment; return how many.

    Through /proc/PID/mem: the memfd is sealed against everybody but the owner's mapping.
    """
    flipped = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "/memfd:mooncake-segment" not in line or line.split()[1][:2] != "rw":
            continue
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            for address in range(begin + 100, end, 64 << 10):
                memory.seek(address)
                byte = memory.read(1)
                memory.seek(address)
                memory.write(bytes([byte[0] ^ 0xFF]))
                flipped += 1
    return flipped
