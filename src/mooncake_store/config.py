"""Hold the store's settings, and load any package's settings; this is the only module that reads the environment.

Precedence, highest first: explicit values (command line, engine JSON) > ``MOONCAKE_<KEY>`` environment > the file named
by ``MOONCAKE_CONFIG`` (JSON or TOML) > default. Environment names are derived from the field names, so there is no
second list. Every value remembers where it came from, for ``mooncake config --show``.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from mooncake_store.errors import ConfigError

ENV_PREFIX = "MOONCAKE_"
ENV_FILE = "MOONCAKE_CONFIG"
FILE_MAX_BYTES = 1 << 20

Medium = Literal["shm", "cma", "rdma", "tcp"]
LogLevel = Literal["debug", "info", "warning", "error"]
Address = Annotated[str, msgspec.Meta(pattern=r"^(etcd://\S+|memory|off)$")]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one store client or capacity node.

    Attributes:
        directory: ``etcd://host:port[,host:port]``, ``memory`` (this process only) or ``off``.
        cell: name that isolates deployments sharing one etcd.
        host: address to bind and to announce; use the machine's address for more than one machine.
        segment_bytes: memory we lend to the pool; 0 = read only. Sizes are accepted as ``2GiB``.
        media: media we may use, in order of preference; the medium is chosen per peer. Also as text: ``shm,tcp``.
        rdma_devices: RDMA devices that `rdma` may use, such as ``mlx5_0,mlx5_1``; empty = those near this process.
        rdma_gid_index: entry of the devices' address tables that `rdma` uses; -1 = the one that reaches the peer.
        tls_cert: PEM file with this member's certificate; set with `tls_key` and `tls_ca`, `tcp` is encrypted and lets
            in only holders of a certificate. Every member of the cell needs it, or none.
        tls_key: PEM file with the private key of `tls_cert`.
        tls_ca: PEM file with the authority that signs the certificates of the cell's members.
        membership_ttl_s: a silent member's entries vanish after this.
        lease_s: longest time a reader may hold blocks without renewing.
        pull_timeout_s: deadline of one pull.
        inflight_max_bytes: bytes one puller may have in flight.
        checksum: verify each pulled pool block.
        log_level: least severe line to log: ``debug``, ``info``, ``warning`` or ``error``.
        debug: log everything, and let the command line show tracebacks.
    """

    directory: Address = "etcd://127.0.0.1:2379"
    cell: Name = "default"
    host: Name = "127.0.0.1"
    segment_bytes: Bytes = 1 << 30
    media: Annotated[tuple[Medium, ...], msgspec.Meta(min_length=1)] = ("shm", "cma", "rdma", "tcp")
    rdma_devices: tuple[Name, ...] = ()
    rdma_gid_index: Annotated[int, msgspec.Meta(ge=-1, le=65_535)] = -1
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    membership_ttl_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 10
    lease_s: Seconds = 5.0
    pull_timeout_s: Seconds = 10.0
    inflight_max_bytes: Annotated[int, msgspec.Meta(ge=1)] = 256 << 20
    checksum: bool = True
    log_level: LogLevel = "info"
    debug: bool = False


C = TypeVar("C", bound=msgspec.Struct)


class Loaded(NamedTuple, Generic[C]):
    """A configuration, and for each key where its value came from (``default``, ``file ...``, ``environment ...``)."""

    config: C
    origins: dict[str, str]


def load_config(
    cls: type[C],
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> C:
    """Build a configuration from every source, highest precedence first: overrides, environment, file, default.

    Args:
        cls: StoreConfig or a subclass.
        overrides: explicit values; a None counts as not given, strings are parsed as in the environment.
        environ: the environment; the process's own when None.
        file: JSON or TOML file; the one that ``MOONCAKE_CONFIG`` names when None.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or a file that cannot be read;
            ``where`` names the key's path and its source.
    """
    return load_with_origins(cls, overrides, environ, file).config


def load_with_origins(
    cls: type[C],
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> Loaded[C]:
    """Do what :func:`load_config` does and also tell where each value came from.

    Raises:
        ConfigError: as for :func:`load_config`.
    """
    environ = os.environ if environ is None else environ
    path = file if file is not None else environ.get(ENV_FILE) or None
    values: dict[str, Any] = {}
    origins = dict.fromkeys(cls.__struct_fields__, "default")
    fields = {field.name: field for field in msgspec.structs.fields(cls)}
    for given, origin in (
        (_read_file(Path(path)) if path else {}, f"file {path}"),
        (environment_values(cls, environ), "environment"),
        ({key: value for key, value in (overrides or {}).items() if value is not None}, "explicit"),
    ):
        _reject_unknown(cls, given, origin)
        for key, value in given.items():
            source = f"environment {environment_name(key)}" if origin == "environment" else origin
            values[key] = _convert(cls, fields[key], value, source)
            origins[key] = source
    return Loaded(cls(**values), origins)


def environment_name(key: str) -> str:
    """Return the variable that sets a key: ``lease_s`` -> ``MOONCAKE_LEASE_S``."""
    return ENV_PREFIX + key.upper()


def environment_values(cls: type[msgspec.Struct], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the keys that the environment sets, unparsed. An empty variable counts as not set."""
    found = {key: environ.get(environment_name(key), "") for key in cls.__struct_fields__}
    return {key: value for key, value in found.items() if value}


def unknown_environment(cls: type[msgspec.Struct], environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ``MOONCAKE_*`` variables that set nothing -> the nearest one that would, or an empty string.

    They are no error, because other programs use the prefix too.
    """
    # Compared without the prefix, which would make every pair look alike.
    known = [name.removeprefix(ENV_PREFIX) for name in (ENV_FILE, *map(environment_name, cls.__struct_fields__))]
    names = [name for name in (os.environ if environ is None else environ) if name.startswith(ENV_PREFIX)]
    unknown = sorted(name for name in names if name.removeprefix(ENV_PREFIX) not in known)
    nearest = {name: _nearest(name.removeprefix(ENV_PREFIX), known) for name in unknown}
    return {name: ENV_PREFIX + near if near else "" for name, near in nearest.items()}


def wants_debug(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether ``MOONCAKE_DEBUG`` asks for tracebacks, before any configuration could be loaded."""
    value = (os.environ if environ is None else environ).get(environment_name("debug"), "")
    return value.strip().lower() not in ("", "0", "false")


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*$", re.IGNORECASE)


def parse_size(text: str, *, where: str = "") -> int:
    """Return the bytes that a size such as ``2GiB``, ``512 MiB``, ``1.5GB`` or ``4096`` names.

    Raises:
        ConfigError: it is no size, or no whole number of bytes.
    """
    hint = "write a size such as 512MiB, 2GiB or 1048576 (bytes)"
    match = _SIZE.match(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size", where=where, hint=hint)
    unit = _UNITS[match[2].lower()]
    size = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    if size != int(size):
        raise ConfigError(f"{text!r} is not a whole number of bytes", where=where, hint=hint)
    return int(size)


def describe_fields(cls: type[msgspec.Struct]) -> dict[str, str]:
    """Return key -> its description, taken from the ``Attributes:`` of the class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section, re.MULTILINE):
            if name in cls.__struct_fields__:
                found[name] = re.sub(r"\s+", " ", text).replace("``", "`")
    return found


def config_schema(cls: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the JSON Schema of a configuration file; sizes may also be strings such as ``2GiB``."""
    schema = msgspec.json.schema(cls)
    definition = schema["$defs"].pop(cls.__name__)
    if not schema["$defs"]:
        del schema["$defs"]
    del schema["$ref"]
    definition["description"] = (cls.__doc__ or "").partition("\n")[0]
    for key, text in describe_fields(cls).items():
        definition["properties"][key]["description"] = text
        if key.endswith("_bytes"):
            size = {name: definition["properties"][key].pop(name) for name in ("type", "minimum")}
            definition["properties"][key]["anyOf"] = [size, {"type": "string", "pattern": _SIZE.pattern}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **definition, **schema}


def _read_file(path: Path) -> dict[str, Any]:
    """Read a JSON or TOML file, told apart by its name."""
    where = f"file {path}"
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise ConfigError(f"the file is longer than {FILE_MAX_BYTES} bytes", where=where, hint="name another file")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file: {error.strerror or error}", where=where,
                          hint=f"name a readable JSON or TOML file in {ENV_FILE} or with --config") from error
    try:
        values = tomllib.loads(data.decode()) if path.suffix == ".toml" else msgspec.json.decode(data)
    except (tomllib.TOMLDecodeError, msgspec.DecodeError, UnicodeDecodeError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise ConfigError(f"the file is not {kind}: {error}", where=where,
                          hint="mend it; `mooncake config --schema` prints what it may hold") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the file holds a {type(values).__name__}, not an object", where=where,
                          hint='write {"key": value, ...}')
    return values


def _reject_unknown(cls: type[msgspec.Struct], given: Mapping[str, object], origin: str) -> None:
    unknown = [key for key in given if key not in cls.__struct_fields__]
    if not unknown:
        return
    near = {key: _nearest(str(key), cls.__struct_fields__) for key in unknown}
    hints = [f"did you mean `{name}` instead of `{key}`?" for key, name in near.items() if name]
    hint = " ".join(hints) or f"known keys: {', '.join(sorted(cls.__struct_fields__))}"
    named = ", ".join(f"`{key}`" for key in unknown)
    raise ConfigError(f"unknown key {named}" if len(unknown) == 1 else f"unknown keys {named}",
                      where=f"{', '.join(f'$.{key}' for key in unknown)} ({origin})", hint=hint)


def _nearest(name: str, known: Any) -> str:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), "")


def _convert(cls: type[msgspec.Struct], field: msgspec.structs.FieldInfo, value: object, source: str) -> object:
    """Turn one given value into the field's type; strings are parsed, everything else must fit as it is."""
    where = f"$.{field.name} ({source})"
    is_text = isinstance(value, str)
    if is_text and field.name.endswith("_bytes"):
        value = parse_size(str(value), where=where)
    elif is_text and msgspec.inspect.type_info(field.type).__class__.__name__ in ("VarTupleType", "ListType"):
        value = [part.strip() for part in str(value).split(",") if part.strip()]
    try:
        return msgspec.convert(value, field.type, strict=not is_text)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        where = f"$.{field.name}{path.rstrip('`')} ({source})"
        text = describe_fields(cls).get(field.name, "")
        if "enum" in message:
            choices = re.findall(r"'(\w+)'", str(field.type))
            message += f", not one of {', '.join(choices)}"
        raise ConfigError(f"{field.name}={value!r}: {message[:1].lower()}{message[1:]}", where=where,
                          hint=f"{field.name}: {text}" if text else "see `mooncake config --schema`") from error
