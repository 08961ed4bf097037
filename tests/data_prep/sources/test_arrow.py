import json

import datasets
import fsspec
import numpy as np
import pyarrow
import pytest

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.sources.formats import input_state
from tests.support.toy_sources import contents_of, pairs_of, source_of

IMAGE = Columns(media="image", class_name="label")


def pictures(number):
    pixels = np.random.default_rng(0).integers(0, 255, (number, 6, 5, 3)).astype(np.uint8)
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.List(datasets.Value("string")),
        label=datasets.ClassLabel(names=["cat", "dog"]),
        score=datasets.Value("float32"),
    )
    values = {
        "image": list(pixels),
        "caption": [[f"caption {n}", f"other {n}"] for n in range(number)],
        "label": [n % 2 for n in range(number)],
        "score": [n / 2 for n in range(number)],
    }
    return datasets.Dataset.from_dict(values, features=features)


def expected_pairs(dataset):
    return [(text, ["cat", "dog"][row["label"]]) for row in dataset for text in row["caption"]]


def expected_contents(dataset):
    rows = dataset.cast_column("image", datasets.Image(decode=False))
    return [row["image"]["bytes"] for row in rows for _ in row["caption"]]


def test_a_saved_dataset_is_read_as_datasets_loads_it(tmp_path):
    pictures(2500).shuffle(seed=1).select(range(2400)).save_to_disk(tmp_path / "d", num_shards=3)
    dataset = datasets.load_from_disk(tmp_path / "d")
    pairs = pairs_of(tmp_path / "d", columns=IMAGE, keep_columns=("score",))
    assert [(pair.caption, pair.class_name) for pair in pairs] == expected_pairs(dataset)
    assert [pair.row for pair in pairs] == [n // 2 + 1 for n in range(4800)]
    assert json.loads(pairs[0].kept) == {"score": dataset[0]["score"]}
    assert contents_of(tmp_path / "d", pairs, columns=IMAGE) == expected_contents(dataset)
    chosen = np.random.default_rng(0).integers(0, 4800, 50).tolist()
    found = contents_of(tmp_path / "d", [pairs[n] for n in chosen], columns=IMAGE)
    contents = expected_contents(dataset)
    assert found == [contents[n] for n in chosen]


def test_bytes_that_are_absent_leave_the_path(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"A")
    values = [{"bytes": b"inner", "path": "x.jpg"}, {"bytes": None, "path": None}, None]
    values.append({"bytes": None, "path": str(tmp_path / "a.jpg")})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(values, kind), "caption": list("abcd")})
    datasets.Dataset(table).save_to_disk(tmp_path / "d")
    columns = Columns(media="image")
    pairs = pairs_of(tmp_path / "d", columns=columns)
    reasons = [None, "missing_media_path", "missing_media_path", None]
    assert [pair.reason for pair in pairs] == reasons
    good = [pairs[0], pairs[3]]
    assert contents_of(tmp_path / "d", good, columns=columns) == [b"inner", b"A"]


def test_a_column_of_sounds_is_read(tmp_path):
    values = [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": None}]
    dataset = datasets.Dataset.from_dict({"audio": values, "caption": ["x", "y"]})
    dataset.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(tmp_path / "d")
    found = contents_of(tmp_path / "d", media="audio", columns=Columns(media="audio"))
    assert found == [b"one", b"two"]


def test_a_saved_dataset_behind_a_url_reads_the_same(tmp_path):
    pictures(5).save_to_disk(tmp_path / "d", num_shards=2)
    files = {f"/saved/{path.name}": path.read_bytes() for path in (tmp_path / "d").iterdir()}
    fsspec.filesystem("memory").pipe(files)
    url = "memory://saved"
    assert pairs_of(url, columns=IMAGE) == pairs_of(tmp_path / "d", columns=IMAGE)
    assert contents_of(url, columns=IMAGE) == contents_of(tmp_path / "d", columns=IMAGE)
    assert input_state(source_of(url)) == input_state(source_of(tmp_path / "d"))


def test_a_folder_of_several_splits_is_refused_with_their_names(tmp_path):
    splits = datasets.DatasetDict(train=pictures(2), test=pictures(1))
    splits.save_to_disk(tmp_path / "d")
    with pytest.raises(InputError, match="several splits: train, test; append the name of one"):
        pairs_of(tmp_path / "d", columns=IMAGE)
    assert len(pairs_of(tmp_path / "d" / "test", columns=IMAGE)) == 2


def test_an_indices_mapping_is_refused(tmp_path):
    pictures(2).save_to_disk(tmp_path / "d")
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "d" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="flatten_indices"):
        pairs_of(tmp_path / "d", columns=IMAGE)


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path):
    pictures(20).save_to_disk(tmp_path / "d")
    path = tmp_path / "d" / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 8, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"data-00000-of-00001\.arrow: expected a readable"):
            pairs_of(tmp_path / "d", columns=IMAGE)
    path.unlink()
    with pytest.raises(InputError, match=r"data-00000-of-00001\.arrow: expected a readable"):
        pairs_of(tmp_path / "d", columns=IMAGE)


def test_a_folder_without_a_state_is_no_saved_dataset(tmp_path):
    with pytest.raises(InputError, match=r"found no state\.json"):
        pairs_of(tmp_path, format="huggingface")
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(InputError, match=r"state\.json: damaged"):
        pairs_of(tmp_path)
