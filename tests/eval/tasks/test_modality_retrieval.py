"""Retrieval between any two modalities, compared with loops over the samples that have both."""

import json
import math
from functools import partial

import numpy as np
import pyarrow.parquet
import pytest
import torch

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from eval.config import EvaluateConfig
from eval.evaluate import dry_run, run
from pretrain.settings.views import View
from tests.support.toy_evaluation import (
    COLORS,
    load_toy_model,
    picture_sample,
    write_dataset,
    write_toy_run,
)
from tests.support.toy_modalities import image
from tests.support.toy_models import write_open_clip_folder
from tests.support.toy_views import SHARD_SIZES, views_members, write_views
from tests.support.toy_views_model import FewNumbers, load_views_model, tokenizer_of_letters

PAIRS = [
    ("image", "audio"),
    ("image", "scan"),
    ("image", "image.scan"),
    ("text.title", "image"),
    ("text", "title"),
    ("values", "series"),
    ("audio", "text"),
    ("series", "text"),
]
KS = [1, 5, 10]


PAIRINGS = [
    {"equal_contents": "merged"},
    {"equal_contents": "own"},
    {"equal_contents": "merged", "pair_by": "kind"},
    {"equal_contents": "own", "pair_by": "kind"},
]


def kind_of(number):
    return number % 6


def members_with_duplicates(number, present):
    """Returns members in which every third image is one of four; all have a kind."""
    members = views_members(number, present)
    if "png" in members and number % 3 == 0:
        members["png"] = image(number % 4)
    metadata = json.loads(members.get("json", "{}")) | {"kind": kind_of(number)}
    return members | {"json": json.dumps(metadata).encode()}


def name_of(left, right, pairing):
    return " ".join([left, right, *pairing.values()])


def config_of(folder, evaluations):
    values = {
        "checkpoint": write_toy_run(folder / "run"),
        "output": folder / "out",
        "bootstrap_samples": 100,
        "batch_size": 4,
        "evaluations": evaluations,
    }
    return EvaluateConfig.model_validate(values)


def records_of(folder, evaluations):
    """Evaluates the toy model of views and returns the record of each evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.models.encoder.load_model", load_views_model)
        run(config_of(folder, evaluations))
    return json.loads((folder / "out/results.json").read_text())["evaluations"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Evaluates all pairs: (dataset folder, output folder, records)."""
    folder = tmp_path_factory.mktemp("pairs")
    data = write_views(folder / "data", members_of=members_with_duplicates)
    evaluations = {
        name_of(left, right, pairing): {
            "task": "modality_retrieval",
            "dataset": str(data),
            "left": left,
            "right": right,
            **pairing,
        }
        for left, right in PAIRS
        for pairing in PAIRINGS
    }
    return data, folder / "out", records_of(folder, evaluations)


def items_of(dataset, view):
    """Lists (sample, content, embedding) of each item of the view, by a loop over all samples."""
    model, transforms, _ = load_views_model(None)
    modality, member = View.parse(view).modality, View.parse(view).member
    items = []
    for ordinal in range(len(dataset)):
        contents = dataset.read_modalities(ordinal)
        inputs = []
        for text in contents.texts.get(member, []):
            inputs.append((text, (tokenizer_of_letters([text]),)))
        if member in contents.vectors:
            vector = contents.vectors[member]
            rows = torch.from_numpy(vector.copy())[None]
            cut = () if vector.ndim == 1 else (torch.tensor([min(4, len(vector))]),)
            inputs.append((vector.tobytes(), (rows[:, :4] if cut else rows, *cut)))
        if member in contents.media:
            content, extension = contents.media[member], contents.extensions[member]
            decoded = transforms[modality].decode(content, extension)
            inputs.append((content, (FewNumbers.__call__(transforms[modality], decoded)[None],)))
        items += [(ordinal, key, model.encode(modality, *each)[0]) for key, each in inputs]
    return items


def both_sides(data, left, right):
    dataset = Dataset(data)
    sides = [items_of(dataset, view) for view in (left, right)]
    common = {item[0] for item in sides[0]} & {item[0] for item in sides[1]}
    return len(common), [[item for item in side if item[0] in common] for side in sides]


def matches(one, other, lefts, rights, pairing):
    group = kind_of if "pair_by" in pairing else int
    if pairing["equal_contents"] == "own":
        return group(one[0]) == group(other[0])
    groups = {group(item[0]) for item in lefts if item[1] == one[1]}
    return bool(groups & {group(item[0]) for item in rights if item[1] == other[1]})


def probability_of_a_hit(scores, is_relevant, k):
    """Returns the probability over random orders of ties that a relevant item is in the first k."""
    best = scores[is_relevant].max()
    is_tied = abs(scores - best) < 1e-6
    num_left = min(k - ((scores > best) & ~is_tied).sum(), is_tied.sum())
    if num_left <= 0:
        return 0.0
    num_wrong = (is_tied & ~is_relevant).sum()
    return 1 - math.comb(num_wrong, num_left) / math.comb(is_tied.sum(), num_left)


@pytest.mark.parametrize("pairing", PAIRINGS, ids=lambda pairing: " ".join(pairing.values()))
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_recalls_are_those_of_a_loop(evaluated, left, right, pairing):
    data, out, records = evaluated
    record = records[name_of(left, right, pairing)]
    num_samples, (lefts, rights) = both_sides(data, left, right)
    assert 0 < num_samples < sum(SHARD_SIZES)
    assert record["num_samples"] == num_samples
    assert record["num_lacking"] == sum(SHARD_SIZES) - num_samples
    assert (record["num_left"], record["num_right"]) == (len(lefts), len(rights))
    names = [view.replace(".", "_") for view in (left, right)]
    assert record["directions"] == ["_to_".join(names), "_to_".join(reversed(names))]

    is_match = np.array(
        [[matches(one, other, lefts, rights, pairing) for other in rights] for one in lefts]
    )
    assert record["num_right_pairs"] == is_match.sum()
    scores = np.array([[float(one[2] @ other[2]) for other in rights] for one in lefts])
    for direction, of_queries, relevant, items in (
        (record["directions"][0], scores, is_match, lefts),
        (record["directions"][1], scores.T, is_match.T, rights),
    ):
        for k in KS:
            rows = zip(of_queries, relevant, strict=True)
            hits = [probability_of_a_hit(row, flags, k) for row, flags in rows]
            found = record["scores"][f"{direction}_recall@{k}"]
            assert found["value"] == pytest.approx(np.mean(hits))
            assert found["num_queries"] == len(items)
        path = next((out / "predictions").glob(f"*.{direction}.parquet"))
        assert "key" in pyarrow.parquet.read_schema(path).names


def test_the_report_shows_all_kinds_and_counts_samples_that_lack_a_modality(evaluated):
    _, out, records = evaluated
    page = (out / "report.html").read_text()
    num_lacking = records["image audio merged"]["num_lacking"]
    assert f"{num_lacking} of 45 samples lack image or audio and take no part." in page
    assert "<audio" in page and "title 1 of" in page and "3] numbers" in page
    assert f"image audio merged: {num_lacking} of 45" in (out / "results.md").read_text()


BAD = [
    ({"left": "image", "right": "photo"}, "expected a modality of image, .*; found 'photo'"),
    ({"left": "photo.image", "right": "audio"}, "contains image, but the model has towers for"),
    ({"left": "image.audio", "right": "text"}, "expected 'audio' of kind image.*found kind audio"),
    ({"left": "values.series", "right": "text"}, r"expected vectors 'series' of shape \[3\]"),
    ({"left": "image", "right": "title"}, "model has towers for"),
    ({"left": "image", "right": "text", "pair_by": "kind"}, "expected 'kind' in .json, found"),
]


@pytest.mark.parametrize(("views", "message"), BAD)
def test_views_that_cannot_be_encoded_are_refused(tmp_path, monkeypatch, views, message):
    load = partial(load_views_model, without=("title",))
    monkeypatch.setattr("eval.models.encoder.load_model", load)
    data = write_views(tmp_path / "data", always=("image", "text", "title", "series"))
    config = config_of(
        tmp_path, {"bad": {"task": "modality_retrieval", "dataset": str(data)} | views}
    )
    with pytest.raises(InputError, match=message):
        run(config)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"left": "image", "right": "image"}, "expected two views"),
        ({"left": "image", "right": {"image": 2}}, "augments nothing; write 'image'"),
        ({"left": "image", "right": "audio", "ks": [5, 1]}, "ascending"),
    ],
)
def test_sections_that_make_no_sense_are_refused(tmp_path, views, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, {"bad": {"task": "modality_retrieval", "dataset": "x"} | views})


def test_a_dry_run_counts_the_samples_that_take_part(tmp_path, capsys):
    data = write_views(tmp_path / "data")
    evaluation = {"task": "modality_retrieval", "dataset": str(data)}
    evaluation |= {"left": {"text": "title"}, "right": "scan"}
    dry_run(config_of(tmp_path, {"titles": evaluation}))
    num_samples, (lefts, _) = both_sides(data, "text.title", "scan")
    found = capsys.readouterr().out
    assert f"{len(lefts)} text.title items" in found and f"{num_samples} samples" in found


def test_too_many_matching_pairs_are_refused_before_memory_runs_out(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.models.encoder.load_model", load_views_model)
    monkeypatch.setattr("eval.metrics.relevance.MAX_PAIRS", 10)
    data = write_views(tmp_path / "data")
    evaluation = {"task": "modality_retrieval", "dataset": str(data)}
    config = config_of(tmp_path, {"pairs": evaluation | {"left": "image", "right": "text"}})
    with pytest.raises(InputError, match=r"evaluations\.pairs: expected at most 10 .* own"):
        run(config)


def test_a_set_of_pairs_gives_the_metrics_of_its_retrieval_task(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.models.encoder.load_model", load_toy_model)
    samples = [picture_sample(list(COLORS)[n % 3], seed=n) for n in range(9)]
    data = {"dataset": str(write_dataset(tmp_path / "pictures", samples))}
    views = {"task": "modality_retrieval", "left": "image", "right": "text"}
    evaluations = {"captions": data | {"task": "retrieval"}}
    evaluations["views"] = data | views | {"equal_contents": "own"}
    run(config_of(tmp_path, evaluations))
    records = json.loads((tmp_path / "out/results.json").read_text())["evaluations"]
    for direction, other in (
        ("media_to_text", "image_to_text"),
        ("text_to_media", "text_to_image"),
    ):
        for k in KS:
            expected = records["captions"]["scores"][f"{direction}_recall@{k}"]["value"]
            found = records["views"]["scores"][f"{other}_recall@{k}"]["value"]
            assert found == pytest.approx(expected)
    assert records["views"]["trained_together"] is None


def test_models_of_other_libraries_take_views_by_their_kind(tmp_path):
    data = write_views(tmp_path / "data")
    pair = {"task": "modality_retrieval", "dataset": str(data), "left": {"image": "scan"}}
    values = {"checkpoint": write_open_clip_folder(tmp_path / "clip"), "output": tmp_path / "out"}
    evaluations = {"titles": pair | {"right": {"text": "title"}}}
    run(EvaluateConfig.model_validate(values | {"batch_size": 8, "evaluations": evaluations}))
    record = json.loads((tmp_path / "out/results.json").read_text())["evaluations"]["titles"]
    assert record["directions"] == ["image_scan_to_text_title", "text_title_to_image_scan"]
    assert record["num_left"] == record["num_right"] == both_sides(data, "scan", "title")[0]
