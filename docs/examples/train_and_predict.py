"""A notebook as a script, with a cell after each `# %%`: two tasks of one's own, trained, and used on new texts.

Prints the scores of each epoch and of the run, predictions for new tickets, and the ticket that is most like the first.
"""

# %% Tickets with a topic and an urgency from 1 to 5, as CSV, and the file that says what is what
import csv
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import minbert

folder = TemporaryDirectory()
here, draw = Path(folder.name), random.Random(0)
WORDS = {"billing": ["invoice", "refund", "price"], "bug": ["crash", "error", "freeze"], "other": ["hello", "thanks"]}
PLACES = ["kitchen", "office", "garage", "attic", "garden", "cellar", "hall", "shop"]
URGENCY = ["whenever", "sometime", "soon", "today", "now"]

with open(here / "tickets.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["text", "topic", "urgency"])
    for _ in range(400):
        topic, urgency = draw.choice(list(WORDS)), draw.randint(1, 5)
        text = f"{draw.choice(WORDS[topic])} from the {draw.choice(PLACES)} , {URGENCY[urgency - 1]}"
        rows.writerow([text, topic, urgency])

(here / "tasks.yaml").write_text("""
tasks:
  topic: {text: text, label: topic, type: classification, train: tickets.csv, dev: 0.2}
  urgency: {text: text, label: urgency, type: regression, scale: [1, 5], train: tickets.csv, dev: 0.2}
""")


# %% Train both at once, and stop when the dev score is high enough
def on_epoch(info: minbert.EpochInfo) -> bool:
    losses = ", ".join(f"{task} {loss:.2f}" for task, loss in info.train_losses.items())
    print(f"epoch {info.epoch}: train loss {losses}; overall dev score {info.overall:.3f}")
    return info.overall > 0.98


run = minbert.fit(
    tasks_file=here / "tasks.yaml",
    recipe="pcgrad",
    epochs=12,
    lr=5e-3,
    pooling="mean",
    precision="fp32",
    scratch={"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    out=here / "run",
    on_epoch=on_epoch,
    quiet=True,
)
print(f"best epoch {run.summary()['best_epoch']}: {run.scores()}")

# %% Predict what was never seen: labels are those of the file, scores are on its scale
predictor = minbert.load(run)
tickets = ["a refund for the office , whenever", "error after error in the attic , now", "hello from the shop , soon"]
topics, urgencies = predictor.predict("topic", tickets), predictor.predict("urgency", tickets)
for ticket, topic, urgency in zip(tickets, topics, urgencies, strict=True):
    print(f"{ticket:36} {topic.label:8} {topic.score:.2f}   urgency {urgency.score:.1f}")

# %% Vectors of texts: which one is most like the first?
vectors = predictor.embed([*tickets, "the price for the garage , whenever"])
vectors /= (vectors**2).sum(axis=1, keepdims=True) ** 0.5
similarities = vectors[1:] @ vectors[0]
print(f"most like the first: text {1 + similarities.argmax()}, cosine {similarities.max():.2f}")
folder.cleanup()
