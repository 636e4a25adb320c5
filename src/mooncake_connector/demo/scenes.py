"""Ask a cell what shows that its caches are shared, and take down where the tokens came from."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec

from mooncake_connector.demo.client import Answer, AskFailed, Handoff, chat, post
from mooncake_connector.demo.cluster import SERVED_NAME, Cell
from mooncake_connector.demo.status import CellStatus, by_label, difference, scrape, total
from mooncake_connector.demo.ways import Ways
from mooncake_store.errors import MooncakeError

DOCUMENT = Path(__file__).with_name("document.txt")
T = TypeVar("T")

PROGRESS_S = 8.0
SETTLE_S = 0.4
HANDOFF_RUNS = 3
HANDOFF_BUDGET_S = 12.0
SAVE_TIMEOUT_S = 20.0
ROUTED_TIMEOUT_S = 60.0

QUESTIONS = (
    ("What is the capital of France?", "Paris"),
    ("How many days are in a week?", "seven|7"),
    ("What is the opposite of hot?", "cold"),
    ("What is the chemical symbol for water?", "H2O"),
    ("What is the capital of Japan?", "Tokyo"),
)
TURNS = (
    "I want to grow tomatoes on my balcony. How do I start?",
    "How often should I water them?",
    "Which soil is best for them?",
    "How much sun do they need?",
    "What can I plant next to them?",
    "Thank you. Sum up your advice in one sentence.",
)
DOCUMENT_QUESTIONS = (
    "Who designed the tower?",
    "In which year was the lamp lit for the first time?",
    "What is the name of the ox?",
    "Who was the first woman to be keeper?",
    "When does the boat leave the quay of Brattvik?",
)
LATE_QUESTION = "Who was the first keeper of the lighthouse?"
CROWD = ("the sea", "the moon", "a good book", "fresh bread", "an old clock", "the first snow", "a long train ride",
         "a garden in spring")


class Scene(msgspec.Struct, kw_only=True):
    """What one scene measured.

    Attributes:
        name: short name.
        title: what was asked.
        num_requests: requests sent.
        num_correct: answers that contain what they must; None where nothing is checked.
        prompt_tokens: tokens of all prompts.
        device_tokens: of those, found in the prefill engine's own cache.
        pool_tokens: of those, loaded from the pool.
        computed_tokens: of those, computed.
        ttft_cold_s: time to first token of the requests that found nothing, median.
        ttft_reused_s: the same of those that found most of their prompt; None when there were none.
        handoff_bytes: bytes pulled out of the prefill's cache, by medium.
        pool_bytes: bytes that engines pulled from the pool, by medium.
        stored_bytes: bytes that the store node copied from engines, by medium.
        tokens_per_s: generated tokens per second.
        answers: question, answer, prompt and first-token time of each request.
    """

    name: str
    title: str
    num_requests: int = 0
    num_correct: int | None = None
    prompt_tokens: int = 0
    device_tokens: int = 0
    pool_tokens: int = 0
    computed_tokens: int = 0
    ttft_cold_s: float | None = None
    ttft_reused_s: float | None = None
    handoff_bytes: dict[str, int] = {}
    pool_bytes: dict[str, int] = {}
    stored_bytes: dict[str, int] = {}
    tokens_per_s: float = 0.0
    answers: list[AnswerNote] = []


class AnswerNote(msgspec.Struct):
    """One request for the report. ``is_reused``: at least half of the prompt was not computed."""

    question: str
    answer: str
    prompt_tokens: int
    ttft_s: float
    is_reused: bool


class HandoffNote(msgspec.Struct):
    """Exposed hand-over times of one prompt length: decode's first token minus the prefill's completion."""

    prompt_tokens: int
    exposed_s: list[float]

    @property
    def median_s(self) -> float:
        """Return the median."""
        return statistics.median(self.exposed_s)


class Sample(msgspec.Struct):
    """Counters of the whole cell at one moment."""

    prefill: dict[str, float]
    engines: dict[str, float]
    stores: dict[str, float]


class Stage:
    """Plays scenes on a running cell.

    Args:
        cell: the cell; its router must be up.
        status: sees the cell's members.
        ways: the engine's.
        is_quick: fewer requests and tokens.
        report: receives progress lines.
    """

    def __init__(self, cell: Cell, status: CellStatus, *, ways: Ways, is_quick: bool,
                 report: Callable[[str], None]) -> None:
        self.cell = cell
        self.ways = ways
        self.is_quick = is_quick
        self._report = report
        self._reported_at = time.monotonic()
        self._status = status

    def report(self, line: str) -> None:
        """Report progress."""
        self._reported_at = time.monotonic()
        self._report(line)

    async def play(self, http: aiohttp.ClientSession) -> list[Scene]:
        """Play scenes a to d."""
        return [await self._scene(http, *scene) for scene in (
            ("a questions", "questions with checkable answers", self._questions),
            ("b conversation", "one conversation, turn by turn", self._conversation),
            ("c document", "five questions about one document", self._document),
            ("d concurrent", "eight requests at once", self._crowd))]

    async def play_again(self, http: aiohttp.ClientSession) -> Scene:
        """Play scene e: the document again, for a prefill engine that has just been started.

        Raises:
            AskFailed: if the router does not take the engine back.
        """
        await self._until_routed(http)
        return await self._scene(http, "e restarted", "the document, after the prefill engine was restarted",
                                 self._document_again)

    async def _until_routed(self, http: aiohttp.ClientSession) -> None:
        """Wait until the router has heard from both engines: a restarted one has new addresses to learn."""
        deadline = time.monotonic() + ROUTED_TIMEOUT_S
        states: dict[str, str] = {}
        while time.monotonic() < deadline:
            async with http.get(f"{self.cell.router_url}/ready") as reply:
                states = (await reply.json()).get("engines", {})
            if [states.get(url) for url in (self.cell.prefill_url, self.cell.decode_url)] == ["up", "up"]:
                return
            await asyncio.sleep(0.3)
        raise AskFailed(f"the router does not use both engines after {ROUTED_TIMEOUT_S:.0f} s: {states}",
                        where=f"{self.cell.router_url}/ready", hint="router.log says why")

    async def measure_handoff(self, http: aiohttp.ClientSession) -> list[HandoffNote]:
        """Send both legs of fresh prompts straight to the engines and note what the hand-over costs the user.

        Raises:
            AskFailed: if the engines refuse.
        """
        cell = self.cell
        split = await self.ways.splitter(http, cell, max_tokens=4)
        words = (await post(http, f"{cell.prefill_url}/tokenize",
                            {"model": SERVED_NAME, "prompt": DOCUMENT.read_text()}))["tokens"]
        notes = []
        for length in (64, 512) if self.is_quick else (64, 512, 2048):
            runs: list[Handoff] = []
            began = time.monotonic()
            for index in range(HANDOFF_RUNS):
                if index and time.monotonic() - began > HANDOFF_BUDGET_S:
                    break
                # a prompt nobody has seen: the document from another word on, with a first token of its own
                prompt = [100 + length % 97 + index, *words[index * 7:]][:length]
                runs.append(await self._never_silent(split(prompt)))
                if math.isnan(runs[-1].exposed_s):
                    raise AskFailed(f"no token came: {runs[-1].decode.error or runs[-1].prefill_error}",
                                    where=cell.decode_url, hint="read decode.log and prefill.log")
            notes.append(HandoffNote(length, [run.exposed_s for run in runs]))
            self.report(f"  {length} tokens: first token {notes[-1].median_s * 1e3:+.0f} ms after the prefill's end")
        return notes

    async def _scene(self, http: aiohttp.ClientSession, name: str, title: str,
                     play: Callable[[aiohttp.ClientSession, Scene], Awaitable[list[Answer]]]) -> Scene:
        self.report(f"scene {name}: {title}")
        scene = Scene(name=name, title=title)
        before, began = self._sample(), time.monotonic()
        answers = await self._never_silent(play(http, scene))
        elapsed = time.monotonic() - began
        await asyncio.sleep(SETTLE_S)
        after = self._sample()
        prefill, engines = difference(after.prefill, before.prefill), difference(after.engines, before.engines)
        source = self.ways.sources(prefill)
        scene.num_requests = len(answers)
        scene.prompt_tokens = sum(answer.prompt_tokens for answer in answers)
        scene.device_tokens = round(source.device)
        scene.pool_tokens = round(source.pool)
        scene.computed_tokens = round(source.computed)
        scene.handoff_bytes = _whole(self.ways.handoff_bytes(prefill, engines))
        # readers count every byte they pull, hand-overs included; what the store node copies is told apart
        pulled = by_label(engines, "mooncake_pull_bytes_total")
        scene.stored_bytes = _whole(by_label(difference(after.stores, before.stores), "mooncake_pull_bytes_total"))
        scene.pool_bytes = _whole({medium: value - scene.handoff_bytes.get(medium, 0)
                                   for medium, value in pulled.items()})
        scene.tokens_per_s = sum(len(answer.times) for answer in answers) / elapsed
        cold = [note.ttft_s for note in scene.answers if not note.is_reused]
        reused = [note.ttft_s for note in scene.answers if note.is_reused]
        scene.ttft_cold_s = statistics.median(cold) if cold else None
        scene.ttft_reused_s = statistics.median(reused) if reused else None
        return scene

    async def _never_silent(self, work: Awaitable[T]) -> T:
        """Wait for ``work`` and report at least every PROGRESS_S."""
        task, began = asyncio.ensure_future(work), time.monotonic()
        while not (await asyncio.wait([task], timeout=0.5))[0]:
            if time.monotonic() - self._reported_at > PROGRESS_S:
                self.report(f"  {time.monotonic() - began:3.0f} s: computing")
        return task.result()

    async def _ask(self, http: aiohttp.ClientSession, scene: Scene, messages: list[dict[str, str]],
                   max_tokens: int) -> Answer:
        """Ask through the router and note the answer; whether it was reused comes from the prefill's counters."""
        before = scrape(self.cell.prefill_url)
        answer = await chat(http, self.cell.router_url, messages, max_tokens=max_tokens)
        if answer.error or not answer.times:
            raise AskFailed(f"no answer (HTTP {answer.status}): {answer.error or 'empty stream'}",
                            where=self.cell.router_url, hint="read router.log, prefill.log and decode.log")
        reused = self.ways.sources(difference(scrape(self.cell.prefill_url), before)).reused
        scene.answers.append(AnswerNote(messages[-1]["content"][-200:], answer.text, answer.prompt_tokens,
                                        answer.ttft_s, reused * 2 >= answer.prompt_tokens))
        self.report(f"  {answer.ttft_s:6.2f} s  {answer.prompt_tokens:5d} tokens, {round(reused):5d} reused  "
                    f"{_tail(messages[-1]['content'], 46)} -> {_head(answer.text, 50)}")
        return answer

    async def _questions(self, http: aiohttp.ClientSession, scene: Scene) -> list[Answer]:
        answers = []
        scene.num_correct = 0
        for question, wanted in QUESTIONS[:3] if self.is_quick else QUESTIONS:
            answer = await self._ask(http, scene, [_user(question)], 24)
            scene.num_correct += any(word.lower() in answer.text.lower() for word in wanted.split("|"))
            answers.append(answer)
        return answers

    async def _conversation(self, http: aiohttp.ClientSession, scene: Scene) -> list[Answer]:
        answers: list[Answer] = []
        messages: list[dict[str, str]] = []
        for turn in TURNS:
            messages.append(_user(turn))
            answers.append(await self._ask(http, scene, messages, 48 if self.is_quick else 96))
            messages.append({"role": "assistant", "content": answers[-1].text})
        return answers

    async def _document(self, http: aiohttp.ClientSession, scene: Scene) -> list[Answer]:
        return [await self._ask(http, scene, [_user(_about(question))], 24) for question in DOCUMENT_QUESTIONS]

    async def _document_again(self, http: aiohttp.ClientSession, scene: Scene) -> list[Answer]:
        return [await self._ask(http, scene, [_user(_about(LATE_QUESTION))], 24)]

    async def _crowd(self, http: aiohttp.ClientSession, scene: Scene) -> list[Answer]:
        answers = list(await asyncio.gather(*(
            chat(http, self.cell.router_url, [_user(f"Write two sentences about {subject}.")], max_tokens=32)
            for subject in CROWD)))
        for subject, answer in zip(CROWD, answers, strict=True):
            if answer.error or not answer.times:
                raise AskFailed(f"no answer about {subject}: {answer.error or 'empty stream'}",
                                where=self.cell.router_url, hint="read router.log, prefill.log and decode.log")
            scene.answers.append(AnswerNote(subject, answer.text, answer.prompt_tokens, answer.ttft_s, False))
        ttfts = sorted(answer.ttft_s for answer in answers)
        self.report(f"  first tokens after {ttfts[0]:.2f} to {ttfts[-1]:.2f} s")
        return answers

    def _sample(self) -> Sample:
        engines: dict[str, float] = {}
        stores: dict[str, float] = {}
        for status in self._status.ask():
            totals = engines if status.member.kind == "engine" else stores
            for key, value in status.samples.items():
                totals[key] = totals.get(key, 0.0) + value
        return Sample(scrape(self.cell.prefill_url), engines, stores)

    def wait_saved(self) -> None:
        """Wait until the prefill engine's blocks are in the pool and the store node has its copies."""
        deadline = time.monotonic() + SAVE_TIMEOUT_S
        previous = -1.0
        while time.monotonic() < deadline:
            statuses = self._status.ask()
            waiting = sum(total(status.samples, "mooncake_save_queue_blocks") for status in statuses)
            stored = sum(total(status.samples, "mooncake_segment_blocks") for status in statuses
                         if status.member.kind == "store")
            if not waiting and stored == previous:
                self.report(f"  the store node holds {stored:.0f} blocks")
                return
            previous = stored
            time.sleep(1.0)
        raise MooncakeError(f"blocks were still being saved after {SAVE_TIMEOUT_S:.0f} s", hint="read prefill.log")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _about(question: str) -> str:
    return f"{DOCUMENT.read_text()}\nAnswer in one short sentence. {question}"


def _tail(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else "..." + line[-length + 3:]


def _head(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[:length - 3] + "..."


def _whole(values: dict[str, float]) -> dict[str, int]:
    return {key: round(value) for key, value in values.items() if value}
