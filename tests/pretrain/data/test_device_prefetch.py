"""The order of events of prefetching to a device, with a copier that records its calls."""

import threading

import pytest

from pretrain.data.batch import StepBatch
from pretrain.data.device_prefetch import prefetch_with


class Diary:
    """A copier without a device, which records its calls."""

    def __init__(self):
        self.events = []
        self.has_copied = threading.Event()

    def copy(self, batch):
        self.events.append(("copy", batch.step))
        self.has_copied.set()
        return batch

    def hand_over(self, batch):
        self.events.append(("use", batch.step))


def batches(diary, num_steps, *, error=None):
    """Yields batches, each 'loaded' when the one before is no longer needed."""
    for step in range(num_steps):
        diary.events.append(("load", step))
        yield StepBatch(step, {}, [])
    if error is not None:
        raise error


def test_the_next_batch_is_copied_while_one_is_in_use_and_no_other_is():
    diary = Diary()
    copied = prefetch_with(diary, batches(diary, 4))
    for step in range(4):
        diary.has_copied.clear()
        assert next(copied).step == step
        if step < 3:
            assert diary.has_copied.wait(timeout=600)
            assert max(number for event, number in diary.events if event == "copy") <= step + 1
    assert next(copied, None) is None
    for step in range(4):  # the loader reuses its memory only after the copy
        assert diary.events.index(("copy", step)) > diary.events.index(("load", step))
        assert diary.events.index(("use", step)) > diary.events.index(("copy", step))
    for step in range(3):
        assert diary.events.index(("load", step + 1)) > diary.events.index(("copy", step))


def test_an_error_of_the_loader_comes_after_the_batches_before_it():
    diary = Diary()
    copied = prefetch_with(diary, batches(diary, 2, error=OSError("no such shard")))
    assert [next(copied).step, next(copied).step] == [0, 1]
    with pytest.raises(OSError, match="no such shard"):
        next(copied)
