import io
import json
import tarfile

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.folder import finish_dataset
from data_prep.shards.subset import Subset
from data_prep.shards.writer import ShardWriter
from data_prep.sources.formats import input_state
from tests.support.toy_sources import contents_of, pairs_of, source_of


def write_tar(path, members):
    """Writes a tar of (name, content), in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def captions(pairs):
    return [(pair.row, pair.media, pair.caption) for pair in pairs]


# ------------------------------------------------------------------------ tars without index


def write_img2dataset(folder):
    """Writes tars with jpg, txt and json per sample, and statistics, as img2dataset does."""
    folder.mkdir()
    for shard in range(2):
        with webdataset.ShardWriter(str(folder / f"{shard:05d}-%d.tar"), verbose=0) as writer:
            for n in range(3):
                key = f"{shard:05d}{n:04d}"
                values = {"caption": f"caption {key}", "url": f"https://h/{n}", "key": key}
                values |= {"status": "success", "width": 10 * n, "exif": "{}"}
                sample = {"__key__": key, "jpg": b"media " + key.encode(), "json": values}
                writer.write(sample | {"txt": f"caption {key}"})
        (folder / f"{shard:05d}.parquet").write_bytes(b"not looked at")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def test_tars_as_img2dataset_writes_them_are_read_as_webdataset_reads_them(tmp_path):
    folder = write_img2dataset(tmp_path / "d")
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    expected = list(webdataset.WebDataset(urls, shardshuffle=False))
    pairs = pairs_of(folder, columns=Columns(uid="key"), keep_columns=("width", "url"))
    assert [pair.uid for pair in pairs] == [sample["__key__"] for sample in expected]
    assert [pair.caption.encode() for pair in pairs] == [sample["txt"] for sample in expected]
    assert contents_of(folder) == [sample["jpg"] for sample in expected]
    assert [json.loads(pair.kept)["width"] for pair in pairs] == [0, 10, 20, 0, 10, 20]
    assert captions(pairs)[3] == (4, "00001-0.tar", "caption 000010000")


def test_laions_sounds_with_texts_in_json_are_read(tmp_path):
    members = []
    for n in range(2):
        texts = [f"one {n}", f"two {n}"] if n else "only one"
        values = {"text": texts, "tag": ["x"], "original_data": {"licence": "CC0"}}
        members += [(f"{n}.flac", b"sound %d" % n), (f"{n}.json", json.dumps(values).encode())]
    path = write_tar(tmp_path / "0.tar", members)
    pairs = pairs_of(path, media="audio", keep_columns=("original_data",))
    assert captions(pairs) == [
        (1, "0.tar", "only one"),
        (2, "0.tar", "one 1"),
        (2, "0.tar", "two 1"),
    ]
    assert json.loads(pairs[0].kept) == {"original_data": {"licence": "CC0"}}
    assert contents_of(path, media="audio") == [b"sound 0", b"sound 1", b"sound 1"]


def test_every_sample_that_is_not_whole_has_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.tars.MAX_SIDECAR_BYTES", 100)
    members = [
        ("good.seg.png", b"a mask"),
        ("good.JPG", b"media"),
        ("good.txt", b"fine"),
        ("no_media.txt", b"x"),
        ("other_kind.wav", b"x"),
        ("other_kind.txt", b"x"),
        ("no_caption.jpg", b"x"),
        ("not_utf8.jpg", b"x"),
        ("not_utf8.txt", b"\xe9"),
        ("not_json.jpg", b"x"),
        ("not_json.json", b"{"),
        ("twice.jpg", b"x"),
        ("twice.jpg", b"x"),
        ("large.jpg", b"x"),
        ("large.txt", b"x" * 101),
        ("no_bytes.jpg", b""),
        ("no_bytes.txt", b"x"),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    pairs = pairs_of(path)
    assert [pair.reason for pair in pairs] == [
        None,
        "no_media_member",
        "no_media_member",
        "missing_caption",
        "not_utf8",
        "not_json",
        "duplicate_member",
        "unreadable_caption",
        None,
    ]
    good = [pair for pair in pairs if pair.reason is None]
    assert contents_of(path, good) == [b"media", "empty_file"]
    assert contents_of(path, good, max_media_bytes=4) == ["too_large", "empty_file"]


def test_a_tar_that_is_cut_short_anywhere_names_itself_and_what_to_do(tmp_path):
    members = [(f"{n}.{e}", b"x" * 700) for n in range(3) for e in ("jpg", "txt")]
    path = write_tar(tmp_path / "0.tar", members)
    content = path.read_bytes()
    for length in (512 * 3 * 6 + 512, 512 * 3 * 6, 512 * 3 * 4, 512 * 3 * 4 + 700, 100):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"0\.tar: .*restore this tar, or exclude it"):
            pairs_of(path)


def test_any_name_that_is_not_dangerous_is_read(tmp_path):
    keys = ["plain", "3\u202fPM", "caf\udce9", "a\u200db", "folder/\u202ea"]
    members = [(f"{key}.{ext}", b"x") for key in keys for ext in ("jpg", "txt")]
    path = write_tar(tmp_path / "0.tar", [("Icon\r", b""), *members])
    assert [pair.reason for pair in pairs_of(path)] == [None] * len(keys)


# In .json, in .txt, taken if .json is preferred, taken if .txt is preferred, whether they differ
CAPTIONS = [
    ({"caption": "old"}, "new", ["old"], ["new"], True),
    ({"caption": "same"}, " same\n", ["same"], ["same"], False),
    ({"caption": "a  b"}, "a b", ["a  b"], ["a b"], False),
    ({"captions": ["one", "two"]}, "two", ["one", "two"], ["two"], False),
    ({"captions": ["a", "b"]}, "a\nb\n", ["a", "b"], ["a\nb"], False),
    ({"captions": ["one", "two"]}, "three", ["one", "two"], ["three"], True),
    ({"caption": "old"}, "  ", ["old"], ["old"], False),
    ({"caption": "old"}, None, ["old"], ["old"], False),
    ({"caption": ""}, "new", ["new"], ["new"], False),
    ({"caption": 5}, "5", ["5"], ["5"], False),
    (None, "new", ["new"], ["new"], False),
]


@pytest.mark.parametrize("preferred", ["json", "txt"])
def test_the_setting_decides_between_two_captions_and_differing_ones_are_tagged(
    tmp_path, preferred
):
    members = []
    (tmp_path / "folder").mkdir()
    for number, (in_json, in_txt, *_) in enumerate(CAPTIONS):
        contents = {"jpg": b"x", "json": in_json and json.dumps(in_json).encode()}
        contents["txt"] = None if in_txt is None else in_txt.encode()
        for extension, content in contents.items():
            if content is not None:
                members.append((f"{number:02d}.{extension}", content))
                (tmp_path / "folder" / members[-1][0]).write_bytes(content)
    tar = write_tar(tmp_path / "0.tar", members)
    expected = [
        (text, ("caption_differs",) * differ)
        for _, _, by_json, by_txt, differ in CAPTIONS
        for text in (by_json if preferred == "json" else by_txt)
    ]
    for source in (tar, tmp_path / "folder"):
        found = pairs_of(source, caption_source=preferred)
        assert [(pair.caption, pair.marks) for pair in found] == expected


def test_what_no_tar_may_hold_is_refused(tmp_path):
    for name in ("../a.jpg", "/a.jpg"):
        path = write_tar(tmp_path / "0.tar", [(name, b"x")])
        with pytest.raises(InputError, match=r"expected a relative name without '\.\.'"):
            pairs_of(path)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match="link or device"):
        pairs_of(path)


def test_a_tar_that_has_changed_since_the_scan_stops_the_run(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", b"x" * 2000), ("a.txt", b"x")])
    pairs = pairs_of(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"expected 2000 bytes at 512, found 488"):
        contents_of(path, pairs)


def test_tars_behind_a_url_read_the_same(tmp_path):
    folder = write_img2dataset(tmp_path / "d")
    files = {f"/tars/{path.name}": path.read_bytes() for path in folder.iterdir()}
    fsspec.filesystem("memory").pipe(files)
    for url in ("memory://tars", "memory://tars/*.tar"):
        assert pairs_of(url) == pairs_of(folder)
        assert contents_of(url) == contents_of(folder)
    pattern = str(folder / "*.tar")
    assert input_state(source_of("memory://tars")) == input_state(source_of(pattern))


# -------------------------------------------------------------------------- dataset folders


def write_dataset(folder, *, licences=True):
    """Writes two indexed shards of five samples; their Parquets have a column licence."""
    folder.mkdir()
    for shard in range(2):
        writer = ShardWriter(folder, f"{shard:08d}")
        for n in range(5):
            values = {"captions": [f"one {shard}{n}", f"two {shard}{n}"], "uid": f"u{shard}{n}"}
            members = {"jpg": b"media %d%d" % (shard, n), "txt": f"one {shard}{n}".encode()}
            if n % 2:
                members["json"] = json.dumps(values).encode()
            writer.add(f"{shard}{n}", members=members)
        writer.finish(rejected={}, marked={})
        if licences:
            columns = {
                "key": [f"{shard}{n}" for n in range(5)],
                "licence": ["CC0", None] * 2 + ["x"],
            }
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{shard:08d}.parquet")
    names = ["00000000", "00000001"]
    finish_dataset(folder, names, media="image", preparation={})
    return folder


def test_a_dataset_of_ours_is_read_through_its_index(tmp_path):
    folder = write_dataset(tmp_path / "d")
    pairs = pairs_of(folder, keep_columns=("licence",))
    assert captions(pairs)[:4] == [
        (1, "00000000.tar", "one 00"),
        (2, "00000000.tar", "one 01"),
        (2, "00000000.tar", "two 01"),
        (3, "00000000.tar", "one 02"),
    ]
    assert [pair.uid for pair in pairs[:3]] == [None, "u01", "u01"]
    assert [pair.kept for pair in pairs[:3]] == ['{"licence": "CC0"}', None, None]
    dataset = Dataset(folder)
    expected = [dataset.read_sample(pair.row - 1).members["jpg"] for pair in pairs]
    assert contents_of(folder) == expected
    assert pairs_of(folder, columns=Columns(uid="key"))[0].uid == "00"


def test_a_subset_keeps_what_it_names(tmp_path):
    folder = write_dataset(tmp_path / "d", licences=False)
    bitmap = np.array([False] * 5 + [True, False, False, True, False])
    info = Dataset(folder).info
    Subset.from_bitmap(info, bitmap, preparation={}).write(tmp_path / "s.subset")
    found = pairs_of(folder, subset=tmp_path / "s.subset")
    assert [(pair.media, pair.caption) for pair in found] == [
        ("00000001.tar", "one 10"),
        ("00000001.tar", "one 13"),
        ("00000001.tar", "two 13"),
    ]
    assert contents_of(folder, found) == [b"media 10", b"media 13", b"media 13"]
    whole = input_state(source_of(folder))
    part = input_state(source_of(folder, subset=tmp_path / "s.subset"))
    assert part == whole | {"subset_fingerprint": Subset.read(tmp_path / "s.subset").fingerprint}


def test_a_subset_of_something_else_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "d", licences=False)
    other = Subset("another", 10, np.zeros(2, np.uint8))
    other.write(tmp_path / "s.subset")
    with pytest.raises(InputError, match="belongs to a dataset of 10 samples"):
        pairs_of(folder, subset=tmp_path / "s.subset")
    (folder / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"requires a local folder with a dataset\.json"):
        pairs_of(folder, subset=tmp_path / "s.subset")
    assert len(pairs_of(folder)) == 14  # as plain tars


def test_a_flipped_bit_in_a_dataset_stops_the_run(tmp_path):
    folder = write_dataset(tmp_path / "d")
    pairs = pairs_of(folder)
    path = folder / "00000000.tar"
    path.write_bytes(path.read_bytes().replace(b"media 02", b"media 03"))
    with pytest.raises(InputError, match=r"00000000\.tar: CRC32 mismatch .*verify_shards"):
        contents_of(folder, pairs)


def test_a_dataset_of_the_other_kind_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "d")
    with pytest.raises(InputError, match="expected a dataset of media=audio, found image"):
        pairs_of(folder, media="audio")
