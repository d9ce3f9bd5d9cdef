"""A user's file gives its rows whatever its format, and a bad one is named with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tracemalloc
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from own_task import own_task

from minbert.data import open_source
from minbert.data.own_rows import OwnRows, read_own
from minbert.errors import UserError

# csv.writer does not write a lone carriage return so that readers of lines agree on it
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1).filter(str.strip)
ROWS = [("red ink, please", "billing"), ('the "new" page\nis blank', "bug")]


def read(path, **values) -> OwnRows:
    split = values.pop("split", "train")
    labels = values.pop("labels", "required")
    return read_own(str(path), own_task(path.parent, **values), labels, split)


def rows_of(rows: OwnRows) -> list[tuple]:
    texts = zip(rows.texts, *([rows.pairs] if rows.pairs is not None else []), strict=True)
    return [(*text, rows.labels[code] if code >= 0 else None) for text, code in zip(texts, rows.codes, strict=True)]


def refusal(path, **values) -> str:
    with pytest.raises(UserError) as refused:
        read(path, **values)
    message = str(refused.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def table(rows, header=("message", "topic"), **options) -> str:
    text = io.StringIO()
    csv.writer(text, **options).writerows([header, *rows])
    return text.getvalue()


@pytest.fixture
def file(tmp_path):
    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@settings(deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT, st.sampled_from("abc")), min_size=1), delimiter=st.sampled_from(",;|\t"))
def test_csv_gives_back_any_text(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_text(table(rows, ("first", "second", "topic"), delimiter=delimiter), encoding="utf-8", newline="")
    found = read(path, text=["first", "second"], delimiter=delimiter)
    assert rows_of(found) == [(first.strip(), second.strip(), label) for first, second, label in rows]
    assert found.ids == [str(number) for number in range(len(rows))]


def test_the_formats_give_the_same_rows(file, tmp_path):
    objects = [{"message": text, "topic": label} for text, label in ROWS]
    lines = "".join(json.dumps(each) + "\n" for each in objects)
    files = [
        file("a.csv", table(ROWS)),
        file("a.CSV", "\ufeff" + table(ROWS)),
        file("a.tsv", table(ROWS, delimiter="\t")),
    ]
    files += [file(f"a{suffix}", lines) for suffix in (".jsonl", ".json", ".ndjson")]
    for path in files:
        assert rows_of(read(path)) == ROWS, path.name


def test_parquet_and_saved_data_sets_give_the_same_rows(file, tmp_path):
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    from pyarrow import parquet

    columns = {"message": [text for text, _ in ROWS], "topic": [label for _, label in ROWS], "more": [[1], []]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    saved = datasets.Dataset.from_dict(columns)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "validation": saved.select([1])}).save_to_disk(tmp_path / "both")
    for name in ("a.parquet", "saved", "both", "both/train"):
        assert rows_of(read(tmp_path / name)) == ROWS, name
    assert rows_of(read(tmp_path / "both", split="dev")) == ROWS[1:]
    assert "holds the splits train, validation; name one of them" in refusal(tmp_path / "both", split="test")
    assert "a directory without a data set" in refusal(tmp_path)
    assert "no column 'topics' (did you mean 'topic'?); found message, topic, more" in refusal(
        tmp_path / "a.parquet", label="topics"
    )


def test_names_of_classes_stand_for_their_numbers(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"message": datasets.Value("string"), "topic": datasets.ClassLabel(names=["bug", "bill"])}
    )
    datasets.Dataset.from_dict({"message": ["a", "b", "c"], "topic": [1, 0, -1]}, features).save_to_disk(tmp_path / "d")
    assert rows_of(read(tmp_path / "d", labels="optional")) == [("a", "bill"), ("b", "bug"), ("c", None)]
    assert rows_of(read(tmp_path / "d", classes=[0, 1])) == [("a", 1), ("b", 0), ("c", -1)]


def test_names_that_are_numbers_mean_the_same_with_and_without_the_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ["0", "1", "10", "2"]  # as texts are sorted
    features = datasets.Features({"message": datasets.Value("string"), "topic": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict({"message": ["a", "b"], "topic": [2, 3]}, features).save_to_disk(tmp_path / "d")
    assert rows_of(read(tmp_path / "d")) == [("a", "10"), ("b", "2")]
    assert rows_of(read(tmp_path / "d", classes=[0, 1, 2, 10])) == [("a", "10"), ("b", "2")]
    assert rows_of(read(tmp_path / "d", classes=[0, 1, 2, 3])) == [("a", 2), ("b", 3)]


def test_a_version_of_datasets_that_runs_code_of_a_data_set_is_refused(monkeypatch, tmp_path):
    old = types.ModuleType("datasets")
    old.__version__ = "2.19.2"
    monkeypatch.setitem(sys.modules, "datasets", old)
    for read_it in (lambda: read_own("hub:a/train", own_task(tmp_path), "required"), lambda: open_source("a/b")):
        with pytest.raises(UserError, match=r"datasets 2\.19\.2 runs code .* pip install 'datasets>=2\.20'"):
            read_it()


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("hub:imdb/train", [("imdb",)]),
        ("hub:glue/sst2/train", [("glue/sst2",), ("glue", "sst2")]),
        ("hub:nyu/glue/train", [("nyu/glue",)]),
        ("hub:nyu/glue/sst2/train", [("nyu/glue", "sst2")]),
    ],
)
def test_a_data_set_on_the_hub_is_streamed(monkeypatch, tmp_path, name, calls):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names: str, split: str, streaming: bool):
        asked.append(names)
        assert (split, streaming) == ("train", True)
        if names == ("glue/sst2",):
            raise FileNotFoundError("no such data set")
        return datasets.Dataset.from_dict({"message": ["a"], "topic": [0]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of(read_own(name, own_task(tmp_path), "required")) == [("a", 0)]
    assert asked == calls


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    datasets = types.ModuleType("datasets")
    datasets.__version__ = "2.20.0"
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    datasets.load_dataset = lambda *names, **options: (_ for _ in ()).throw(ConnectionError("no network\nat all"))
    with pytest.raises(UserError, match=r"hub:a/train: cannot be read from the hub: no network\Z"):
        read_own("hub:a/train", own_task(tmp_path), "required")
    with pytest.raises(UserError, match="expected hub:NAME/CONFIG/SPLIT"):
        read_own("hub:a", own_task(tmp_path), "required")


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_a_missing_extra_is_named(monkeypatch, file, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    path = file("a.parquet", b"PAR1")
    if module == "datasets":
        path = tmp_path / "saved"
        path.mkdir()
        (path / "state.json").write_text("{}")
    assert "pip install 'minbert[data]'" in refusal(path)


def test_quotes_of_a_tsv_that_join_whole_lines_are_text(file):
    text = 'message\ttopic\n"I love it.\tpos\nIt was great."\tpos\nFine.\tneg\n'
    assert rows_of(read(file("a.tsv", text))) == [('"I love it.', "pos"), ('It was great."', "pos"), ("Fine.", "neg")]


def test_columns_are_found_by_name(file):
    text = table([("1", "hello", "x")], ("No. 1", " the message", "class"))
    path = file("a.csv", text)
    found = read(path, text="the message", label="class", id="No. 1")
    assert (rows_of(found), found.ids) == ([("hello", "x")], ["1"])
    assert "line 1: no column 'massage' (did you mean ' the message'?); found No. 1,  the message, class" in refusal(
        path, text="massage", label="class"
    )
    assert "line 1: no column 'topic'; found" in refusal(path, text="the message")
    assert "line 1: no column 'number'; found" in refusal(path, text="the message", label="class", id="number")
    assert "the column 'a' is there twice" in refusal(file("b.csv", "a,a,topic\n1,2,3\n"), text="a")
    assert rows_of(read(path, text="the message", labels="optional")) == [("hello", None)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "message,topic\na,b\n", "line 1: its columns are separated by ',', not by tabs; give the file a name"
         " that ends in .csv"),
        ("a.csv", "message;topic\na;b\n", """line 1: its columns are separated by ';', not by ','; give the task"""
         """ `delimiter: ";"`"""),
        ("a.csv", "message\ttopic\na\tb\n", "line 1: its columns are separated by tabs, not by ','; give the file a"
         " name that ends in .tsv"),
        ("a.tsv", "message|topic\na|b\n", 'ends in .csv and give the task `delimiter: "|"`'),
        ("a.csv", '{"message": "a", "topic": "b"}\n', "line 1: a JSON object, not the header of a table; give the file"
         " a name that ends in .jsonl"),
        ("a.csv", "message,topic\na,b\n".encode("utf-16-le"), "line 1: a NUL character (is the file UTF-16?); convert"),
        ("a.csv", "m\xe9ssage,topic\na,b\n".encode("latin-1"), "line 1: not UTF-8 text; convert the file to UTF-8"),
        ("a.jsonl", "message,topic\na,b\n", "line 1: a table's header, not a JSON object; give the file a name that"
         " ends in .csv"),
        ("a.json", '[{"message": "a", "topic": "b"}]', "line 1: a JSON list; write each object on a line of its own"),
        ("a.json", '{\n "message": "a",\n "topic": "b"\n}', "line 1: a JSON object over several lines; write each"),
        ("a.jsonl", 'a\r"b\n{}', ": none of its 2 rows is usable; line 1: not JSON"),
        ("a.csv", b"PAR1\0\0", "not CSV, as its name says, but a Parquet file; give it a name that ends in .parquet"),
        ("a.csv", gzip.compress(b"message,topic\n", mtime=0), "not CSV, as its name says, but a gzip file: unpack it"),
        ("a.csv", "message,topic\na,b\n".encode("utf-16"), "but UTF-16 text: convert it to UTF-8"),
        ("a.parquet", "message,topic\na,b\n", "not a Parquet file, as its name says, but another format"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("a.txt", "message,topic\na,b\n", "its name ends in none of .csv, .tsv, .jsonl"),
        ("a.csv", "", " is empty; expected a header and rows"),
        ("a.csv", "\n\n", " is empty; expected a header and rows"),
        ("a.jsonl", "\n", " is empty; expected a JSON object on each line"),
        ("a.csv", "message,topic\n", " has no rows; expected examples of topics"),
        ("a.csv", "message,topic\n,b\n \n", ": none of its 2 rows is usable; line 2: empty text"),
    ],
)  # fmt: skip
def test_a_file_in_another_format_is_named(file, name, content, said):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    assert said in refusal(file(name, content))


def test_a_parquet_file_of_other_texts_than_utf_8_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array([b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"message": texts, "topic": ["a"]}), tmp_path / "a.parquet")
    assert "cannot be read as Parquet ('utf-8' codec can't decode" in refusal(tmp_path / "a.parquet")


def test_a_damaged_directory_is_refused(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{}")
    assert "cannot be read by datasets (" in refusal(tmp_path)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    for name in ("a.csv", "a", "a.parquet"):
        assert "cannot be read (No such file or directory)" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"one field", "expected 3 fields, found 1"),
        (b"a,b,c,d", "expected 3 fields, found 4; a text with ',' in it needs quotes"),
        (b"7, ,bug", "empty text"),
        (b"7,text,", "no label"),
        (b"7,caf\xe9,bug", "not UTF-8 text; convert the file to UTF-8"),
        (b"7,nul\0,bug", "a NUL character (is the file UTF-16? convert it to UTF-8)"),
        (b'"7\n8",text,bug', "its id contains a line break"),
        (b"7,text,caf\xe9", "not UTF-8 text; convert the file to UTF-8"),
    ],
)
def test_a_bad_row_costs_no_other(file, row, said):
    found = read(file("a.csv", b"id,message,topic\n1,good,bug\n" + row + b"\n2,fine,bill\n"))
    assert rows_of(found) == [("good", "bug"), ("fine", "bill")]
    assert [(each.line, each.reason) for each in found.skipped] == [(3, said)]
    assert [found.where(index).rsplit(" ")[-1] for index in range(2)] == ["2", str(4 + row.count(b"\n"))]


@pytest.mark.parametrize("quoted", ['"never closed', '"closed" too early', 'x,"never closed\nbut, "here" again'])
def test_an_unbalanced_quote_is_an_error_with_its_line(file, quoted):
    said = refusal(file("a.csv", f'message,topic\n"a\nb",bug\n{quoted},bug\nc,bug\nd,bug\n'))
    assert said.startswith(", line 4: cannot split its fields (a quote is not closed, or has text after it)")


def test_a_quote_in_a_field_without_quotes_is_text(file):
    assert rows_of(read(file("a.csv", 'message,topic\na 5" disk,bug\n'))) == [('a 5" disk', "bug")]


def test_tabs_separate_lines_whose_quotes_are_text(file):
    path = file("a.tsv", 'message\ttopic\n"Who?\tbug\n"Me" and you\tbill\r\n\na\rb\tbug\n')
    assert rows_of(read(path)) == [('"Who?', "bug"), ('"Me" and you', "bill"), ("a\rb", "bug")]


def test_a_bad_row_of_quoted_fields_between_tabs_costs_no_other(file):
    path = file("a.tsv", 'message\ttopic\n"a\nb"\t"bug"\n"c"\n"d ""e"""\tbill\n')
    found = read(path)
    assert rows_of(found) == [("a\nb", "bug"), ('d "e"', "bill")]
    assert [(row.line, row.reason) for row in found.skipped] == [(4, "expected 2 fields, found 1")]
    path.write_text('message\ttopic\n"a"\tbug\n"b"\tbill\n"c\tbill\n"d"\tbill\n')
    assert ", line 4: cannot split its fields" in refusal(path)


def test_the_column_id_is_not_taken_from_texts_or_labels(file):
    path = file("a.csv", "id,topic\na,b\na,c\n")
    assert read(path, text="id").ids == read(path, text="topic", label="id").ids == ["0", "1"]
    assert read(file("a.jsonl", '{"id": "a", "topic": "b"}'), text="id").ids == ["0"]


def test_texts_longer_than_the_limit_of_csv_are_read(file):
    limit = csv.field_size_limit()
    assert rows_of(read(file("a.csv", table([("x" * 300_000, "bug")])))) == [("x" * 300_000, "bug")]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"message": "a"}', "no 'topic'; found message"),
        ('{"massage": "a", "topic": "b"}', "no 'message' (did you mean 'massage'?); found massage, topic"),
        ('{"message": null, "topic": "b"}', "expected text for message, got null"),
        ('{"message": true, "topic": "b"}', "expected text for message, got a boolean"),
        ('{"message": ["a"], "topic": "b"}', "expected text for message, got a list"),
        ('{"message": "a", "topic": null}', "no label"),
        ('{"message": "a", "topic": {}}', "expected a label for topic, got an object"),
        ('{"message": "a", "topic": ["b"]}', "expected one label for topic, got a list"),
        ('{"message": "\\ud800", "topic": "b"}', "not Unicode text (half a surrogate pair)"),
        ('{"message": "a", "topic": "b"', "not JSON: "),
        ("[]", "expected a JSON object, got a list"),
    ],
)
def test_a_bad_object_costs_no_other(file, line, said):
    good = '{"message": "good", "topic": true}\n'
    found = read(file("a.jsonl", f"{good}\n{line}\n{good}"))
    assert rows_of(found) == [("good", True)] * 2
    ((skipped),) = found.skipped
    assert skipped.line == 3
    assert skipped.reason.startswith(said)


def test_numbers_are_texts_with_a_warning(file):
    path = file("a.jsonl", '{"message": "a", "topic": 1}\n{"message": 5, "topic": 1}\n{"message": 0.5, "topic": 1}\n')
    found = read(path)
    assert list(found.texts) == ["a", "5", "0.5"]
    assert found.warnings == [f"{path}, line 2: a number in the text column 'message'; numbers are read as texts"]
    found = read(file("a.csv", "message,topic\n1,a\n2.5,b\n"))
    assert [warning.partition(": ")[2] for warning in found.warnings] == [
        "every text in column 'message' is a number; is it the right column?"
    ]


def test_labels_of_different_types_are_different(file):
    labels = ["1", "1.0", "true", '"1"', '"true"', "[1]", '["1"]', "[]"]
    path = file("a.jsonl", "".join(f'{{"message": "a", "topic": {label}}}\n' for label in labels))
    found = read(path, type="multilabel")
    assert [found.labels[code] for code in found.codes] == [json.loads(label) for label in labels]
    assert len(found.labels) == len(labels)


def test_ids_are_those_of_their_column(file):
    text = table([("a", "x", "1"), ("b", "y", "2"), ("a", "z", "3"), ("a", "w", "4")], ("id", "message", "topic"))
    found = read(file("a.csv", text))
    assert found.ids == ["a", "b", "a", "a"]
    (warning,) = found.warnings
    assert warning.endswith("a.csv: lines 2 and 4 have the same id a; so have 1 more")
    assert read(file("b.csv", text), id="topic", label="id").ids == ["1", "2", "3", "4"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".tsv"])
def test_memory_grows_with_the_rows_and_not_with_their_texts(file, suffix):
    count, size = 2000, 2000
    rows = [(f"{number} {'x' * size}", "ab"[number % 2]) for number in range(count)]
    if suffix == ".jsonl":
        content = "".join(json.dumps({"message": text, "topic": label}) + "\n" for text, label in rows)
    else:
        content = table(rows, delimiter="," if suffix == ".csv" else "\t")
    path = file(f"a{suffix}", content)
    del rows, content
    tracemalloc.start()
    try:
        found = read(path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == count
    assert held < count * 200
    assert peak < (1 << 20) + count * 400, "a megabyte is the spool's buffer"
