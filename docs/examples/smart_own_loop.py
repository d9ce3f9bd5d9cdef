"""SMART in a loop of your own: the same small classifier trained without and with the regulariser.

Prints both models' accuracy on held-out data, and how far an adversary within the ball moves their outputs.
"""

import torch
from torch import nn

from minbert.integrations import SMARTLoss, sym_kl_loss

TOKENS, WIDTH, CLASSES = 12, 16, 3
BALL = {"step_size": 0.1, "epsilon": 0.1, "noise_var": 1e-4}


def make_data(examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [examples, TOKENS] below 90; the label is the class, of thirty words each, that most tokens are in."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(90, (examples, TOKENS), generator=generator)
    return ids, nn.functional.one_hot(ids // 30, CLASSES).sum(1).argmax(1)


def train(weight: float) -> tuple[float, float]:
    """Accuracy, and the divergence that the adversary reaches per example, both on held-out data."""
    torch.manual_seed(0)
    embedding = nn.Embedding(90, WIDTH)
    hidden, output = nn.Linear(WIDTH, 64), nn.Linear(64, CLASSES)

    def classify(embed: torch.Tensor) -> torch.Tensor:
        """Everything after the embeddings: [examples, TOKENS, WIDTH] -> logits [examples, CLASSES]."""
        return output(torch.relu(hidden(embed)).mean(1))

    smart = SMARTLoss(classify, lambda a, b: sym_kl_loss(a, b, "batchmean"), **BALL)
    optimizer = torch.optim.AdamW([*embedding.parameters(), *hidden.parameters(), *output.parameters()], lr=1e-2)
    ids, labels = make_data(256, seed=1)
    for _ in range(60):
        embed = embedding(ids)
        logits = classify(embed)
        loss = nn.functional.cross_entropy(logits, labels)
        if weight:
            loss = loss + weight * smart(embed, logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ids, labels = make_data(1000, seed=2)
    with torch.no_grad():
        embed = embedding(ids)
        logits = classify(embed)
        return (logits.argmax(1) == labels).float().mean().item(), smart(embed, logits).item()


if __name__ == "__main__":
    print("            accuracy   adversarial divergence")
    for name, weight in (("plain", 0.0), ("with SMART", 1.0)):
        accuracy, divergence = train(weight)
        print(f"{name:10} {accuracy:9.3f}   {divergence:22.4f}")
