# %% [markdown]
# # Your own training loop
#
# `Phases` says which parameters may train. The loop, the loss and the optimizer are yours.
# The data here is random: each of a task's four classes is a random image, to which noise is added.

# %%
import torch
from torch import nn
from torch.nn import functional as F

import exssnet

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 64, 4)
)
model = exssnet.convert(model, density=0.05)
phases = exssnet.Phases(model)


def draw_task() -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.randint(4, (256,))
    return torch.randn(4, 3, 16, 16)[y] + 2 * torch.randn(256, 3, 16, 16), y


# %% [markdown]
# The trainable parameters differ between phases. So make a new optimizer for each phase.


# %%
def fit(x: torch.Tensor, y: torch.Tensor, lr: float) -> float:
    optimizer = phases.optimizer(torch.optim.AdamW, lr=lr, weight_decay=0.01)
    model.train()
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


# %%
logits = []
for task in range(3):
    x, y = draw_task()
    phases.start_task()  # mask phase: the scores train
    mask_loss = fit(x, y, lr=1e-2)
    phases.start_weight_phase()  # weight phase: the kept weights that no earlier task uses train
    weight_loss = fit(x, y, lr=1e-3)
    phases.finish_task()
    model.eval()
    logits.append((x, model(x).detach()))
    print(f"task {task}: loss {mask_loss:.2f} after the mask phase, {weight_loss:.2f} after the weight phase")

# %% [markdown]
# Every finished task gives the same logits as on the day it was finished, bit for bit.

# %%
for task, (x, expected) in enumerate(logits):
    phases.activate(task)
    model.eval()
    assert torch.equal(model(x), expected)
print(f"the logits of all {len(logits)} tasks are unchanged")
