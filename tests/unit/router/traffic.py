"""Make up requests as a trace has them: conversations that grow, and tools whose long instructions many share."""

from __future__ import annotations

import itertools
import random

from mooncake_connector.router.simulation.trace import BLOCK_TOKENS, TraceRequest


def conversations(
    *,
    num: int,
    rate: float,
    seed: int = 0,
    num_tools: int = 0,
    tool_tokens: int = 6000,
    turns: float = 2.0,
    tokens: float = 5000.0,
    output_tokens: float = 250.0,
) -> list[TraceRequest]:
    """Return requests in the order of their arrival.

    Args:
        num: how many.
        rate: arrivals per second.
        seed: same seed, same requests.
        num_tools: kinds of conversation that begin with the same instructions; few are asked for often.
        tool_tokens: length of the instructions.
        turns: questions in a conversation, on average.
        tokens: median of what is new in a question; lengths are spread widely.
        output_tokens: median length of an answer.
    """
    rng, ids = random.Random(seed), itertools.count()
    tools = [[next(ids) for _ in range(tool_tokens // BLOCK_TOKENS)] for _ in range(num_tools)]
    found: list[tuple[float, int, int, tuple[int, ...]]] = []
    now_s = 0.0
    while len(found) < num * 2:
        now_s += rng.expovariate(rate / turns)
        chain = list(rng.choices(tools, [1 / (place + 1) for place in range(num_tools)])[0]) if tools else []
        at_s, length = now_s, len(chain) * BLOCK_TOKENS
        while True:
            length = min(length + int(tokens * rng.lognormvariate(0, 1)) + 1, 120_000)
            chain = [*chain, *(next(ids) for _ in range(length // BLOCK_TOKENS - len(chain)))]
            answer = int(output_tokens * rng.lognormvariate(0, 0.9)) + 1
            found.append((at_s, length, answer, tuple(chain)))
            if rng.random() < 1 / turns or length >= 120_000:
                break
            at_s += rng.expovariate(1 / 60)
    found.sort()
    return [TraceRequest(number, *each) for number, each in enumerate(found[:num])]
