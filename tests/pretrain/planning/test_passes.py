"""FLOPs against closed formulas, memory on fakes against the same passes with real values."""

import pytest
import torch

from pretrain.fakes.fake_tensors import as_fake, fake_mode
from pretrain.model.tokenizer import build_tokenizer
from pretrain.planning.model_sizes import measure_model
from pretrain.planning.passes import PassTrace
from pretrain.planning.planned_model import plan_model
from pretrain.planning.tower_facts import facts_of_towers
from pretrain.training.activation_memory import measure_activations
from tests.support.toy_plans import measured, plan_config, timm_vit
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

# open_clip model -> (W, patch, image size, layers, MLP ratio, text W, text layers, D): model cards
OPEN_CLIP = {
    "ViT-B-32": (768, 32, 224, 12, 4, 512, 12, 512),
    "ViT-L-14": (1024, 14, 224, 24, 4, 768, 12, 768),
    "ViT-bigG-14": (1664, 14, 224, 48, 8192 / 1664, 1280, 32, 1280),
}


def vit_flops(*, width, patch, size, depth, ratio, out):
    """Counts the forward FLOPs of a vision transformer with a class token."""
    num_patches = (size // patch) ** 2
    blocks = depth * block_flops(num_patches + 1, width, ratio)
    return 2 * (3 * patch**2 * width * num_patches + width * out) + blocks


def block_flops(num_tokens, width, ratio):
    return 2 * (num_tokens * (4 + 2 * ratio) * width**2 + 2 * num_tokens**2 * width)


@pytest.mark.parametrize(
    "sizes",
    [
        {"embed_dim": 24, "depth": 1, "patch_size": 8, "img_size": 32, "mlp_ratio": 4},
        {"embed_dim": 48, "depth": 3, "patch_size": 4, "img_size": 16, "mlp_ratio": 2},
    ],
)
def test_flops_are_those_of_the_formula(sizes):
    config = plan_config(timm_vit(**sizes), image={"size": sizes["img_size"]})
    planned = plan_model(config)
    vision, text = facts_of_towers(config, planned)
    expected = vit_flops(
        width=sizes["embed_dim"],
        patch=sizes["patch_size"],
        size=sizes["img_size"],
        depth=sizes["depth"],
        ratio=sizes["mlp_ratio"],
        out=16,
    )
    assert vision.flops == pytest.approx(expected, rel=1e-3)
    assert vision.num_tokens == (sizes["img_size"] // sizes["patch_size"]) ** 2 + 1
    assert text.flops == pytest.approx(2 * block_flops(12, 32, 4) + 2 * 32 * 16, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_flops_of_models_of_open_clip_are_those_of_the_formula(name):
    width, patch, size, depth, ratio, text_width, text_depth, joint = OPEN_CLIP[name]
    tower = {"library": "open_clip", "name": name}
    sizes = measured(plan_config(tower, text=tower, embed_dim=joint, image={"size": size}))
    vision = vit_flops(width=width, patch=patch, size=size, depth=depth, ratio=ratio, out=joint)
    text = text_depth * block_flops(77, text_width, 4) + 2 * text_width * joint
    found = sizes.segments[0].passes["pairs"]
    assert found.forward_flops == pytest.approx(vision + text, rel=1e-3)
    # Inputs have no gradient, so the first layer has one product less.
    first = 2 * 3 * patch**2 * width * (size // patch) ** 2
    assert found.backward_flops == pytest.approx(2 * (vision + text) - first, rel=1e-3)


def test_frozen_towers_have_no_backward_and_recomputation_is_one_more_forward():
    image = timm_vit(depth=4)
    plain = measured(plan_config(image, image={"size": 32}))
    frozen = measured(plan_config(image | {"frozen": True}, image={"size": 32}))
    of_plain, of_frozen = (each.segments[0].passes["pairs"] for each in (plain, frozen))
    of_image = vit_flops(width=24, patch=8, size=32, depth=4, ratio=4, out=16)
    of_text = 2 * block_flops(12, 32, 4) + 2 * 32 * 16
    assert of_frozen.forward_flops == of_plain.forward_flops
    # The projection is trained, and its input has no gradient.
    assert of_frozen.backward_flops == pytest.approx(2 * of_text + 2 * 24 * 16, rel=1e-3)
    first = 2 * 3 * 8**2 * 24 * 16  # pixels have no gradient
    assert of_plain.backward_flops == pytest.approx(2 * (of_image + of_text) - first, rel=1e-3)
    assert frozen.num_trained < plain.num_trained == plain.num_parameters
    optimizer = {"learning_rate": 1e-4, "frozen": ["towers.image.backbone.*"]}
    by_pattern = measured(plan_config(image, image={"size": 32}, optimizer=optimizer))
    assert by_pattern.num_trained == frozen.num_trained
    assert by_pattern.segments[0].passes["pairs"].backward_flops == of_frozen.backward_flops
    engine = {"precision": "fp32", "activation_checkpointing": True}
    recomputed = measured(plan_config(image, image={"size": 32}, engine=engine))
    # torch does not recompute the last product of a block, which no gradient reads.
    of_blocks = 4 * (block_flops(17, 24, 4) - 2 * 17 * 4 * 24**2)
    of_blocks += 2 * (block_flops(12, 32, 4) - 2 * 12 * 4 * 32**2)
    more = recomputed.segments[0].passes["pairs"].backward_flops - of_plain.backward_flops
    assert more == pytest.approx(of_blocks, rel=1e-3)
    assert recomputed.segments[0].passes["pairs"].graph.peak(9) < of_plain.graph.peak(9)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_backward_of_grouped_convolutions_is_twice_the_forward(groups):
    mode = fake_mode()
    convolution = torch.nn.Conv2d(8, 16, 3, groups=groups, device="meta")
    weight = as_fake(convolution.weight, mode)
    images = as_fake(torch.empty(2, 8, 10, 10, device="meta"), mode).requires_grad_()
    trace = PassTrace([])
    with mode, trace:
        output = torch.nn.functional.conv2d(images, weight, groups=groups)
        forward = trace.flops
        output.sum().backward()
    assert forward == 2 * (2 * 16 * 8 * 8) * (8 // groups * 9)
    assert trace.flops - forward == 2 * forward


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_parameters_and_memory_on_fakes_are_those_of_the_real_model(toy_data, tmp_path, precision):
    config = toy_config(toy_data, tmp_path, engine={"precision": precision})
    planned = plan_model(config)
    sizes = measure_model(config, planned, is_gpu=False)
    model = build_toy_model(config, build_tokenizer(config.model.text))
    parameters = dict(planned.model.named_parameters())
    assert {n: (p.shape, p.requires_grad) for n, p in model.named_parameters()} == {
        name: (each.shape, each.requires_grad) for name, each in parameters.items()
    }
    real = measure_activations(
        model, planned.layouts[0], device=torch.device("cpu"), is_bf16=precision == "bf16"
    )
    for name, fake in sizes.segments[0].passes.items():
        assert fake.graph.per_row.max() == pytest.approx(real[name].per_pair, rel=0.01)
        expected = real[name].fixed + 64 * real[name].per_pair
        assert fake.graph.peak(64) == pytest.approx(expected, rel=0.05)
