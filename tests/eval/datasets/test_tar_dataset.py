"""Evaluation sets in clip_benchmark's layout, written with webdataset and with tarfile."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset

from data_prep.errors import InputError
from eval.config import EvaluateConfig
from eval.datasets.tar_dataset import TarDataset
from eval.tasks.readers import read_tasks
from tests.support.toy_evaluation import COLORS, picture_sample, sound_sample
from tests.support.toy_shards import jpeg


def write_set(folder, samples, *, kind=None, classes=None, samples_per_tar=2, **files):
    """Writes a set of samples; each sample maps extensions to contents."""
    (folder / "test").mkdir(parents=True)
    numbers = range(0, len(samples), samples_per_tar)
    for number, start in enumerate(numbers):
        with webdataset.TarWriter(str(folder / "test" / f"{number}.tar")) as tar:
            for place, members in enumerate(samples[start : start + samples_per_tar], start=start):
                tar.write({"__key__": f"s{place:07d}"} | members)
    texts = {"test/nshards.txt": str(len(numbers))} | files
    if kind is not None:
        texts["dataset_type.txt"] = kind
    if classes is not None:
        texts["classnames.txt"] = "".join(f"{name}\r\n" for name in classes)
        texts["zeroshot_classification_templates.txt"] = "a {c} picture\nin {c}\n\n"
    for name, content in texts.items():
        (folder / name).write_text(content, newline="")
    return folder


def tasks_of(folder, task, **section):
    values = {"task": task, "dataset": folder, **section}
    config = {"checkpoint": "run", "output": "out", "evaluations": {"set": values}}
    return read_tasks(EvaluateConfig.model_validate(config).evaluations).present


def test_a_classification_set_needs_nothing_but_its_folder(tmp_path):
    samples = [{"jpg": jpeg(n), "cls": str(n % 3).encode()} for n in range(23)]
    write_set(tmp_path / "set", samples, classes=COLORS, kind="classification\n")
    (task,) = tasks_of(tmp_path / "set", "zero_shot_classification")
    assert task.class_names == list(COLORS)
    assert task.prompts.templates == ["a {c} picture", "in {c}"]
    # Tars are in numerical order: 9.tar comes before 10.tar.
    assert task.targets.tolist() == [n % 3 for n in range(23)]
    dataset = task.dataset
    assert (dataset.info.media, len(dataset.tars)) == ("image", 12)
    assert [dataset.read_sample(n).members["jpg"] for n in range(23)] == [
        sample["jpg"] for sample in samples
    ]
    assert set(dataset.read_sample(5, fields=["cls"]).members) == {"cls"}
    assert dataset.fingerprint == TarDataset(tmp_path / "set").fingerprint


def test_other_splits_and_lists_of_ones_own_are_taken(tmp_path):
    folder = write_set(tmp_path / "set", [{"png": b"", "cls": b"1"}], classes=["cat", "dog"])
    (folder / "test").rename(folder / "train")
    (task,) = tasks_of(folder, "zero_shot_classification", split="train", class_names=["x", "y"])
    assert (task.class_names, task.targets.tolist()) == (["x", "y"], [1])


def test_a_multi_label_set_is_read(tmp_path):
    def flags(*values):
        file = io.BytesIO()
        np.save(file, np.array(values))
        return file.getvalue()

    samples = [{"png": b"", "npy": flags(1, 0, 1)}, {"png": b"", "npy": flags(0, 0, 0)}]
    folder = write_set(tmp_path / "set", samples, classes=COLORS, kind="multilabel")
    (task,) = tasks_of(folder, "multi_label_classification")
    np.testing.assert_array_equal(task.is_of_class, [[1, 0, 1], [0, 0, 0]])
    with pytest.raises(
        InputError, match=r"task: expected multi_label.*dataset_type.txt.*, found zero"
    ):
        tasks_of(folder, "zero_shot_classification")


def test_a_retrieval_set_has_a_caption_per_line(tmp_path):
    texts = ["a dog\na brown dog\n\nit says\\nwoof", "a cat"]
    samples = [{"webp": b"", "txt": text.encode()} for text in texts]
    folder = write_set(tmp_path / "set", samples, kind="retrieval")
    (task,) = tasks_of(folder, "retrieval")
    assert task.captions == ["a dog", "a brown dog", "it says\nwoof", "a cat"]
    assert task.media_of_text.tolist() == [0, 0, 0, 1]


def test_tars_of_sounds_alone_are_read_as_laion_makes_them(tmp_path):
    texts = [["a bell", "ringing"], ["rain"]]
    samples = [
        sound_sample("low", seed=n) | {"json": json.dumps({"text": text, "tag": []}).encode()}
        for n, text in enumerate(texts)
    ]
    folder = write_set(tmp_path / "set", samples)
    (task,) = tasks_of(folder / "test", "retrieval")
    assert task.captions == ["a bell", "ringing", "rain"]
    assert task.dataset.info.media == "audio"


@pytest.mark.parametrize(
    ("samples", "files", "message"),
    [
        (
            [{"jpg": b"", "cls": b"3"}],
            {},
            r"test/0\.tar: sample s0000000: \.cls: .* 0 to 2, found '3'",
        ),
        (
            [{"jpg": b"", "cls": b"0"}],
            {"test/nshards.txt": "4"},
            r"expected 4 tars, found 1; fetch",
        ),
        ([{"cls": b"0"}], {}, r"expected only images or only audio clips; .* members \['cls'\]"),
        ([{"jpg": b"", "wav": b"", "cls": b"0"}], {}, r"members \['cls', 'jpg', 'wav'\]"),
        ([{"jpg": b"", "txt": b"a"}], {}, r"sample s0000000: expected \"class_name\" in .json or"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, samples, files, message):
    write_set(tmp_path / "set", samples, classes=COLORS, **files)
    with pytest.raises(InputError, match=message):
        tasks_of(tmp_path / "set", "zero_shot_classification")


def test_what_is_missing_or_damaged_is_named(tmp_path):
    folder = write_set(tmp_path / "set", [picture_sample("red", seed=n) for n in range(2)])
    with pytest.raises(
        InputError, match=r"evaluations\.set\.class_names: .* no classnames\.txt in"
    ):
        tasks_of(folder, "zero_shot_classification")
    with pytest.raises(InputError, match="expected a subset of shards with an index"):
        tasks_of(folder, "retrieval", subset=tmp_path / "x.subset")
    tar = folder / "test" / "0.tar"
    with tarfile.open(tar, "w") as twice:
        for _ in range(2):
            twice.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(InputError, match=r"0\.tar: sample a: duplicate member \.jpg"):
        tasks_of(folder, "retrieval")
    tar.write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match=r"0\.tar: expected an uncompressed tar"):
        tasks_of(folder, "retrieval")
