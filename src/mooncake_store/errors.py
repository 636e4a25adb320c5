"""Name every failure by what the caller should do about it.

Each error says *what* happened, *where* (a path such as ``$.transport.port`` or a peer) and *what to do* (``hint``).
``retryable`` errors surface to an engine as a miss, never as a lost request.
"""

from __future__ import annotations


class MooncakeError(Exception):
    """Base of every error this project raises on purpose.

    Attributes:
        where: configuration path, peer or file the failure belongs to; empty when the message says it all.
        hint: one sentence telling the operator what to do; empty when nothing can be done.
        retryable: whether the same call may succeed later.
    """

    retryable = False

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  do: {self.hint}")
        return "\n".join(lines)


class ConfigError(MooncakeError):
    """A configuration value cannot be used; raised at start-up only."""


class FingerprintMismatch(MooncakeError):
    """Two caches differ in a field that must be equal to share bytes; the message lists every differing field."""


class DirectoryUnavailable(MooncakeError):
    """The directory's backing service did not answer in time."""

    retryable = True


class PeerUnreachable(MooncakeError):
    """A peer's control or data endpoint did not answer in time, or its process is gone."""

    retryable = True


class LeaseExpired(MooncakeError):
    """The owner's promise that bytes stay put ended before the pull did."""

    retryable = True


class CapacityExceeded(MooncakeError):
    """A bounded queue, segment or table is full."""

    retryable = True


class TransferFailed(MooncakeError):
    """Some or all reads of a batch did not complete on this medium."""

    retryable = True


class ChecksumMismatch(MooncakeError):
    """Pulled bytes differ from what the owner stored; the block counts as a miss."""


class LocalProtocolError(MooncakeError):
    """We broke our own protocol: a bug here."""


class RemoteProtocolError(MooncakeError):
    """A peer sent something we cannot accept: wrong version, malformed or out of order."""
