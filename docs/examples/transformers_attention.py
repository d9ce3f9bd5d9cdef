"""transformers' BertModel on minbert's packed attention: the same outputs, and the time of a step either way.

A random BERT and random sentences of the lengths that real batches have: nothing is downloaded.
"""

import copy
import time

import torch
from transformers import BertConfig, BertModel

from minbert.integrations.transformers import register


def step(model: BertModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Forward and backward; the hidden states of the real tokens [N, D]."""
    model.zero_grad()
    hidden = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    hidden[:, 0].sum().backward()
    return hidden.detach()


def seconds(model: BertModel, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Of the fastest of three steps."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step(model, ids, mask)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    register()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    eager = BertModel(config, add_pooling_layer=False).eval()
    models = {"eager": eager, "sdpa": copy.deepcopy(eager), "minbert": copy.deepcopy(eager)}
    for name, model in models.items():
        model.set_attn_implementation(name)  # or from_pretrained(..., attn_implementation="minbert")

    lengths = torch.randint(40, 513, (8,))
    mask = (torch.arange(512) < lengths[:, None]).long()
    ids = torch.randint(5, config.vocab_size, mask.shape) * mask
    print(f"{mask.float().mean():.0%} of the padded batch are real tokens")
    expected = step(eager, ids, mask)
    for name, model in models.items():
        difference = (step(model, ids, mask) - expected).abs().max()
        print(f"{name:8} {1e3 * seconds(model, ids, mask):6.1f} ms per step, differs from eager by {difference:.1e}")
