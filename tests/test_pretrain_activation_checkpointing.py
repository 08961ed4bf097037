import pytest
import torch
from torch import nn
from toy_droppers import NUM_PAIRS, Pairs, dropping_config
from toy_run import toy_config

from data_prep.config_file import InputError
from pretrain.activation_checkpointing import blocks_of, checkpoint_blocks
from pretrain.model import build_model
from pretrain.tokenizer import build_tokenizer


def toy_model(folder):
    """Towers that drop nothing: ConvNeXt twice, and open_clip's text transformer."""
    config = toy_config(folder, folder / "run")
    return build_model(config, tokenizer=build_tokenizer(config.model.text))


def class_names(backbone):
    return [type(block).__name__ for block in blocks_of(backbone)]


def test_blocks_are_found_in_towers_of_all_libraries(tmp_path):
    config = dropping_config(tmp_path)
    towers = Pairs(config).build_model(config).towers
    assert class_names(towers["image"].backbone) == ["Block"] * 2
    assert class_names(towers["audio"].backbone) == ["SwinTransformerBlock"] * 2
    assert class_names(towers["text"].backbone) == ["BertLayer"]
    towers = toy_model(tmp_path).towers
    assert set(class_names(towers["image"].backbone)) == {"ConvNeXtBlock"}  # not its stages
    assert class_names(towers["text"].backbone) == ["ResidualAttentionBlock"]


def bytes_kept_for_backward(model, pairs):
    """Of all tensors that the forward pass leaves to the backward pass, each once."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model([pairs.piece(slice(0, NUM_PAIRS), step=0)])
    assert features["image-text"][0].requires_grad
    return sum(kept.values())


def test_blocks_keep_less_and_their_names(tmp_path):
    config = dropping_config(tmp_path)
    pairs = Pairs(config)
    model = pairs.build_model(config)
    names = list(model.state_dict())
    before = bytes_kept_for_backward(model, pairs)
    checkpoint_blocks(model)
    assert bytes_kept_for_backward(model, pairs) < 0.7 * before
    assert list(model.state_dict()) == names


def test_a_tower_without_blocks_is_refused_and_a_frozen_one_is_left_alone(tmp_path):
    model = toy_model(tmp_path)
    tower = model.towers["image"]
    tower.backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(
        InputError,
        match=r"engine\.activation_checkpointing: model\.image \(Sequential\) has no list of equal "
        "blocks to checkpoint; set it to false",
    ):
        checkpoint_blocks(model)
    tower.is_frozen = True
    checkpoint_blocks(model)
