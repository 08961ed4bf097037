import math

import open_clip
import pytest
import torch
from gloo_processes import run_in_processes
from torch.nn import functional

from pretrain.contrastive_loss import hit_share, softmax_loss
from pretrain.gather import rank, world_size

# Rows per rank: equal, ragged, and with an empty rank.
SPLITS = {1: [[12]], 2: [[6, 6], [9, 3], [12, 0]], 4: [[3, 3, 3, 3], [5, 0, 4, 3]]}


def features(num_pairs=12, width=8):
    generator = torch.Generator().manual_seed(0)
    media, text = torch.randn(2, num_pairs, width, generator=generator).unbind()
    return functional.normalize(media, dim=-1), functional.normalize(text + media, dim=-1)


def obvious_loss(media, text, scale):
    logits = scale * media @ text.T
    labels = torch.arange(len(media))
    rows, columns = (functional.cross_entropy(x, labels) for x in (logits, logits.T))
    return (rows + columns) / 2


def obvious_gradients(scale_value):
    media, text = (x.requires_grad_() for x in features())
    scale = torch.tensor([scale_value], requires_grad=True)
    loss = obvious_loss(media, text, scale)
    loss.backward()
    return loss.item(), media.grad, text.grad, scale.grad


def gradients_of_my_rows(counts, scale_value):
    """What an engine that averages over ranks makes of the loss: towers see W times less."""
    import os
    from datetime import timedelta

    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    first = sum(counts[: rank()])
    media, text = (x[first : first + counts[rank()]].requires_grad_() for x in features())
    scale = torch.tensor([scale_value], requires_grad=True)
    loss = softmax_loss(media, text, scale)
    loss.for_backward.backward()
    average = 1 / world_size()
    return (
        loss.value,
        (media.grad * average).tolist(),
        (text.grad * average).tolist(),
        (scale.grad * average).tolist(),
        loss.media_to_text_recall_at_1,
        loss.text_to_media_recall_at_1,
    )


@pytest.mark.parametrize("num_processes", SPLITS)
def test_loss_and_gradients_equal_one_process_with_the_whole_batch(num_processes):
    for counts in SPLITS[num_processes]:
        for scale in (1.0, 100.0):
            expected, media_grad, text_grad, scale_grad = obvious_gradients(scale)
            results = run_in_processes(num_processes, gradients_of_my_rows, counts, scale)
            for value, *_ in results:
                assert value == pytest.approx(expected, rel=1e-6)
            for position, truth in ((1, media_grad), (2, text_grad)):
                rows = torch.tensor([row for result in results for row in result[position]])
                torch.testing.assert_close(rows, truth, rtol=1e-4, atol=1e-6)
            summed = torch.tensor([result[3] for result in results]).sum(dim=0)
            torch.testing.assert_close(summed, scale_grad, rtol=1e-4, atol=1e-6)


def test_loss_equals_open_clips():
    media, text = features()
    theirs = open_clip.loss.ClipLoss()(media, text, torch.tensor(20.0)).item()
    assert softmax_loss(media, text, torch.tensor([20.0])).value == pytest.approx(theirs, rel=1e-6)


def test_recall_at_1_counts_pairs_that_are_each_others_nearest():
    media, text = features()
    logits = media @ text.T
    loss = softmax_loss(media, text, torch.tensor([10.0]))
    own = torch.arange(len(media))
    assert loss.media_to_text_recall_at_1 == pytest.approx(
        (logits.argmax(dim=1) == own).float().mean().item()
    )
    assert loss.text_to_media_recall_at_1 == pytest.approx(
        (logits.argmax(dim=0) == own).float().mean().item()
    )


def test_a_collapsed_model_is_at_chance():
    same = functional.normalize(torch.ones(10, 4), dim=-1)
    loss = softmax_loss(same, same, torch.tensor([10.0]))
    assert loss.value == pytest.approx(math.log(10), rel=1e-6)
    assert loss.media_to_text_recall_at_1 == pytest.approx(0.1)


def test_hit_share_divides_ties():
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    assert hit_share(logits, torch.tensor([0, 1, 2])).tolist() == [0.5, 0.0, 1.0]
