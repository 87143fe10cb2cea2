# %% [markdown]
# # A method of your own
#
# A-GEM (Chaudhry et al., "Efficient lifelong learning with A-GEM", ICLR 2019) keeps a few training items of each task.
# Where a step would raise the loss on kept items, the part of the gradient that points against theirs is removed.

# %%
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from exssnet import Learner, PhaseOptions
from exssnet.continual.methods import Sequential
from exssnet.continual.metrics import forgetting
from exssnet.continual.strategy import Context
from exssnet.tasks import Labelled, Task, split_by_class


class AGEM(Sequential):
    """Fine-tunes a dense network with a head for each task; gradients are projected on those of kept items.

    memory: Training items kept of each task.
    """

    def __init__(self, memory: int = 30) -> None:
        super().__init__()
        self.memory = memory
        self.kept: list[tuple[Tensor, Tensor, int]] = []  # items, labels and classes of each finished task

    def after_task(self, learner: Context) -> None:
        data = learner.task.train.unaugmented()
        x, y = data[torch.randperm(len(data), generator=learner.generator())[: self.memory]]
        self.kept.append((x.to(learner.device), y.to(learner.device), learner.task.classes))

    def gradient(self, learner: Context) -> None:
        if not self.kept:
            return
        shared = learner.phases.masked_parameters()
        reference = torch.autograd.grad(self.memory_loss(learner), shared)
        gradients = [p.grad for p in shared if p.grad is not None]
        dot = sum((g * r).sum() for g, r in zip(gradients, reference, strict=True))
        if dot < 0:
            square = sum(r.square().sum() for r in reference)
            for g, r in zip(gradients, reference, strict=True):
                g.sub_(dot / square * r)

    def memory_loss(self, learner: Context) -> Tensor:
        """Mean loss over the kept items of all earlier tasks, each with the head and norms of its task."""
        losses = []
        for task, (x, y, classes) in enumerate(self.kept):
            own = {name: t.clone() for name, t in learner.phases.states[task].items()}  # training changes norms
            losses.append(F.cross_entropy(functional_call(learner.model, own, (x,))[:, :classes], y))
        return torch.stack(losses).mean()


# %% [markdown]
# The tasks have two classes each. A class is a random vector, to which noise is added.


# %%
def tasks(count: int = 4, size: int = 12) -> list[Task]:
    torch.manual_seed(0)
    centres, labels = torch.randn(2 * count, size), torch.arange(2 * count).repeat_interleave(100)
    train, test = (Labelled(centres[labels] + torch.randn(len(labels), size), labels) for _ in range(2))
    return split_by_class(train, test, count, validation=0)


# %% [markdown]
# A-GEM forgets less than fine-tuning, the method that it starts from.


# %%
def main() -> None:
    for method in (Sequential(), AGEM()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        options = PhaseOptions(epochs=10, lr=0.1, optimizer="sgd")
        learner = Learner(model, method, mask=PhaseOptions(0), weight=options, batch_size=20, keep_scores=None)
        accuracy = learner.run(tasks())
        print(f"{type(method).__name__}: accuracy {accuracy[-1].mean():.3f}, forgetting {forgetting(accuracy):.3f}")


if __name__ == "__main__":
    main()
