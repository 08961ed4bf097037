import hashlib
import json
import pickle
import random

import numpy as np
import pytest

from data_prep.modalities.modality import Modalities, Modality
from data_prep.modalities.vectors import to_npy
from data_prep.shards.dataset import Dataset
from data_prep.shards.folder import finish_dataset
from data_prep.shards.index import ShardIndex
from data_prep.shards.sample import BadShardError, CorruptSampleError, Sample
from data_prep.shards.sample_contents import contents_of
from data_prep.shards.writer import ShardWriter
from tests.support.toy_modalities import FOUR, SUBSETS, members_of, vector, write_subsets

# Computed by the version before modalities had names.
PAIR_FILES = {
    "00000000.idx": "03ed4c91ec4acb2082a8c9e64be487f0e1c35cd53770a5727d59a9e0399b361d",
    "00000000.tar": "25317fdcee4ef1e2c82f06af326108c9c0510eefd9ed0718f3ba1fe66b6eae31",
    "00000001.idx": "48fb641a30752b9c76077841af6dd390d52335bad624086257ec81d11caf496f",
    "00000001.tar": "b628b2050f690d1832be58994d045a87e63300b92400de73f7531ba2d14c91fd",
    "dataset.json": "fb2b33230457bdd60f51e2cdba762b8d81f66032700824abf258601a77a7caa8",
    "manifest.jsonl": "3572f8f33156e8738727b394e5bb55a4f50a9c186808fc721b12e4e5cf166eeb",
}


@pytest.fixture(scope="module")
def subsets(tmp_path_factory):
    return write_subsets(tmp_path_factory.mktemp("subsets") / "four")


def write_pairs(folder):
    for shard in range(2):
        writer = ShardWriter(folder, f"{shard:08d}")
        for number in range(3):
            members = {"jpg": bytes([number, shard]) * 300, "txt": f"caption {number}".encode()}
            if number == 1:
                members["json"] = b'{"captions": ["a", "b"]}'
            writer.add(f"{shard}{number:011d}", members=members)
        writer.finish(rejected={"empty_caption": shard + 1}, marked={"image_too_small": 1})
    preparation = {"command": "make_shards"}
    settings = {"num_pairs": 9, "isopair_version": "0.1.0", "preparation": preparation}
    finish_dataset(folder, ["00000000", "00000001"], media="image", **settings)


def test_files_of_pairs_have_the_same_bytes_as_before_and_are_read_by_modality(tmp_path):
    write_pairs(tmp_path)
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}
    assert found == PAIR_FILES
    dataset = Dataset(tmp_path)
    assert dataset.modalities.is_pair and list(dataset.modalities) == ["image", "text"]
    assert dataset.modalities["text"] == Modality("text", num_samples=6)
    contents = dataset.read_modalities(1)
    assert (contents.media, contents.extensions) == ({"image": b"\1\0" * 300}, {"image": "jpg"})
    assert contents.texts == {"text": ["a", "b"]}
    assert dataset.read_modalities(2, names=["text"]).texts == {"text": ["caption 2"]}
    assert dataset.presence(1).tolist() == [3, 3, 3]


def test_every_subset_is_read_as_it_was_written(subsets):
    dataset = pickle.loads(pickle.dumps(Dataset(subsets)))
    assert len(dataset) == len(SUBSETS) == 15
    presence = np.concatenate([dataset.presence(shard) for shard in range(4)])
    for ordinal, subset in enumerate(SUBSETS):
        contents, members = dataset.read_modalities(ordinal), members_of(ordinal, subset)
        assert contents.present == set(subset) == set(FOUR.names_in(int(presence[ordinal])))
        for name, extension in (("scan", "scan.png"), ("audio", "flac")):
            assert contents.media.get(name) == members.get(extension)
        assert contents.texts == ({"title": [f"title {ordinal}"]} if "title" in subset else {})
        if "values" in subset:
            assert contents.vectors["values"].tobytes() == vector(ordinal).tobytes()
        for wanted in SUBSETS:
            shard, position = dataset.locate(ordinal)
            assert dataset.has_all(shard, wanted)[position] == set(wanted).issubset(subset)


def test_only_members_of_wanted_modalities_are_read(subsets):
    dataset = Dataset(subsets)
    for wanted in SUBSETS:
        contents = dataset.read_modalities(14, names=wanted)
        assert contents.present == set(wanted)
    sample = dataset.read_sample(14, fields=dataset._fields_of(frozenset(["values"])))
    assert list(sample.members) == ["values.npy"]
    with pytest.raises(KeyError):
        dataset.read_modalities(0, names=["image"])


def test_counts_and_statistics_are_those_of_numpy_over_the_samples_that_have_them(subsets):
    modalities = Dataset(subsets).modalities
    having = {name: [n for n, subset in enumerate(SUBSETS) if name in subset] for name in FOUR}
    assert {name: modalities[name].num_samples for name in FOUR} == {
        name: len(numbers) for name, numbers in having.items()
    }
    rows = np.stack([vector(number) for number in having["values"]]).astype(np.float64)
    np.testing.assert_allclose(modalities["values"].mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(modalities["values"].std, rows.std(axis=0), rtol=1e-12)
    assert modalities["values"].num_rows == len(rows) == 8


def test_statistics_do_not_depend_on_the_samples_per_shard_beyond_rounding(tmp_path, subsets):
    expected = Dataset(subsets).modalities["values"]
    for size in (1, 3, 15):
        found = Dataset(write_subsets(tmp_path / str(size), samples_per_shard=size)).modalities
        np.testing.assert_allclose(found["values"].mean, expected.mean, rtol=1e-14)
        np.testing.assert_allclose(found["values"].std, expected.std, rtol=1e-14)


def test_presence_of_random_datasets_is_that_of_their_samples(tmp_path):
    for seed in range(3):
        chosen = random.Random(seed).choices(SUBSETS, k=20)
        folder = write_subsets(tmp_path / str(seed), subsets=chosen, samples_per_shard=7)
        dataset = Dataset(folder)
        masks = np.concatenate([dataset.presence(shard) for shard in range(3)])
        assert masks.tolist() == [FOUR.mask_of(subset) for subset in chosen]


def test_an_index_with_modalities_survives_and_every_damage_is_detected(subsets):
    content = (subsets / "00000003.idx").read_bytes()
    index = ShardIndex.parse(content, "x")
    assert index.to_bytes() == content
    assert tuple(index.modalities) == tuple(FOUR) and index.vector_sums["values"].num_rows == 3
    for size in range(0, len(content), 7):
        with pytest.raises(ValueError, match="index"):
            ShardIndex.parse(content[:size], "x")
    with pytest.raises(ValueError, match="damaged index"):
        ShardIndex.parse(content + b"\0", "x")
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match="index"):
            ShardIndex.parse(bytes(damaged), "x")


def test_two_texts_and_captions_are_kept_apart():
    modalities = Modalities({name: Modality("text") for name in ("text", "caption", "ocr")})

    def texts(metadata=None, **members):
        if metadata is not None:
            members["json"] = json.dumps(metadata).encode()
        return contents_of(Sample("x.tar", "k", members), modalities).texts

    assert texts({"caption": "a", "ocr": ["b", " c ", ""]}) == {"caption": ["a"], "ocr": ["b", "c"]}
    assert texts({"caption": "a", "captions": ["d"]}) == {"caption": ["a"], "text": ["d"]}
    assert texts({"text": "e", "ocr": ""}, txt=b"f") == {"text": ["e"]}
    assert texts(None, txt=b"f", **{"ocr.txt": b"g\n"}) == {"text": ["f"], "ocr": ["g"]}
    assert texts({"caption": None, "ocr": []}) == {}
    for metadata in ({"ocr": 3}, {"ocr": ["a", 3]}, {"ocr": {"a": 1}}, [], "a"):
        with pytest.raises(CorruptSampleError, match=r"x\.tar: sample k: \.json"):
            texts(metadata)


def test_plain_captions_come_from_the_keys_of_pairs():
    modalities = Modalities({"text": Modality("text"), "title": Modality("text")})
    for key in ("captions", "caption", "text"):
        sample = Sample("x.tar", "k", {"json": json.dumps({key: "a", "labels": [1]}).encode()})
        assert contents_of(sample, modalities).texts == {"text": ["a"]}
    labelled = Sample("x.tar", "k", {"json": b'{"title": "t", "labels": {"side": "left"}}'})
    assert contents_of(labelled, modalities).labels == {"side": "left"}


def test_bad_vectors_and_members_that_differ_from_the_index_are_corrupt(tmp_path):
    wide = Modalities({"values": Modality("vector", width=2), "title": Modality("text")})
    cases = {"vector": to_npy(np.ones(3)), "not .npy": b"x", "absent": None}
    writer = ShardWriter(tmp_path, "00000000", modalities=wide)
    good = contents_of(Sample("", "", {"values.npy": to_npy(np.ones(2))}), wide)
    for key, content in cases.items():
        members = {"title.txt": b"a"} if content is None else {"values.npy": content}
        writer.add(key.replace(" .", "_"), members=members, contents=good)
    writer.finish()
    finish_dataset(tmp_path, ["00000000"], modalities=wide, preparation={})
    dataset = Dataset(tmp_path)
    messages = (r"expected \[2\], found \[3\]", "npy", "title, values: the members differ")
    for ordinal, message in enumerate(messages):
        with pytest.raises(CorruptSampleError, match=message):
            dataset.read_modalities(ordinal)


def test_a_damaged_index_is_no_source_of_presence(tmp_path):
    folder = write_subsets(tmp_path / "four")
    path = folder / "00000001.idx"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(BadShardError, match="damaged index"):
        Dataset(folder).presence(1)
