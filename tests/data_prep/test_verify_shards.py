import io
import json
import random
import shutil
import tarfile

import pyarrow.parquet
import pytest

from data_prep.config import VerifyShards
from data_prep.errors import InputError
from data_prep.shards.folder import finish_dataset
from data_prep.shards.manifest import read_dataset_files
from data_prep.shards.writer import ShardWriter
from data_prep.verify_shards import verify_dataset, verify_shards
from tests.support.toy_pairs import contents, shard, write_pictures
from tests.support.toy_shards import (
    record_sidecars,
    toy_sample,
    write_rows,
    write_toy_dataset,
)


def verify(dataset, **fields):
    verify_shards(VerifyShards(dataset=dataset, **fields))


def problems_of(dataset, **fields):
    with pytest.raises(InputError) as caught:
        verify(dataset, **fields)
    return str(caught.value)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def find(path, text):
    return path.read_bytes().index(text)


def rewrite_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members_of(path):
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


TAR, IDX, PARQUET = "00000001.tar", "00000001.idx", "00000001.parquet"
# damage -> (what it does to the dataset, what the report says, what the advice begins with)
DAMAGES = {
    "payload bit": (
        lambda d: flip(d / TAR, 600),
        f"{TAR}: sample 000000000003: .jpg: CRC32 mismatch",
        "damaged tars: restore",
    ),
    "header bit": (
        lambda d: flip(d / TAR, find(d / TAR, b"000000000004.jpg") + 3),
        f"{TAR}: sample 000000000004: .jpg: no such member",
        "damaged tars: restore",
    ),
    "zeroed header": (
        lambda d: (d / TAR).write_bytes(bytes(512) + (d / TAR).read_bytes()[512:]),
        f"{TAR}: sample 000000000003: .jpg: no such member",
        "damaged tars: restore",
    ),
    "bit in the padding": (
        lambda d: flip(d / TAR, find(d / TAR, b"caption 4") + 100),
        f"{TAR}: sha256 mismatch with manifest.jsonl",
        "damaged tars: restore",
    ),
    "cut inside a payload": (
        lambda d: cut(d / TAR, 2048 + 600),
        f"{TAR}: sample 000000000005: .jpg: CRC32 mismatch",
        "damaged tars: restore",
    ),
    "cut at a member": (
        lambda d: cut(d / TAR, 1024 + 1024),
        f"{TAR}: sample 000000000005: .txt: no such member",
        "damaged tars: restore",
    ),
    "cut at the end blocks": (lambda d: cut(d / TAR, 1024), f"{TAR}: truncated", "damaged tars"),
    "empty tar": (lambda d: (d / TAR).write_bytes(b""), f"{TAR}: expected", "damaged tars"),
    "missing member": (
        lambda d: rewrite_tar(d / TAR, members_of(d / TAR)[:-1]),
        f"{TAR}: sample 000000000005: .txt: no such member",
        "damaged tars: restore",
    ),
    "wrong order": (
        lambda d: rewrite_tar(d / TAR, sorted(members_of(d / TAR), key=lambda m: m[0][-3:])),
        f"{TAR}: sample 000000000003: duplicate key, or its members are not adjacent",
        "damaged tars: restore",
    ),
    "duplicate key": (
        lambda d: rewrite_tar(d / TAR, members_of(d / TAR) + members_of(d / TAR)[:3]),
        f"{TAR}: sample 000000000003: duplicate key, or its members are not adjacent",
        "damaged tars: restore",
    ),
    "tar of another shard": (
        lambda d: shutil.copy(d / "00000000.tar", d / TAR),
        f"{TAR}: sha256 mismatch",
        "damaged tars: restore",
    ),
    "missing tar": (lambda d: (d / TAR).unlink(), f"{TAR}: missing", "missing tars: restore"),
    "index of another shard": (
        lambda d: shutil.copy(d / "00000000.idx", d / IDX),
        f"{IDX}: belongs to a different tar",
        "all samples are in their tars",
    ),
    "damaged index": (lambda d: cut(d / IDX, 4), f"{IDX}: damaged index", "all samples are in"),
    "bit in the index": (
        lambda d: flip(d / IDX, -1),
        f"{TAR}: sample 000000000005: .txt: CRC32 mismatch",
        "all samples are in their tars",
    ),
    "missing index": (lambda d: (d / IDX).unlink(), f"{IDX}: missing", "all samples are in"),
    "missing shard": (
        lambda d: [(d / name).unlink() for name in (TAR, IDX, PARQUET)],
        f"{TAR}: missing",
        "missing tars: restore",
    ),
    "extra shard": (
        lambda d: [shutil.copy(d / f"00000001.{e}", d / f"9.{e}") for e in ("tar", "idx")],
        "9: manifest.jsonl does not list this shard (.idx)",
        "shards that manifest.jsonl does not list",
    ),
    "extra tar": (
        lambda d: shutil.copy(d / TAR, d / "9.tar"),
        "9: manifest.jsonl does not list this shard (.tar without an index)",
        "shards that manifest.jsonl does not list",
    ),
    "manifest without a row": (
        lambda d: (d / "manifest.jsonl").write_text(
            "".join((d / "manifest.jsonl").read_text().splitlines(keepends=True)[:-1])
        ),
        "dataset.json: expected num_samples 6 (manifest.jsonl), found 8",
        "all samples are in their tars",
    ),
    "other totals": (
        lambda d: edit_json(d / "dataset.json", num_samples=9, rejected={}),
        "dataset.json: expected rejected {'empty_caption': 6} (the indexes), found {}",
        "all samples are in their tars",
    ),
    "missing Parquet": (lambda d: (d / PARQUET).unlink(), f"{PARQUET}: missing", "all samples"),
    "cut Parquet": (lambda d: cut(d / PARQUET, 9), f"{PARQUET}: damaged Parquet", "all samples"),
    "Parquet with other rows": (
        lambda d: write_rows(d / PARQUET, range(3, 5)),
        f"{PARQUET}: expected 3 rows (manifest.jsonl), found 2",
        "all samples are in their tars",
    ),
    "Parquet with other keys": (
        lambda d: write_rows(d / PARQUET, range(4, 7)),
        f"{PARQUET}: row 0: expected 000000000003 with",
        "all samples are in their tars",
    ),
    "Parquet without hashes": (
        lambda d: pyarrow.parquet.write_table(
            pyarrow.parquet.read_table(d / PARQUET).drop_columns(["sha256"]), d / PARQUET
        ),
        f"{PARQUET}: has no column sha256",
        "all samples are in their tars",
    ),
    "Parquet without keys": (
        lambda d: pyarrow.parquet.write_table(
            pyarrow.parquet.read_table(d / PARQUET).drop_columns(["key"]), d / PARQUET
        ),
        f"{PARQUET}: has no column key",
        "all samples are in their tars",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_found_and_named(dataset, damage):
    action, expected, advice = DAMAGES[damage]
    action(dataset)
    found = problems_of(dataset)
    assert expected in found
    assert any(line.startswith(advice) for line in found.splitlines())
    assert len(found.splitlines()) <= 12


@pytest.mark.parametrize(
    ("file", "expected"),
    [("manifest.jsonl", "manifest.jsonl: line 1: damaged"), ("dataset.json", "damaged")],
)
def test_damaged_closing_files_are_named(dataset, file, expected):
    flip(dataset / file, 0)
    found = problems_of(dataset)
    assert expected in found
    assert "repair=true" in found


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("manifest.jsonl", '"num_samples": 3', '"num_samples": "3"', "num_samples '3': Input"),
        ("manifest.jsonl", '"name": "00000001"', '"name": null', "name None: Input"),
        ("dataset.json", '"preparation": {}', '"preparation": 5', "preparation 5: Input"),
        ("dataset.json", '"num_shards": ', '"num_shards": 1.', "num_shards 1."),
    ],
)
def test_values_of_another_type_are_named_and_made_again(dataset, file, old, new, expected):
    before = contents(dataset)
    text = (dataset / file).read_text()
    assert old in text
    (dataset / file).write_text(text.replace(old, new))
    assert f"damaged ({expected}" in problems_of(dataset)
    verify(dataset, repair=True)
    after = contents(dataset)
    after.pop(f"damaged/{file}", None)  # kept if no checksum says what it was
    assert after == before


def test_another_kind_of_media_than_was_prepared_is_found_and_mended(tmp_path):
    dataset = shard(write_pictures(tmp_path, 3), tmp_path / "dataset")
    before = contents(dataset)
    edit_json(dataset / "dataset.json", media="audio")
    assert "expected media image (its preparation), found audio" in problems_of(dataset)
    verify(dataset, repair=True)
    assert contents(dataset) == before


def test_names_that_lead_out_of_the_folder_are_refused(dataset):
    text = (dataset / "manifest.jsonl").read_text()
    (dataset / "manifest.jsonl").write_text(text.replace("00000001", "../../x"))
    assert "line 2: damaged (name '../../x' points outside" in problems_of(dataset)


def test_an_intact_dataset_passes(dataset, capsys):
    verify(dataset, decode=True)
    assert "8 samples in 3 shards" in capsys.readouterr().out


def test_decoding_names_media_and_captions_that_cannot_be_read(tmp_path):
    dataset = write_toy_dataset(tmp_path / "d", has_parquet=False)
    writer = ShardWriter(dataset, "00000001")
    for key, members in [("a", {"jpg": b"text", "txt": b"x"}), ("b", {"txt": b"\xff"})]:
        writer.add(key, members=members)
    writer.finish(rejected={"empty_caption": 2}, marked={"image_too_small": 1})
    record_sidecars(dataset)
    verify(dataset, repair=True)
    found = problems_of(dataset, decode=True)
    assert "sample a: .jpg:" in found
    assert "sample b: .txt is not UTF-8" in found
    assert "sample b: contains no image" in found
    assert "exclude them with a subset" in found


def test_a_cut_tar_gives_a_few_lines(tmp_path):
    dataset = write_toy_dataset(tmp_path / "d", num_samples=60, samples_per_shard=60)
    cut(dataset / "00000000.tar", 60_000)
    found = problems_of(dataset)
    assert "sample 000000000041: .jpg: no such member" in found
    assert "the last is number 59" in found
    assert len(found.splitlines()) < 10


def test_many_problems_are_cut_to_twenty(tmp_path):
    dataset = write_toy_dataset(tmp_path / "d", num_samples=30, samples_per_shard=1)
    for path in dataset.glob("*.tar"):
        path.unlink()
    assert problems_of(dataset).count(": missing") == 20
    assert "and 10 more" in problems_of(dataset)


def test_a_shard_that_is_listed_twice_is_found(dataset):
    for suffix in ("tar", "idx", "parquet"):
        shutil.copy(dataset / f"00000001.{suffix}", dataset / f"9.{suffix}")
    finish_dataset(
        dataset, ["00000000", "00000001", "00000002", "9"], media="image", preparation={}
    )
    assert "9: has the same bytes as shard 00000001" in problems_of(dataset)


def test_a_dataset_of_another_version_is_refused(dataset):
    edit_json(dataset / "dataset.json", format_version=99)
    assert "expected format version 1 or 2, found 99" in problems_of(dataset)


def test_advice_names_make_shards_only_where_it_made_the_dataset(tmp_path):
    made = write_toy_dataset(tmp_path / "d", preparation={"command": "make_shards", "config": {}})
    flip(made / TAR, 600)
    assert "move each listed shard out of the folder and run make_shards again" in problems_of(made)


@pytest.mark.parametrize("file", ["tar", "idx", "parquet", "manifest.jsonl", "dataset.json"])
def test_every_flipped_bit_is_found(tmp_path, file):
    """Tests 250 bytes of large files and every byte of the others; the bit is random."""
    generator = random.Random(0)
    dataset = write_toy_dataset(tmp_path / "d", num_samples=3)
    path = dataset / (file if "." in file else f"00000000.{file}")
    content = path.read_bytes()
    places = range(len(content))
    for place in generator.sample(places, 250) if file in ("tar", "parquet") else places:
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            info, manifest = read_dataset_files(dataset)
            found = verify_dataset(VerifyShards(dataset=dataset), info, manifest)
        except InputError as error:
            found = [error]
        assert found, f"{file}: byte {place}: {content[place]} -> {changed[place]}"


def test_samples_are_those_of_the_toy(intact):
    names = [f"{key}.{name}" for n in range(3, 6) for key, m in [toy_sample(n)] for name in m]
    assert sorted(names) == sorted(name for name, _ in members_of(intact / TAR))
