"""Read and write one request's row of SGLang's metadata buffers: first token, log probabilities, counts, room.

Ref: sglang srt/disaggregation/utils.py MetadataBuffers. The prefill engine fills a row, and the decode engine admits a
request only once its own row names the request's room.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from mooncake_connector.transfer.messages import NOTE_MAX_BYTES
from mooncake_store.errors import ConfigError, RemoteProtocolError

if TYPE_CHECKING:
    from sglang.srt.disaggregation.base.conn import KVArgs


class MetadataRows:
    """The rows of this engine. Threads: the scheduler's.

    Raises:
        ConfigError: a row is longer than a hand-over's note may be.
    """

    def __init__(self, args: KVArgs) -> None:
        self._columns = [(int(address), int(length))
                         for address, length in zip(args.aux_data_ptrs, args.aux_item_lens, strict=True)]
        self.row_bytes = sum(length for _, length in self._columns)
        if self.row_bytes > NOTE_MAX_BYTES:
            raise ConfigError(f"a request's metadata row has {self.row_bytes} bytes, at most {NOTE_MAX_BYTES} are sent",
                              where="sglang MetadataBuffers", hint="ask for fewer log probabilities; docs/limits.md")

    def read(self, index: int) -> bytes:
        """Return row ``index``: its columns, one after the other."""
        return b"".join(ctypes.string_at(address + index * length, length) for address, length in self._columns)

    def write(self, index: int, row: bytes) -> None:
        """Fill row ``index``. Raises: RemoteProtocolError when the peer's rows are laid out otherwise."""
        if len(row) != self.row_bytes:
            raise RemoteProtocolError(
                f"the prefill engine's metadata rows have {len(row)} bytes, ours {self.row_bytes}",
                hint="start both engines with the same release and the same --disaggregation and sampling options")
        position = 0
        for address, length in self._columns:
            ctypes.memmove(address + index * length, row[position: position + length], length)
            position += length
