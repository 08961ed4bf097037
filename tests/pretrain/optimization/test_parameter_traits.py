import pytest
import torch

from data_prep.errors import ConfigError
from pretrain.model.sample_dropout import SampleDropPath
from pretrain.model.tokenizer import build_tokenizer
from pretrain.optimization.parameter_groups import describe_groups, parameter_groups
from pretrain.optimization.parameter_traits import matching, refuse_untrained_streams, set_traits
from pretrain.optimization.unfreezing import Unfreezing
from pretrain.training.assembly import build_training_optimizer
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

VIT = {
    "library": "timm",
    "name": "test_vit",
    "options": {"img_size": 16, "patch_size": 4, "depth": 3, "drop_path_rate": 0.5},
}
BACKBONE = "towers.image.backbone"


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """Returns a function from settings to (config, new model)."""
    folder = tmp_path_factory.mktemp("traits")
    tokenizer = build_tokenizer(toy_config(folder, folder / "run").model.text)

    def build(*, image=None, **optimizer):
        model = {"image": VIT | (image or {})}
        config = toy_config(
            folder, folder / "run", model=model, optimizer={"learning_rate": 1.0} | optimizer
        )
        return config, build_toy_model(config, tokenizer)

    return build


def traits_of(config, model):
    return set_traits(model, config.optimizer, sections=config.model)


def test_a_config_without_settings_has_the_three_groups_and_no_labels(configured):
    config, model = configured()
    optimizer = build_training_optimizer(config, model)
    plain = parameter_groups(model, weight_decay=0.2, max_scale=100)
    assert [len(each["params"]) for each in optimizer.param_groups] == [
        len(each["params"]) for each in plain
    ]
    assert [each["weight_decay"] for each in optimizer.param_groups] == [0.2, 0.0, 0.0]
    assert {each["rate_scale"] for each in optimizer.param_groups} == {1.0}
    assert all(p.requires_grad for p in model.parameters())
    assert model.towers["image"].held == []


@pytest.mark.parametrize(("number", "frozen"), [(0, 0), (2, 2), (3, 3), (-1, 2), (-3, 0)])
def test_frozen_blocks_are_the_first_with_the_embeddings(configured, number, frozen):
    config, model = configured(image={"frozen_blocks": number})
    traits_of(config, model)
    for name, parameter in model.named_parameters():
        block = name.removeprefix(f"{BACKBONE}.blocks.").partition(".")[0]
        is_first = block.isdecimal() and int(block) < frozen
        is_embedding = name.startswith(
            (f"{BACKBONE}.patch_embed", f"{BACKBONE}.cls", f"{BACKBONE}.pos")
        )
        # timm counts the last norm to the last block
        is_norm = name.startswith(f"{BACKBONE}.norm.") and frozen == 3
        assert parameter.requires_grad != (is_first or is_embedding or is_norm), name


def test_frozen_blocks_drop_nothing_until_they_are_trained(configured):
    entries = [{"from_step": 3, "parameters": [f"{BACKBONE}.blocks.1.*"]}]
    config, model = configured(frozen=[f"{BACKBONE}.blocks.[01].*"], unfreeze=entries)
    optimizer = build_training_optimizer(config, model)
    unfreezing = Unfreezing(model, optimizer)
    blocks = model.towers["image"].backbone.blocks

    def modes():
        model.train()
        drops = [[m for m in block.modules() if isinstance(m, SampleDropPath)] for block in blocks]
        return [
            all(each.training for each in (block, *dropping))
            for block, dropping in zip(blocks, drops, strict=True)
        ]

    assert modes() == [False, False, True]
    assert not unfreezing.open_groups(2, updates_before=lambda step: step)
    assert modes() == [False, False, True]
    assert unfreezing.open_groups(3, updates_before=lambda step: step - 1)
    assert modes() == [False, True, True]
    assert unfreezing.missed_updates(f"{BACKBONE}.blocks.1.norm1.weight") == 2
    assert unfreezing.missed_updates(f"{BACKBONE}.blocks.2.norm1.weight") == 0
    assert [model.eval().training, blocks[1].training] == [False, False]


def test_a_backbone_that_is_frozen_by_a_pattern_is_like_a_frozen_tower(configured):
    config, model = configured(frozen=[f"{BACKBONE}.*"])
    assert not model.towers["image"].is_frozen
    traits_of(config, model)
    model.train()
    assert model.towers["image"].is_frozen
    assert not model.towers["image"].backbone.training
    assert model.towers["image"].projection.weight.requires_grad


def test_parameters_that_no_feature_uses_stay_frozen(configured):
    config, model = configured(
        frozen=["towers.*"], unfreeze=[{"from_step": 1, "parameters": ["towers.*"]}]
    )
    idle = model.towers["image"].backbone.norm.weight.requires_grad_(False)
    traits = traits_of(config, model)
    assert traits[f"{BACKBONE}.norm.weight"].from_step is None
    assert traits[f"{BACKBONE}.norm.bias"].from_step == 1
    assert not idle.requires_grad
    assert traits == traits_of(config, model)


def test_a_fixed_temperature_is_in_no_group(configured):
    config, model = configured(frozen=["log_logit_scale.*"], no_decay=["*.weight"])
    groups = build_training_optimizer(config, model).param_groups
    assert all(each["clamp"] is None for each in groups)
    held = {id(p) for each in groups if each["weight_decay"] for p in each["params"]}
    assert held == {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not name.endswith(".weight")
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"frozen": ["towers.imag.*"]}, r"frozen: 'towers\.imag\.\*' matches no.*towers\.image\."),
        ({"no_decay": ["*", "x"]}, r"no_decay: 'x' matches no parameter"),
        ({"frozen": ["*"]}, "no parameter is left to train at the first step"),
        (
            {"frozen": ["*"], "unfreeze": [{"from_step": 1, "parameters": ["*"]}]},
            "no parameter is left to train at the first step",
        ),
        (
            {"unfreeze": [{"from_step": 1, "parameters": ["towers.image.*"]}]},
            r"unfreeze\.0\.parameters=.* found none; freeze them",
        ),
        (
            {
                "frozen": ["towers.text.*"],
                "unfreeze": [
                    {"from_step": 1, "parameters": ["towers.text.*"]},
                    {"from_step": 2, "parameters": ["towers.text.projection.*"]},
                ],
            },
            r"unfreeze\.1\.parameters",
        ),
        (
            {
                "image": {"frozen": True},
                "frozen": ["towers.text.*"],
                "unfreeze": [{"from_step": 1, "parameters": ["towers.image.*"]}],
            },
            r"towers with frozen=true \(image\) stay frozen",
        ),
        ({"image": {"frozen_blocks": 4}}, "expected -3 to 3, because the tower has 3 blocks"),
    ],
)
def test_settings_that_fit_no_parameter_are_refused(configured, settings, expected):
    with pytest.raises(ConfigError, match=expected):
        traits_of(*configured(**settings))


def test_a_stream_without_a_trained_parameter_is_refused(configured):
    frozen = ["towers.image.*", "towers.text.*"]
    config, model = configured(frozen=[*frozen, "log_logit_scale.image-text"])
    traits_of(config, model)
    with pytest.raises(ConfigError, match=r"streams\.image-text \(image, text, image-text\)"):
        refuse_untrained_streams(model, config.parts_of_streams)
    config, model = configured(frozen=frozen)
    traits_of(config, model)
    refuse_untrained_streams(model, config.parts_of_streams)


def test_every_parameter_is_counted_in_the_table_once(configured):
    config, model = configured(
        image={"layer_decay": 0.5, "learning_rate_scale": 0.1},
        frozen=["towers.text.*"],
        unfreeze=[{"from_step": 7, "parameters": ["*.text.projection.*"]}],
    )
    traits = traits_of(config, model)
    header, *rows = describe_groups(model, weight_decay=0.2, learning_rate=1.0, traits=traits)
    assert header.split()[:2] == ["parameters", "of"]
    total = sum(int(row.split()[1].replace(",", "")) for row in rows)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    cells = [row.split() for row in rows]
    assert ["image.block_3", "0.05"] in [[each[0], each[2]] for each in cells]
    assert ["text", "never"] in [[each[0], each[-1]] for each in cells]
    assert ["text", "512", "1", "0.2", "7"] in cells


def test_patterns_are_case_sensitive_and_keep_the_order_of_the_names():
    names = ["b.Weight", "a.weight", "c.bias"]
    assert matching(["a.*", "*.bias", "b.W*"], names, where="x") == names
    with pytest.raises(ConfigError, match="x: 'A"):
        matching(["A.*"], names, where="x")


def test_layers_of_equal_rate_share_a_group(configured):
    config, model = configured(image={"layer_decay": 1.0})
    optimizer = build_training_optimizer(config, model)
    assert len(optimizer.param_groups) == 3
    assert isinstance(optimizer, torch.optim.Optimizer)
