"""Turn what the legs of requests showed into what the predictor learns.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

An engine does not say when it began a prompt: it began when the leg was sent, or when the one before it ended, if that
was later. For an engine that computes several prompts at a time this gives its rate, which is what a queue needs.
"""

from __future__ import annotations

from mooncake_connector.router.policy import Start
from mooncake_connector.router.predictor import PredictionError, Predictor

SCALE_RATE = 0.05
SCALE_MIN = 0.1
SCALE_MAX = 10.0
OVERHEAD_RATE = 0.05
STEP_TOKENS_MIN = 4


class Lessons:
    """What was learned beside the predictor's own models, and how far its promises held.

    Args:
        predictor: learns.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._ended_s: dict[str, float] = {}
        self._token_scale = 1.0
        self._overhead_s = 0.0
        self.ttft_error = PredictionError()

    def prompt_tokens(self, estimated: int) -> int:
        """Return how many tokens a prompt will have, from the router's own estimate and what engines counted."""
        return max(1, round(estimated * self._token_scale))

    def output_tokens(self, *, hinted: int, most: int) -> int:
        """Return how long an answer will be: what the client expects, else the usual; never more than it allows."""
        usual = hinted or self._predictor.output_tokens()
        return min(usual, most) if most else usual

    def ttft_s(self, start: Start | None) -> float:
        """Return the predicted seconds from placement to the first byte; 0 when nothing can be said."""
        return start.ttft_s + self._overhead_s if start is not None else 0.0

    def prefill_ended(
        self, url: str, *, sent_s: float, ended_s: float, num_estimated: int, num_prompt: int, num_prefix: int
    ) -> None:
        """Learn from a prefill leg that succeeded.

        Args:
            url: the engine.
            sent_s: when the leg was sent.
            ended_s: when it was answered.
            num_estimated: the router's estimate of the prompt, in tokens.
            num_prompt: what the engine counted; 0 when it did not say.
            num_prefix: tokens that were not computed.
        """
        begun_s = max(sent_s, self._ended_s.get(url, 0.0))
        self._ended_s[url] = ended_s
        if num_prompt and num_estimated:
            scale = min(max(num_prompt / num_estimated, SCALE_MIN), SCALE_MAX)
            self._token_scale += SCALE_RATE * (scale - self._token_scale)
        num_tokens = num_prompt or self.prompt_tokens(num_estimated)
        self._predictor.observe_prefill(url, num_tokens, num_prefix, ended_s - begun_s)

    def whole_ended(self, url: str, *, sent_s: float, ended_s: float, num_prompt: int, num_prefix: int) -> None:
        """Learn from an answer that came all at once: its prefill took no longer than since the one before it."""
        begun_s = max(sent_s, self._ended_s.get(url, 0.0))
        self._ended_s[url] = ended_s
        if ended_s - begun_s < self._predictor.prefill_s(num_prompt, num_prefix, url):
            self._predictor.observe_prefill(url, num_prompt, num_prefix, ended_s - begun_s)

    def first_byte(self, predicted_s: float, actual_s: float) -> None:
        """Compare a promise with what came: seconds from placement to first byte."""
        if predicted_s <= 0:
            return
        self.ttft_error.observe(predicted_s, actual_s)
        # What neither model knows: the hand-over's last part, the first decode step, the way to the engines.
        self._overhead_s = max(self._overhead_s + OVERHEAD_RATE * (actual_s - predicted_s), 0.0)

    def stream_ended(self, *, num_requests: int, num_context: int, num_tokens: int, took_s: float) -> None:
        """Learn from a stream that was read without delay: ``took_s`` from its first token to its last."""
        self.answer_ended(num_tokens)
        if num_tokens >= STEP_TOKENS_MIN:
            self._predictor.observe_step(max(num_requests, 1), num_context, took_s / (num_tokens - 1))

    def answer_ended(self, num_tokens: int) -> None:
        """Learn from the length of an answer."""
        self._predictor.observe_output(num_tokens)

    def forget(self, url: str) -> None:
        """Drop what is known of an engine that is gone."""
        self._ended_s.pop(url, None)
