"""Several processes that train one model: what they exchange, and nothing where there is one process."""

import atexit
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Its functions' default arguments hold the group that exists when it is imported, and any optimizer imports it:
    # then `destroy_process_group` leaves Gloo's threads running, which can abort the process at its end.
    import torch.distributed.nn


def size() -> int:
    """Number of processes: 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process' number; 0 decides and writes."""
    return dist.get_rank() if size() > 1 else 0


def part() -> tuple[int, int]:
    """Which part of every batch is this process': (rank, size)."""
    return rank(), size()


def share(batch: int) -> int:
    """How many items of a batch of so many are this process'."""
    return len(range(rank(), batch, size()))


def start() -> None:
    """Join the processes that `torchrun` started, each with its own GPU if there are any; nothing without torchrun."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.get_node_local_rank())
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, number, processes = next(rendezvous("env://"))
        # The store outlives a restart: what the processes of before wrote there is out of the way under a prefix.
        store = PrefixStore(f"restart {_restarts()}", store)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=processes)
        atexit.register(dist.destroy_process_group)


def restarted() -> bool:
    """Whether torchrun started the processes again because one of them died."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, the same bits on each, in one exchange for each dtype."""
    if size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    with torch.no_grad():
        for together in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in together])
            dist.all_reduce(flat)
            parts = (flat / size()).split([t.numel() for t in together])
            for tensor, part in zip(together, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def total(values: Iterable[float], device: torch.device) -> list[float]:
    """The sums of some numbers over all processes."""
    sums = torch.tensor(list(values), dtype=torch.float64, device=device)
    if size() > 1:
        dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def of_first(value: Any) -> Any:
    """What process 0 says: its decision for all."""
    if size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]


def gathered(value: Any) -> list[Any]:
    """What every process says, by rank."""
    if size() == 1:
        return [value]
    said: list[Any] = [None] * size()
    dist.all_gather_object(said, value)
    return said


def sharded_topk_mask(shard: Tensor, k: int) -> Tensor:
    """The part of `topk_mask` of a tensor that lies in shards on several processes: bool, of the shard's shape.

    The whole is the shards' elements in the order of the ranks, as `fully_shard` (FSDP2) cuts a parameter along its
    first dimension: give ``parameter.to_local()``. Exactly the k largest magnitudes of the whole are kept, of equal
    ones those of smaller index in the whole, the same bits that `topk_mask` of the whole has.
    What travels are histograms of 11 bits of the magnitudes, three of 16 kB, and two numbers a process.
    shard: float32, of any shape, also empty. ValueError for a k that is not in [0, n] or NaN, on every process.
    """
    if shard.dtype != torch.float32:
        raise ValueError(f"sharded_topk_mask: shard must be float32, got {shard.dtype}")
    magnitude = shard.detach().contiguous().view(-1).abs().view(torch.int32).long()  # order of magnitudes
    counts = torch.tensor([magnitude.numel(), int(shard.isnan().sum())], device=shard.device)
    dist.all_reduce(counts)
    n, nans = counts.tolist()
    if not 0 <= k <= n:
        raise ValueError(f"sharded_topk_mask: k must be in [0, {n}], got {k}")
    if nans:
        raise ValueError(f"sharded_topk_mask: {nans} of {n} scores are NaN")
    if k == 0:
        return torch.zeros_like(shard, dtype=torch.bool)
    # From the highest bits down: the bits of the k-th largest magnitude, and how many of its equals are kept.
    wanted, candidates, left = 0, torch.ones_like(magnitude, dtype=torch.bool), k
    for shift, bits in ((20, 11), (9, 11), (0, 9)):
        digit = (magnitude[candidates] >> shift) & ((1 << bits) - 1)
        histogram = digit.bincount(minlength=1 << bits)
        dist.all_reduce(histogram)
        larger = histogram.flip(0).cumsum(0).flip(0)  # elements of this digit or a larger one
        chosen = int((larger >= left).nonzero()[-1])
        left -= int(larger[chosen] - histogram[chosen])
        wanted |= chosen << shift
        candidates = magnitude >> shift == wanted >> shift
    equal = magnitude == wanted
    before = torch.zeros(size(), dtype=torch.int64, device=shard.device)
    before[rank()] = equal.sum()
    dist.all_reduce(before)
    mine = left - int(before[: rank()].sum())
    kept = (magnitude > wanted) | (equal & (equal.cumsum(0) <= mine))
    return kept.view(shard.shape)
