"""Matryoshka losses: on the first numbers of embeddings as well, against plain autograd."""

import itertools
import os
from datetime import timedelta

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pretrain.distributed.collectives import RowSplit
from pretrain.loss.options import Teacher
from pretrain.loss.reference import dense_loss, dense_recall
from pretrain.objectives.contrastive import ContrastiveObjective, ContrastiveSection
from pretrain.objectives.objective import ObjectiveInputs, Temperature
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config

NUM_SAMPLES = 13
WIDTH = 8
DIMS, WEIGHTS = [1, 3, 5], [0.5, 2.0, 1.5]
SCALE, BIAS = 9.0, -2.5
LOSSES = [
    {"loss": "sigmoid"},
    {"loss": "softmax"},
    {"loss": "softmax", "label_smoothing": 0.1},
    {"loss": "softmax", "direction": "forward"},
    {"loss": "softmax", "negatives": "all_pairs"},
    {"loss": "softmax", "teacher": {"checkpoint": "none", "weight": 0.3}},
]
SETTINGS = [
    loss | {"duplicates": duplicates}
    for loss, duplicates in itertools.product(LOSSES, ("negatives", "positives", "masked"))
]


def unit_rows(width, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(NUM_SAMPLES, width, generator=generator, dtype=torch.float64)
    return functional.normalize(values, dim=-1)


def leaves():
    """Returns image and text features, scale and bias; each requires a gradient."""
    image, text = unit_rows(WIDTH, 0), unit_rows(WIDTH, 1)
    text = functional.normalize(text + image, dim=-1)
    numbers = (torch.tensor([value], dtype=torch.float64) for value in (SCALE, BIAS))
    return [value.requires_grad_() for value in (image, text, *numbers)]


def all_keys():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, most, (NUM_SAMPLES,), generator=generator) for most in (9, 11)]


def teacher_of(section, rows=slice(None)):
    if section.teacher is None:
        return None
    media, text = unit_rows(4, 3)[rows], unit_rows(4, 4)[rows]
    return Teacher(media, text, scale=12.0, weight=section.teacher.weight)


def nested(image, text, dim):
    """Returns the first numbers of both sides, normalised again."""
    return [functional.normalize(side[:, :dim], dim=-1) for side in (image, text)]


def true_loss(section):
    """Returns (loss, leaves with gradients): a sum over dims of plain losses."""
    image, text, scale, bias = leaves()
    losses = [
        dense_loss(
            *((image, text) if dim == WIDTH else nested(image, text, dim)),
            scale,
            bias if section.loss == "sigmoid" else None,
            kind=section.loss,
            duplicates=section.duplicates,
            label_smoothing=section.label_smoothing,
            keys=all_keys(),
            teacher=teacher_of(section),
            direction=section.direction,
            negatives=section.negatives,
        )
        for dim in (WIDTH, *DIMS)
    ]
    total = losses[0] + sum(w * loss for w, loss in zip(WEIGHTS, losses[1:], strict=True))
    total.backward()
    return total.item(), losses, [image, text, scale, bias]


def errors_of(settings, mode, counts):
    """Returns the worst relative error of the loss, metrics and gradients on this rank."""
    section = ContrastiveSection(**settings, matryoshka_dims=DIMS, matryoshka_weights=WEIGHTS)
    objective = ContrastiveObjective("image-text", section, torch.float64, mode)
    truth, losses, true_leaves = true_loss(section)
    own = RowSplit(tuple(counts)).own
    image, text, scale, bias = leaves()
    mine = [image.detach()[own].requires_grad_(), text.detach()[own].requires_grad_(), scale, bias]
    inputs = ObjectiveInputs(
        dict(zip(("image", "text"), mine, strict=False)),
        {view: keys[own] for view, keys in zip(("image", "text"), all_keys(), strict=True)},
        Temperature(scale, bias if section.loss == "sigmoid" else None),
        counts,
        objective.begin("image", mine[0], counts=counts),
        teacher_of(section, own),
    )
    found = objective.loss(inputs)
    found.for_backward.backward()
    errors = [abs(found.value - truth) / abs(truth)]
    for dim, loss in zip(DIMS, losses[1:], strict=True):
        errors.append(abs(found.metrics[f"dim{dim}_loss"] - loss.item()) / loss.item())
        sides = nested(*(x.detach() for x in true_leaves[:2]), dim)
        recalls = dense_recall(*sides, duplicates=section.duplicates, keys=all_keys())
        for name, recall in zip(("image_to_text", "text_to_image"), recalls, strict=True):
            errors.append(abs(found.metrics[f"dim{dim}_{name}_recall@1"] - recall))
    expected = [x.grad[own] for x in true_leaves[:2]] + [x.grad for x in true_leaves[2:]]
    for leaf, gradient in zip(mine, expected, strict=True):
        if gradient is None:  # the bias of a softmax
            assert leaf.grad is None
            continue
        # The engine averages the gradients of ranks; those of scale and bias are sums over ranks.
        share = leaf.grad / len(counts)
        if leaf.shape == (1,) and len(counts) > 1:
            torch.distributed.all_reduce(share)
        errors.append(((share - gradient).norm() / gradient.norm().clamp_min(1e-9)).item())
    return max(errors)


def all_errors(counts_of_modes):
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=600))
    return {
        (str(settings), mode, counts): errors_of(settings, mode, counts)
        for settings in SETTINGS
        for mode, counts in counts_of_modes
    }


@pytest.mark.parametrize("mode", ["strip1", "strip2"])
def test_loss_and_gradients_are_those_of_the_sum_over_dims(mode):
    errors = all_errors([(mode, (NUM_SAMPLES,))])
    assert max(errors.values()) < 1e-12, max(errors.items(), key=lambda pair: pair[1])


def test_the_loss_does_not_depend_on_the_number_of_processes():
    counts = [("strip1", (7, 6)), ("strip2", (11, 2)), ("strip1", (0, 13))]
    for errors in run_in_processes(2, all_errors, counts):
        assert max(errors.values()) < 1e-12, max(errors.items(), key=lambda pair: pair[1])


def test_validation_measures_each_dim_in_addition_to_the_plain_loss():
    section = ContrastiveSection(matryoshka_dims=DIMS, matryoshka_weights=WEIGHTS)
    plain = ContrastiveSection()
    image, text, scale, _ = leaves()
    inputs = ObjectiveInputs({"image": image, "text": text}, {}, Temperature(scale), counts=None)
    found, expected = (
        ContrastiveObjective("image-text", each.for_validation(), torch.float64, "strip1").loss(
            inputs
        )
        for each in (section, plain)
    )
    assert found.value == expected.value
    assert expected.metrics.items() <= found.metrics.items()
    assert {name for name in found.metrics if name.startswith("dim3_")} == {
        "dim3_loss",
        "dim3_image_to_text_recall@1",
        "dim3_text_to_image_recall@1",
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"matryoshka_dims": [4, 2]}, "rising matryoshka_dims"),
        ({"matryoshka_dims": [2, 2]}, "rising matryoshka_dims"),
        ({"matryoshka_dims": [0]}, "greater than 0"),
        ({"matryoshka_dims": [2], "matryoshka_weights": [1, 1]}, "one of matryoshka_weights for"),
        ({"matryoshka_weights": [1]}, "one of matryoshka_weights for"),
        ({"matryoshka_dims": [2], "matryoshka_weights": [0]}, "greater than 0"),
        ({"matryoshka_dims": [2, 16]}, "below model.embed_dim=16, found 16"),
    ],
)
def test_dims_that_cannot_be_trained_are_refused(toy_data, tmp_path, settings, words):
    streams = toy_config(toy_data, tmp_path).model_dump(mode="json")["streams"]
    streams["image-text"]["objectives"]["image-text"] |= settings
    with pytest.raises(ValidationError, match=words):
        toy_config(toy_data, tmp_path, streams=streams)


def test_dims_of_own_projections_are_not_those_of_embeddings(toy_data, tmp_path):
    def dims(*, projection):
        config = toy_config(toy_data, tmp_path)
        values = config.model_dump(mode="json")
        objective = {"left": "image", "right": "text"}
        objective |= {"projection": projection, "matryoshka_dims": [2, 4]}
        values["streams"]["image-text"]["objectives"]["other"] = objective
        return type(config).model_validate(values).matryoshka_dims

    assert dims(projection="shared") == [2, 4]
    assert dims(projection="own") == []
