"""Failures while a checkpoint is written: complete checkpoints are never lost."""

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_prep.errors import (
    InputError,
    RunError,
)
from pretrain.checkpoint import newest_checkpoint, open_checkpoint, restore
from pretrain.checkpoints import writer as writer_module
from pretrain.checkpoints.record import RunState
from pretrain.checkpoints.store import CheckpointStore, open_store
from pretrain.distributed.collectives import rank
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_state import ToyEngine, writer_of
from tests.support.waiting import wait_until


def steps_in(folder):
    return [each.step for each in open_store(folder).checkpoints()]


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of 128 kB; the toy state takes 8 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_the_run_goes_on_until_it_has_happened_too_often(
    small_disk, caplog
):
    folder = small_disk / "checkpoints"
    writer = writer_of(ToyEngine(), folder, max_failed_saves=2)
    writer.save(RunState(1, 1))
    writer.finish()
    filling = small_disk / "filling"
    with pytest.raises(OSError, match="No space"), filling.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    writer.save(RunState(2, 2))
    writer.finish()
    assert "step 2: the checkpoint could not be written: rank 0" in caplog.text
    assert "No space left on device" in caplog.text
    assert str(folder) in caplog.text
    with pytest.raises(RunError, match="the last checkpoint could not be written"):
        writer.refuse_failure()
    assert (steps_in(folder), hidden(folder)) == ([1], [])
    filling.unlink()
    writer.save(RunState(3, 3))
    writer.finish()
    writer.refuse_failure()
    assert steps_in(folder) == [3, 1]
    open_checkpoint(str(folder / "step_00000001"))
    filling.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    writer.save(RunState(4, 4))
    writer.finish()
    writer.save(RunState(5, 5))
    with pytest.raises(RunError, match=r"2 checkpoints in a row .*run\.max_failed_saves.*No space"):
        writer.finish()
    assert newest_checkpoint(open_store(folder)).record.state.step == 3


def test_a_folder_that_becomes_read_only_is_named(small_disk, caplog):
    writer = writer_of(ToyEngine(), small_disk)
    writer.save(RunState(1, 1))
    writer.finish()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    writer.save(RunState(2, 2))
    writer.finish()
    assert "Read-only file system" in caplog.text
    assert newest_checkpoint(open_store(small_disk)).record.state.step == 1


class SlowStore(CheckpointStore):
    """A store that waits for an event before writing, which takes a second of its clock."""

    def __init__(self, folder):
        super().__init__(folder)
        self.may_write = threading.Event()
        self.on_reading = lambda: None
        self.seconds = 0.0

    def clock(self):
        seconds = self.seconds
        self.on_reading()
        return seconds

    def begin(self, partial):
        self.may_write.wait()
        self.seconds += 1
        super().begin(partial)


def test_training_waits_for_an_unfinished_checkpoint_but_not_for_a_slow_store(
    tmp_path, caplog, monkeypatch
):
    store = SlowStore(str(tmp_path))
    engine = ToyEngine()
    writer = writer_of(engine, tmp_path, store=store, clock=store.clock)
    saved = engine.values()
    writer.save(RunState(1, 1))
    for held in engine.slices():  # training goes on
        held.values.add_(1)
    writer.advance()
    assert steps_in(tmp_path) == []
    store.on_reading = store.may_write.set  # training reads the clock when it starts to wait
    writer.save(RunState(2, 2))
    assert "because the checkpoint of step 1 was still being written" in caplog.text
    assert steps_in(tmp_path) == [1]
    writer.finish()
    [first, second] = writer.take_reports()
    assert second.waited_seconds > first.waited_seconds
    other = ToyEngine(seed=1)
    restore(other, open_checkpoint(str(tmp_path / "step_00000001")))
    assert all(map(torch.equal, other.values(), saved))
    restore(other, open_checkpoint(str(tmp_path / "step_00000002")))
    assert all(map(torch.equal, other.values(), engine.values()))
    caplog.clear()
    monkeypatch.setattr(writer_module, "SECONDS_TO_REPORT", 60)
    writer.save(RunState(3, 3))
    writer.save(RunState(4, 4))
    writer.finish()
    assert "training waited" not in caplog.text


def test_leftovers_of_earlier_attempts_are_deleted_and_never_loaded(tmp_path):
    engine = ToyEngine()
    writer = writer_of(engine, tmp_path, attempt="0002")
    writer.save(RunState(3, 3))
    writer.finish()
    for name in (".step_00000004.0002.tmp", ".step_00000004.0003.tmp", ".step_00000003.0002.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text("{}")
    (tmp_path / "step_00000004").mkdir()  # its deletion was interrupted
    assert newest_checkpoint(open_store(tmp_path)).record.state.step == 3
    writer_of(engine, tmp_path, attempt="0003")
    assert hidden(tmp_path) == [".step_00000004.0003.tmp"]


class SupersededError(RunError):
    """Stands in for the error of the run folder."""


@pytest.mark.parametrize("num_calls", [0, 1])
def test_a_superseded_attempt_neither_commits_nor_deletes(tmp_path, num_calls):
    calls = []

    def fence():
        calls.append(None)
        if len(calls) > num_calls:
            raise SupersededError("by attempt 0002")

    later = writer_of(ToyEngine(), tmp_path, attempt="0002")
    later.save(RunState(9, 9))
    later.finish()
    writer = writer_of(ToyEngine(), tmp_path, fence=fence, keep_checkpoints=1)
    writer.save(RunState(5, 5))
    with pytest.raises(SupersededError):
        writer.finish()
    assert newest_checkpoint(open_store(tmp_path)).record.state.step == 9


def save_twice(folder, failing_rank):
    """Returns the error of a save that fails on one rank, and the steps of later reports."""
    dist.init_process_group("gloo")
    engine = ToyEngine()
    store = FailingStore(str(folder), fails=rank() == failing_rank)
    writer = writer_of(engine, folder, store=store)
    writer.save(RunState(1, 1))
    writer.finish()
    try:
        writer.refuse_failure()
    except RunError as error:
        first = str(error)
    store.fails = False
    writer.save(RunState(2, 1, skipped_steps=(1,), tags=("why",)))
    if rank() == 1:  # it comes late: all ranks commit when the last has written
        wait_until(lambda: writer._save.task.is_done)
    writer.finish()
    writer.refuse_failure()
    return first, [report.step for report in writer.take_reports()]


class FailingStore(CheckpointStore):
    def __init__(self, folder, *, fails):
        super().__init__(folder)
        self.fails = fails

    def begin(self, partial):
        if self.fails:
            raise PermissionError(13, "Permission denied", partial)
        super().begin(partial)


def load_all(folder):
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    engine = ToyEngine(seed=1)
    checkpoint = newest_checkpoint(open_store(folder))
    restore(engine, checkpoint)
    expected = ToyEngine().values()
    error = None
    try:
        restore(ToyEngine(sizes=(30, 2, 1000)), checkpoint)
    except InputError as raised:
        error = str(raised)
    same = all(map(torch.equal, engine.values(), expected))
    return same, checkpoint.record.state, checkpoint.record.written_by, error


def test_all_ranks_learn_that_one_could_not_write_and_any_number_loads_what_they_wrote(tmp_path):
    outcomes = run_in_processes(2, save_twice, tmp_path, 1)
    assert all("last checkpoint could not be written" in first for first, _ in outcomes)
    assert all(steps == [2] for _, steps in outcomes)
    assert (steps_in(tmp_path), hidden(tmp_path)) == ([2], [])
    written = sorted(path.name for path in Path(tmp_path / "step_00000002").iterdir())
    assert written == [
        "checkpoint.json",
        "config.yaml",
        *(
            f"{kind}-{number:05d}-of-00002.safetensors"
            for kind in ("model", "optimizer")
            for number in (1, 2)
        ),
    ]
    sizes = [(tmp_path / "step_00000002" / name).stat().st_size for name in written[2:]]
    assert max(sizes) < 1.2 * min(sizes)
    for num_processes in (1, 3):
        for same, state, written_by, error in run_in_processes(num_processes, load_all, tmp_path):
            assert same
            assert state == RunState(2, 1, skipped_steps=(1,), tags=("why",))
            assert written_by == {"attempt": "0001", "world_size": 2, "strategy": "toy"}
            assert "w1: (1,) in the checkpoint, (2,) in the model" in error
