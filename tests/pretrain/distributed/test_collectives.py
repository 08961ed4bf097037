import os
from datetime import timedelta

import pytest
import torch

from pretrain.distributed.collectives import (
    RowSplit,
    RowStream,
    RowSum,
    counted_traffic,
    gather_objects,
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
