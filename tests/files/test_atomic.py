"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import re
import shutil

import pytest
import safetensors.torch
import torch

from minbert.errors import UserError
from minbert.files import atomic as files
from minbert.files.atomic import (
    readable,
    recover,
    remove_directory,
    verify,
    write_atomically,
    write_directory,
    write_tensors,
    writing,
)


def fill_with(text):
    return lambda directory: (directory / "a.txt").write_text(text)


def test_a_write_that_fails_leaves_the_old_directory_whole(tmp_path):
    path = tmp_path / "last"
    write_directory(path, fill_with("one"))

    def fill(directory):
        (directory / "a.txt").write_text("two")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="no room left"), writing(path, "free some space"):
        write_directory(path, fill)
    verify(path)
    assert (path / "a.txt").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize("survivors", [["old", "new"], ["old"], ["last", "old"], ["last", "new"]])
def test_a_crash_at_any_moment_leaves_one_whole_directory(tmp_path, survivors):
    names = {"last": "last", "old": ".last.old", "new": ".last.new"}
    path = tmp_path / "last"
    for survivor in survivors:
        write_directory(tmp_path / "made", fill_with(survivor))
        (tmp_path / "made").rename(tmp_path / names[survivor])
    expected = "last" if "last" in survivors else "old"
    assert (readable(path) / "a.txt").read_text() == expected
    recover(path)
    verify(path)
    assert (path / "a.txt").read_text() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_a_removal_that_a_crash_interrupts_leaves_no_half_directory(tmp_path, monkeypatch):
    path = tmp_path / "last"
    write_directory(path, fill_with("one"))

    def crash(directory, **options):
        (directory / "a.txt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            remove_directory(path)
    assert not readable(path).exists()
    remove_directory(path)  # the same again
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("damage", ["truncate", "alter", "delete", "manifest"])
def test_verify_names_the_damaged_file(tmp_path, damage):
    path = tmp_path / "last"
    write_directory(path, fill_with("hello"))
    verify(path)
    file = path / ("manifest.json" if damage == "manifest" else "a.txt")
    if damage == "delete":
        file.unlink()
    else:
        file.write_text({"truncate": "hell", "alter": "hellO", "manifest": '{"a.txt": '}[damage])
    with pytest.raises(UserError, match=file.name):
        verify(path)


def test_a_write_replaces_the_whole_file(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, "a longer first version\n")
    write_atomically(file, "short\n")
    assert file.read_text() == "short\n"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "no room left on the disk to write {path}; free some space"),
        (errno.EDQUOT, "no room left on the disk to write {path}; free some space"),
        (errno.EIO, "{path} cannot be written (Input/output error); free some space"),
        (errno.EROFS, "{path} cannot be written (Read-only file system); free some space"),
        (errno.EACCES, "{path} cannot be written (Permission denied); free some space"),
        (errno.ENOENT, "{path} cannot be written (No such file or directory); free some space"),
    ],
)
def test_what_the_system_says_against_writing_is_one_clear_line(tmp_path, code, said):
    path = tmp_path / "x"
    with pytest.raises(UserError, match=f"^{re.escape(said.format(path=path))}$"), writing(path, "free some space"):
        raise OSError(code, os.strerror(code))


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="no"), writing(tmp_path / "x", "free some space"):
        raise ValueError("no")


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    tensors = {f"t{i} \u00e9": torch.ones(3, i, dtype=dtype) for i, dtype in enumerate(files._DTYPES)}
    tensors |= {"scalar": torch.zeros(()), "transposed": torch.rand(3, 2).t(), "a": torch.rand(5)}
    for metadata in (None, {"format": "pt"}):
        write_tensors(tmp_path / "x", tensors, metadata)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        assert (tmp_path / "x").read_bytes() == safetensors.torch.save(whole, metadata)
