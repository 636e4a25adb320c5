"""Turn valid inputs into almost valid ones, from a seed: the same seed, the same inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

# headers that declare much: array, map, str, bin and ext of up to 2^32 - 1
INFLATED = (b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xde\xff\xff", b"\xdb\xff\xff\xff\xff",
            b"\xda\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc5\xff\xff", b"\xc9\xff\xff\xff\xff\x01",
            b"\xdd\x00\x10\x00\x00")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 65_535, 65_536, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, 1e308,
    float("nan"), float("inf"), "", "a", "x" * 300, "a..b", "tcp://", "\u20ac" * 60, b"", b"\0" * 90, [], {}, [[]],
    [None] * 40, msgspec.Raw(b"\x91" * 4000 + b"\xc0"), msgspec.Raw(b"\x81\xa1a" * 4000 + b"\xc0"), {"a": 1},
    ["shm", "x"], ["tcp", "127.0.0.1", 99_999], "hello", "welcome",
)  # fmt: skip
ODD_JSON = (b"null", b"-1", b"1e999", b"1" * 5000, b"[" * 2000, b'{"a":' * 2000, b'"\\ud800"', b"NaN", b"[]", b"{}",
            b"0.5", b'"' + b"x" * 300 + b'"', b"true", b"\xff", b"18446744073709551616", b"-9223372036854775809")


def mutants(samples: tuple[bytes, ...], *, codec: str, head: int, count: int, seed: int) -> Iterator[bytes]:
    """Yield ``count`` damaged versions of the samples."""
    rng = random.Random(seed)
    ways: list[Callable[[random.Random, bytes], bytes]] = [_flip_bits, _set_bytes, _truncate, _splice, _inflate]
    trees = []
    if codec == "msgpack":
        trees = [(sample[:head], msgspec.msgpack.decode(sample[head:])) for sample in samples]
    if codec == "json":
        ways.append(_odd_json)
    for index in range(count):
        if trees and index % 2:
            prefix, tree = trees[rng.randrange(len(trees))]
            yield prefix + _swap_value(rng, tree)
            continue
        data = samples[rng.randrange(len(samples))]
        way = ways[rng.randrange(len(ways))]
        data = way(rng, data) if way is not _splice else _splice(rng, data, samples[rng.randrange(len(samples))])
        if index % 8 == 0:
            data = _flip_bits(rng, data)
        yield data


def _flip_bits(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\0"
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_bytes(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    width = rng.choice((1, 2, 4, 8))
    return data[:start] + rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * width + data[start + width:]


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[:rng.randrange(len(data) + 1)]


def _splice(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    return data[:rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1):]


def _inflate(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice(INFLATED) + data[start + rng.randrange(2):]


def _odd_json(rng: random.Random, data: bytes) -> bytes:
    """Put an odd value where one began: behind a colon, a comma or a bracket."""
    starts = [index + 1 for index, byte in enumerate(data) if byte in b":,["]
    start = rng.choice(starts)
    stop = start
    while stop < len(data) and data[stop] not in b",]}":
        stop += 1
    return data[:start] + rng.choice(ODD_JSON) + data[stop:]


def _swap_value(rng: random.Random, tree: Any) -> bytes:
    """Encode the tree with one of its values replaced, removed or repeated."""
    node, parent, place = tree, None, None
    while isinstance(node, list | dict) and node and (parent is None or rng.random() < 0.8):
        parent = node
        place = rng.randrange(len(node)) if isinstance(node, list) else rng.choice(list(node))
        node = node[place]
    if parent is None:
        return msgspec.msgpack.encode(rng.choice(ODD_VALUES))
    what = rng.randrange(5) if isinstance(parent, list) else 0
    saved = parent.copy()
    if what == 1:
        del parent[place]
    elif what == 2:
        parent.extend([node] * rng.choice((1, 2, 70)))
    elif what == 3:
        parent.append(rng.choice(ODD_VALUES))
    elif what == 4:
        other = rng.randrange(len(parent))
        parent[place], parent[other] = parent[other], parent[place]
    else:
        parent[place] = rng.choice(ODD_VALUES)
    data = msgspec.msgpack.encode(tree)
    parent.clear()
    parent.extend(saved) if isinstance(parent, list) else parent.update(saved)
    return data
