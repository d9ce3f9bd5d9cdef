"""A small tasks file with a task of each type, and its data."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import yaml

WORDS = ("film", "plot", "cast", "score", "scene", "actor", "story", "light", "sound", "camera", "ending", "song")
TOPICS = {"billing": "invoice paid", "bug": "crash error", "other, new": "hello question"}
TAGS = {"red": "rose", "green": "leaf", "blue": "sky", "none of these": "stone"}


def write_tasks(directory: Path, rows: int = 48, dev: int = 24) -> Path:
    """Write tasks.yaml and its files: topics of texts, same of pairs, stars of pairs (1 to 5), tags of texts."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    def topic(number: int) -> list[str]:
        name = rng.choices([*TOPICS], [1, 2, 5])[0]
        return [f"{words(rng.randint(3, 9))} {TOPICS[name]}", name]

    def same(number: int) -> list[str]:
        text, alike = words(5), rng.random() < 0.3
        return [text, text[::-1] if alike else words(6), "yes" if alike else "no"]

    def stars(number: int) -> list[str]:
        value = rng.randint(1, 5)
        return [words(4), " ".join([words(2), *["good"] * value]), str(value)]

    def tags(number: int) -> list[str]:
        found = [tag for tag, share in zip(TAGS, (0.6, 0.4, 0.2, 0.1), strict=True) if rng.random() < share]
        return [" ".join([words(3), *(TAGS[tag] for tag in found)]), ";".join(found)]

    tasks = {
        "topics": (topic, {"text": "message", "label": "topic", "type": "classification"}),
        "same": (same, {"text": ["one", "two"], "label": "same", "type": "classification"}),
        "stars": (stars, {"text": ["one", "two"], "label": "stars", "type": "regression", "scale": [1, 5]}),
        "tags": (tags, {"text": "message", "label": "tags", "type": "multilabel"}),
    }
    tasks["topics"][1]["class_weights"] = "balanced"
    tasks["same"][1]["class_weights"] = {"yes": 3.0}
    tasks["tags"][1]["class_weights"] = "balanced"
    directory.mkdir(parents=True, exist_ok=True)
    records = {}
    for name, (row, record) in tasks.items():
        texts = [record["text"]] if isinstance(record["text"], str) else record["text"]
        for split, count in (("train", rows), ("dev", dev)):
            with open(directory / f"{name}-{split}.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow([*texts, record["label"]])
                writer.writerows(row(number) for number in range(count))
        records[name] = {**record, "train": f"{name}-train.csv", "dev": f"{name}-dev.csv"}
    path = directory / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": records}, sort_keys=False), encoding="utf-8")
    return path
