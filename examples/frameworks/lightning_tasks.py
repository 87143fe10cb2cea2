"""Two tasks in Lightning: each `fit` learns one, first its mask and then its free weights."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import exssnet
from exssnet.compat.lightning import PhaseCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
        self.phases = exssnet.Phases(exssnet.convert(self.model, density=0.2))

    def training_step(self, batch, index):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):  # once in each phase
        return self.phases.optimizer(torch.optim.AdamW, lr=1e-2 if self.phases.phase == "mask" else 1e-3)


module, x = Classifier(), torch.randn(128, 20)
for task in range(2):
    data = DataLoader(TensorDataset(x, (x[:, task] > 0).long()), batch_size=32)
    callback = PhaseCallback(module.phases, mask_epochs=2)
    pl.Trainer(max_epochs=4, accelerator="cpu", logger=False, callbacks=[callback]).fit(module, data)
