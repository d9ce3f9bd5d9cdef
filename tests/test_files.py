"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import multiprocessing

import pytest
from safetensors import SafetensorError

from minbert.errors import UserError
from minbert.files import (
    locked,
    no_room_is_a_user_error,
    readable,
    recover,
    verify,
    write_atomically,
    write_directory,
)


def fill_with(text):
    return lambda directory: (directory / "a.txt").write_text(text)


def test_a_write_that_fails_leaves_the_old_directory_whole(tmp_path):
    path = tmp_path / "last"
    write_directory(path, fill_with("one"))

    def fill(directory):
        (directory / "a.txt").write_text("two")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="no room left"), no_room_is_a_user_error(path, "free some space"):
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
    "error", [OSError(errno.ENOSPC, "x"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_clear_line(tmp_path, error):
    with pytest.raises(UserError, match=r"no room left on the disk to write .*; free some space"):  # noqa: SIM117
        with no_room_is_a_user_error(tmp_path / "x", "free some space"):
            raise error


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), no_room_is_a_user_error(tmp_path / "x", "free some space"):
        raise PermissionError(errno.EACCES, "no")


def _try_to_lock(directory, answer):
    try:
        with locked(directory):
            answer.put("locked")
    except UserError as error:
        answer.put(str(error))


def test_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with locked(tmp_path):
        other = context.Process(target=_try_to_lock, args=(tmp_path, answer))
        other.start()
        assert "in use" in answer.get(timeout=60)
        other.join()


def test_a_directory_nothing_was_put_in_goes_again(tmp_path):
    with locked(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").is_dir()
    assert not (tmp_path / "a" / "run").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run"), locked(tmp_path / "file" / "run"):
        pass
