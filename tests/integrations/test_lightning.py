"""GradientSurgery in Lightning's manual optimisation: its checkpoints resume to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minbert.integrations import GradientSurgery

lightning = pytest.importorskip("lightning", reason="needs lightning, of the extra [test]")


class Multitask(lightning.LightningModule):
    def __init__(self, rule: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.rule, self.trunk = rule, nn.Linear(4, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def configure_optimizers(self) -> GradientSurgery:
        inner = torch.optim.AdamW(self.parameters(), lr=0.05)
        return GradientSurgery(inner, self.rule, generator=torch.Generator().manual_seed(5))

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer, hidden = self.optimizers(), torch.tanh(self.trunk(batch[0]))
        losses = [(head(hidden) - y).square().mean() for head, y in zip(self.heads, (1.0, -2.0), strict=True)]
        optimizer.backward(losses, hold=index % 2 == 0)
        if index % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()


def fit(model: Multitask, folder, epochs: int, resume: str | None = None, **options) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, enable_checkpointing=False, **quiet, **options
    )
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 4)), batch_size=2)
    trainer.fit(model, batches, ckpt_path=resume)
    return trainer


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers
@pytest.mark.parametrize("rule", ["famo", "gradvac"])
def test_a_checkpoint_resumes_to_the_bit(tmp_path, rule: str) -> None:
    whole, first, second = Multitask(rule), Multitask(rule), Multitask(rule)
    reference = fit(whole, tmp_path, 4)
    path = str(tmp_path / "half.ckpt")
    fit(first, tmp_path, 2).save_checkpoint(path)
    resumed = fit(second, tmp_path, 4, path)
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.trunk.weight, second.trunk.weight)
    assert torch.equal(reference.optimizers[0].weights, resumed.optimizers[0].weights)


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_trains(tmp_path) -> None:
    model = Multitask("upgrad")
    before = model.trunk.weight.detach().clone()
    fit(model, tmp_path, 1, precision="bf16-mixed")
    assert model.trunk.weight.isfinite().all()
    assert not torch.equal(model.trunk.weight, before)
