"""Say in response headers how a request was served.

Pure: no sockets, threads or clocks.
"""

from __future__ import annotations

import msgspec


class Receipt(msgspec.Struct):
    """What is known of a request by the time its answer begins; changed as it becomes known.

    Attributes:
        waited_s: from its arrival until it was given to engines.
        predicted_ttft_s: from its arrival to the first byte, as predicted when it was placed; 0 when nothing was.
        ttft_s: the same, as it came; 0 until it did.
        num_reused: prompt tokens that were not computed: as the engine counted, else as predicted; -1 when unknown.
    """

    request_id: str
    service_class: str = ""
    prefill_url: str = ""
    decode_url: str = ""
    transfer_id: str = ""
    waited_s: float = 0.0
    predicted_ttft_s: float = 0.0
    ttft_s: float = 0.0
    num_reused: int = -1

    def headers(self, content_type: str) -> dict[str, str]:
        """Return the headers of the answer."""
        headers = {"Content-Type": content_type, "x-request-id": self.request_id}
        if self.service_class:
            headers["x-mooncake-class"] = self.service_class
        if not self.decode_url:
            return headers
        if self.prefill_url:
            headers["x-mooncake-prefill"] = self.prefill_url
        headers["x-mooncake-decode"] = self.decode_url
        headers["x-mooncake-transfer-id"] = self.transfer_id
        headers["x-mooncake-queue-ms"] = _ms(self.waited_s)
        if self.predicted_ttft_s:
            headers["x-mooncake-predicted-ttft-ms"] = _ms(self.predicted_ttft_s)
        if self.ttft_s:
            headers["x-mooncake-ttft-ms"] = _ms(self.ttft_s)
        if self.num_reused >= 0:
            headers["x-mooncake-tokens-reused"] = str(self.num_reused)
        return headers


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
