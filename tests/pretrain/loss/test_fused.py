import itertools
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch.nn import functional

from pretrain.distributed.collectives import RowSplit, world_size
from pretrain.loss import feature_tiles
from pretrain.loss.contrastive_loss import contrastive_loss
from pretrain.loss.options import LossOptions
from pretrain.loss.reference import dense_loss, dense_recall
from tests.support.gloo_processes import run_in_processes

NUM_PAIRS, WIDTH = 135, 24  # not multiples of the block size
# Noise between media and text for each scale, so that the loss does not vanish. Plain exponentials
# of the first scale fit the type of a tile, those of the others do not.
NOISE = {14.3: 1.0, 100.0: 3.0, 300.0: 5.0}


def use_interpreted_kernels():
    """Makes this process compute every loss with Triton kernels, in tiles of several blocks."""
    import tests.support.interpreted_triton  # noqa: F401
    from pretrain.loss import contrastive_loss as module

    module.choose_backend = lambda *arguments, **settings: "triton"
    small = feature_tiles.Blocks(64, 64, 16, num_warps=4, num_stages=3)
    feature_tiles.BLOCKS = {torch.bfloat16: small, torch.float32: small}
    feature_tiles.TILE_COLUMNS, feature_tiles.TILE_ENTRIES = 70, 70 * 128


def features(num_pairs, width, dtype, *, noise=1.0):
    """Returns media and text, L2-normalised to the precision of the type."""
    generator = torch.Generator().manual_seed(0)
    media, text = torch.randn(2, num_pairs, width, generator=generator, dtype=torch.float64)
    text = media + noise * text
    return [functional.normalize(side, dim=-1).to(dtype) for side in (media, text)]


def leaves_of(kind, scale, sides):
    shared = [torch.tensor([scale])] + ([torch.tensor([-5.0])] if kind == "sigmoid" else [])
    return [leaf.clone().requires_grad_() for leaf in (*sides, *shared)]


def relative_errors(leaves, exact, own):
    """Computes the error of each gradient, divided by the norm of the true gradient."""
    found = []
    for number, (leaf, truth) in enumerate(zip(leaves, exact, strict=True)):
        gradient = leaf.grad.double() / world_size()
        if number > 1 and world_size() > 1:
            torch.distributed.all_reduce(gradient)
        expected = truth.grad[own] if number < 2 else truth.grad
        size = truth.grad.norm().item()
        found.append((gradient - expected).norm().item() / size)
    return found


def errors_of(kind, mode, scale, sides, counts, *, direction="both"):
    """Returns the errors of (loss, recalls, each gradient) against the dense loss in float64."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves_of(kind, scale, sides)]
    truth = dense_loss(*exact, kind=kind, direction=direction)
    truth.backward()
    own = RowSplit(tuple(counts)).own
    leaves = leaves_of(kind, scale, [side[own] for side in sides])
    options = LossOptions(kind, mode=mode, direction=direction)
    loss = contrastive_loss(*leaves, options=options)
    loss.for_backward.backward()
    hits = dense_recall(*(leaf.detach() for leaf in exact[:2]))
    recalls = (loss.media_to_text_recall_at_1, loss.text_to_media_recall_at_1)
    recall_error = max(abs(a - b) for a, b in zip(recalls, hits, strict=True))
    values = [loss.value]
    if mode == "strip1":  # without gradients the modes do not differ
        with torch.no_grad():
            values.append(contrastive_loss(*leaves, options=replace(options, mode="auto")).value)
    loss_error = max(abs(value - truth.item()) / max(1.0, truth.item()) for value in values)
    return loss_error, recall_error, relative_errors(leaves, exact, own)


def figures_of_one_process():
    """Returns ({(kind, scale, dtype): errors}, recalls of a collapsed model, Triton's modules)."""
    media, text = features(20, 8, torch.bfloat16)
    contrastive_loss(media, text, torch.tensor([10.0]))
    imported_before = [name for name in sys.modules if name.startswith("triton")]
    use_interpreted_kernels()
    errors = {}
    for kind, (scale, noise), dtype in itertools.product(
        ("softmax", "sigmoid"), NOISE.items(), (torch.bfloat16, torch.float32)
    ):
        sides = features(NUM_PAIRS, WIDTH, dtype, noise=noise)
        mode = "strip1" if dtype == torch.bfloat16 else "strip2"
        errors[kind, scale, dtype] = errors_of(kind, mode, scale, sides, [NUM_PAIRS])
    for scale, noise in NOISE.items():
        sides = features(NUM_PAIRS, WIDTH, torch.float32, noise=noise)
        errors["forward", scale, torch.float32] = errors_of(
            "softmax", "strip1", scale, sides, [NUM_PAIRS], direction="forward"
        )
    same = media[:1].expand(NUM_PAIRS, 8)
    with torch.no_grad():
        loss = contrastive_loss(same, same, torch.tensor([10.0]))
    recalls = loss.media_to_text_recall_at_1, loss.text_to_media_recall_at_1
    return errors, recalls, imported_before


@pytest.fixture(scope="module")
def of_one_process():
    # Triton chooses its interpreter when it is imported, so that needs a process of its own.
    return run_in_processes(1, figures_of_one_process, without_imports=True)[0]


def check(errors, settings):
    loss_error, recall_error, of_gradients = errors
    assert loss_error < 1e-6, settings
    assert recall_error < 1e-12, settings
    # G and the result are rounded to the type of the features; shared gradients are not.
    of_features = 5e-3 if torch.bfloat16 in settings else 1e-5
    assert max(of_gradients[:2]) < of_features, settings
    assert max(of_gradients[2:]) < 2e-6, settings


def test_kernels_give_the_dense_loss_and_gradients(of_one_process):
    errors = of_one_process[0]
    assert len(errors) == 15
    for settings, found in errors.items():
        check(found, settings)


def test_ties_in_the_kernels_are_at_chance(of_one_process):
    assert of_one_process[1] == pytest.approx((1 / NUM_PAIRS, 1 / NUM_PAIRS), rel=1e-12)


def test_a_loss_on_the_cpu_does_not_import_triton(of_one_process):
    assert of_one_process[2] == []


def errors_of_two_processes():
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=600))
    use_interpreted_kernels()
    return {
        (kind, mode, counts, torch.bfloat16): errors_of(
            kind, mode, 50.0, features(60, WIDTH, torch.bfloat16, noise=2.0), counts
        )
        for kind, mode, counts in (
            ("softmax", "strip1", (41, 19)),
            ("softmax", "strip2", (41, 19)),
            ("sigmoid", "strip2", (41, 19)),
            ("sigmoid", "strip1", (60, 0)),
        )
    }


def test_two_processes_give_the_dense_loss_and_gradients_by_the_kernels():
    for found in run_in_processes(2, errors_of_two_processes, without_imports=True):
        assert len(found) == 4
        for settings, errors in found.items():
            check(errors, settings)
