"""Classification from any view of a sample or from the mean of several, compared with loops."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from data_prep.errors import ConfigError, InputError
from data_prep.shards.dataset import Dataset
from eval.config import EvaluateConfig
from eval.evaluate import run
from tests.eval.tasks.test_modality_retrieval import config_of, items_of, records_of
from tests.support.toy_views import SHARD_SIZES, views_members, write_views
from tests.support.toy_views_model import load_views_model, tokenizer_of_letters

CLASSES = ["one", "two", "three"]
TEMPLATES = ["a {}", "{} of them"]
VIEWS = {
    "image": ["image"],
    "scan as image": ["image.scan"],
    "texts": ["text"],
    "series": ["series"],
    "image and audio": ["image", "audio"],
    "all": ["image", "text", "text.title", "values"],
}


def labelled_members(number, present):
    """Returns members with two labels: class_name, and `shape` among the labels of the sample."""
    members = views_members(number, present)
    values = json.loads(members.get("json", b"{}"))
    values |= {"class_name": CLASSES[number % 3], "labels": {"shape": CLASSES[number // 3 % 3]}}
    return members | {"json": json.dumps(values).encode()}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Classifies by every list of VIEWS: (dataset folder, output folder, records)."""
    folder = tmp_path_factory.mktemp("views")
    data = write_views(folder / "data", fraction=0.8, members_of=labelled_members)
    train = write_views(folder / "train", fraction=0.8, seed=1, members_of=labelled_members)
    shared = {"dataset": str(data), "class_names": CLASSES}
    prompts = {"task": "zero_shot_classification", "prompt_templates": TEMPLATES}
    evaluations = {name: shared | prompts | {"views": views} for name, views in VIEWS.items()}
    evaluations["shapes"] = shared | prompts | {"views": "image", "label": "shape"}
    evaluations["default"] = shared | prompts
    evaluations["captions"] = {"task": "retrieval", "dataset": str(data)}
    evaluations["neighbours"] = {"task": "nearest_neighbours", "train": str(train)}
    evaluations["neighbours"] |= shared | {"views": ["scan", "audio"], "num_neighbours": 3}
    return data, folder / "out", records_of(folder, evaluations)


def embedding_of(items, sample):
    """Returns the normalised mean over the items of a sample; None if it has none."""
    own = [item[2] for item in items if item[0] == sample]
    return normalize(torch.stack(own).mean(dim=0), dim=0) if own else None


def expected_accuracy(data, views, class_of):
    """Returns (accuracy, number of samples that take part)."""
    model, *_ = load_views_model(None)
    classes = []
    for name in CLASSES:
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        embeddings = model.encode("text", tokenizer_of_letters(prompts))
        classes.append(normalize(embeddings.mean(dim=0), dim=0))
    sides, hits = [items_of(Dataset(data), view) for view in views], []
    for sample in range(sum(SHARD_SIZES)):
        parts = [embedding_of(items, sample) for items in sides]
        if all(part is not None for part in parts):
            whole = normalize(torch.stack(parts).mean(dim=0), dim=0)
            found = np.argmax([float(whole @ each) for each in classes])
            hits.append(found == class_of(sample))
    return np.mean(hits), len(hits)


@pytest.mark.parametrize("name", VIEWS)
def test_accuracies_are_those_of_a_loop(evaluated, name):
    data, _, records = evaluated
    record = records[name]
    accuracy, num_samples = expected_accuracy(data, VIEWS[name], lambda sample: sample % 3)
    assert record["views"] == VIEWS[name]
    assert record["scores"]["top_1_accuracy"]["value"] == pytest.approx(accuracy)
    assert record["num_queries"] == num_samples
    assert record["num_lacking"] == sum(SHARD_SIZES) - num_samples > 0


def test_labels_of_samples_are_classes_too(evaluated):
    data, _, records = evaluated
    accuracy, _ = expected_accuracy(data, ["image"], lambda sample: sample // 3 % 3)
    assert records["shapes"]["scores"]["top_1_accuracy"]["value"] == pytest.approx(accuracy)


def test_without_views_the_first_media_of_samples_that_have_it_are_measured(evaluated):
    data, out, records = evaluated
    own, named = records["default"], records["image"]
    assert own["scores"] == named["scores"] and own["num_lacking"] == named["num_lacking"]
    images, texts = (items_of(Dataset(data), view) for view in ("image", "text"))
    both = {item[0] for item in images} & {item[0] for item in texts}
    assert records["captions"]["num_media"] == len(both)
    assert records["captions"]["num_captions"] == sum(item[0] in both for item in texts)
    assert "samples lack image or text and take no part" in (out / "results.md").read_text()


def test_trained_classifiers_take_the_same_views(evaluated):
    _, _, records = evaluated
    record = records["neighbours"]
    assert record["views"] == ["scan", "audio"]
    assert 0 < record["num_train"] < sum(SHARD_SIZES)


def test_a_model_without_texts_is_evaluated_and_told_what_it_cannot_encode(tmp_path, monkeypatch):
    load = partial(load_views_model, without=("text", "title"))
    monkeypatch.setattr("eval.models.encoder.load_model", load)
    data = write_views(tmp_path / "data", members_of=labelled_members)
    pairs = {"task": "modality_retrieval", "dataset": str(data), "left": "image", "right": "audio"}
    run(config_of(tmp_path, {"sounds": pairs}))
    record = json.loads((tmp_path / "out/results.json").read_text())["evaluations"]["sounds"]
    assert record["scores"]["image_to_audio_recall@1"]["num_queries"] == record["num_left"] > 0
    classes = {"task": "zero_shot_classification", "dataset": str(data), "class_names": CLASSES}
    classes |= {"prompt_templates": ["a {}"], "views": "image"}
    message = "tower for text, which encodes the prompts of classes; found towers for"
    with pytest.raises(InputError, match=message):
        run(
            EvaluateConfig.model_validate(
                {"checkpoint": tmp_path / "run", "output": tmp_path / "out2"}
                | {"evaluations": {"classes": classes}}
            )
        )


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (["image", "image"], "expected different views"),
        ([], "at least 1"),
        ("image.2", "augments nothing"),
    ],
)
def test_views_that_make_no_sense_are_refused(tmp_path, views, message):
    section = {"task": "zero_shot_classification", "dataset": "x", "views": views}
    with pytest.raises((ConfigError, ValueError), match=message):
        config_of(tmp_path, {"bad": section})
