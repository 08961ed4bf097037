import functools
import itertools
import math
import os
from dataclasses import replace
from datetime import timedelta

import open_clip
import pytest
import torch
from torch.nn import functional
from transformers import SiglipConfig, SiglipModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from pretrain.distributed.collectives import RowSplit, rank, world_size
from pretrain.loss import logit_tiles
from pretrain.loss.contrastive_loss import begin_gather, contrastive_loss
from pretrain.loss.options import LossOptions, Teacher
from pretrain.loss.reference import dense_loss, dense_recall
from tests.support.gloo_processes import run_in_processes

NUM_PAIRS = 13
WIDTH = 6
# Rows per rank: equal as far as possible, ragged, and with empty ranks.
SPLITS = {
    1: [[13]],
    2: [[7, 6], [11, 2], [0, 13]],
    3: [[5, 4, 4], [1, 9, 3], [6, 0, 7]],
    4: [[4, 3, 3, 3], [1, 6, 2, 4], [8, 0, 5, 0]],
}
# Plain exponentials of the first scale fit the type of a tile, those of the second do not.
SCALES = {"softmax": (9.0, 320.0), "sigmoid": (9.0, 90.0)}


def join_processes():
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=600))


def features(num_pairs=NUM_PAIRS, width=WIDTH, *, dtype=torch.float64, seed=0):
    """Returns media and text, L2-normalised to the precision of the type."""
    generator = torch.Generator().manual_seed(seed)
    media, text = torch.randn(2, num_pairs, width, generator=generator, dtype=torch.float64)
    text = text + media
    return tuple(functional.normalize(side, dim=-1).to(dtype) for side in (media, text))


def duplicate_keys(num_pairs=NUM_PAIRS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, most, (num_pairs,), generator=generator) for most in (9, 11)]


def toy_teacher():
    return Teacher(*features(width=5, seed=2), scale=12.0, weight=0.3)


def all_loss_options():
    """Yields (options, has_teacher) for each accepted combination of settings."""
    for mode, piece_rows, duplicates in itertools.product(
        ("strip1", "strip2"), (None, 3), ("negatives", "positives", "masked")
    ):
        options = LossOptions("sigmoid", 0.0, duplicates, mode, piece_rows)
        yield options, False
        for smoothing, has_teacher in ((0.0, False), (0.1, False), (0.2, True)):
            yield replace(options, kind="softmax", label_smoothing=smoothing), has_teacher


def softmax_options():
    """Yields (options, has_teacher) for the other directions and negatives of the softmax loss."""
    for mode, piece_rows, duplicates in itertools.product(
        ("strip1", "strip2"), (None, 3), ("negatives", "positives", "masked")
    ):
        options = LossOptions("softmax", 0.0, duplicates, mode, piece_rows)
        yield replace(options, direction="forward"), False
        yield replace(options, direction="forward", label_smoothing=0.2), True
        yield replace(options, negatives="all_pairs"), False
        yield replace(options, negatives="all_pairs", label_smoothing=0.1), False


def leaves_of(kind, scale, *, dtype=torch.float64):
    """Returns media, text, scale and, for the sigmoid loss, bias; each requires a gradient."""
    bias = [torch.tensor([-2.5], dtype=dtype)] if kind == "sigmoid" else []
    values = [*features(dtype=dtype), torch.tensor([scale], dtype=dtype), *bias]
    return [value.requires_grad_() for value in values]


@functools.cache
def truth_of_one_process(options, has_teacher, scale, dtype):
    """Computes (loss, leaves with gradients, recalls) in float64 from the dense loss."""
    leaves = [
        leaf.detach().double().requires_grad_()
        for leaf in leaves_of(options.kind, scale, dtype=dtype)
    ]
    settings = {"duplicates": options.duplicates, "keys": duplicate_keys()}
    teacher = toy_teacher() if has_teacher else None
    loss = dense_loss(
        *leaves,
        kind=options.kind,
        label_smoothing=options.label_smoothing,
        teacher=teacher,
        direction=options.direction,
        negatives=options.negatives,
        **settings,
    )
    loss.backward()
    return loss.item(), leaves, dense_recall(*(leaf.detach() for leaf in leaves[:2]), **settings)


def errors_on_this_rank(
    options, has_teacher, counts, scale, *, dtype=torch.float64, begins_early=False
):
    """Returns the worst errors of (loss and recalls, gradients) against one process."""
    teacher, keys = (toy_teacher() if has_teacher else None), duplicate_keys()
    any_mode = replace(options, mode="auto", piece_rows=None)
    truth, leaves, hits = truth_of_one_process(any_mode, has_teacher, scale, dtype)
    own = RowSplit(tuple(counts)).own
    mine = leaves_of(options.kind, scale, dtype=dtype)
    rows = [x.detach()[own].requires_grad_() for x in mine[:2]] + mine[2:]
    if has_teacher:
        teacher = replace(teacher, media=teacher.media[own], text=teacher.text[own])
    settings = {"options": options, "keys": [key[own] for key in keys], "teacher": teacher}
    begun = begin_gather(rows[0], options=options, counts=counts) if begins_early else None
    loss = contrastive_loss(*rows, **settings, media_gather=begun)
    loss.for_backward.backward()
    losses = [loss]
    if options.mode == "strip1":  # without gradients the modes do not differ
        with torch.no_grad():
            losses.append(contrastive_loss(*rows, **settings))

    value_error = 0.0
    for found in losses:
        recalls = (found.media_to_text_recall_at_1, found.text_to_media_recall_at_1)
        pairs = ((found.value, truth), *zip(recalls, hits, strict=True))
        value_error = max(value_error, *(abs(a - b) / max(1.0, abs(b)) for a, b in pairs))
    gradient_error = max(
        relative_error(found, expected)
        for found, expected in zip(gradients(rows), true_gradients(leaves, own), strict=True)
    )
    return value_error, gradient_error


def gradients(rows):
    """Averages gradients over ranks as an engine does."""
    found = [row.grad / world_size() for row in rows]
    for shared in found[2:]:
        if world_size() > 1:
            torch.distributed.all_reduce(shared)
    return found


def true_gradients(leaves, own):
    """Returns (gradient of this rank's rows or of a shared number, its largest entry) per leaf."""
    return [
        (leaf.grad[own] if number < 2 else leaf.grad, leaf.grad.abs().max())
        for number, leaf in enumerate(leaves)
    ]


def relative_error(found, expected):
    """Computes the error relative to the largest entry, or to 1e-3 for a saturated loss."""
    values, largest = expected
    if not len(values):
        return 0.0
    return (found - values).abs().max().item() / max(largest.item(), 1e-3)


def worst_errors(num_processes):
    """Returns [(options, has_teacher, rows per rank, scale, errors)] of every combination."""
    join_processes()
    logit_tiles.TILE_SHAPES = {"cpu": (5, 6)}  # several in each row block, the last ones smaller
    found = []
    every_options = [*all_loss_options(), *softmax_options()]
    for number, (options, has_teacher) in enumerate(every_options):
        splits = SPLITS[num_processes]
        is_plain = options.direction == "both" and options.negatives == "per_anchor"
        if options.label_smoothing or not is_plain:  # one split each; all others take every split
            splits = [splits[number % len(splits)]]
        for counts in splits:
            scale = SCALES[options.kind][
                number // 4 % 2
            ]  # the same for the four losses of a setting
            errors = errors_on_this_rank(options, has_teacher, counts, scale)
            found.append((options, has_teacher, counts, scale, errors))
            if options.piece_rows is None and not has_teacher:
                errors = errors_on_this_rank(options, False, counts, scale, begins_early=True)
                found.append((options, "media begun early", counts, scale, errors))
    return found


@pytest.mark.parametrize(
    "num_processes",
    [
        1,
        2,
        pytest.param(3, marks=pytest.mark.exhaustive),
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_all_options_give_the_loss_and_gradients_of_one_process_with_the_whole_batch(num_processes):
    for found in run_in_processes(num_processes, worst_errors, num_processes):
        num_begun = 6 + 12 * len(SPLITS[num_processes]) + 18
        assert len(found) == 24 + 24 * len(SPLITS[num_processes]) + 48 + num_begun
        for *settings, (value_error, gradient_error) in found:
            assert value_error < 1e-13, settings
            assert gradient_error < 1e-12, settings


def test_losses_of_float32_features_are_right_to_five_digits():
    for options, has_teacher in [*all_loss_options(), *softmax_options()]:
        errors = errors_on_this_rank(options, has_teacher, [NUM_PAIRS], 30.0, dtype=torch.float32)
        assert max(errors) < 1e-5, options


@pytest.mark.parametrize("mode", ["strip1", "strip2"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradients_are_those_of_finite_differences(kind, mode):
    options = LossOptions(kind, mode=mode)

    def loss_of(*leaves):
        return contrastive_loss(*leaves, options=options).for_backward

    assert torch.autograd.gradcheck(loss_of, leaves_of(kind, 3.0))


# -------------------------------------------------------------------------------------- oracles


def errors_against_open_clip(num_processes):
    """Returns the largest differences of loss and gradients, for CLIP's and SigLIP's loss."""
    join_processes()
    media, text = features(12)
    own = RowSplit((12 // num_processes,) * num_processes).own
    found = []
    group = {"rank": rank(), "world_size": num_processes}
    for theirs, bias in (
        (open_clip.ClipLoss(local_loss=True, gather_with_grad=True, **group), None),
        (open_clip.loss.SigLipLoss(**group), torch.tensor(-3.0, dtype=torch.float64)),
    ):
        for mode in ("strip1", "strip2"):
            sides = []
            for _ in range(2):
                scale = torch.tensor(20.0, dtype=torch.float64)
                leaves = [media[own], text[own], scale, *([] if bias is None else [bias])]
                sides.append([leaf.clone().requires_grad_() for leaf in leaves])
            options = LossOptions("softmax" if bias is None else "sigmoid", mode=mode)
            loss = contrastive_loss(*sides[0], options=options)
            loss.for_backward.backward()
            their_loss = theirs(*sides[1])
            their_loss.backward()
            # Theirs is a part of the loss; the mean over ranks completes it and shared gradients.
            pairs = list(zip(*[[side.grad for side in leaves] for leaves in sides], strict=True))
            mean = torch.stack([their_loss.detach(), *(b for _, b in pairs[2:])])
            ours = torch.stack([a for a, _ in pairs[2:]])
            torch.distributed.all_reduce(mean)
            torch.distributed.all_reduce(ours)
            found.append(abs(loss.value - mean[0].item() / num_processes))
            found.append((mean[1:] - ours).abs().max().item())
            found += [(a - b).abs().max().item() for a, b in pairs[:2]]
    return found


@pytest.mark.parametrize("num_processes", [2, 4])
def test_loss_and_gradients_equal_open_clips_exact_losses(num_processes):
    for errors in run_in_processes(num_processes, errors_against_open_clip, num_processes):
        assert len(errors) == 16
        assert max(errors) < 1e-12


def test_softmax_loss_equals_hugging_faces():
    media, text = features()
    theirs = image_text_contrastive_loss(20.0 * text @ media.T).item()
    assert contrastive_loss(media, text, torch.tensor([20.0])).value == pytest.approx(
        theirs, rel=1e-12
    )


def test_sigmoid_loss_equals_hugging_faces():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = SiglipConfig(
        text_config=sizes | {"num_attention_heads": 1, "vocab_size": 20, "projection_size": 8},
        vision_config=sizes | {"num_attention_heads": 1, "image_size": 8, "patch_size": 4},
    )
    model = SiglipModel(config).eval()
    theirs = model(
        input_ids=torch.randint(0, 20, (5, 7)),
        pixel_values=torch.randn(5, 3, 8, 8),
        return_loss=True,
    )
    ours = contrastive_loss(
        theirs.image_embeds,
        theirs.text_embeds,
        model.logit_scale.exp(),
        model.logit_bias,
        options=LossOptions("sigmoid"),
    )
    assert ours.value == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_a_teachers_loss_equals_open_clips():
    teacher = toy_teacher()
    teacher = replace(teacher, weight=0.5)
    media, text = features()
    scale = torch.tensor(15.0, dtype=torch.float64)
    theirs = open_clip.loss.DistillClipLoss()(
        media, text, scale, teacher.media, teacher.text, torch.tensor(teacher.scale)
    )
    ours = contrastive_loss(media, text, scale, teacher=teacher)
    assert ours.value == pytest.approx(sum(theirs).item() / 2, rel=1e-12)


# ------------------------------------------------------------------------------------ precision


def worst_row_error(found, truth):
    return ((found - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item()


@pytest.mark.parametrize(
    ("dtype", "largest_row_error"), [(torch.float32, 5e-5), (torch.bfloat16, 1e-2)]
)
def test_nothing_cancels_when_training_is_sharp(dtype, largest_row_error):
    num_pairs, width = 2048, 256
    media = functional.normalize(
        torch.randn(num_pairs, width, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    noise = torch.randn(num_pairs, width, generator=torch.Generator().manual_seed(1))
    text = functional.normalize(media + noise * 0.165, dim=-1)
    leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (media, text)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = dense_loss(*exact, torch.tensor(100.0, dtype=torch.float64))
    truth.backward()
    assert 0.03 < truth.item() < 0.15
    loss = contrastive_loss(*leaves, torch.tensor([100.0]))
    loss.for_backward.backward()
    assert abs(loss.value - truth.item()) < 1e-7
    for leaf, reference in zip(leaves, exact, strict=True):
        assert worst_row_error(leaf.grad.double(), reference.grad) < largest_row_error


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [1e-3, 40.0, 41.0, 300.0])
def test_loss_and_gradients_are_finite_for_cosines_from_minus_1_to_1(kind, scale):
    axis = functional.normalize(torch.ones(1, 8), dim=-1)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[:, None]
    for media, text in ((signs * axis, signs * axis), (signs * axis, -signs * axis)):
        leaves = [media.clone().requires_grad_(), text.clone().requires_grad_()]
        shared = [torch.tensor([scale], requires_grad=True)]
        shared += [torch.tensor([-10.0], requires_grad=True)] if kind == "sigmoid" else []
        loss = contrastive_loss(*leaves, *shared, options=LossOptions(kind))
        loss.for_backward.backward()
        assert math.isfinite(loss.value)
        assert all(leaf.grad.isfinite().all() for leaf in (*leaves, *shared))
        truth = dense_loss(*(x.detach().double() for x in (*leaves, *shared)), kind=kind)
        assert loss.value == pytest.approx(truth.item(), rel=1e-5)


def test_autocast_around_the_loss_changes_nothing():
    media, text = features(64, 32, dtype=torch.float32)
    expected = contrastive_loss(media, text, torch.tensor([50.0])).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_loss(media, text, torch.tensor([50.0])).value == expected


def flags_around_exact_products(way):
    """Returns (flags before, inside, after) of a process that allowed less than float32."""
    matmul, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    if way == "legacy":
        torch.set_float32_matmul_precision("medium")
    elif way == "legacy of CUDA":
        matmul.allow_tf32 = True
    elif way == "new":
        matmul.fp32_precision = "tf32"
    found = [(matmul.fp32_precision, mkldnn.fp32_precision)]
    with logit_tiles.exact_products(torch.device("cpu")):
        found.append((matmul.fp32_precision, mkldnn.fp32_precision, matmul.allow_tf32))
    return [*found, (matmul.fp32_precision, mkldnn.fp32_precision)]


@pytest.mark.parametrize("way", ["none", "legacy", "legacy of CUDA", "new"])
def test_float32_is_multiplied_as_float32_whatever_the_process_allows(way):
    ((before, inside, after),) = run_in_processes(1, flags_around_exact_products, way)
    assert (way == "none") == ("tf32" not in before)
    assert inside == ("ieee", "ieee", False)
    assert after == before


# --------------------------------------------------------------------------------------- recall


def test_a_collapsed_model_is_at_chance():
    same = functional.normalize(torch.rand(700, 40), dim=-1)[:1].expand(700, 40)
    loss = contrastive_loss(same, same, torch.tensor([10.0]))
    assert loss.value == pytest.approx(math.log(700), rel=1e-6)
    assert loss.media_to_text_recall_at_1 == pytest.approx(1 / 700)
    assert loss.text_to_media_recall_at_1 == pytest.approx(1 / 700)


def test_duplicates_that_are_no_negatives_do_not_beat_a_pair():
    media = torch.eye(3)
    text = media[[0, 0, 2]]
    keys = [torch.tensor([7, 7, 8])]
    scale = torch.tensor([5.0])
    recalls = [
        contrastive_loss(
            media, text, scale, options=LossOptions(duplicates=duplicates), keys=keys
        ).media_to_text_recall_at_1
        for duplicates in ("negatives", "positives", "masked")
    ]
    # Media 0 ties with its duplicate; media 1 is equally far from captions 0, 1 and 2.
    assert recalls == pytest.approx([(1 / 2 + 1 / 3 + 1) / 3, (1 + 1 / 2 + 1) / 3, *recalls[1:2]])


# ------------------------------------------------------------------------------------- refusals


def test_a_step_without_pairs_has_no_loss_and_gradients_of_zero():
    leaves = [torch.zeros(0, 4, requires_grad=True) for _ in range(2)]
    shared = [torch.tensor([x], requires_grad=True) for x in (10.0, -10.0)]
    loss = contrastive_loss(*leaves, *shared, options=LossOptions("sigmoid"))
    loss.for_backward.backward()
    assert (loss.value, loss.num_pairs) == (0.0, 0)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (*leaves, *shared))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "hinge"}, "kind: expected one of softmax, sigmoid, found 'hinge'"),
        ({"duplicates": "ignored"}, "expected one of negatives, positives, masked"),
        ({"mode": "ring"}, "expected one of auto, strip1, strip2"),
        ({"label_smoothing": 1.0}, "expected 0 <= x < 1, found 1"),
        ({"kind": "sigmoid", "label_smoothing": 0.1}, "softmax loss only"),
        ({"kind": "sigmoid", "direction": "forward"}, "direction=forward is defined for the soft"),
        ({"kind": "sigmoid", "negatives": "all_pairs"}, "negatives=all_pairs is defined for the s"),
        ({"direction": "backward"}, "direction: expected one of both, forward"),
        ({"direction": "forward", "negatives": "all_pairs"}, "has no direction"),
    ],
)
def test_options_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LossOptions(**settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"text": torch.zeros(3, 4)}, r"found \(2, 4\) and \(3, 4\)"),
        ({"bias": torch.tensor([1.0])}, "a bias does not change the softmax loss"),
        ({"scale": torch.tensor([400.0])}, "a scale of at most 340"),
        (
            {"options": LossOptions(duplicates="masked")},
            "expected one or two keys per pair, found 0",
        ),
        (
            {"teacher": Teacher(torch.zeros(3, 4), torch.zeros(3, 4), 1.0)},
            r"of the same shape \[2, D\]",
        ),
        ({"teacher": Teacher(torch.zeros(2, 4), torch.zeros(2, 4), 1.0, 2.0)}, "0 < x <= 1"),
        (
            {
                "teacher": Teacher(torch.zeros(2, 4), torch.zeros(2, 4), 1.0),
                "options": LossOptions("sigmoid"),
            },
            "a teacher requires the softmax loss",
        ),
        (
            {
                "teacher": Teacher(torch.zeros(2, 4), torch.zeros(2, 4), 1.0),
                "options": LossOptions(negatives="all_pairs"),
            },
            "a teacher provides targets per anchor",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments, words):
    given = {"media": torch.zeros(2, 4), "text": torch.zeros(2, 4), "scale": torch.tensor([10.0])}
    with pytest.raises(ValueError, match=words):
        contrastive_loss(**(given | arguments))
