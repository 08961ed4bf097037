import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from data_prep.config_file import read_config
from data_prep.errors import (
    ConfigError,
    InputError,
)
from data_prep.shards.manifest import read_dataset_files
from data_prep.shards.subset import Subset
from eval.config import EvaluateConfig
from eval.prompts.class_prompts import read_lines
from eval.tasks.readers import read_tasks as read_all_tasks
from tests.support.toy_evaluation import write_dataset


def read_tasks(config):
    return read_all_tasks(config.evaluations).present


def config_of(folder, **section):
    return EvaluateConfig.model_validate(
        {
            "checkpoint": "run",
            "output": "out",
            "evaluations": {"toy": {"dataset": folder, **section}},
        }
    )


def classification(folder, **changes):
    section = {"class_names": ["cat", "dog"], "prompt_templates": ["a {}"]}
    return config_of(folder, **{"task": "zero_shot_classification"} | section | changes)


def labelled(name):
    return {"json": json.dumps({"class_name": name}).encode()}


def test_classes_come_from_json_or_an_index(tmp_path):
    write_dataset(tmp_path / "toy", [labelled("dog"), {"cls": b"0\n"}, labelled("cat")])
    (task,) = read_tasks(classification(tmp_path / "toy"))
    np.testing.assert_array_equal(task.targets, [1, 0, 0])
    assert task.description() == (
        "toy: zero-shot classification, 3 image items, 2 classes, 1 templates, 2 prompts "
        f"({tmp_path / 'toy'})"
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (labelled("dgo"), r"00000000\.tar: sample 0001: class 'dgo' .* nearest is 'dog'"),
        ({"cls": b"2"}, r"sample 0001: \.cls: expected an index from 0 to 1, found '2'"),
        ({"cls": b"-1"}, r"found '-1'"),
        ({"txt": b"a dog"}, r"sample 0001: expected \"class_name\" .* members: \['txt'\]"),
        ({"json": b"["}, r"sample 0001: \.json is not JSON"),
    ],
)
def test_sample_without_a_known_class_is_named(tmp_path, members, message):
    write_dataset(tmp_path / "toy", [labelled("dog"), members])
    with pytest.raises(InputError, match=message):
        read_tasks(classification(tmp_path / "toy"))


def test_classes_of_one_name_are_distinguished_by_their_index(tmp_path):
    names = ["dog", "cat", "dog"]
    write_dataset(tmp_path / "toy", [{"cls": b"2"}, {"cls": b"0"}])
    (task,) = read_tasks(classification(tmp_path / "toy", class_names=names))
    assert (task.targets.tolist(), task.class_labels) == ([2, 0], ["dog (0)", "cat", "dog (2)"])
    write_dataset(tmp_path / "named", [labelled("dog")])
    with pytest.raises(InputError, match=r"sample 0000: class 'dog' is a duplicate"):
        read_tasks(classification(tmp_path / "named", class_names=names))


def test_every_caption_belongs_to_its_item(tmp_path):
    two = {"json": json.dumps({"captions": ["a", "b"]}).encode()}
    write_dataset(tmp_path / "toy", [two, {"txt": b"c"}])
    distractors = tmp_path / "others.txt"
    distractors.write_text("d\n\ne\n")
    (task,) = read_tasks(
        config_of(tmp_path / "toy", task="retrieval", distractor_captions=distractors)
    )
    assert task.captions == ["a", "b", "c"]
    np.testing.assert_array_equal(task.media_of_text, [0, 0, 1])
    assert task.distractor_captions == ["d", "e"]


def test_a_subset_is_measured_as_if_nothing_else_were_there(tmp_path):
    samples = [{"txt": text} for text in (b"a", b" ", b"c", b"d")]
    folder = write_dataset(tmp_path / "toy", samples)
    kept = np.array([True, False, False, True])
    info, _ = read_dataset_files(folder)
    subset = Subset.from_bitmap(info, kept, preparation={})
    subset.write(tmp_path / "some.subset")
    section = {"task": "retrieval", "subset": tmp_path / "some.subset"}
    (task,) = read_tasks(config_of(folder, **section))
    assert task.captions == ["a", "d"]
    np.testing.assert_array_equal(task.media_of_text, [0, 1])
    assert task.dataset.fingerprint == f"{info.fingerprint} subset {subset.fingerprint}"
    assert "2 image items, 2 captions" in task.description()
    other = write_dataset(tmp_path / "other", samples[:2])
    with pytest.raises(InputError, match=r"some\.subset: belongs to a dataset of 4 samples"):
        read_tasks(config_of(other, **section))


def test_too_many_equal_captions_or_values_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.metrics.relevance.MAX_PAIRS", 10)
    kind = json.dumps({"kind": "same", "captions": ["same"]}).encode()
    pictures = write_dataset(tmp_path / "pictures", [{"json": kind}] * 4)
    tones = write_dataset(tmp_path / "tones", [{"json": kind}] * 4, media="audio")
    (task,) = read_tasks(config_of(pictures, task="retrieval", equal_captions="merged"))
    with pytest.raises(
        InputError, match=r"evaluations\.toy: expected at most 10 .* found at .* 16"
    ):
        _ = task.relevance
    section = {"task": "media_retrieval", "other": str(tones), "pair_by": "kind"}
    with pytest.raises(InputError, match=r"expected at most 10 .* found at .* 16.*remove pair_by"):
        read_tasks(config_of(pictures, **section))


def test_sample_without_caption_is_named(tmp_path):
    write_dataset(tmp_path / "toy", [{"txt": b"a"}, {"txt": b" "}])
    with pytest.raises(InputError, match="sample 0001: expected a caption"):
        read_tasks(config_of(tmp_path / "toy", task="retrieval"))


def test_empty_dataset_is_refused(tmp_path):
    write_dataset(tmp_path / "toy", [])
    with pytest.raises(InputError, match="found an empty dataset"):
        read_tasks(config_of(tmp_path / "toy", task="retrieval"))


def test_text_files_may_come_from_any_system(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbfcat\r\n\r\n dog \r\n")
    assert read_lines(path) == ["cat", "dog"]
    path.write_text("\n")
    with pytest.raises(InputError, match="found none"):
        read_lines(path)
    with pytest.raises(InputError, match=r"absent\.txt: expected a text file"):
        read_lines(tmp_path / "absent.txt")


def test_a_blank_line_never_shifts_the_classes_after_it(tmp_path):
    path = tmp_path / "classnames.txt"
    for lines in itertools.product(["cat", "dog", "", " "], repeat=3):
        path.write_bytes("\r\n".join([*lines, ""]).encode())
        named = [number for number, line in enumerate(lines) if line.strip()]
        if not named:
            continue
        first_blank = next((n for n, line in enumerate(lines) if not line.strip()), 3)
        for source in (path, list(lines)):
            if first_blank > named[-1]:
                expected = [line for line in lines if line.strip()]
                assert read_lines(source, are_numbered=True) == expected
            else:
                with pytest.raises(InputError, match=f"line {first_blank + 1} is blank"):
                    read_lines(source, are_numbered=True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{task: retrieval, dataset: d, class_names: [a]}", "unknown key 'class_names'"),
        ("{task: retrieve, dataset: d}", "retrieval"),
        ("{task: retrieval, dataset: d, ks: [5, 1]}", "ascending numbers without duplicates"),
        ("{task: zero_shot_classification}", "this key is required"),
    ],
)
def test_config_names_what_is_wrong(tmp_path, lines, message):
    path = tmp_path / "config.yaml"
    path.write_text(f"checkpoint: c\noutput: o\nevaluations:\n  toy: {lines}\n")
    with pytest.raises(ConfigError, match=message):
        read_config(EvaluateConfig, path)


def test_a_probe_trains_on_other_items_and_validates_on_some_of_them(tmp_path):
    train = [labelled(("cat", "dog")[n % 2]) for n in range(40)]
    write_dataset(tmp_path / "train", train)
    write_dataset(tmp_path / "test", [labelled("dog"), labelled("cat")])
    section = {"task": "linear_probe", "class_names": ["cat", "dog"]}
    config = config_of(tmp_path / "test", **section, train=tmp_path / "train")
    (task,) = read_tasks(config)
    assert task.targets.tolist() == [1, 0]
    indices = sorted([*task.train.indices.tolist(), *task.validation.indices.tolist()])
    assert indices == list(range(40))
    assert 0 < len(task.validation.indices) < 10
    for items in (task.train, task.validation):
        np.testing.assert_array_equal(items.targets, items.indices % 2)
    assert f"{len(task.train.indices)} training items" in task.description()
    write_dataset(tmp_path / "val", [labelled("dog"), labelled("cat"), labelled("cat")])
    separate = config_of(
        tmp_path / "test", **section, train=tmp_path / "train", validation=tmp_path / "val"
    )
    (task,) = read_tasks(separate)
    assert (len(task.train.indices), task.validation.targets.tolist()) == (40, [1, 0, 0])
    same = config_of(tmp_path / "test", **section, train=tmp_path / "test", train_split="test")
    with pytest.raises(InputError, match="expected training items other than the test items"):
        read_tasks(same)


def npy_of(values):
    file = io.BytesIO()
    np.save(file, np.array(values))
    return {"npy": file.getvalue()}


def test_several_classes_come_from_json_or_an_array(tmp_path):
    names = {"json": json.dumps({"class_names": ["dog", "cat"]}).encode()}
    none = {"json": json.dumps({"class_names": []}).encode()}
    write_dataset(tmp_path / "toy", [names, npy_of([0, 1]), none])
    (task,) = read_tasks(classification(tmp_path / "toy", task="multi_label_classification"))
    np.testing.assert_array_equal(task.is_of_class, [[1, 1], [0, 1], [0, 0]])
    assert "2 classes, 1.00 per item" in task.description()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (npy_of([0, 1, 0]), r"sample 0001: \.npy: expected 2 numbers, each 0 or 1, found .*3"),
        (npy_of([0, 2]), r"found shape \(2,\) with values \[0, 2\]"),
        ({"npy": b"no array"}, r"sample 0001: \.npy: not an array"),
        ({"json": b'{"class_names": ["cow"]}'}, r"sample 0001: classes \['cow'\] are not among"),
        ({"txt": b"a dog"}, r"sample 0001: expected \"class_names\" in .json or one number"),
    ],
)
def test_a_sample_whose_classes_do_not_fit_is_named(tmp_path, members, message):
    write_dataset(tmp_path / "toy", [npy_of([0, 1]), members])
    with pytest.raises(InputError, match=message):
        read_tasks(classification(tmp_path / "toy", task="multi_label_classification"))


def test_equal_captions_are_merged_where_asked(tmp_path):
    write_dataset(tmp_path / "toy", [{"txt": b"a dog"}, {"txt": b"a cat"}, {"txt": b"a dog"}])
    own, merged = (
        read_tasks(config_of(tmp_path / "toy", task="retrieval", equal_captions=each))[0]
        for each in ("own", "merged")
    )
    assert own.relevance.media_of(0).tolist() == [0]
    assert merged.relevance.media_of(0).tolist() == [0, 2]
    assert merged.relevance.texts_of(1).tolist() == [1]


def test_a_config_is_checked_without_heavy_libraries(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("checkpoint: c\noutput: o\nevaluations: {toy: {task: retrieval, other: d}}\n")
    code = (
        "import sys; from eval.evaluate import *\n"
        "status = run_command(EvaluateConfig, run=run, dry_run=dry_run, description='')\n"
        "heavy = {'torch', 'transformers', 'timm', 'open_clip', 'matplotlib', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, str(path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2, finished.stderr
    assert "evaluations.toy: unknown key 'other'" in finished.stderr
