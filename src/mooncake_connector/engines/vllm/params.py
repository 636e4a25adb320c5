"""Read and write ``kv_transfer_params``, the only thing a client or router says to an engine about hand-overs.

The key names ``do_remote_prefill`` and ``do_remote_decode`` are vLLM's own: its front-end looks for the former to
tell us about requests it rejects (entrypoints/generate/base/serving.py). Unknown keys are ignored; wrong types are an
error that the request survives: it is then served without a hand-over.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from mooncake_connector.transfer.messages import TRANSFER_ID_MAX_CHARS
from mooncake_store.errors import RemoteProtocolError

ADDRESSES_MAX = 1024


class TransferParams(msgspec.Struct, frozen=True, kw_only=True):
    """What a request says.

    Attributes:
        do_remote_decode: we prefill; somebody else pulls and decodes.
        do_remote_prefill: we decode; pull from ``remote_addresses``.
        transfer_id: names the pair of requests; chosen by the sender of both.
        remote_addresses: control address of each prefill worker, by TP rank.
        publish: overrides the configured granularity for this request.
        introduce: answer who we are.
    """

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    transfer_id: Annotated[str, msgspec.Meta(max_length=TRANSFER_ID_MAX_CHARS)] = ""
    remote_engine_id: str = ""
    remote_addresses: list[str] = []
    publish: str = ""
    introduce: bool = False


def read_params(raw: dict[str, Any] | None) -> TransferParams:
    """Return the parameters of a request; defaults when it has none.

    Raises:
        RemoteProtocolError: a known key has a wrong type or an impossible value.
    """
    if not raw:
        return TransferParams()
    try:
        params = msgspec.convert(raw, TransferParams)
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"kv_transfer_params: {error}", hint="see docs/reference/http.md") from error
    if (params.do_remote_decode or params.do_remote_prefill) and not params.transfer_id:
        raise RemoteProtocolError("kv_transfer_params: transfer_id is missing", where="$.transfer_id")
    if params.do_remote_prefill and not 0 < len(params.remote_addresses) <= ADDRESSES_MAX:
        raise RemoteProtocolError("kv_transfer_params: remote_addresses is missing", where="$.remote_addresses")
    if any(not address.startswith("tcp://") for address in params.remote_addresses):
        raise RemoteProtocolError("kv_transfer_params: a remote address is not tcp://HOST:PORT",
                                  where="$.remote_addresses")
    return params


def answer(*, engine_id: str, addresses: list[str], block_size: int, transfer_id: str = "") -> dict[str, Any]:
    """Return what our response carries: ready to be sent on to the decode engine."""
    fields: dict[str, Any] = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": engine_id,
        "remote_addresses": addresses,
        "block_size": block_size,
    }
    if transfer_id:
        fields["transfer_id"] = transfer_id
    return fields
