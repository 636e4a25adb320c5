"""Hold the connector's settings; the only module of the package that may read the environment.

The loader (precedence, sizes, suggestions) is shared with the store: mooncake_store.config.load_config.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from mooncake_store.config import Seconds, StoreConfig

Count = Annotated[int, msgspec.Meta(ge=1)]


class ConnectorConfig(StoreConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine's connector: everything of the store's, and these.

    Attributes:
        pool: save finished blocks to the pool and load prefixes from it.
        save_decode: save the blocks that decoding fills, so that the next turn of a conversation finds them.
        publish: let a decode engine pull after each ``layer`` or after each ``step`` of the prefill.
        handoff_lease_s: how long a prefill's blocks wait for a silent decode engine before they are freed.
        handoff_timeout_s: longest wait for a prefill to make progress before the decode engine computes itself.
        load_min_blocks: pool hits shorter than this are recomputed.
        save_queue_max_blocks: blocks that may wait to be saved; beyond it blocks are skipped and counted.
        http_url: base URL of this engine's HTTP server, such as http://10.0.0.1:8100, told to routers that look for
            engines in the directory; empty = not told.
        http_role: what routers may use it for: ``prefill``, ``decode`` or ``both``.
        verify: compare the checksum of every handed-over block with its source's; for tests, costs time.
    """

    pool: bool = True
    save_decode: bool = True
    publish: Literal["layer", "step"] = "layer"
    handoff_lease_s: Seconds = 10.0
    handoff_timeout_s: Seconds = 120.0
    load_min_blocks: Count = 1
    save_queue_max_blocks: Count = 1024
    http_url: Annotated[str, msgspec.Meta(max_length=512, pattern=r"^(https?://[^\s/]+/?)?$")] = ""
    http_role: Literal["prefill", "decode", "both"] = "both"
    verify: bool = False

    @property
    def about(self) -> str:
        """Return what this engine tells routers in the directory; empty for nothing."""
        return f"{self.http_role} {self.http_url.rstrip('/')}" if self.http_url else ""
