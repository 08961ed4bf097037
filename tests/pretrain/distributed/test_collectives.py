import os
import threading
from datetime import timedelta

import pytest
import torch

from data_prep.errors import ConfigError, InputError, RunError
from pretrain.distributed.collectives import (
    RowSplit,
    RowStream,
    RowSum,
    counted_traffic,
    gather_objects,
    on_main_process,
    rank,
    rows_per_rank,
    sum_over_ranks,
    world_size,
)
from tests.support.gloo_processes import run_in_processes

SPLITS = {1: [[5]], 2: [[3, 3], [5, 0]], 3: [[2, 0, 4], [1, 1, 1]]}


def rows_of_all(split):
    """Returns two tensors of N rows with different types and widths."""
    numbers = torch.arange(split.total)
    return numbers[:, None] * torch.tensor([1.0, 10.0, 100.0]).bfloat16(), numbers


def join_processes():
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=600))


def streamed_rows(num_processes):
    """Returns the rows from two passes of each stream, assembled by index."""
    join_processes()
    found = []
    for counts in SPLITS[num_processes]:
        split = RowSplit(tuple(counts))
        for piece_rows in (1, 2, 10):
            stream = RowStream(
                [tensor[split.own] for tensor in rows_of_all(split)], split, piece_rows=piece_rows
            )
            for _ in range(2):
                seen = {}
                for _, blocks in stream:
                    for block in blocks:
                        wide, narrow = block.tensors
                        assert wide.dtype == torch.bfloat16
                        for number, (left, right) in enumerate(zip(wide, narrow, strict=True)):
                            seen[block.first + number] = (left.tolist(), right.item())
                found.append((counts, seen))
    return found


@pytest.mark.parametrize("num_processes", SPLITS)
def test_a_stream_brings_every_row_once_in_every_pass(num_processes):
    for found in run_in_processes(num_processes, streamed_rows, num_processes):
        for counts, seen in found:
            wide, narrow = rows_of_all(RowSplit(tuple(counts)))
            assert sorted(seen) == narrow.tolist()
            assert [seen[n] for n in sorted(seen)] == list(
                zip(wide.tolist(), narrow.tolist(), strict=True)
            )


def summed_rows(num_processes):
    join_processes()
    parts = torch.arange(num_processes * 2 * 3, dtype=torch.float64).view(num_processes, 2, 3)
    return RowSum(parts * (rank() + 1)).wait().tolist()


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_a_row_sum_gives_each_rank_the_sum_of_its_rows(num_processes):
    parts = torch.arange(num_processes * 2 * 3, dtype=torch.float64).view(num_processes, 2, 3)
    factor = num_processes * (num_processes + 1) / 2  # 1 + 2 + ... of the ranks
    found = run_in_processes(num_processes, summed_rows, num_processes)
    assert found == (parts * factor).tolist()


def traffic_of_each_collective():
    join_processes()
    split = RowSplit((4, 2))
    with counted_traffic() as traffic:
        assert rows_per_rank(split.counts[rank()], torch.device("cpu")) == [4, 2]
        assert sum_over_ranks(torch.ones(10, dtype=torch.float64)).sum() == 20
        stream = RowStream([torch.zeros(split.counts[rank()], 32)], split, piece_rows=4)
        assert len(next(iter(stream))[1]) == world_size()
        RowSum(torch.zeros(2, 4, 32)).wait()
        gather_objects("a")
    sum_over_ranks(torch.ones(10))  # outside: not counted
    return traffic


def test_traffic_counts_calls_and_what_a_rank_receives():
    for traffic in run_in_processes(2, traffic_of_each_collective):
        assert traffic.calls == {
            "all_reduce": 2,
            "all_gather": 1,
            "reduce_scatter": 1,
            "all_gather_object": 1,
        }
        assert traffic.received_bytes["all_reduce"] == 16 + 80  # two int64, ten float64
        assert traffic.received_bytes["all_gather"] == 4 * 32 * 4
        assert traffic.received_bytes["reduce_scatter"] == 4 * 32 * 4
        assert traffic.received_bytes["all_gather_object"] > 0


def test_one_process_sends_nothing():
    with counted_traffic() as traffic:
        split = RowSplit((3,))
        own = torch.arange(6.0).view(3, 2)
        ((_, (block,)),) = RowStream([own], split, piece_rows=8)
        assert block.tensors[0].data_ptr() == own.data_ptr()
        assert gather_objects(1) == [1]
    assert not traffic.calls


class DemandingError(Exception):
    """Pickled without complaint, but the copy cannot be built: it lacks an argument."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")


class ForgetfulError(Exception):
    """Its copy has another message."""

    def __init__(self, path="nowhere"):
        super().__init__()
        self.args, self.text = (), f"lost {path}"

    def __reduce__(self):
        return type(self), ()

    def __str__(self):
        return self.text


def unpicklable_error():
    error = ValueError("holds a lock")
    error.lock = threading.Lock()
    return error


FAILURES = {  # name: (error of rank 0, type and message on rank 0, type and message elsewhere)
    "input": (InputError("no shards"), (InputError, "no shards"), None),
    "config": (ConfigError("lanes=0"), (ConfigError, "lanes=0"), None),
    "run": (RunError("superseded"), (RunError, "superseded"), None),
    "file": (
        FileNotFoundError(2, "No such file", "x.json"),
        (RunError, "rank 0: [Errno 2] No such file: 'x.json'"),
        None,
    ),
    "value": (ValueError("odd"), (ValueError, "odd"), None),
    "key": (KeyError("step"), (KeyError, "'step'"), None),
    "assertion": (AssertionError(), (AssertionError, ""), None),
    "memory": (MemoryError("9 GB"), (MemoryError, "9 GB"), None),
    "unicode": (
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        (
            UnicodeDecodeError,
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        None,
    ),
    "interrupt": (KeyboardInterrupt(), (KeyboardInterrupt, ""), None),
    "exit": (SystemExit(3), (SystemExit, "3"), None),
    "demanding": (
        DemandingError("x.json", "damaged"),
        (DemandingError, "x.json: damaged"),
        (RunError, "rank 0: DemandingError: x.json: damaged"),
    ),
    "forgetful": (
        ForgetfulError("step 6"),
        (ForgetfulError, "lost step 6"),
        (RunError, "rank 0: ForgetfulError: lost step 6"),
    ),
    "unpicklable": (
        unpicklable_error,
        (ValueError, "holds a lock"),
        (RunError, "rank 0: ValueError: holds a lock"),
    ),
}


def raised_errors():
    """Returns the (type, message) that this rank sees for each failure of rank 0."""
    join_processes()
    seen = {}
    for name, (error, _, _) in FAILURES.items():
        try:
            on_main_process(lambda: raise_on_main(error))  # noqa: B023
        except BaseException as raised:
            seen[name] = type(raised), str(raised)
    # A result that cannot be sent must not leave the others waiting either.
    with pytest.raises(TypeError, match="cannot pickle"):
        on_main_process(threading.Lock)
    # The group still works.
    assert on_main_process(lambda: {"rank": rank()}) == {"rank": 0}
    return seen


def raise_on_main(error):
    assert rank() == 0
    raise error() if callable(error) else error


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_an_error_of_any_kind_on_rank_0_reaches_every_rank(num_processes):
    function = raised_errors if num_processes > 1 else raised_errors_alone
    for number, seen in enumerate(run_in_processes(num_processes, function)):
        assert seen == {
            name: on_others if number and on_others else on_main
            for name, (_, on_main, on_others) in FAILURES.items()
        }


def raised_errors_alone():
    seen = {}
    for name, (error, _, _) in FAILURES.items():
        with pytest.raises(BaseException) as raised:
            on_main_process(lambda: raise_on_main(error))  # noqa: B023
        seen[name] = raised.type, str(raised.value)
    return seen


def traffic_of_main_process():
    join_processes()
    with counted_traffic() as traffic:
        assert len(on_main_process(lambda: bytes(100_000) if rank() == 0 else None)) == 100_000
    return dict(traffic.calls), traffic.received_bytes.total()


def test_the_outcome_of_rank_0_is_broadcast_so_its_bytes_do_not_grow_with_the_ranks():
    found = [each for n in (2, 4) for each in run_in_processes(n, traffic_of_main_process)]
    assert all(calls == {"broadcast_object": 1} for calls, _ in found)
    assert len({received for _, received in found}) == 1
    assert 100_000 < found[0][1] < 100_200
