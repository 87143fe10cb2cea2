"""Compresses masks: Huffman codes of the gaps between kept, or dropped, weights, a tenth above the entropy at most."""

import zlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BITS, GAPS, DROPPED = 0, 1, 2
"""First byte of a coded mask: it holds packed bits, gaps between kept weights, or gaps between dropped weights."""
ESCAPE = 255
HEAD = 9  # bytes before the code: the first byte, and 8 bytes with the number of kept weights


def encode(bits: Tensor, n: int) -> Tensor:
    """Compress a packed mask. `decode` restores it.

    A gap is the number of weights between a kept weight and the next kept one. If more than half of the weights are
    kept, the gaps are those between dropped weights. A gap is written as one byte 255 for every 255 weights of it, and
    a last byte below 255. zlib codes these bytes by Huffman codes. If the packed bits are not longer than the code,
    they are stored instead.

    Args:
        bits: Packed mask (see `pack_mask`), uint8.
        n: Number of weights.

    Returns:
        The compressed mask, uint8.
    """
    packed = bits.cpu().numpy()
    ones = np.unpackbits(packed, count=n, bitorder="little")
    kept = int(ones.sum(dtype=np.int64))
    rare = DROPPED if 2 * kept > n else GAPS
    where = np.flatnonzero(ones == (rare == GAPS))
    gaps = np.diff(where, prepend=-1) - 1
    ends = np.cumsum(gaps // ESCAPE + 1) - 1
    symbols = np.full(ends[-1] + 1 if len(ends) else 0, ESCAPE, np.uint8)
    symbols[ends] = gaps % ESCAPE
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    coded = packer.compress(symbols.tobytes()) + packer.flush()
    kind, body = (rare, coded) if len(coded) < len(packed) else (BITS, packed.tobytes())
    return torch.frombuffer(bytearray([kind]) + kept.to_bytes(8, "little") + body, dtype=torch.uint8)


def decode(coded: Tensor, n: int) -> Tensor:
    """Restore a packed mask from the result of `encode`.

    Args:
        coded: Result of `encode`, uint8, on the CPU.
        n: Number of weights.

    Returns:
        The packed mask, uint8.

    Raises:
        ValueError: If these bytes are no mask of n weights.
    """
    data = coded.numpy().tobytes()
    kept = int.from_bytes(data[1:HEAD], "little")
    if len(data) < HEAD or kept > n:
        raise ValueError(f"a mask of {n} weights cannot be coded in {len(data)} bytes that keep {kept}")
    read = {BITS: _ones, GAPS: _positions, DROPPED: _positions}.get(data[0])
    count = n - kept if data[0] == DROPPED else kept
    where = None if read is None else read(data, count, n)
    if where is None or len(where) != count or (count and where[-1] >= n):
        raise ValueError(f"a mask of {n} weights that keeps {kept} is damaged")
    flags = np.zeros(-(-n // 8) * 8, np.uint8)
    flags[:n] = data[0] == DROPPED
    flags[where] = data[0] != DROPPED
    return torch.from_numpy(np.packbits(flags, bitorder="little"))


def _ones(data: bytes, count: int, n: int) -> npt.NDArray[np.int64] | None:
    """Ascending indices of the kept weights, from packed bits; None if their number is wrong."""
    mask = np.frombuffer(data, np.uint8, offset=HEAD)
    return np.flatnonzero(np.unpackbits(mask, bitorder="little")) if len(mask) == -(-n // 8) else None


def _positions(data: bytes, count: int, n: int) -> npt.NDArray[np.int64] | None:
    """Ascending indices of `count` weights, from the gaps between them; None if the bytes are no complete code."""
    unpacker = zlib.decompressobj(-15)
    longest = count + n // ESCAPE + 1  # more symbols would exceed n weights
    try:
        symbols = np.frombuffer(unpacker.decompress(data[HEAD:], longest), np.uint8)
    except zlib.error:
        return None
    if not unpacker.eof or unpacker.unused_data or (len(symbols) and symbols[-1] == ESCAPE):
        return None
    ends = symbols != ESCAPE
    where: npt.NDArray[np.int64] = np.cumsum(symbols, dtype=np.int64)[ends] + np.arange(int(ends.sum()))
    return where
