"""Small data in the layout of GLUE's folders."""

from __future__ import annotations

from pathlib import Path

MNLI_START = ["index", "promptID", "pairID", "genre"]
MNLI_PARSES = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
MNLI = [*MNLI_START, *MNLI_PARSES, "sentence1", "sentence2"]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]


def table(path: Path, header: list[str], *rows: list[object]) -> None:
    """A file of GLUE: fields between tabs, nothing quoted; without a header if it is empty."""
    path.parent.mkdir(exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in ([header] if header else []) + list(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def mnli_row(number: int, first: str, second: str, *labels: str) -> list[object]:
    return [
        number,
        f"{number}",
        f"{number}e",
        "fiction",
        "( a )",
        "( b )",
        "(ROOT a)",
        "(ROOT b)",
        first,
        second,
        *labels,
    ]


def stsb_row(number: int, first: str, second: str, *label: str) -> list[object]:
    return [number, "news", "captions", 2012, number, "none", "none", first, second, *label]


def write_glue(directory: Path) -> Path:
    """A directory of the nine tasks' folders, with files as the benchmark distributes them."""
    directory.mkdir(exist_ok=True)
    for split in ("train", "dev"):
        table(
            directory / "CoLA" / f"{split}.tsv",
            [],
            ["mb01", 1, "", f'She said "{split}" twice.'],
            ["mb01", 0, "*", "Twice said she had."],
            ["mb02", 1, "", "The cat sleeps."],
        )
        table(directory / "SST-2" / f"{split}.tsv", ["sentence", "label"], ["a fine day", 1], ["a dull day", 0])
        table(
            directory / "MRPC" / f"{split}.tsv",
            ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            [1, 11, 12, f'He said "yes" in {split}.', "He agreed."],
            [0, 13, 14, "It rained all day.", "The sun shone."],
        )
        table(
            directory / "STS-B" / f"{split}.tsv",
            [*STSB, "score"],
            stsb_row(0, "a man runs", "a man is running", "4.750"),
            stsb_row(1, "a dog barks", "a plane lands", "0.200"),
        )
        table(
            directory / "QQP" / f"{split}.tsv",
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            [70, 1, 2, "How old is it?", "What is its age?", 1],
            [71, 3, 4, "Where is it?", "Why is it?", 0],
        )
        for folder, columns in (("QNLI", ["question", "sentence"]), ("RTE", ["sentence1", "sentence2"])):
            table(
                directory / folder / f"{split}.tsv",
                ["index", *columns, "label"],
                [0, "Who wrote it?", "It was written by Ada.", "entailment"],
                [1, "Who sang it?", "It was written by Ada.", "not_entailment"],
            )
        table(
            directory / "WNLI" / f"{split}.tsv",
            ["index", "sentence1", "sentence2", "label"],
            [0, "The cup fell off the shelf as it was tilted.", "The shelf was tilted.", 1],
            [1, "The cup fell off the shelf as it was round.", "The shelf was round.", 0],
        )
    labels = ("neutral", "entailment", "contradiction")
    rows = [mnli_row(number, f"Story {number}.", "A story.", label) for number, label in enumerate(labels)]
    table(directory / "MNLI" / "train.tsv", [*MNLI, "label1", "gold_label"], *([*row, row[-1]] for row in rows))
    five = [f"label{number}" for number in range(1, 6)]
    for genres, label in (("matched", "entailment"), ("mismatched", "contradiction")):
        row = mnli_row(0, f"A {genres} story.", "A story.", *["neutral"] * 5, label)
        table(directory / "MNLI" / f"dev_{genres}.tsv", [*MNLI, *five, "gold_label"], row, rows[0][:-1] + ["-"] * 6)
        table(directory / "MNLI" / f"test_{genres}.tsv", MNLI, *(row[:-1] for row in rows))
    for folder, columns in (
        ("CoLA", ["sentence"]),
        ("SST-2", ["sentence"]),
        ("MRPC", ["#1 ID", "#2 ID", "#1 String", "#2 String"]),
        ("QNLI", ["question", "sentence"]),
        ("RTE", ["sentence1", "sentence2"]),
        ("WNLI", ["sentence1", "sentence2"]),
    ):
        rows = [[number, *(f"{column} of {number}" for column in columns)] for number in range(4)]
        table(directory / folder / "test.tsv", ["index", *columns], *rows)
    pair = ["A cat sat down.", "A cat stood up."]
    table(
        directory / "diagnostic" / "diagnostic.tsv", ["index", "sentence1", "sentence2"], [0, *pair], [1, *pair[::-1]]
    )
    questions = [[number, f"Why {number}?", f"How {number}?"] for number in range(4)]
    table(directory / "QQP" / "test.tsv", ["id", "question1", "question2"], *questions)
    table(directory / "STS-B" / "test.tsv", STSB, *(stsb_row(n, f"a cat {n}", "a cat") for n in range(4)))
    return directory
