import itertools
from collections import Counter
from datetime import timedelta

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pretrain.distributed.collectives import RowSplit, counted_traffic
from pretrain.loss.contrastive_loss import begin_gather, contrastive_loss
from pretrain.loss.options import LossOptions
from pretrain.loss.two_passes import choose_mode, choose_piece_rows, received_bytes
from tests.support.gloo_processes import run_in_processes


def features(num_pairs, width, *, dtype=torch.float64):
    sides = torch.randn(2, num_pairs, width, dtype=dtype)
    return functional.normalize(sides, dim=-1).unbind()


def num_products(options, *, wants_gradients=True):
    """Counts matrix products of the size of this rank's row block, by torch's FLOP counter."""
    media, text = features(64, 32)
    leaves = [media, text, torch.tensor([9.0], dtype=torch.float64)]
    leaves += [torch.tensor([-3.0], dtype=torch.float64)] if options.kind == "sigmoid" else []
    leaves = [leaf.requires_grad_(wants_gradients) for leaf in leaves]
    with FlopCounterMode(display=False) as counter:
        loss = contrastive_loss(*leaves, options=options)
        if wants_gradients:
            loss.for_backward.backward()
    return counter.get_total_flops() / (2 * 64 * 64 * 32)


@pytest.mark.parametrize(
    ("kind", "mode", "products"),
    [
        ("softmax", "strip1", 4),
        ("softmax", "strip2", 5),
        ("sigmoid", "strip1", 3),
        ("sigmoid", "strip2", 4),
    ],
)
def test_products_are_as_few_as_the_mode_promises(kind, mode, products):
    assert num_products(LossOptions(kind, mode=mode)) == products
    assert num_products(LossOptions(kind, mode=mode), wants_gradients=False) == 1


def traffic_of_a_step(num_processes):
    """Returns {(kind, mode, piece rows): traffic} for 64 float32 pairs of width 32 per rank."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=600))
    split = RowSplit((64,) * num_processes)
    media, text = features(split.total, 32, dtype=torch.float32)
    found = {}
    for kind, mode, piece in itertools.product(
        ("softmax", "sigmoid"), ("strip1", "strip2"), (64, 16)
    ):
        leaves = [side[split.own].clone().requires_grad_() for side in (media, text)]
        leaves.append(torch.tensor([9.0]))
        leaves += [torch.tensor([-3.0])] if kind == "sigmoid" else []
        options = LossOptions(kind, mode=mode, piece_rows=piece)
        with counted_traffic() as traffic:
            loss = contrastive_loss(*leaves, options=options, counts=split.counts)
            before_backward = traffic.calls.total()
            loss.for_backward.backward()
        assert traffic.calls.total() == before_backward
        found[kind, mode, piece] = traffic
        if piece == 64:
            with counted_traffic() as traffic:
                begun = begin_gather(
                    leaves[0], options=LossOptions(kind, mode=mode), counts=split.counts
                )
                contrastive_loss(*leaves, options=options, counts=split.counts, media_gather=begun)
            found[kind, mode, "begun"] = traffic
    return found


def test_collectives_and_bytes_are_as_few_as_the_modes_promise():
    num_processes, num_pairs, width = 2, 128, 32
    of_features = 4 * num_pairs * width
    for found in run_in_processes(num_processes, traffic_of_a_step, num_processes):
        for (kind, mode, piece), traffic in found.items():
            if piece == "begun":  # the positives take a gather of their own
                kept = found[kind, mode, 64]
                assert traffic.calls == kept.calls + Counter(all_gather=1)
                received = [each.received_bytes.total() for each in (traffic, kept)]
                assert received[0] == received[1]
                continue
            num_pieces = 64 // piece
            # Rows that the first pass of the softmax loss does not keep are gathered again.
            is_gathered_again = kind == "softmax" and num_pieces > 1
            assert traffic.calls["all_gather"] == num_pieces * (2 if is_gathered_again else 1)
            assert traffic.calls["all_reduce"] == 1
            assert traffic.calls["reduce_scatter"] == (num_pieces if mode == "strip1" else 0)
            promised = of_features * (2 if is_gathered_again else 1)  # captions
            promised += of_features  # gradients of the captions, or media
            promised += (32 if mode == "strip1" else 48) * num_pairs
            received = traffic.received_bytes.total()
            assert received <= promised * (num_processes - 1) / num_processes + 64
            predicted = received_bytes(
                (64, 64),
                options=LossOptions(kind, mode=mode, piece_rows=piece),
                width=width,
                feature_bytes=4,
                device=torch.device("cpu"),
            )
            assert predicted == pytest.approx(received, abs=64 * num_pieces)


def test_large_batches_are_streamed_and_small_ones_kept():
    assert choose_piece_rows(RowSplit((4096,) * 8), width=512) == 4096
    assert choose_piece_rows(RowSplit((2048,) * 64), width=512) == 256
    assert choose_piece_rows(RowSplit((10**6,)), width=512) == 10**6
    on_gpu = choose_piece_rows(RowSplit((2048,) * 64), width=512, device_type="cuda")
    assert on_gpu == 4 * 256


def test_the_mode_follows_the_rows_per_rank_on_gpus_alone():
    small, large = RowSplit((1024,) * 8), RowSplit((8192,) * 8)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [choose_mode(split, gpu) for split in (small, large)] == ["strip2", "strip1"]
    assert [choose_mode(split, cpu) for split in (small, large)] == ["strip1", "strip1"]
