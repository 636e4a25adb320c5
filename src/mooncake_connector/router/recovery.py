"""Decide how long a decode leg may go on when its prefill leg did not succeed.

Pure: no sockets, threads or clocks.
"""

from __future__ import annotations

from typing import NamedTuple

from mooncake_connector.router.placer import OUTPUT_TOKENS_UNKNOWN


class Patience(NamedTuple):
    """The waits of RouterConfig that matter here; see there."""

    decode_recovery_s: float
    refused_grace_s: float
    decode_token_s: float


def recovery_wait_s(patience: Patience, *, is_refusal: bool, is_stream: bool, num_output_tokens: int) -> float:
    """Return how long the decode leg may take to show its first byte before the request is sent anew as a plain one.

    A dead prefill engine is noticed by the decode engine's connector, which then computes the prompt itself: waiting is
    cheaper than starting over. A live one that refused the request is noticed by nobody else, so little is waited.

    Args:
        patience: the configured waits.
        is_refusal: the prefill engine answered with an error, rather than not at all.
        is_stream: whether the first byte comes with the first token.
        num_output_tokens: the most tokens the answer may have; 0 when unknown.
    """
    wait_s = patience.refused_grace_s if is_refusal else patience.decode_recovery_s
    if is_stream:
        return wait_s
    return wait_s + patience.decode_token_s * (num_output_tokens or OUTPUT_TOKENS_UNKNOWN)
