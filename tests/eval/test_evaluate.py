import io
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml

from data_prep.command import run_command
from eval.config import EvaluateConfig
from eval.evaluate import dry_run, run
from tests.eval.datasets.test_tar_dataset import write_set
from tests.support.toy_evaluation import (
    COLORS,
    PITCHES_HZ,
    ToyModel,
    load_toy_model,
    picture_sample,
    sound_sample,
    write_dataset,
    write_toy_run,
)


def flags(*colors):
    """Returns the .npy of an item: flags of four classes; no item belongs to the first."""
    file = io.BytesIO()
    np.save(file, np.array([0, *(int(n in colors) for n in range(3))], dtype=np.int64))
    return file.getvalue()


def with_metadata(sample, **values):
    return sample | {"json": json.dumps(json.loads(sample["json"]) | values).encode()}


@pytest.fixture
def config_path(tmp_path, monkeypatch):
    """A config over images and sounds, evaluated with the toy model."""
    monkeypatch.setattr("eval.models.encoder.load_model", load_toy_model)
    pictures = [picture_sample(list(COLORS)[n % 3], seed=n) for n in range(12)]
    # Each is labelled with its colour, and every third, wrongly, with a second one as well.
    tints = [
        sample | {"npy": flags(*{n % 3, 0 if n % 3 == 2 else n % 3})}
        for n, sample in enumerate(pictures)
    ]
    for sample in tints:
        del sample["json"]
    # The first two are also test items.
    seeds = [0, 1, *range(102, 160)]
    more_pictures = [picture_sample(list(COLORS)[n % 3], seed=seeds[n]) for n in range(60)]
    published = [
        {"png": sample["png"], "cls": str(n % 3).encode()} for n, sample in enumerate(pictures)
    ]
    sounds = [sound_sample(list(PITCHES_HZ)[n % 3], seed=n) for n in range(6)]
    sounds = [with_metadata(sample, group=n // 3) for n, sample in enumerate(sounds)]
    choices = [
        with_metadata(
            sample,
            group=n // 3,
            negative_captions=["a pink picture", "a red picture"],
            captions=[f"a {list(COLORS)[n % 3]} picture", f"in {list(COLORS)[n % 3]} <{n}>"],
            pair=n % 3,
            is_right=n < 3,
        )
        for n, sample in enumerate(pictures[:6])
    ]
    (tmp_path / "others.txt").write_text("a grey cat\r\n\r\na yellow dog\r\n")
    (tmp_path / "templates.txt").write_text("a {} picture\na photo in {c}\n")
    config = {
        "checkpoint": str(write_toy_run(tmp_path / "run")),
        "output": str(tmp_path / "out"),
        "batch_size": 5,
        "bootstrap_samples": 100,
        "evaluations": {
            "colors": {
                "task": "zero_shot_classification",
                "dataset": str(write_dataset(tmp_path / "pictures", pictures)),
                "class_names": [*COLORS, "unused"],
                "prompt_templates": str(tmp_path / "templates.txt"),
            },
            "published": {
                "task": "zero_shot_classification",
                "dataset": str(write_set(tmp_path / "set", published, classes=[*COLORS, "unused"])),
            },
            "probed": {
                "task": "linear_probe",
                "dataset": str(tmp_path / "pictures"),
                "train": str(write_dataset(tmp_path / "more_pictures", more_pictures)),
                "class_names": [*COLORS, "unused"],
            },
            "neighbours": {
                "task": "nearest_neighbours",
                "dataset": str(tmp_path / "pictures"),
                "train": str(tmp_path / "more_pictures"),
                "class_names": [*COLORS],
                "averages": ["trained"],
            },
            "few": {
                "task": "few_shot",
                "dataset": str(tmp_path / "pictures"),
                "train": str(tmp_path / "more_pictures"),
                "class_names": [*COLORS],
                "shots": [1, 2],
                "averages": ["trained"],
            },
            "choice": {
                "task": "caption_choice",
                "dataset": str(write_dataset(tmp_path / "choices", choices)),
            },
            "grouped": {
                "task": "caption_choice",
                "dataset": str(tmp_path / "choices"),
                "group_by": "group",
            },
            "associated": {
                "task": "association",
                "dataset": str(tmp_path / "choices"),
                "group_by": "pair",
                "right": "is_right",
            },
            "matched": {
                "task": "media_retrieval",
                "dataset": str(tmp_path / "choices"),
                "other": str(write_dataset(tmp_path / "sounds", sounds, media="audio")),
                "pair_by": "group",
                "ks": [1, 2],
            },
            "tints": {
                "task": "multi_label_classification",
                "dataset": str(write_dataset(tmp_path / "tints", tints)),
                "class_names": ["unused", *COLORS],
                "prompt_templates": ["in {}"],
            },
            "pictures": {
                "task": "retrieval",
                "dataset": str(tmp_path / "pictures"),
                "distractor_captions": str(tmp_path / "others.txt"),
            },
            "tones": {
                "task": "retrieval",
                "dataset": str(tmp_path / "sounds"),
                "ks": [1, 2],
            },
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def evaluate(path, *overrides):
    return run_command(
        EvaluateConfig,
        run=run,
        dry_run=dry_run,
        description="",
        arguments=[str(path), *overrides],
    )


def test_evaluation_writes_metrics_with_their_provenance(config_path, capsys):
    assert evaluate(config_path) == 0
    out = config_path.parent / "out"
    record = json.loads((out / "results.json").read_text())
    colors, pictures, tones = (
        record["evaluations"][name] for name in ("colors", "pictures", "tones")
    )
    assert colors["scores"]["top_1_accuracy"]["value"] == 1
    assert colors["scores"]["top_1_accuracy"]["chance"] == 0.25
    assert colors["num_classes_without_items"] == 1
    assert colors["num_prompts"] == 8
    assert colors["confusion_matrix"][0] == [4, 0, 0, 0]
    assert colors["class_recalls"]["unused"] is None
    assert record["evaluations"]["published"]["scores"] == colors["scores"]
    probed = record["evaluations"]["probed"]
    assert probed["scores"]["top_1_accuracy"]["value"] == 1
    assert probed["num_train"] + probed["num_validation"] == 60
    assert 0 < probed["num_validation"] < 20
    best = probed["validation_accuracies"][f"{probed['l2']:.4g}"]
    assert best == max(probed["validation_accuracies"].values()) == 1
    for name, metric in (("neighbours", "top_1_accuracy"), ("few", "top_1_accuracy@2_shot")):
        assert record["evaluations"][name]["scores"][metric]["value"] == 1
        assert record["evaluations"][name]["num_train"] == 60
    for name in ("probed", "neighbours", "few"):
        assert record["evaluations"][name]["num_train_equal_to_test"] == 2
        assert record["evaluations"][name]["num_test_equal_to_train"] == 2
    assert record["averages"]["trained"]["value"] == 1
    assert record["averages"]["all"]["num_queries"] == len(record["evaluations"])
    # Only red pictures tie with the wrong caption "a red picture".
    choice = record["evaluations"]["choice"]["scores"]["caption_accuracy"]
    assert choice["value"] == pytest.approx(5 / 6)
    assert choice["chance"] == pytest.approx(1 / 3)
    for score in record["evaluations"]["grouped"]["scores"].values():
        assert (score["value"], score["num_queries"]) == (1, 2)
    associated = record["evaluations"]["associated"]["scores"]["jaccard"]
    assert associated["chance"] == pytest.approx(0.5)  # one of two pictures of a colour
    assert associated["num_queries"] == 3
    matched = record["evaluations"]["matched"]
    assert matched["num_right_pairs"] == 18
    # All pictures tie with all sounds, which gives the value of chance.
    recall = matched["scores"]["image_to_audio_recall@1"]
    assert recall["value"] == pytest.approx(recall["chance"]) == pytest.approx(0.5)
    tints = record["evaluations"]["tints"]
    assert tints["num_classes_without_items"] == 1
    assert tints["num_labels"] == 16
    precisions = tints["average_precisions"]
    assert precisions["unused"] is None
    assert precisions["green"] == precisions["blue"] == 1
    # The four red ones come first; the blue ones that are labelled red as well do not.
    assert 0.5 < precisions["red"] < 1
    mean = (precisions["red"] + 2) / 3
    assert tints["scores"]["mean_average_precision"]["value"] == pytest.approx(mean)
    # Each caption belongs to one picture; the 3 others of its colour tie with it or beat it.
    assert 0 < pictures["scores"]["text_to_media_recall@1"]["value"] < 1
    assert pictures["scores"]["text_to_media_recall@5"]["value"] == 1
    assert pictures["media_to_text_gallery"] == 26
    assert pictures["num_repeated_captions"] == 9
    # Two tones of each pitch, with equal captions: the tie is broken at chance.
    assert tones["scores"]["media_to_text_recall@1"]["value"] == pytest.approx(0.5)
    assert tones["scores"]["media_to_text_recall@2"]["value"] == pytest.approx(1)
    assert record["checkpoint"]["step"] == 40
    fingerprint = json.loads((config_path.parent / "sounds/dataset.json").read_text())[
        "fingerprint"
    ]
    assert tones["dataset"]["fingerprint"] == fingerprint

    printed = capsys.readouterr().out.rstrip().splitlines()
    assert printed[-1] == str(out / "report.html")
    table = (out / "results.md").read_text()
    assert table.strip() in "\n".join(printed)
    assert "neighbours: 2 of 12 test items have the same media file as one of 2 training" in table
    assert table.count("the same media file") == 3
    assert re.search(r"\| colors +\| top_1_accuracy +\| 100\.0 % +\| 75\.8 % to 100\.0 % ", table)


def test_report_is_complete_and_needs_no_network(config_path):
    assert evaluate(config_path) == 0
    page = (config_path.parent / "out/report.html").read_text()
    assert not re.findall(r"(?:src|href|url|xmlns)[^>]{0,12}https?:", page)
    assert set(re.findall(r'src="(data:[a-z/]+)', page)) == {"data:image/jpeg", "data:audio/mpeg"}
    for expected in (
        "top 1 accuracy",
        "media to text recall@5",
        "confusion matrix",
        "validation recall@1",
        "logit scale",
        "modality gap",
        "average: trained",
        "audio to image",
        "2 of 12 test items have the same media file as one of 2 training items",
        "train equal to test 2",
        'alt="spectrogram"',
        "a painting in red &lt;0&gt;",  # captions are escaped
        "a photo in {c}",
        json.loads((config_path.parent / "pictures/dataset.json").read_text())["fingerprint"],
    ):
        assert expected in page, expected
    assert len(page) < 2_000_000


def test_results_do_not_depend_on_batches_or_workers(config_path):
    scores = []
    for overrides in ((), ("batch_size=1",), ("batch_size=100", "workers=2")):
        assert evaluate(config_path, *overrides) == 0
        record = json.loads((config_path.parent / "out/results.json").read_text())
        scores.append({name: each["scores"] for name, each in record["evaluations"].items()})
    assert scores[0] == scores[1] == scores[2]


def test_dry_run_counts_without_loading_torch(config_path):
    code = (
        "import sys; from eval.evaluate import *\n"
        "status = run_command(EvaluateConfig, run=run, dry_run=dry_run, description='')\n"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    command = [sys.executable, "-c", code, str(config_path), "--dry-run"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "12 image items, 4 classes, 2 templates, 8 prompts" in finished.stdout
    assert "12 image items, 24 captions, 2 distractor captions, k [1, 5, 10]" in finished.stdout
    assert not (config_path.parent / "out").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_sample_that_cannot_be_decoded_stops_the_evaluation(config_path, capsys, workers):
    samples = [picture_sample("red", seed=n) for n in range(3)]
    samples[1]["png"] = samples[1]["png"][:60]
    folder = write_dataset(config_path.parent / "damaged", samples)
    override = f"evaluations.pictures.dataset={folder}"
    assert evaluate(config_path, override, f"workers={workers}") == 1
    error = capsys.readouterr().err
    assert "00000000.tar: sample 0001: .png cannot be decoded" in error
    assert "Traceback" not in error


def test_dataset_of_media_that_the_model_has_no_tower_for_is_refused(
    config_path, capsys, monkeypatch
):
    def load_image_model(folder, *, weights="plain"):
        model, transforms, tokenizer = load_toy_model(folder)
        return model, {"image": transforms["image"]}, tokenizer

    monkeypatch.setattr("eval.models.encoder.load_model", load_image_model)
    assert evaluate(config_path) == 1
    assert (
        "sounds contains audio, but the model has towers for ['image']" in capsys.readouterr().err
    )


def test_diverged_model_is_refused(config_path, capsys, monkeypatch):
    monkeypatch.setattr(
        ToyModel, "encode_text", lambda self, tokens: torch.full((len(tokens), 6), torch.nan)
    )
    assert evaluate(config_path) == 1
    assert "cues of associated: 3 of 3 embeddings contain NaN" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("checkpoint=absent",), ("checkpoint=absent", "--dry-run")])
def test_missing_checkpoint_is_named(config_path, capsys, arguments):
    assert evaluate(config_path, *arguments) == 1
    assert "absent: expected a run folder with a checkpoint" in capsys.readouterr().err


def test_per_sample_predictions_are_written_and_give_the_metrics_again(config_path):
    assert evaluate(config_path) == 0
    out = config_path.parent / "out"
    record = json.loads((out / "results.json").read_text())["evaluations"]
    names = sorted(path.name for path in (out / "predictions").iterdir())
    assert names == [
        "associated.parquet",
        "choice.parquet",
        "colors.parquet",
        "few.parquet",
        "grouped.parquet",
        "matched.audio_to_image.parquet",
        "matched.image_to_audio.parquet",
        "neighbours.parquet",
        "pictures.media_to_text.parquet",
        "pictures.text_to_media.parquet",
        "probed.parquet",
        "published.parquet",
        "tints.parquet",
        "tones.media_to_text.parquet",
        "tones.text_to_media.parquet",
    ]
    tables = {n: pyarrow.parquet.read_table(out / "predictions" / n).to_pydict() for n in names}
    colors, tints = tables["colors.parquet"], tables["tints.parquet"]
    assert colors["key"] == [f"{n:04d}" for n in range(12)]
    assert tables["published.parquet"]["predicted"] == colors["class_name"] == colors["predicted"]
    assert colors["rank"] == [1.0] * 12
    assert tints["class_names"][2] == ["red", "blue"]
    best = [row.index(max(row)) - 1 for row in tints["scores"]]
    assert best == [n % 3 for n in range(12)]
    by_text = tables["tones.text_to_media.parquet"]
    scores = record["tones"]["scores"]
    mean_rank = np.mean(by_text["rank"])
    assert scores["text_to_media_mean_rank"]["value"] == pytest.approx(mean_rank)
    assert by_text["caption"][:3] == ["a low tone", "a middle tone", "a high tone"]
    rows = (out / "results.csv").read_text().splitlines()
    assert rows[0] == "evaluation,metric,value,low,high,chance,num_queries,interval"
    assert any(row.startswith("colors,top_1_accuracy,1.0,") for row in rows)
    assert len(rows) == 1 + sum(len(each["scores"]) for each in record.values())


def test_a_missed_goal_fails_the_command_after_everything_is_written(config_path, capsys):
    reached = "evaluations.colors.goals={top_1_accuracy: 1.0}"
    assert evaluate(config_path, reached, "evaluations.tones.goals={text_to_media_mrr: 0.1}") == 0
    (config_path.parent / "out" / "report.html").unlink()
    missed = "evaluations.tones.goals={text_to_media_recall@1: 0.6, text_to_media_mean_rank: 1.2}"
    assert evaluate(config_path, reached, missed) == 1
    error = capsys.readouterr().err
    assert "metrics miss their goals:" in error
    assert "tones: text_to_media_recall@1: goal 0.6, found 0.5" in error
    assert "tones: text_to_media_mean_rank: goal 1.2, found 1.5" in error
    assert (config_path.parent / "out" / "report.html").exists()
    assert evaluate(config_path, "evaluations.colors.goals={accuracy: 1}") == 1
    assert "expected one of top_1_accuracy, top_5_accuracy" in capsys.readouterr().err
