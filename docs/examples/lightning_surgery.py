"""Lightning with gradient surgery, by manual optimisation: two tasks, two batches for each update, a schedule.

Prints the tasks' losses before and after the training, and the weights of the last update.
"""

import logging
import warnings

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from minbert.integrations import GradientSurgery

BATCHES = 2  # for each update


class Multitask(lightning.LightningModule):
    """A trunk, and a head for each of two regression tasks, one much louder than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trunk, self.heads = (
            nn.Sequential(nn.Linear(8, 16), nn.Tanh()),
            nn.ModuleList([nn.Linear(16, 1) for _ in "12"]),
        )

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        hidden = self.trunk(x)
        return [mse_loss(head(hidden), y[:, t : t + 1]) for t, head in enumerate(self.heads)]

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = GradientSurgery(torch.optim.AdamW(self.parameters(), lr=1e-2), "famo")
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)]

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer, last = self.optimizers(), (index + 1) % BATCHES == 0
        optimizer.backward([loss / BATCHES for loss in self.losses(*batch)], hold=not last)
        if last:
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's advice about workers
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = torch.cat([torch.sin(x[:, :1]), 10 * torch.cos(x[:, 1:2])], dim=1)
    model = Multitask()
    trainer = lightning.Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    print("losses before:", [round(loss.item(), 3) for loss in model.losses(x, y)])
    trainer.fit(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True))
    print("losses after: ", [round(loss.item(), 3) for loss in model.losses(x, y)])
    print("weights of the last update:", trainer.optimizers[0].weights)
