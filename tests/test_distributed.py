"""Several processes: what they exchange, and that they learn what one process learns."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from exssnet import distributed, topk_mask

if not dist.is_available() or sys.platform == "win32":
    pytest.skip("torch.distributed with gloo is needed", allow_module_level=True)


def _process(rank: int, body: Callable[..., Any], ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(body(*arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def together(body: Callable[..., Any], folder: Path, *arguments: Any, ranks: int = 2) -> list[Any]:
    """What each of several processes returns for the same call."""
    os.environ["TORCH_SHOW_CPP_STACKTRACES"] = "0"
    mp.spawn(_process, (body, ranks, str(folder), arguments), nprocs=ranks)
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(ranks)]


def adversarial() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(60, 7, generator=generator),
        torch.randn(60, 7, generator=generator).round(),
        torch.zeros(60, 7),
        torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("inf"), -float("inf"), 1.0]).repeat(60, 1),
    ]


def _exchanges() -> dict[str, Any]:
    mine = distributed.rank()
    x, y = torch.full((3,), float(mine)), torch.full((2, 2), 10.0 * mine, dtype=torch.float64)
    distributed.average([x, y])
    found: dict[str, Any] = {
        "size": distributed.size(), "average": (x, y), "total": distributed.total([1, mine], x.device),
        "first": distributed.of_first(f"rank {mine}"), "gathered": distributed.gathered(mine),
    }  # fmt: skip
    masks = []
    for scores in adversarial():
        for k in (0, 1, 100, 210, 419, 420):
            masks.append(distributed.sharded_topk_mask(scores.tensor_split([17])[mine], k))
    found["masks"] = masks
    refused = []
    shard = torch.ones(4) if mine == 0 else torch.tensor([float("nan")])
    for k in (6, 3):
        try:
            distributed.sharded_topk_mask(shard, k)
        except ValueError as error:
            refused.append(str(error))
    found["refused"] = refused
    return found


def test_processes_exchange(tmp_path: Path) -> None:
    first, second = together(_exchanges, tmp_path)
    for found in (first, second):
        assert found["size"] == 2
        assert found["average"][0].tolist() == [0.5] * 3
        assert found["average"][1].tolist() == [[5.0, 5.0]] * 2
        assert found["total"] == [2.0, 1.0]
        assert found["first"] == "rank 0"
        assert found["gathered"] == [0, 1]
        assert found["refused"] == [
            "sharded_topk_mask: k must be in [0, 5], got 6",
            "sharded_topk_mask: 1 of 5 scores are NaN",
        ]
    wanted = [topk_mask(scores, k) for scores in adversarial() for k in (0, 1, 100, 210, 419, 420)]
    for whole, a, b in zip(wanted, first["masks"], second["masks"], strict=True):
        assert torch.equal(torch.cat([a, b]), whole)
