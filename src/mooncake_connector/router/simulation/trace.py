"""Read a trace of requests: one JSON object per line, as published with the Mooncake paper.

``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one per 512 tokens of input]}``; a
``hash_ids`` entry names the whole prefix up to its block. Optional: ``class``, ``tenant``, and ``output_hint``.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from mooncake_store.errors import ConfigError

BLOCK_TOKENS = 512
REQUESTS_MAX = 5_000_000
LENGTH_MAX = 10_000_000

Length = Annotated[int, msgspec.Meta(ge=0, le=LENGTH_MAX)]


class TraceLine(msgspec.Struct, frozen=True):
    """One line of the file; unknown fields are ignored."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=1e15)]
    input_length: Annotated[int, msgspec.Meta(ge=1, le=LENGTH_MAX)]
    output_length: Length
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    service_class: str = msgspec.field(default="", name="class")
    tenant: str = ""
    output_hint: Length = 0


class TraceRequest(NamedTuple):
    """One request; times in seconds since the first one of the slice."""

    number: int
    arrived_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    chain: tuple[int, ...]
    service_class: str = ""
    tenant: str = ""
    output_hint: int = 0


def read_trace(path: Path) -> list[TraceRequest]:
    """Return the requests of a file, by time.

    Raises:
        ConfigError: the file cannot be read or a line cannot be used; says which and why.
    """
    decoder = msgspec.json.Decoder(TraceLine)
    lines: list[TraceLine] = []
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                if len(lines) >= REQUESTS_MAX:
                    raise ConfigError(f"more than {REQUESTS_MAX} requests", where=str(path), hint="cut the trace")
                try:
                    lines.append(decoder.decode(text))
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    raise ConfigError(
                        f"not a request of a trace: {error}",
                        where=f"{path}:{number}",
                        hint='one line looks like {"timestamp": 0, "input_length": 700, "output_length": 5, '
                        '"hash_ids": [1, 2]}',
                    ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot read the trace: {error.strerror}", where=str(path), hint="give a readable file"
        ) from error
    if not lines:
        raise ConfigError("the trace has no requests", where=str(path), hint="give a file with one request per line")
    lines.sort(key=lambda line: line.timestamp)
    return [
        TraceRequest(
            number,
            line.timestamp / 1000,
            line.input_length,
            line.output_length,
            line.hash_ids,
            line.service_class,
            line.tenant,
            line.output_hint,
        )
        for number, line in enumerate(lines)
    ]


def cut(requests: list[TraceRequest], *, begin: float, end: float, load: float) -> list[TraceRequest]:
    """Return the requests between two fractions of the trace's count, arriving ``load`` times as fast.

    Raises:
        ConfigError: nothing is left.
    """
    chosen = requests[int(begin * len(requests)) : int(end * len(requests))]
    if not chosen:
        raise ConfigError("no request is left", where=f"--part {begin}:{end}", hint="choose a larger part")
    origin_s = chosen[0].arrived_s
    return [
        each._replace(number=number, arrived_s=(each.arrived_s - origin_s) / load) for number, each in enumerate(chosen)
    ]


def draw_class(requests: list[TraceRequest], name: str, *, share: float, seed: int) -> list[TraceRequest]:
    """Return the requests with a drawn part of them in another class."""
    rng = random.Random(seed)
    return [each._replace(service_class=name) if rng.random() < share else each for each in requests]
