"""Ways in which a safetensors file of ours may be damaged, drawn at random."""

import copy
import hashlib
import json
import random
from typing import Any

VALUES = [None, True, 0, -1, 1, 2, 1 << 40, 1 << 63, 10**400, 0.5, -0.0, float("nan"), float("inf"), "", "idle", "mask",
          "weight", "joint", "../../etc/passwd", "\x1b[2J", "F64", "I64", [], [0], {}, {"a": 1}]  # fmt: skip


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 9))):
        # Half of the bits in the header, which is the smaller part.
        at = draw.randrange(draw.choice((len(data), 8 + int.from_bytes(data[:8], "little"))))
        spoilt[at] ^= 1 << draw.randrange(8)
    return bytes(spoilt)


def overwritten(data: bytes, draw: random.Random) -> bytes:
    at, count = draw.randrange(len(data)), draw.choice((1, 8, 100, 4096))
    part = draw.choice((bytes(count), draw.randbytes(count), data[:count], b"\xff" * count))
    return data[:at] + part + data[at + draw.choice((0, count)) :]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON object."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, v in inner for p in places(v, (*path, key))]


def edit(value: Any, draw: random.Random) -> None:
    """Change, remove, add or exchange something in a JSON object."""
    *path, last = draw.choice(places(value))
    for step in path:
        value = value[step]
    how = draw.choice(("change", "nudge", "remove", "add"))
    if how == "nudge" and type(value[last]) in (int, float):
        value[last] += draw.choice((-1, 1, 1000))
    elif how == "remove":
        del value[last]
    elif how == "add" and isinstance(value, dict):
        value[draw.choice(("more", "weight/../x", "__metadata__", "checksum", "\x1b[2J"))] = copy.deepcopy(value[last])
    else:
        value[last] = draw.choice(VALUES)


def edited(data: bytes, draw: random.Random) -> bytes:
    """Other fields or other bytes of tensors, with a checksum that fits."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    for _ in range(draw.choice((1, 1, 3))):
        what = draw.choice(("fields", "fields", "entries", "bytes"))
        if what == "fields":
            meta = json.loads(header["__metadata__"]["exssnet"])
            edit(meta, draw)
            header["__metadata__"]["exssnet"] = json.dumps(meta)
        elif what == "entries":
            edit(header, draw)
        else:
            at = draw.randrange(len(body) - 32)
            body[at : at + 4] = draw.choice((draw.randbytes(4), b"\0\0\xc0\x7f", b"\xff\xff\xff\xff"))
        if not isinstance(header.get("__metadata__"), dict) or "exssnet" not in header["__metadata__"]:
            break
        try:
            if not isinstance(json.loads(header["__metadata__"]["exssnet"]), dict):
                break
        except (TypeError, ValueError):
            break
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(body[:-32])
    return whole + hashlib.sha256(whole).digest()
