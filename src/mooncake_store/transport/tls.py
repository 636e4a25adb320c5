"""Load the certificate with which a member proves that it belongs to the cell, and encrypts the tcp medium.

Both ends show a certificate, and each accepts every certificate that its authority signed: belonging to the cell is
what is proven. Names in certificates are not compared, because members are found by address. TLS 1.3 only.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import msgspec

from mooncake_store.errors import ConfigError

GENERATE_HINT = "docs/operating/security.md shows how to make certificates with openssl"


class TlsFiles(msgspec.Struct, frozen=True):
    """Where a member's certificate, its private key and the cell's authority are; PEM, all empty = no TLS."""

    certificate: str = ""
    key: str = ""
    authority: str = ""


NO_TLS = TlsFiles()


class TlsContexts(NamedTuple):
    """What wraps sockets: those we accept and those we open."""

    accepting: ssl.SSLContext
    connecting: ssl.SSLContext


def load_contexts(files: TlsFiles) -> TlsContexts | None:
    """Read the files; None when TLS is not wanted.

    Raises:
        ConfigError: only some of the files are named, one cannot be read or is no PEM, or they do not fit together.
    """
    named = {"tls_cert": files.certificate, "tls_key": files.key, "tls_ca": files.authority}
    missing = [key for key, path in named.items() if not path]
    if len(missing) == len(named):
        return None
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be set too, or none of {', '.join(named)}",
                          where=f"$.{missing[0]}", hint=GENERATE_HINT)
    for key, path in named.items():
        _check_readable(key, path)
    contexts = TlsContexts(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    contexts.accepting.num_tickets = 0  # nobody resumes, and a ticket would look like an answer nobody asked for
    contexts.connecting.check_hostname = False
    for context in (contexts.accepting, contexts.connecting):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        _load(context, files)
    return contexts


def _check_readable(key: str, path: str) -> None:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", where=f"$.{key}",
                          hint="name a readable PEM file") from error
    if b"-----BEGIN " not in content:
        raise ConfigError(f"{path} is no PEM file", where=f"$.{key}", hint="it must hold a line -----BEGIN ...-----")


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    try:
        context.load_verify_locations(files.authority)
    except ssl.SSLError as error:
        raise ConfigError(f"{files.authority} holds no certificate: {error.reason or error}", where="$.tls_ca",
                          hint=GENERATE_HINT) from error
    try:
        context.load_cert_chain(files.certificate, files.key, password=_refuse_password)
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        raise ConfigError(f"{files.certificate} and {files.key} cannot be used: {reason}",
                          where="$.tls_cert, $.tls_key",
                          hint="the key must be the certificate's and carry no password") from error


def _refuse_password() -> str:
    return ""  # without a callback OpenSSL would ask at the terminal
