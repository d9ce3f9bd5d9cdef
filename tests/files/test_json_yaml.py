"""JSON and YAML from anywhere: read, or refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minbert.errors import UserError
from minbert.files.json_yaml import (
    dump_yaml,
    parse_json,
    parse_object,
    parse_yaml,
    read_bytes,
    read_json,
    read_json_lines,
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": 1e400}',
        "[NaN]",
        "[-Infinity]",
        '["\\ud800"]',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        "9" * 5000,
        '"x',
    ],
)
def test_json_that_is_refused(text):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text",
    ["a: *b", "&a [*a]", "!!python/name:os.system", "a: 1\na: 2", "[" * 9999, "? [1]\n: 2", "a: \0", "--- a\n--- b"],
)
def test_yaml_that_is_refused(text):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_what_is_read():
    assert parse_json('{"a": [1, 2.5, null, true, "\\ud83d\\ude00"]}') == {"a": [1, 2.5, None, True, "😀"]}
    assert parse_yaml("a: 1e-3\nb: [x, null]\nc: 2001-01-01") == {"a": 0.001, "b": ["x", None], "c": "2001-01-01"}


def test_files_are_read_up_to_their_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, 10) == b"x" * 10
    with pytest.raises(UserError, match="longer than 9 bytes"):
        read_bytes(path, 9)
    (tmp_path / "zeros").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="no regular file"):
        read_bytes(tmp_path / "zeros", 9)
    path.write_bytes(b"[]")
    with pytest.raises(UserError, match="expected a JSON object, got a list"):
        read_json(path)


def test_each_line_is_an_object_or_says_why_not(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n\n[1]\n\xff\n{"b": 2}')
    found = list(read_json_lines(path))
    assert [number for number, value in found if isinstance(value, dict)] == [1, 5]
    assert [number for number, value in found if isinstance(value, ValueError)] == [2, 3, 4]
    path.write_bytes(b"")
    assert list(read_json_lines(path)) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "not JSON: nested too deeply"),
        ('{"a": 1, "a": 2}', "not JSON: key 'a' twice in an object"),
        ('{"a": 1', "not JSON: Expecting"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ("3", "expected a JSON object, got a number"),
    ],
)
def test_a_line_of_data_that_is_no_json_object_is_a_value_error(line, message):
    with pytest.raises(ValueError, match=message):
        parse_object(line, strict=False)


def test_data_may_hold_numbers_and_texts_that_files_of_a_run_may_not():
    text = '{"a": NaN, "b": 1e400, "c": "\\ud800"}'
    assert str(parse_object(text, strict=False)) == str({"a": float("nan"), "b": float("inf"), "c": "\ud800"})
    with pytest.raises(ValueError, match="not JSON: NaN is no JSON number"):
        parse_object(text)


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
        max_leaves=8,
    )
)
@settings(deadline=None)
@example("1e5")  # a number to parse_yaml, as YAML 1.2 has it, and a text to YAML 1.1
@example({"0E0": ["2020-01-01", "=", "<<", "yes", "0x1F", "1_000", "12:30"]})
def test_what_dump_yaml_writes_is_what_parse_yaml_reads(value):
    assert parse_yaml(dump_yaml(value)) == value
    assert parse_yaml(dump_yaml(value), core=True) == value


def test_only_true_and_false_are_booleans_of_the_core_schema():
    text = "[yes, No, on, OFF, y, true, False, 'true']"
    assert parse_yaml(text) == [True, False, True, False, "y", True, False, "true"]
    assert parse_yaml(text, core=True) == ["yes", "No", "on", "OFF", "y", True, False, "true"]
