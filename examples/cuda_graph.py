# %% [markdown]
# # Training steps in a CUDA graph
#
# In eager mode a large GPU waits for Python. `exssnet.graphed` captures a training step in a CUDA graph and replays it.
# On a CPU it runs the step itself, so this script runs everywhere.

# %%
import torch
from torch.nn import functional as F

import exssnet
from exssnet.nn.models import LeNet300100

device = "cuda" if torch.cuda.is_available() else "cpu"
model = exssnet.convert(LeNet300100(784, 10), density=0.1).to(device)
phases = exssnet.Phases(model)

# %% [markdown]
# A captured Adam needs `capturable=True`, a captured SGD `fused=True`. Learning rates are scheduled as usual.


# %%
def train(steps: int) -> torch.Tensor:
    optimizer = phases.optimizer(torch.optim.Adam, lr=1e-2, fused=True, capturable=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    step = exssnet.graphed(step, model=model, optimizer=optimizer)  # the fourth call captures
    for number in range(steps):
        size = 16 if number < steps - 1 else 7  # the last batch of an epoch: this step is eager
        loss = step(torch.randn(size, 1, 28, 28), torch.randint(10, (size,)))
        schedule.step()
    return loss


# %% [markdown]
# Each phase has a new optimizer and a new graph. A graph of an earlier phase would be refused.

# %%
phases.start_task()
loss = train(6)
print(f"mask phase: loss {loss.item():.2f}; NaN scores: {exssnet.nan_scores_seen(device)}")
phases.start_weight_phase()
print(f"weight phase: loss {train(6).item():.2f}")
phases.finish_task()
