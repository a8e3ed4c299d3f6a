"""Files as a disk, a transfer or an enemy may leave them: bytes, JSON and names that are not what was written."""

from __future__ import annotations

import json
import re
import struct
from random import Random
from typing import Any

ODD = (
    None, True, -1, 0, 1, 7, 64, 2**31, 2**62, 2**63, 10**30, -(2**40), 0.5, 1e308, float("nan"), float("inf"), "",
    "64", "x" * 5000, "F32", "I64", "BF16", "F4", [], [1], [2**40, 2**40], [-1, 64], {}, {"a": {"a": {}}}, "\x00",
)  # fmt: skip
NAMES = (
    "a.b.c", "a/b", "a\\b", "'", '"', "<script>alert(1)</script>", "&amp;", "ünïcödé", "名前", "🙂", "a b", "a\nb",
    "a\tb", "%s%n", "{0}", "$HOME", "`x`", "--flag", "", "weight_sl", "w" * 3000, "\u202eabc", "\x7f", "*[0-9]?",
)  # fmt: skip


def of_bytes(content: bytes, random: Random) -> bytes:
    """Returns bytes of which some were changed, lost, repeated or added, or a length at their beginning."""
    found = bytearray(content)
    kind = random.choice(("flip", "flip", "cut", "lose", "repeat", "zero", "add", "length", "empty"))
    at = random.randrange(len(found)) if random.random() < 0.5 else random.randrange(min(len(found), 2048))
    size = random.choice((1, 2, 8, 64, 4096))
    if kind == "flip":
        for _ in range(random.choice((1, 1, 2, 8, 64))):
            where = random.randrange(len(found)) if random.random() < 0.3 else random.randrange(min(len(found), 4096))
            found[where] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del found[at:]
    elif kind == "lose":
        del found[at : at + size]
    elif kind == "repeat":
        found[at:at] = found[at : at + size]
    elif kind == "zero":
        found[at : at + size] = bytes(len(found[at : at + size]))
    elif kind == "add":
        found += random.randbytes(size)
    elif kind == "length":
        found[:8] = struct.pack("<Q", random.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(found), 100_000_000)))
    else:
        return b""
    return bytes(found)


def of_json(text: str, random: Random) -> str:
    """Returns JSON of which one value or key was changed, lost or given twice, or that is none any more."""
    if random.random() < 0.15:
        return of_bytes(text.encode(), random).decode(errors=random.choice(("replace", "surrogateescape")))
    tree = json.loads(text)
    holder, key = random.choice(list(_places(tree)))
    kind = random.choice(("value", "value", "value", "lose", "rename", "type", "digits", "twice", "deep", "whole"))
    if kind == "value":
        holder[key] = random.choice(ODD)
    elif kind == "lose":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[random.choice((*NAMES, *map(str, holder)))] = holder.pop(key)
    elif kind == "type":
        holder[key] = [holder[key]] if random.random() < 0.5 else str(holder[key])
    elif kind == "twice" and isinstance(holder, dict):
        once, again = json.dumps(key), json.dumps(random.choice(ODD))
        return json.dumps(tree).replace(f"{once}: ", f"{once}: {again}, {once}: ", 1)
    elif kind == "deep":
        holder[key] = "@"
        depth = random.choice((10, 2000, 100_000))
        return json.dumps(tree).replace('"@"', "[" * depth + "]" * depth)
    elif kind == "whole":
        return json.dumps(random.choice(ODD))
    else:
        numbers = (0, 10**9, 2**63, 64)
        return re.sub(r"\d+", lambda _: str(random.choice(numbers)), json.dumps(tree), count=3)
    return json.dumps(tree)


def _places(tree: Any) -> Any:
    """Yields every place that holds a value: the dict or list, and its key."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def of_safetensors(content: bytes, random: Random) -> bytes:
    """Returns a safetensors file with another header, whose length fits or not, or with other bytes."""
    if random.random() < 0.4:
        return of_bytes(content, random)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    text = of_json(header.decode(), random) if random.random() < 0.6 else _of_entries(header.decode(), random)
    changed = text.encode(errors="surrogatepass")
    changed += b" " * (-len(changed) % 8)
    return struct.pack("<Q", len(changed)) + changed + data


def _of_entries(text: str, random: Random) -> str:
    """Returns a header that is valid, but says something else of two tensors: names, dtypes or shapes exchanged."""
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    first, second = random.sample(names, 2)
    kind = random.choice(("names", "dtype", "shape", "rename", "lose", "whole"))
    if kind == "names":
        header[first], header[second] = header[second], header[first]
    elif kind == "dtype":
        same = {"F32": "I32", "I32": "F32", "I64": "F64", "F64": "I64", "BF16": "F16"}
        header[first]["dtype"] = same.get(header[first]["dtype"], "U8")
    elif kind == "shape":
        header[first]["shape"] = header[first]["shape"][::-1]
    elif kind == "rename":
        header[f"{first}{random.choice(NAMES)}"] = header.pop(first)
    elif kind == "lose":
        del header[first]
    else:
        header[first]["shape"] = [1, *header[first]["shape"]]
    return json.dumps(header)
