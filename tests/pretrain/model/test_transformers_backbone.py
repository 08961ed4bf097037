import pytest
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from data_prep.errors import InputError
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.towers import build_media_backbone, build_text_backbone
from pretrain.model.transformers_backbone import refuse_unknown_options
from pretrain.settings.model import MediaTower, TextTower
from tests.support.toy_towers import TINY_BERT

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 100,
}
SIZES_OF_IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}


def build_text(name, options, *, pretrained=False):
    config = TextTower(
        library="transformers", name=str(name), options=options, pretrained=pretrained
    )
    tokenizer = Tokenizer(None, context_length=12, pad_id=0, vocab_size=100)
    return build_text_backbone(config, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    """Saves a BERT of 100 tokens and returns its folder."""
    folder = tmp_path_factory.mktemp("bert")
    build_text("bert", SIZES).backbone.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden_size": "abc"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": [16]}, "Field 'hidden_size' expected int, got list"),
        ({"hidden_size": 16.0}, "Field 'hidden_size' expected int, got float"),
        ({"hidden_size": None}, "Field 'hidden_size' expected int, got NoneType"),
        ({"hidden_size": 15}, r"hidden size \(15\) is not a multiple"),
        ({"hidden_act": "gelo"}, "KeyError: 'gelo'"),
        ({"hiden_size": 16}, r"no option 'hiden_size' \(nearest: hidden_size"),
    ],
)
@pytest.mark.parametrize("is_saved", [False, True], ids=["from scratch", "saved"])
def test_wrong_options_end_in_one_sentence(saved_bert, options, reason, is_saved):
    name = saved_bert if is_saved else "bert"
    with pytest.raises(InputError, match=reason) as raised:
        build_text(name, SIZES | options, pretrained=is_saved)
    message = str(raised.value)
    assert message.startswith(f"model.text: transformers cannot build '{name}' with options {{")
    assert "\n" not in message


def test_arguments_of_a_saved_model_are_accepted(saved_bert):
    backbone = build_text(saved_bert, {"add_pooling_layer": False}, pretrained=True).backbone
    assert backbone.pooler is None


@pytest.mark.parametrize(
    ("model_type", "options", "unknown"),
    [
        ("bert", {"hidden_dropout": 0.0}, "hidden_dropout"),
        ("bert", {"max_length": 20}, "max_length"),  # dropped by transformers
        ("bert", {"to_dict": 1}, "to_dict"),  # a method
        ("bert", {"add_pooling_layer": False}, "add_pooling_layer"),
        ("llama", {"rope_thata": 1e4}, "rope_thata"),
        ("vit", {"patch_sizes": 8}, "patch_sizes"),
        ("gpt2", {"n_layers": 1}, "n_layers"),
    ],
)
def test_unknown_options_are_refused(model_type, options, unknown):
    with pytest.raises(ValueError, match=rf"has no option '{unknown}'.*; correct or remove it"):
        refuse_unknown_options(CONFIG_MAPPING[model_type], options)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("bert", TINY_BERT | {"num_labels": 3, "attn_implementation": "eager"}),
        ("gpt2", {"hidden_size": 16, "n_layer": 1}),  # the first name stands for n_embd
        ("llama", {"rope_theta": 1e4}),  # an old name, here with its default
        # An old name, here without effect on the layers.
        ("modernbert", {"num_hidden_layers": 2, "global_attn_every_n_layers": 2}),
        ("distilbert", {"dim": 16, "num_hidden_layers": 1}),
    ],
)
def test_known_options_are_accepted(model_type, options):
    refuse_unknown_options(CONFIG_MAPPING[model_type], options)


@pytest.mark.slow
def test_every_attribute_of_every_model_type_is_accepted():
    """Walks all model types that AutoModel builds; options are their own attributes."""
    num_types = 0
    for config_class in CONFIG_MAPPING.values():
        if config_class in MODEL_MAPPING:
            written = config_class().to_diff_dict()
            names = set(written) - {"model_type", "transformers_version", "_name_or_path"}
            refuse_unknown_options(config_class, {name: written[name] for name in names})
            with pytest.raises(ValueError, match="no option 'isopair'"):
                refuse_unknown_options(config_class, {"isopair": 1})
            num_types += 1
    assert num_types > 200


@pytest.mark.parametrize(
    ("kind", "name", "options", "reason"),
    [
        ("text", "blip_text_model", SIZES, "AutoModel does not build .* 'blip_text_model'"),
        ("audio", "wav2vec2", {}, "expected a .* type that takes log-mel .* found 'wav2vec2'"),
        ("text", "clap_audio_model", {}, "'clap_audio_model' is one of audio towers; choose one"),
        ("audio", "clip", {}, "model type 'clip' has towers for image and text, none for audio"),
        ("text", "bertt", {}, r"no model type 'bertt' \(nearest: bert"),
        (
            "image",
            "chinese_clip",
            {"text_config": SIZES, "vision_config": SIZES_OF_IMAGES},
            "expected a model of one modality, found 'chinese_clip'",
        ),
        (
            "image",
            "clip",
            {"vision_config": SIZES_OF_IMAGES | {"patch_sise": 8}},
            "CLIPVisionConfig has no option 'patch_sise'",
        ),
        (
            "image",
            "clip",
            {"projection_dim": 8},
            r"the options of clip's tower for image .* {vision_config: {projection_dim: ...}}",
        ),
    ],
)
def test_models_that_are_no_tower_are_refused(kind, name, options, reason):
    with pytest.raises(InputError, match=rf"model\.{kind}: .*{reason}") as raised:
        if kind == "text":
            build_text(name, options)
        else:
            config = MediaTower(library="transformers", name=name, options=options)
            build_media_backbone(config, kind=kind)
    assert len(str(raised.value)) < 600
