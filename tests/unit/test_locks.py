"""Locks: a folder that one run at a time works in, and what is left of it."""

import fcntl
import shutil
import threading

import pytest

from trawl import locks
from trawl.errors import PlanError
from trawl.locks import PRIVATE, held, locked


def hold(folder, files=(), error=KeyboardInterrupt):
    with held(folder):
        for name in files:
            (folder / name).touch()
        raise error


def test_a_held_folder_is_refused_to_others(tmp_path):
    with held(tmp_path / "a"):
        (tmp_path / "a" / "made").touch()
        with pytest.raises(PlanError, match=r"another run is working in .*a; wait for it, or choose another folder"):
            hold(tmp_path / "a")
    with held(tmp_path / "a"):
        assert (tmp_path / "a" / "made").exists()


def test_a_folder_in_which_nothing_was_made_is_removed(tmp_path):
    (tmp_path / "there").mkdir()
    for folder, files in (("new", ()), ("there", ()), ("worked", ("made",))):
        with pytest.raises(KeyboardInterrupt):
            hold(tmp_path / folder, files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "worked"]


def test_a_folder_that_its_holder_removes_at_that_moment_is_made_again(tmp_path, monkeypatch):
    """Between opening the lock and locking it: what would be locked is a file that nobody else finds."""
    folder, lock, removed = tmp_path / "a", fcntl.flock, []

    def remove_first(file, how):
        if not removed:
            removed.append(shutil.rmtree(folder))
        lock(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", remove_first)
    with held(folder, PRIVATE):
        assert folder.stat().st_mode & 0o777 == PRIVATE
        with pytest.raises(PlanError, match="another run"):
            hold(folder)


def test_a_place_where_no_folder_can_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(PlanError, match=rf"cannot work in {folder}: .*; choose another folder"):
            hold(folder)


def test_others_wait_for_a_locked_file(tmp_path):
    order = []

    def wait():
        with locked(tmp_path / "locks" / "a"):
            order.append("second")

    with locked(tmp_path / "locks" / "a"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
