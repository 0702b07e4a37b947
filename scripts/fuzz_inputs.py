"""Inputs for a reader: structures that hypothesis draws, and valid files with changed bytes; all decided by a seed."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from fuzz_corpus import Target, mask_files, photo_files
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

_DEEP = "@@DEEP@@"
_NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    100_000,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
_WORDS = (
    "", " ", "..", "../../../etc/passwd", "/etc/passwd", "C:\\x", "a\nb", "a\0b", "\ud800", "\x1b[2J", "é" * 30,
    "x" * 5000,
    "~nobody/x", "one", "cat", "__ignore__", "hub", "random", "nan", "-1", "1e999", "\u202e", "a" * 300 + ".jpg",
    "%s%n",
    "p1.jpg", "mask", "context", "similarity", "general", _DEEP,
)  # fmt: skip


def _scalars() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 300),
        st.sampled_from([*_NUMBERS, -1, 10**30, 10**400, -(2**63), -(10**12)]),
        st.floats(),
        st.sampled_from(_WORDS),
        st.text(max_size=8),
    )


def json_values() -> st.SearchStrategy[Any]:
    """Small trees of anything that JSON can say, and of what only Python's parser takes (NaN, infinities)."""
    return st.recursive(
        _scalars(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.text(max_size=6) | st.sampled_from(_WORDS[:8]), inner, max_size=3),
        ),
        max_leaves=6,
    )


_OPERATIONS = ("tweak", "tweak", "tweak", "replace", "replace", "delete", "double", "rename", "wrap", "many")
_changes = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(_OPERATIONS), json_values()), min_size=1, max_size=2
)


def changed_json(value: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """A copy of a JSON value with some of its parts replaced, deleted, doubled, renamed or wrapped."""
    holder = {"": json.loads(json.dumps(value))}
    for number, operation, other in changes:
        places = list(_places(holder))
        parent, key = places[number % len(places)]
        if operation == "replace":
            parent[key] = other
        elif operation == "tweak":
            parent[key] = _tweaked(parent[key], number)
        elif operation == "wrap":
            parent[key] = [parent[key]]
        elif operation == "delete" and parent is not holder:
            del parent[key]
        elif operation == "double" and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif operation == "rename" and isinstance(parent, dict) and parent is not holder:
            parent[str(other)[:50]] = parent.pop(key)
        elif operation == "many":
            parent[key] = [parent[key]] * 50
    return holder[""]


def _tweaked(value: Any, number: int) -> Any:
    """Nearly the same, of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return (value + 1, value - 1, -value, value / 2, value * 10, float(value))[number % 6]
    if isinstance(value, str):
        return (value + "x", value[:-1], value.upper(), f" {value}", f"{value}/..")[number % 5]
    return value[:-1] if isinstance(value, list) else {**value, "more": number}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def as_json(value: Any, depth: int) -> bytes:
    """The text; the deep word becomes lists in each other."""
    return json.dumps(value).replace(f'"{_DEEP}"', "[" * depth + "]" * depth).encode()


def _structured_json(content: bytes) -> st.SearchStrategy[bytes]:
    value = json.loads(content)
    depths = st.sampled_from([30, 200, 900, 940, 960, 975, 985, 100_000])
    return st.builds(lambda changes, depth: as_json(changed_json(value, changes), depth), _changes, depths)


def _structured_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """The header changed and its length set right; often the description in it, which is JSON in a JSON text."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    told = json.loads(header.get("__metadata__", {}).get("fewshot_seg", "null"))

    def build(changes: list[tuple[int, str, Any]], inside: bool, depth: int, damage: int) -> bytes:
        new = dict(header)
        if inside and told is not None:
            new["__metadata__"] = {"fewshot_seg": as_json(changed_json(told, changes), depth).decode()}
        else:
            new = changed_json(header, changes)
        text = as_json(new, depth)
        tail = bytearray(body)
        if damage % 3 == 0 and len(tail) >= 8:  # numbers that are none
            place = damage % (len(tail) - 4) // 4 * 4
            tail[place : place + 4] = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\0\x7c\0\x7c")[
                damage % 4
            ]
        return struct.pack("<Q", len(text)) + text + bytes(tail)

    depths = st.sampled_from([30, 900, 960, 100_000])
    return st.builds(build, _changes, st.booleans(), depths, st.integers(0, 10**6))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place + 8 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        found.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


_bomb = zlib.compress(bytes(50_000_000), 9)
_EXTRA = {
    b"iCCP": b"name\0\0" + _bomb, b"zTXt": b"Comment\0\0" + _bomb, b"iTXt": b"Comment\0\1\0\0\0" + _bomb,
    b"tRNS": b"\1\2\3", b"acTL": struct.pack(">II", 2**31 - 1, 0),
    b"eXIf": b"MM\0*\xff\xff\xff\xff", b"PLTE": b"\1" * 5,
    b"tEXt": b"a\0" + b"b" * 100_000, b"fcTL": bytes(26), b"IDAT": b"", b"IEND": b"", b"gAMA": b"",
    b"cHRM": b"\xff" * 32,
}  # fmt: skip


def _structured_png(content: bytes) -> st.SearchStrategy[bytes]:
    """Chunks in another order or number, odd ones among them, and any head, with right checksums."""
    chunks = _chunks(content)
    sides = st.sampled_from([0, 1, 2, 47, 48, 49, 1000, 20_000, 100_000, 2**31 - 1])

    def build(size: tuple[int, int] | None, depth: int, colour: int, extra: list[bytes], order: int) -> bytes:
        parts = list(chunks)
        if size is not None:
            head = struct.pack(">II", *size) + bytes([depth, colour]) + parts[0][1][10:13]
            parts[0] = (b"IHDR", head)
        for n, kind in enumerate(extra):
            parts.insert(1 + (order + n) % len(parts), (kind, _EXTRA[kind]))
        if order % 7 == 0:
            parts.append(parts.pop(order % len(parts)))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)

    return st.builds(
        build,
        st.none() | st.tuples(sides, sides),
        st.sampled_from([1, 2, 4, 8, 16, 3]),
        st.sampled_from([0, 2, 3, 4, 6, 1]),
        st.lists(st.sampled_from(sorted(_EXTRA)), max_size=2),
        st.integers(0, 100),
    )


def _structured_text(content: bytes) -> st.SearchStrategy[bytes]:
    """Words of the text replaced, lines doubled, values as TOML or a list would have them."""
    lines = content.decode().split("\n")
    values = st.sampled_from(
        ["nan", "inf", "-inf", "1e999", "9" * 5000, "0x" + "f" * 400, "true", '""', "[]", "[[1]]", "{}",
         "1979-05-27", '"\\u0000"',
         '"~nobody/x"', "-1", "0", "[1, 'a']", "'''", "[" * 2000, "a = " * 50, "../../x", "\0", "é", "#", "=", ":",
         "box=nan,0,1,1",
         "point=inf,1", "box=1e400,0,1,1", "+", "*", "**", "[!", "x" * 5000, "1_0", "٣", "\ufeff", "\u2028",
         "\udc80", "~", "~root"]
    ) | st.text(max_size=6)  # fmt: skip

    def build(changes: list[tuple[int, int, str]]) -> bytes:
        new = list(lines)
        for number, how, value in changes:
            place = number % len(new)
            words = new[place].split(" ")
            if how == 0:
                new.insert(place, new[place])
            elif how == 1:
                new[place] = value
            elif how == 2 and "=" in new[place]:
                new[place] = f"{new[place].split('=')[0]}= {value}"
            else:
                words[number % len(words)] = value
                new[place] = " ".join(words)
        return "\n".join(new).encode("utf-8", "surrogateescape")

    changes = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 4), values), min_size=1, max_size=3)
    return st.builds(build, changes)


def _strategy(target: Target, name: str, content: bytes) -> st.SearchStrategy[bytes] | None:
    if name.endswith(".safetensors") or (target.place or "").endswith(".safetensors"):
        return _structured_safetensors(content)
    if content.startswith(b"\x89PNG"):
        return _structured_png(content)
    if name.endswith(".json") and content[:1] == b"{":
        return _structured_json(content)
    if target.kind == "text" or name.endswith(".txt"):
        return _structured_text(content)
    return None


def _drawn(strategy: st.SearchStrategy[bytes], count: int, number: int) -> list[bytes]:
    found: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def note(content: bytes) -> None:
        found.append(content)

    note()
    return found[:count]


# --------------------------------------------------------------------------------------------------- changed bytes


def _flip(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 2, 8, 40))):
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)


def _number(content: bytearray, chance: random.Random) -> None:
    width = chance.choice((1, 2, 4, 8))
    value = chance.choice(_NUMBERS) % 256**width
    # heads of files are short and decide most
    place = chance.randrange(min(len(content), chance.choice((64, 512, len(content)))))
    content[place : place + width] = value.to_bytes(width, chance.choice(("big", "little")))


def _cut(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def _block(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    block = content[start : start + chance.choice((1, 4, 16, 64, 512, 4096))]
    how, place = chance.randrange(4), chance.randrange(len(content))
    if how == 0:
        del content[start : start + len(block)]
    elif how == 1:
        content[place:place] = block * chance.choice((1, 1, 2, 50))
    elif how == 2:
        content[place : place + len(block)] = block
    else:
        content[start : start + len(block)] = bytes([chance.choice((0, 255, 32, 10))]) * len(block)


def _noise(content: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(content))
    content[place:place] = chance.randbytes(chance.choice((1, 8, 100)))


_CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _flip,
    _number,
    _number,
    _number,
    _cut,
    _block,
    _noise,
)


def changed_bytes(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A file with some bytes changed; now and then it is empty, as it was, or of another kind altogether."""
    luck = chance.random()
    if luck < 0.01:
        return b""
    if luck < 0.02:
        return content
    if luck < 0.06:
        return chance.choice(others)
    if luck < 0.12 and content:
        other = chance.choice(others)
        return content[: chance.randrange(len(content))] + other[chance.randrange(len(other)) :]
    new = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if new:
            chance.choice(_CHANGES)(new, chance)
    return bytes(new)


def inputs_of(target: Target, number: int, seed_number: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of `count` inputs. The first ones do not depend on `count`.

    Hypothesis draws for blocks of inputs, so that some can be made again without all.
    """
    seeds = list(target.seeds.items())
    everything = [*(content for _, content in seeds), *photo_files().values(), *mask_files().values(), b"text\n",
                  b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", b"PK\x03\x04" + bytes(30),
                  b"[]", b"{}",
                  b"\x80\x02]q\x00.", bytes(1000)]  # fmt: skip
    for block in range(-(-count // _BLOCK)):
        chance = random.Random(f"{seed_number}/{number}/{block}")
        name, content = seeds[chance.randrange(len(seeds))]
        strategy = _strategy(target, name, content)
        made = (
            [] if strategy is None else [(name, one) for one in _drawn(strategy, _BLOCK // 2, chance.randrange(2**32))]
        )
        while len(made) < _BLOCK:
            name, content = chance.choice(seeds)
            made.append((name, changed_bytes(content, everything, chance)))
        chance.shuffle(made)
        yield from made[: count - block * _BLOCK]


_BLOCK = 20
