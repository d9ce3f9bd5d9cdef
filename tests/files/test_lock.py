"""A directory has one writer at a time, and whatever ends it leaves no lock behind."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest
from faults import wrapped

from minbert.errors import UserError
from minbert.files.lock import locked


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
        assert answer.get(timeout=60) == f"{tmp_path} is in use by another training process; choose another --out"
        other.join()


def test_a_process_that_is_killed_leaves_no_lock(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from minbert.files.lock import locked
with locked(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_an_empty_directory_is_removed(tmp_path):
    with locked(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").is_dir()
    assert not (tmp_path / "a" / "run").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run"), locked(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("removed", ["the lock file", "the directory"])
def test_a_lock_that_its_last_holder_removed_is_made_again(tmp_path, removed):
    """The last holder left between the moment this process opened the lock file and the moment it locked it."""
    directory, opened = tmp_path / "run", []

    def late(name, real):
        def call(path, *rest, **options):
            descriptor = real(path, *rest, **options)
            if not opened and str(path).endswith(".lock"):
                opened.append(path)
                (directory / ".lock").unlink()
                if removed == "the directory":
                    directory.rmdir()
            return descriptor

        return call

    with wrapped(("open",), late), locked(directory):
        assert opened
        assert (directory / ".lock").exists()
    assert not directory.exists()


def test_everything_is_imported_without_fcntl_and_resource():
    script = (
        "import sys\n"
        "sys.modules.update(fcntl=None, resource=None)\n"
        "import minbert.train, minbert.evaluate, minbert.predict, minbert.reproduce, minbert.augment, minbert.report\n"
        "import torch\n"
        "from minbert.device import peak_memory_bytes\n"
        "assert peak_memory_bytes(torch.device('cpu')) is None\n"
    )
    words = [sys.executable, "-W", "ignore:only soft file lock", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
