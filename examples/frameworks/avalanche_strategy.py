"""Two experiences of an Avalanche benchmark: each is learned as one task, and none is forgotten."""

import torch
from avalanche.benchmarks import tensors_benchmark
from torch import nn

import exssnet
from exssnet.compat.avalanche import Supermask

x = torch.randn(128, 20)
streams = [[(x, (x[:, task] > 0).long()) for task in range(2)] for _ in range(2)]
benchmark = tensors_benchmark(train_tensors=streams[0], test_tensors=streams[1], task_labels=[0, 1])

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
phases = exssnet.Phases(exssnet.convert(model, density=0.2))
strategy = Supermask(
    phases,
    lambda phases: phases.optimizer(torch.optim.AdamW, lr=1e-2),
    mask_epochs=2,
    train_epochs=4,
    train_mb_size=32,
    eval_mb_size=128,
)
for experience in benchmark.train_stream:
    strategy.train(experience)
    accuracies = strategy.eval(benchmark.test_stream)
