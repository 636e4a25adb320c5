"""Say which medium moved the bytes, and why that one."""

from __future__ import annotations

from collections.abc import Iterable

from mooncake_connector.demo.status import MemberStatus, by_label

REASONS = {
    "shm": "same machine, and the owner's memory is a memfd that we map",
    "cma": "same machine, and the owner's memory is private: process_vm_readv",
    "tcp": "another machine, or the same one without permission to read its memory",
    "loopback": "our own segment",
}


def describe_media(statuses: Iterable[MemberStatus]) -> dict[str, str]:
    """Return each medium that moved bytes, with how many and why it was chosen.

    Members that tell their choice (facts named ``medium ...``) are quoted; else the rule that chose is named.
    """
    moved: dict[str, float] = {}
    told: dict[str, str] = {}
    for status in statuses:
        for name in ("mooncake_handoff_bytes_total", "mooncake_pull_bytes_total"):
            for medium, value in by_label(status.samples, name).items():
                moved[medium] = moved.get(medium, 0.0) + value
        told |= {key.split()[-1]: reason for key, reason in status.info.items() if key.startswith("medium")}
    return {medium: f"{value / 1e6:.0f} MB; {told.get(medium) or REASONS.get(medium, 'chosen by the peers')}"
            for medium, value in sorted(moved.items()) if value}
