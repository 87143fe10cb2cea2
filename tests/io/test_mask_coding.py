"""Coded masks: they come back bit for bit, take little more than their entropy, and anything else is refused."""

import math
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from exssnet import pack_mask
from exssnet.io.mask_coding import GAPS, decode, encode


def random_mask(n: int, kept: int, seed: int = 0) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return mask


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 255, 256, 257, 5001])
@pytest.mark.parametrize("density", [0, 0.001, 0.02, 0.1, 0.5, 0.9, 1])
def test_a_mask_comes_back_bit_for_bit(n: int, density: float) -> None:
    bits = pack_mask(random_mask(n, round(density * n)))
    assert torch.equal(decode(encode(bits, n), n), bits)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765])
def test_gaps_about_the_escape_come_back(gap: int) -> None:
    mask = torch.zeros(5000, dtype=torch.bool)
    mask[gap :: gap + 1] = True
    assert torch.equal(decode(encode(pack_mask(mask), 5000), 5000), pack_mask(mask))


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.8, 0.95])
def test_a_random_mask_takes_at_most_a_tenth_more_than_its_entropy(density: float) -> None:
    n = 1 << 20
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)  # bits a weight
    assert 8 * len(encode(pack_mask(random_mask(n, round(density * n))), n)) <= 1.1 * entropy * n


@pytest.mark.parametrize("density", [0.5, 0.9, 1])
def test_a_dense_mask_takes_no_more_than_its_bits(density: float) -> None:
    assert len(encode(pack_mask(random_mask(8000, round(8000 * density))), 8000)) <= 1000 + 9


CODED = encode(pack_mask(random_mask(3000, 150)), 3000)
DENSE = encode(pack_mask(random_mask(3000, 2850)), 3000)


@pytest.mark.parametrize("n", [0, 1, 2000])
def test_a_mask_of_a_smaller_layer_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"a mask of {n} weights"):
        decode(CODED, n)


@given(some.integers(0, 2**32), some.sampled_from(["cut", "flip", "more", "count", "kind"]), some.booleans())
def test_damaged_bytes_are_refused_or_a_mask(seed: int, how: str, dense: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = bytearray((DENSE if dense else CODED).numpy().tobytes())
    at = int(torch.randint(len(data), (1,), generator=generator))
    if how == "cut":
        del data[at:]
    elif how == "flip":
        data[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
    elif how == "more":
        data[at:at] = bytes([at % 256])
    elif how == "count":
        data[1 + at % 8] += 1
    else:
        data[0] = at % 256
    try:
        found = decode(torch.tensor(list(data), dtype=torch.uint8), 3000)
    except ValueError:
        return
    assert found.shape == (375,)
    assert sum(bin(b).count("1") for b in found.tolist()) == int.from_bytes(data[1:9], "little")


def test_a_stream_that_unpacks_to_far_more_is_refused_without_unpacking_it() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(1 << 26)) + packer.flush()
    data = bytearray([GAPS, *(100).to_bytes(8, "little"), *bomb])
    coded = torch.tensor(list(data), dtype=torch.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="a mask of 3000 weights that keeps 100 is damaged"):
            decode(coded, 3000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_gaps_that_end_within_a_gap_are_refused() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    gaps = packer.compress(bytes([3, 255])) + packer.flush()
    with pytest.raises(ValueError, match="a mask of 3000 weights that keeps 1 is damaged"):
        decode(torch.tensor([GAPS, *(1).to_bytes(8, "little"), *gaps], dtype=torch.uint8), 3000)
