import open_clip
import pytest
import torch

from data_prep.errors import InputError
from eval.prompts.class_prompts import average_prompts, check_templates, class_prompts


def test_templates_take_both_placeholders_and_leave_other_braces():
    prompts = class_prompts(["{} dog", "cat"], ["a {} here", "the {c} {x}"])
    assert prompts == [["a {} dog here", "the {} dog {x}"], ["a cat here", "the cat {x}"]]


def test_template_without_a_place_for_the_class_raises():
    with pytest.raises(InputError, match="'a photo'"):
        check_templates(["a {}", "a photo"])


def test_class_embeddings_equal_open_clip():
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    ).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    names, templates = ["dog", "red car", "seven"], ["a photo of a {}.", "{}", "a drawing of {c}"]
    expected = open_clip.build_zero_shot_classifier(
        model, tokenizer, names, [template.replace("{c}", "{}") for template in templates]
    )  # [D, K]
    with torch.no_grad():
        prompts = model.encode_text(
            tokenizer([text for each in class_prompts(names, templates) for text in each])
        )
    found = average_prompts(prompts, num_prompts=[len(templates)] * len(names))
    assert found.shape == (3, 16)
    torch.testing.assert_close(found, expected.T, atol=1e-6, rtol=0)
