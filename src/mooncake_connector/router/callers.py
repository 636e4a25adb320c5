"""Read who sends a request, what it was promised, and what it says about itself.

Pure: no sockets, threads or clocks. Headers come before the body's fields; a tenant's own settings come before both.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import msgspec

from mooncake_connector.router.admission import NO_HINTS, PRIORITY_MAX, Hints
from mooncake_connector.router.answers import Problem
from mooncake_connector.router.bodies import Body
from mooncake_connector.router.config import Tenant

CLASS_HEADER = "x-mooncake-class"
TENANT_HEADER = "x-mooncake-tenant"
TTFT_HEADER = "x-mooncake-ttft-target-ms"
PRIORITY_HEADER = "x-mooncake-priority"
OUTPUT_HEADER = "x-mooncake-output-tokens"
REUSE_HEADER = "x-mooncake-expected-reuses"
NAME_MAX_CHARS = 128

N = TypeVar("N", int, float)


class Caller(NamedTuple):
    """Who asks; ``service_class`` and ``tenant`` are empty when nobody said."""

    tenant: str = ""
    service_class: str = ""
    hints: Hints = NO_HINTS


NOBODY = Caller()


def find_tenant(tenants: Mapping[str, Tenant], authorization: str) -> str | None:
    """Return the tenant with the key of an ``Authorization`` header; None when no tenant has it."""
    scheme, _, key = authorization.partition(" ")
    given = key.strip().encode() if scheme.lower() == "bearer" else b""
    found = None
    for name, tenant in tenants.items():  # all of them, so that the time tells nothing
        if hmac.compare_digest(given, tenant.api_key.encode()):
            found = name
    return found


def read_caller(
    headers: Mapping[str, str], body: Body, *, classes: Iterable[str], tenant: str = "", tenant_class: str = ""
) -> Caller | Problem:
    """Return who asks, or what is wrong with a header.

    Args:
        headers: the request's.
        body: its fields; ``service_tier`` may name a class, ``user`` a tenant.
        classes: names of the configured classes.
        tenant: whose key the request has; empty when there are no keys.
        tenant_class: the only class of that tenant; empty when it may choose.
    """
    service_class = headers.get(CLASS_HEADER, "")
    known = set(classes)
    if service_class and service_class not in known:
        names = ", ".join(sorted(known)) or "none"
        return Problem(400, f"{CLASS_HEADER}: there is no class {service_class[:NAME_MAX_CHARS]!r}; known: {names}")
    if not service_class and known:
        tier = _text(body, "service_tier")
        service_class = tier if tier in known else ""
    name = tenant or headers.get(TENANT_HEADER, "") or _text(body, "user")
    hints = _read_hints(headers)
    if isinstance(hints, Problem):
        return hints
    return Caller(name[:NAME_MAX_CHARS], tenant_class or service_class, hints)


def _read_hints(headers: Mapping[str, str]) -> Hints | Problem:
    try:
        ttft_ms = _number(headers, TTFT_HEADER, 0.0, lowest=1.0, highest=86_400_000.0)
        priority = _number(headers, PRIORITY_HEADER, 0, lowest=-PRIORITY_MAX, highest=PRIORITY_MAX)
        num_output = _number(headers, OUTPUT_HEADER, 0, lowest=1, highest=1 << 24)
        num_reuses = _number(headers, REUSE_HEADER, 0, lowest=0, highest=1 << 24)
    except ValueError as error:
        return Problem(400, str(error))
    if not (ttft_ms or priority or num_output or num_reuses):
        return NO_HINTS
    return Hints(
        ttft_s=ttft_ms / 1e3 if ttft_ms else math.inf,
        priority=priority,
        num_output_tokens=num_output,
        num_reuses=num_reuses,
    )


def _number(headers: Mapping[str, str], name: str, default: N, *, lowest: N, highest: N) -> N:
    text = headers.get(name)
    if text is None:
        return default
    try:
        value = type(default)(text)
    except ValueError:
        value = highest + 1
    if not lowest <= value <= highest:  # NaN is refused too
        raise ValueError(f"{name}: {text[:32]!r} is not a number from {lowest:g} to {highest:g}")
    return value


def _text(body: Body, name: str) -> str:
    """Return a field of the body when it is text; it is a hint, and the engine's business when it is not."""
    raw = body.get(name)
    if raw is None:
        return ""
    try:
        return msgspec.json.decode(raw, type=str)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
