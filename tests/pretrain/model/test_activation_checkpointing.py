import logging

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from data_prep.errors import InputError
from pretrain.model.activation_checkpointing import (
    checkpoint_backbone,
    checkpoint_blocks,
    compile_towers,
)
from pretrain.model.contrastive_model import Tower
from pretrain.model.sample_dropout import (
    DropKeys,
    SampleDropout,
    SampleDropPath,
    SamplePatchDropout,
    TowerDropKeys,
    pair_keys,
)
from pretrain.model.vector_inputs import ArrayRows
from pretrain.run.attempts import read_metrics
from pretrain.towers.blocks import blocks_of
from pretrain.towers.vector_towers import VectorGru, VectorMlp
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_droppers import NUM_PAIRS, VIT, Pairs, dropping_config, largest_difference
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model


def toy_model(folder):
    """Builds towers that drop nothing: ConvNeXt twice, and open_clip's text transformer."""
    config = toy_config(folder, folder / "run")
    return build_toy_model(config)


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
    """Measures the tensors that the forward pass saves for the backward pass, each once."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model([pairs.micro_batch(slice(0, NUM_PAIRS), step=0)])
    assert features.views["image-text"]["image"].requires_grad
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
        "blocks to checkpoint; set the key to false",
    ):
        checkpoint_blocks(model)
    tower.is_frozen = True
    checkpoint_blocks(model)


def test_small_towers_without_blocks_store_their_activations():
    options = {"num_layers": 3, "is_bidirectional": False}
    gru = VectorGru(3, 4, **options)
    for backbone in (VectorMlp(3, 4, num_layers=3), gru, ArrayRows(gru)):
        forward = backbone.forward
        checkpoint_backbone(backbone, TowerDropKeys(), where="model")
        assert backbone.forward == forward


DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_blocks_of_decoders_are_recomputed_without_a_cache(tmp_path, name):
    options = {"gpt2": {"attn_pdrop": 0.0}}.get(
        name, {"intermediate_size": 16, "num_key_value_heads": 2}
    )
    config = dropping_config(tmp_path)
    text = config.model.text.model_copy(
        update={"name": name, "options": DECODER | {"vocab_size": 49408} | options}
    )
    model_config = config.model.model_copy(update={"text": text})
    config = config.model_copy(update={"model": model_config})
    pairs = Pairs(config)
    model = pairs.build_model(config)
    expected = text_gradients(model, pairs, step=3)
    checkpoint_blocks(model)
    assert largest_difference(text_gradients(model, pairs, step=3), expected) < 1e-12


def train(config):
    from pretrain.train import pretrain

    pretrain(config)


@pytest.mark.slow
def test_a_run_that_drops_goes_on_elsewhere_with_activations_computed_again(toy_data, tmp_path):
    validation = {
        "every_steps": 2,
        "streams": {"image-text": {"dataset": toy_data / "more_colors", "batch_size": 10}},
    }

    def config_of(folder, **sections):
        model = toy_config(toy_data, folder).model.model_dump(mode="json") | {"image": VIT}
        return toy_config(toy_data, folder, model=model, **sections)

    undisturbed = config_of(tmp_path / "undisturbed", validation=validation)
    run_in_processes(1, train, undisturbed)
    moved = config_of(
        tmp_path / "moved", micro_batch_size=3, engine={"activation_checkpointing": True}
    )
    stopping = moved.run.model_copy(update={"stop_after_step": 3})
    run_in_processes(2, train, moved.model_copy(update={"run": stopping}))
    run_in_processes(1, train, config_of(tmp_path / "moved"))
    rows, expected_rows = (
        [row for row in read_metrics(config.run.folder) if "validation" not in row]
        for config in (moved, undisturbed)
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.fixture
def num_compilations(monkeypatch):
    """A function that says how many graphs were compiled since the test began."""
    # pytest would have every record of the compiler's trace, which is what takes its time.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch.compiler.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Returns pairs together with the config of their model."""
    config = dropping_config(tmp_path_factory.mktemp("droppers"))
    pairs = Pairs(config)
    pairs.config = config
    return pairs


def keys_of(num_pairs, *, step=0):
    drop_keys = DropKeys(torch.tensor(step), torch.arange(NUM_PAIRS)[:num_pairs])
    return pair_keys(drop_keys, seed=0, stream="image-text", view="text")


def text_gradients(model, pairs, *, step):
    model.zero_grad()
    embeddings = model.encode("text", pairs.tokens, keys=keys_of(NUM_PAIRS, step=step))
    (embeddings.double() @ torch.arange(16.0).double()).sin().sum().backward()
    return {n: p.grad for n, p in model.towers["text"].named_parameters() if p.requires_grad}


def test_a_compiled_tower_gives_the_same_gradients_and_keeps_its_names(pairs, num_compilations):
    """Tests recomputed blocks; a second step compiles nothing."""
    model = pairs.build_model(pairs.config)
    expected = [text_gradients(model, pairs, step=step) for step in (3, 4)]
    assert largest_difference(*expected) > 0.1
    names = list(model.state_dict())
    checkpoint_blocks(model)
    compile_towers(model, backend="aot_eager")
    for step, gradients in zip((3, 4), expected, strict=True):
        assert largest_difference(text_gradients(model, pairs, step=step), gradients) < 1e-12
        assert num_compilations() == 1
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_any_number_of_pairs_and_tokens_takes_few_compilations(pairs, num_compilations):
    model = pairs.build_model(pairs.config)

    def encode(num_pairs, num_tokens):
        return model.encode("text", pairs.tokens[:num_pairs, :num_tokens], keys=keys_of(num_pairs))

    shapes = [(8, 24), (5, 24), (5, 16), (3, 24), (7, 16), (0, 24)]
    with torch.no_grad():
        expected = [encode(*shape) for shape in shapes]
        compile_towers(model, backend="eager")
        for shape, features in zip(shapes, expected, strict=True):
            torch.testing.assert_close(encode(*shape), features)
    assert num_compilations() <= 4


def test_compiled_layers_of_every_kind_drop_alike(num_compilations):
    drop_keys = TowerDropKeys()
    layers = nn.Sequential(
        nn.Linear(7, 7),
        SampleDropout("a", drop_keys, p=0.3, drops_channels=False),
        SampleDropout("b", drop_keys, p=0.3, drops_channels=True),
        SampleDropPath("c", drop_keys, drop_prob=0.3, scale_by_keep=True),
        SamplePatchDropout("d", drop_keys, prob=0.5, num_prefix_tokens=1, is_ordered=True),
    )
    tower = Tower(nn.Identity(), layers, nn.Flatten(), drop_keys=drop_keys)
    values = torch.randn(2 * NUM_PAIRS, 9, 7)  # two rows of each sample
    expected = [tower(values, keys=keys_of(NUM_PAIRS, step=step)) for step in range(3)]
    tower.compile(backend="aot_eager")
    for step in range(3):
        assert torch.equal(tower(values, keys=keys_of(NUM_PAIRS, step=step)), expected[step])
    assert num_compilations() == 1
