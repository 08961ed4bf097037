import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep.storage.atomic import NO_FOLDER_FLUSH, write_atomically


def test_a_file_and_then_its_name_are_flushed(tmp_path, monkeypatch):
    done, fsync = [], os.fsync

    def record(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append((is_folder, sorted(path.name for path in tmp_path.iterdir())))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    [(_, before), after] = done
    assert [name.startswith(".file.") for name in before] == [True]
    assert after == (True, ["file"])


@pytest.mark.parametrize("number", NO_FOLDER_FLUSH)
def test_a_file_system_that_flushes_no_folders_is_written_to(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_threads_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    path, contents = tmp_path / "file", [bytes([number]) * 10_000 for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda content: write_atomically(path, content), contents))
    assert path.read_bytes() in contents
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_flushed_is_named_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_atomically(path, b"new")
    assert caught.value.filename == str(path)
    assert (path.read_bytes(), [each.name for each in tmp_path.iterdir()]) == (b"old", ["file"])
