"""A loop of one's own with Accelerate: prepare the optimizer of each phase, and the model anew in each phase."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import exssnet

accelerator = Accelerator(cpu=True)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)).to(accelerator.device)
phases = exssnet.Phases(exssnet.convert(model, density=0.2))
x = torch.randn(128, 20)
for task in range(2):
    data = accelerator.prepare(DataLoader(TensorDataset(x, (x[:, task] > 0).long()), batch_size=32))
    phases.start_task()
    for phase in ("mask", "weight"):
        if phase == "weight":
            phases.start_weight_phase()
        network, optimizer = accelerator.prepare(model, phases.optimizer(torch.optim.AdamW, lr=1e-2))
        for inputs, labels in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
    phases.finish_task()
