"""Predict how long things take: a prefill, a decode step, a transfer; learn from what was measured.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

A prefill of n tokens of which p are cached takes ``a + b (n - p) + c (n^2 - p^2) + d p``; a decode step over B requests
takes ``a + b B + c context``. Both are linear in a few unknown, non-negative coefficients, which recursive least
squares finds within some ten observations. Errors count relative to the prediction, because what disturbs a long
prefill disturbs it more. The prior is Llama2-70B on eight A800, as published (FAST'25, figures 8 and 14).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

PREFILL_PRIOR = (0.03, 1.08e-4, 7.7e-10, 320e3 / 128e9)
"""Seconds: once, per computed token, per pair of tokens, per token loaded from the engine's own cache."""
STEP_PRIOR = (0.0263, 1.2e-4, 3.8e-8)
"""Seconds: once, per request in the batch, per token of context."""

NOISE = 0.15
SPREAD = 1.0
FORGETTING = 0.9995
SCALE_MIN = 1e-4
SURPRISE_MAX = 3.0
ENGINE_RATE = 0.05
ENGINE_FACTOR_MAX = 16.0
ERROR_RATE = 0.02
OUTPUT_RATE = 0.01
OUTPUT_PRIOR_TOKENS = 256.0
ENGINES_MAX = 4096


class LinearModel:
    """Learns ``y = c . x`` with ``c >= 0`` by recursive least squares on relative errors.

    Args:
        prior: coefficients before anything was observed; all positive. The model is scaled by them.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior = tuple(prior)
        size = len(self._prior)
        self.coefficients = self._prior
        self._scale = [1.0] * size
        self._covariance = [[SPREAD**2 if row == column else 0.0 for column in range(size)] for row in range(size)]

    def observe(self, features: Sequence[float], actual: float) -> None:
        """Learn from one measurement. Modifies the coefficients; ignores what is not a positive number."""
        predicted = sum(c * x for c, x in zip(self.coefficients, features, strict=True))
        if not (0 < predicted < math.inf and 0 < actual < math.inf):
            return
        inputs = [prior * x / predicted for prior, x in zip(self._prior, features, strict=True)]
        # A single absurd measurement (a paused machine) must not move the model for long.
        surprise = min(actual / predicted - 1.0, SURPRISE_MAX)
        covariance = self._covariance
        spread = [sum(p * u for p, u in zip(row, inputs, strict=True)) for row in covariance]
        denominator = NOISE**2 + sum(u * s for u, s in zip(inputs, spread, strict=True))
        gain = [s / denominator for s in spread]
        self._scale = [max(t + g * surprise, SCALE_MIN) for t, g in zip(self._scale, gain, strict=True)]
        self.coefficients = tuple(p * t for p, t in zip(self._prior, self._scale, strict=True))
        for row, g in zip(covariance, gain, strict=True):
            for column, s in enumerate(spread):
                row[column] -= g * s
        if sum(covariance[i][i] for i in range(len(inputs))) < len(inputs) * SPREAD**2:
            for row in covariance:
                for column in range(len(row)):
                    row[column] /= FORGETTING


class PredictionError(msgspec.Struct):
    """How wrong the predictions were lately, relative to the prediction.

    Attributes:
        mean: recent mean of ``|actual - predicted| / predicted``.
        bias: recent mean of ``(actual - predicted) / predicted``; positive when things take longer than said.
    """

    num_observed: int = 0
    mean: float = NOISE
    bias: float = 0.0

    def observe(self, predicted: float, actual: float) -> None:
        """Take in one pair. Modifies this."""
        if not (0 < predicted < math.inf and 0 <= actual < math.inf):
            return
        self.num_observed += 1
        rate = max(ERROR_RATE, 1.0 / (self.num_observed + 8))
        error = min(actual / predicted - 1.0, SURPRISE_MAX)
        self.mean += rate * (abs(error) - self.mean)
        self.bias += rate * (error - self.bias)


class Predictor:
    """Predicts durations for every engine: one model for all, times a factor per engine.

    Args:
        prefill_prior, step_prior: coefficients to begin with, see ``PREFILL_PRIOR`` and ``STEP_PRIOR``.
        kv_token_bytes: bytes of KV per token.
        link_bytes_per_s: bandwidth of an engine's network, each way.

    Attributes:
        factors: by how much an engine's prefills take longer than the mean engine's; 1 where it is not listed.
    """

    def __init__(
        self,
        *,
        prefill_prior: Sequence[float] = PREFILL_PRIOR,
        step_prior: Sequence[float] = STEP_PRIOR,
        kv_token_bytes: float = 320e3,
        link_bytes_per_s: float = 87e9,
    ) -> None:
        self._prefill = LinearModel(prefill_prior)
        self._step = LinearModel(step_prior)
        self.factors: dict[str, float] = {}
        self.prefill_error = PredictionError()
        self.step_error = PredictionError()
        self.mean_output_tokens = OUTPUT_PRIOR_TOKENS
        self._mean_squared_output = OUTPUT_PRIOR_TOKENS**2
        self.kv_token_bytes = kv_token_bytes
        self.links = Links(link_bytes_per_s)

    def prefill_s(self, num_prompt_tokens: int, num_prefix_tokens: int, engine: str = "") -> float:
        """Return the seconds an engine computes for a prompt whose first ``num_prefix_tokens`` are in its cache."""
        n, p = num_prompt_tokens, min(num_prefix_tokens, num_prompt_tokens)
        once, per_token, per_pair, per_loaded = self._prefill.coefficients
        seconds = once + (n - p) * (per_token + per_pair * (n + p)) + p * per_loaded
        return seconds * self.factors.get(engine, 1.0)

    def factor(self, engine: str) -> float:
        """Return by how much an engine's prefills take longer than the mean engine's."""
        return self.factors.get(engine, 1.0)

    def observe_prefill(self, engine: str, num_prompt_tokens: int, num_prefix_tokens: int, actual_s: float) -> None:
        """Learn from a finished prefill; ``actual_s`` without the time it waited for its turn."""
        n, p = num_prompt_tokens, min(num_prefix_tokens, num_prompt_tokens)
        predicted_s = self.prefill_s(n, p, engine)
        self.prefill_error.observe(predicted_s, actual_s)
        factor = self.factors.get(engine, 1.0)
        self._prefill.observe((1.0, n - p, n * n - p * p, p), actual_s / factor)
        if actual_s > 0 and (engine in self.factors or len(self.factors) < ENGINES_MAX):
            ratio = min(max(actual_s / predicted_s, 1 / ENGINE_FACTOR_MAX), ENGINE_FACTOR_MAX)
            factor *= ratio**ENGINE_RATE
            self.factors[engine] = min(max(factor, 1 / ENGINE_FACTOR_MAX), ENGINE_FACTOR_MAX)

    def step_s(self, num_requests: int, num_context_tokens: float) -> float:
        """Return the seconds of one decode step over a batch: the time between tokens."""
        once, per_request, per_token = self.step_coefficients
        return once + per_request * num_requests + per_token * num_context_tokens

    @property
    def step_coefficients(self) -> tuple[float, ...]:
        """Return the seconds of a decode step: once, per request, per token of context."""
        return self._step.coefficients

    def observe_step(self, num_requests: int, num_context_tokens: float, actual_s: float) -> None:
        """Learn from a measured time between tokens."""
        self.step_error.observe(self.step_s(num_requests, num_context_tokens), actual_s)
        self._step.observe((1.0, num_requests, num_context_tokens), actual_s)

    def output_tokens(self, hint: int = 0) -> int:
        """Return how long an answer will be: what the client said, or the recent mean."""
        return hint or round(self.mean_output_tokens)

    def reserved_tokens(self, hint: int = 0) -> int:
        """Return the memory to set aside for an answer, in tokens.

        More than the mean: an engine is mostly busy with long answers, because they stay longer.
        """
        return hint or round(self._mean_squared_output / self.mean_output_tokens)

    def observe_output(self, num_tokens: int) -> None:
        """Learn from the length of a finished answer."""
        num_tokens = max(num_tokens, 1)
        self.mean_output_tokens += OUTPUT_RATE * (num_tokens - self.mean_output_tokens)
        self._mean_squared_output += OUTPUT_RATE * (num_tokens**2 - self._mean_squared_output)

    @property
    def token_transfer_s(self) -> float:
        """Return the seconds that one token's KV takes on an idle link."""
        return self.kv_token_bytes / self.links.bytes_per_s

    def transfer_s(self, source: str, target: str, num_tokens: int, *, now_s: float) -> float:
        """Return the seconds until tokens' KV sent now has arrived, after all that both links still have to carry."""
        return self.links.transfer_s(source, target, num_tokens * self.kv_token_bytes, now_s=now_s)

    def forget(self, engine: str) -> None:
        """Drop what is known of an engine that is gone."""
        self.factors.pop(engine, None)
        self.links.forget(engine)


class Links:
    """Keeps what each engine's network has still to send and to receive.

    A link carries its transfers in the order they were booked. A transfer has arrived when both ends are through.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.error = PredictionError()
        self._egress_free_s: dict[str, float] = {}
        self._ingress_free_s: dict[str, float] = {}

    def transfer_s(self, source: str, target: str, size_bytes: float, *, now_s: float) -> float:
        """Return the seconds until a transfer that begins now has arrived."""
        begin_s = max(self._egress_free_s.get(source, now_s), self._ingress_free_s.get(target, now_s), now_s)
        return begin_s - now_s + size_bytes / self.bytes_per_s

    def egress_wait_s(self, engine: str, *, now_s: float) -> float:
        """Return the seconds until an engine has sent all that was booked."""
        return max(self._egress_free_s.get(engine, now_s) - now_s, 0.0)

    def ingress_wait_s(self, engine: str, *, now_s: float) -> float:
        """Return the seconds until an engine has received all that was booked."""
        return max(self._ingress_free_s.get(engine, now_s) - now_s, 0.0)

    def book(self, source: str, target: str, size_bytes: float, *, now_s: float) -> float:
        """Count a transfer that begins now, and return the seconds until it has arrived."""
        duration_s = size_bytes / self.bytes_per_s
        egress_s = max(self._egress_free_s.get(source, now_s), now_s) + duration_s
        ingress_s = max(self._ingress_free_s.get(target, now_s), now_s) + duration_s
        self._egress_free_s[source] = egress_s
        self._ingress_free_s[target] = ingress_s
        return max(egress_s, ingress_s) - now_s

    def backlog_s(self, engine: str, *, now_s: float) -> float:
        """Return the seconds until the busier direction of an engine's network is idle."""
        free_s = max(self._egress_free_s.get(engine, now_s), self._ingress_free_s.get(engine, now_s))
        return max(free_s - now_s, 0.0)

    def observe(self, size_bytes: float, actual_s: float) -> None:
        """Learn the bandwidth from a transfer that nothing else delayed."""
        if size_bytes <= 0 or not 0 < actual_s < math.inf:
            return
        self.error.observe(size_bytes / self.bytes_per_s, actual_s)
        self.bytes_per_s += ENGINE_RATE * (size_bytes / actual_s - self.bytes_per_s)

    def forget(self, engine: str) -> None:
        """Drop an engine's backlog."""
        self._egress_free_s.pop(engine, None)
        self._ingress_free_s.pop(engine, None)
