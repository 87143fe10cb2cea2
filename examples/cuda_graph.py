# %% [markdown]
# # Training steps in a CUDA graph
#
# In eager mode a large GPU waits for Python. A CUDA graph replays a whole training step without Python.
# No training step of a converted model makes the host wait, so both phases can be captured.

# %%
import sys

import torch
from torch.nn import functional as F

import exssnet
from exssnet.nn.models import ResNet18

if not torch.cuda.is_available():
    print("This example needs a GPU that PyTorch can use through CUDA; there is none.")
    sys.exit()

device = torch.device("cuda")
model = exssnet.convert(ResNet18(10), density=0.1).to(device)
phases = exssnet.Phases(model)
x = torch.randn(64, 3, 32, 32, device=device)  # the graph reads these two tensors in every replay
y = torch.randint(10, (64,), device=device)

# %% [markdown]
# A captured optimizer needs `capturable=True`.

# %%
phases.start_task()
optimizer = phases.optimizer(torch.optim.Adam, lr=1e-3, capturable=True)


def step() -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


# %% [markdown]
# Make a few steps on a side stream first. They tune the kernels, choose between kernels, and allocate the flag for
# NaN scores. Then capture one step.

# %%
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for _ in range(3):
        step()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = step()

# %% [markdown]
# Each replay is a training step on what `x` and `y` hold. All batches must have the same size.

# %%
for _ in range(10):
    x.copy_(torch.randn(64, 3, 32, 32))
    y.copy_(torch.randint(10, (64,)))
    graph.replay()
print(f"loss {loss.item():.3f}; NaN scores: {exssnet.nan_scores_seen(device)}")
