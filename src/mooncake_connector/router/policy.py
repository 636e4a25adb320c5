"""Choose engines for one request.

Pure: no sockets, threads or clocks; the same candidates give the same choice.

For now: least outstanding work, longest known prefix as tie-break, then the engine that was used least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mooncake_connector.router.messages import Role

PREFERENCE_LAST_RESORT = 2
"""A candidate with this preference or a higher one is used only when no other is left."""


class Candidate(NamedTuple):
    """One engine as the policy sees it.

    Attributes:
        preference: 0 is best; an engine with a higher number is used only when none with a lower one is left.
        outstanding_tokens: unfinished work.
        num_prefix_chunks: leading chunks of this prompt that it is believed to hold.
        num_placed: legs ever placed on it.
        has_connector: whether it can take part in a hand-over.
    """

    url: str
    role: Role
    preference: int
    outstanding_tokens: int
    num_prefix_chunks: int
    num_placed: int
    has_connector: bool

    @property
    def is_healthy(self) -> bool:
        """Tell whether it is more than a last resort."""
        return self.preference < PREFERENCE_LAST_RESORT


class Choice(NamedTuple):
    """A pair of engines; ``prefill`` is None when the request runs whole on ``decode``, and ``reason`` says why."""

    prefill: Candidate | None
    decode: Candidate
    reason: str


def choose_prefill(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the engine to prefill on, or None.

    An engine that is merely a last resort is not worth a hand-over: the decode engine computes the prompt instead.
    """
    return _least_work(
        [each for each in candidates if each.role != "decode" and each.has_connector and each.is_healthy]
    )


def choose_pair(candidates: Sequence[Candidate]) -> Choice | None:
    """Return a pair, or one engine for both legs when no pair can be made, or None without candidates.

    An engine is never paired with itself.
    """
    prefill = choose_prefill(candidates)
    if prefill is None:
        return choose_one(candidates, reason="no_prefill")
    decode = _least_work([each for each in candidates if each.role != "prefill" and each.url != prefill.url])
    if decode is None or not decode.is_healthy:
        return choose_one(candidates, reason="no_decode")
    if not decode.has_connector:
        return Choice(None, decode, "no_connector")
    return Choice(prefill, decode, "")


def choose_one(candidates: Sequence[Candidate], *, reason: str) -> Choice | None:
    """Return one engine for both legs: a decode engine, or any healthier one when no decode engine is healthy."""
    decode = _least_work([each for each in candidates if each.role != "prefill"])
    if decode is None or not decode.is_healthy:
        decode = _least_work(candidates)
    return None if decode is None else Choice(None, decode, reason)


def _least_work(candidates: Sequence[Candidate]) -> Candidate | None:
    return min(candidates, key=_rank, default=None)


def _rank(candidate: Candidate) -> tuple[int, int, int, int, str]:
    return (
        candidate.preference,
        candidate.outstanding_tokens,
        -candidate.num_prefix_chunks,
        candidate.num_placed,
        candidate.url,
    )
