import ast
import gzip
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile

import data_prep
from data_prep.config import IndexShards, VerifyShards
from data_prep.errors import InputError
from data_prep.index_shards import index_shards
from data_prep.shards.dataset import Dataset
from data_prep.shards.sample import captions_of
from data_prep.verify_shards import verify_shards
from tests.support.toy_shards import jpeg


def index(tars, output, **fields):
    fields = {"media": "image"} | fields
    index_shards(IndexShards(input=str(tars), output=output, **fields))
    return Dataset(output)


def verify(dataset, **fields):
    verify_shards(VerifyShards(dataset=dataset, **fields))


def write_tar(path, members, *, tar_format=tarfile.PAX_FORMAT):
    """Writes a tar of (name or TarInfo, content) with Python's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1234.5  # a fraction makes a PAX header
            tar.addfile(info, io.BytesIO(content))
    return path


def pairs(*keys):
    return [
        member
        for number, key in enumerate(keys)
        for member in ((f"{key}.jpg", jpeg(number)), (f"{key}.txt", key[-9:].encode()))
    ]


def problems_of(tmp_path, members, **fields):
    write_tar(tmp_path / "tars" / "a.tar", members)
    with pytest.raises(InputError) as caught:
        index(tmp_path / "tars", tmp_path / "index", **fields)
    assert not (tmp_path / "index" / "dataset.json").exists()
    return str(caught.value)


def test_tars_of_webdataset_are_read_sample_for_sample(tmp_path):
    import webdataset

    (tmp_path / "tars").mkdir()
    pattern = str(tmp_path / "tars" / "shard-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for number in range(7):
            jpg = jpeg(number)
            writer.write({"__key__": f"s{number}", "jpg": jpg, "json": {"caption": f"c{number}"}})
    dataset = index(tmp_path / "tars", tmp_path / "index", workers=2)
    assert len(dataset) == 7
    for number in range(7):
        sample = dataset.read_sample(number)
        assert (sample.key, captions_of(sample)) == (f"s{number}", [f"c{number}"])
        assert sample.members["jpg"] == jpeg(number)
    verify(tmp_path / "index", decode=True)


@pytest.mark.parametrize(
    "tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
)
def test_long_names_of_plain_tars_are_read(tmp_path, tar_format):
    long_key = "folder_of_many_letters/" * 6 + "last"
    keys = [long_key, "short", "./here"]
    if tar_format != tarfile.USTAR_FORMAT:
        keys.append("k\u00e9y")
    tar = write_tar(tmp_path / "tars" / "a.b.tar", pairs(*keys), tar_format=tar_format)
    before = tar.read_bytes()
    dataset = index(tmp_path / "tars", tmp_path / "tars")  # sidecars next to the tars
    assert [dataset.read_sample(number).key for number in range(len(keys))] == keys
    assert tar.read_bytes() == before
    verify(tmp_path / "tars")


def test_a_glob_over_folders_keeps_their_names_apart(tmp_path):
    write_tar(tmp_path / "tars" / "x" / "0.tar", pairs("a"))
    write_tar(tmp_path / "tars" / "y" / "0.tar", pairs("b", "c"))
    dataset = index(tmp_path / "tars" / "*" / "0.tar", tmp_path / "index")
    assert [row.name for row in dataset.manifest] == ["x/0", "y/0"]
    assert dataset.read_sample(2).key == "c"


def test_incomplete_samples_abort_or_are_left_out_and_counted(tmp_path):
    members = [*pairs("a"), ("b.txt", b"no picture"), ("c.jpg", jpeg(2)), *pairs("d")]
    found = problems_of(tmp_path, members)
    assert "a.tar: sample b: missing_media: expected image, found txt" in found
    assert "a.tar: sample c: missing_caption" in found
    dataset = index(tmp_path / "tars", tmp_path / "other", skip_incomplete=True)
    assert [dataset.read_sample(number).key for number in range(2)] == ["a", "d"]
    assert dataset.info.rejected == {"missing_caption": 1, "missing_media": 1}
    verify(tmp_path / "other")


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    found = problems_of(tmp_path, [(name, jpeg(0)), ("a.txt", b"x")])
    assert "expected a relative name without '..'" in found


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x7f", "\x85", "\x9b"])
def test_names_that_act_on_a_terminal_are_refused_unless_no_sample_has_them(tmp_path, character):
    found = problems_of(tmp_path, [(f"a{character}.jpg", jpeg(0)), ("a.txt", b"x")])
    assert f"without control characters, found U+{ord(character):04X}" in found
    write_tar(tmp_path / "icons" / "a.tar", [(f"Icon{character}", b""), *pairs("b")])
    assert len(index(tmp_path / "icons", tmp_path / "other")) == 1


def test_names_need_not_be_printable(tmp_path):
    # A space that macOS writes, joiners, marks of direction, a private character, a line separator
    odd = [
        "3\u202fPM",
        "a\u200db",
        "a\u200fb",
        "\u202ea",
        "\ue000",
        "a\u2028b",
        "a\xa0b",
        "\U0001f600",
    ]
    members = [member for key in odd for member in pairs(key)]
    write_tar(tmp_path / "tars" / "a.tar", members)
    dataset = index(tmp_path / "tars", tmp_path / "tars")
    assert [dataset.read_sample(number).key for number in range(len(odd))] == odd
    verify(tmp_path / "tars")


def test_names_that_are_not_utf8_are_refused_by_an_index_with_advice(tmp_path):
    found = problems_of(tmp_path, [*pairs("a"), ("caf\udce9.jpg", jpeg(0))])
    assert "expected a name in UTF-8" in found and "data_prep.make_shards" in found


def test_captions_that_contradict_each_other_are_tagged_and_counted(tmp_path):
    members = [
        *[*pairs("a"), ("a.json", b'{"caption": "old"}')],
        *[("b.jpg", jpeg(1)), ("b.txt", b"new "), ("b.json", b'{"caption": " new"}')],
    ]
    write_tar(tmp_path / "tars" / "a.tar", members)
    for measure in (True, False):
        dataset = index(tmp_path / "tars", tmp_path / f"out_{measure}", measure=measure)
        assert dataset.info.marked == {"caption_differs": 1}
        verify(tmp_path / f"out_{measure}")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = kind, "b.jpg"
    assert "a.tar: a.jpg: expected a regular file" in problems_of(tmp_path, [(link, b"")])


def test_scattered_and_repeated_keys_are_refused(tmp_path):
    a, b = pairs("a"), pairs("b")
    assert "sample a: duplicate key, or its members are not adjacent" in problems_of(
        tmp_path, [a[0], *b, a[1]], skip_incomplete=True
    )
    assert "sample a: duplicate member .jpg" in problems_of(
        tmp_path, [*a, a[0]], skip_incomplete=True
    )


@pytest.mark.parametrize("damage", ["inside", "boundary", "header", "zeroed"])
def test_damaged_tars_are_refused(tmp_path, damage):
    tar = write_tar(tmp_path / "tars" / "a.tar", pairs("a", "b", "c"), tar_format=0)
    content = bytearray(tar.read_bytes())
    header = content.index(b"c.jpg")
    if damage == "header":
        content[header + 1] ^= 1
    elif damage == "zeroed":
        content[header : header + 512] = bytes(512)
    tar.write_bytes(content[: {"inside": header + 700, "boundary": header}.get(damage)])
    with pytest.raises(InputError, match=r"a\.tar: (truncated|corrupt|expected a header)"):
        index(tmp_path / "tars", tmp_path / "index")


def test_huge_name_headers_and_compressed_tars_are_refused(tmp_path):
    tar = write_tar(tmp_path / "tars" / "a.tar", pairs("k" * 70_000))
    with pytest.raises(InputError, match="a long-name header of at most 65536 bytes"):
        index(tmp_path / "tars", tmp_path / "index")
    tar.write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(InputError, match="expected a plain tar, found gzip"):
        index(tmp_path / "tars", tmp_path / "index")


def test_a_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"expected uncompressed \.tar files \(input\), found none"
    ):
        index(tmp_path, tmp_path / "index")


# ------------------------------------------------------------------------------------ Parquet


def flac_bytes(number):
    tone = 0.5 * np.sin(np.arange(1600 + number) * 0.05)
    sink = io.BytesIO()
    soundfile.write(sink, tone, 8000, format="FLAC")
    return sink.getvalue()


def rows_of(path):
    return pyarrow.parquet.read_table(path).to_pylist()


def test_shards_of_img2dataset_are_measured(tmp_path):
    # The layout of img2dataset's webdataset output: nine digits, .jpg, .txt, .json.
    members = []
    for number in range(3):
        key, jpg = f"{number:09d}", jpeg(number)
        about = {
            "url": f"https://example.org/{number}.jpg",
            "key": key,
            "caption": f"caption {number}",
            "status": "success",
            "similarity": [0.31, None, 1][number],
            "sha256": hashlib.sha256(jpg).hexdigest(),
        }
        members += [(f"{key}.jpg", jpg), (f"{key}.json", json.dumps(about).encode())]
        members += [(f"{key}.txt", f"caption {number}".encode())]
    write_tar(tmp_path / "tars" / "00000.tar", members)
    keep = ("url", "similarity")
    dataset = index(tmp_path / "tars", tmp_path / "index", keep_columns=keep, workers=2)
    assert captions_of(dataset.read_sample(1)) == ["caption 1"]
    rows = rows_of(tmp_path / "index" / "00000.parquet")
    assert [row["key"] for row in rows] == ["000000000", "000000001", "000000002"]
    assert [row["similarity"] for row in rows] == [0.31, None, 1.0]
    assert rows[2]["url"] == "https://example.org/2.jpg"
    assert (rows[2]["height"], rows[2]["width"], rows[2]["is_reencoded"]) == (22, 16, False)
    assert rows[2]["sha256"] == hashlib.sha256(jpeg(2)).hexdigest()
    assert rows[2]["captions"] == ["caption 2"]
    assert (rows[2]["source"], rows[2]["source_row"]) == ("00000.tar", 3)
    verify(tmp_path / "index", decode=True)


def test_shards_of_laion_audio_are_measured(tmp_path):
    # The layout of LAION's audio-dataset: number, .flac, .json with a list under text.
    members = []
    for number in range(2):
        about = {"text": [f"a tone {number}", "a sound"], "tag": ["tone"], "original_data": {}}
        members += [(f"{number}.flac", flac_bytes(number))]
        members += [(f"{number}.json", json.dumps(about).encode())]
    write_tar(tmp_path / "tars" / "0.tar", members)
    dataset = index(tmp_path / "tars", tmp_path / "index", media="audio", keep_columns=("tag",))
    assert captions_of(dataset.read_sample(1)) == ["a tone 1", "a sound"]
    row = rows_of(tmp_path / "index" / "0.parquet")[1]
    assert (row["sample_rate_hz"], row["channels"], row["seconds"]) == (8000, 1, 1601 / 8000)
    assert row["tag"] == '["tone"]'
    verify(tmp_path / "index", decode=True)


def test_samples_that_do_not_decode_abort_or_are_left_out_and_counted(tmp_path):
    members = [*pairs("a"), ("b.jpg", b"no picture"), ("b.txt", b"x")]
    members += [("c.jpg", jpeg(1)[:300]), ("c.txt", b"x"), *pairs("d")]
    found = problems_of(tmp_path, members)
    assert "a.tar: sample b: unknown_format" in found
    assert "a.tar: sample c: undecodable" in found
    assert "skip_incomplete=true" in found
    dataset = index(tmp_path / "tars", tmp_path / "other", skip_incomplete=True)
    assert dataset.info.rejected == {"undecodable": 1, "unknown_format": 1}
    assert [row["key"] for row in rows_of(tmp_path / "other" / "a.parquet")] == ["a", "d"]
    verify(tmp_path / "other", decode=True)


def test_without_measuring_there_is_no_parquet_and_nothing_is_decoded(tmp_path):
    write_tar(tmp_path / "tars" / "a.tar", [("b.jpg", b"no picture"), ("b.txt", b"x")])
    dataset = index(tmp_path / "tars", tmp_path / "index", measure=False)
    assert len(dataset) == 1
    assert not list((tmp_path / "index").glob("*.parquet"))
    verify(tmp_path / "index")


def test_columns_to_keep_must_be_there_and_be_no_names_of_ours(tmp_path):
    write_tar(tmp_path / "tars" / "a.tar", pairs("a"))
    with pytest.raises(InputError, match="keep_columns: 'licence' has no value in any row"):
        index(tmp_path / "tars", tmp_path / "index", keep_columns=("licence",))
    with pytest.raises(
        InputError, match="keep_columns: height: built-in Parquet columns have these names"
    ):
        index(tmp_path / "tars", tmp_path / "other", keep_columns=("height",))


# ----------------------------------------------------------------------------------- security


def test_sparse_files_are_refused(tmp_path):
    sparse = tarfile.TarInfo("a.jpg")
    sparse.type = tarfile.GNUTYPE_SPARSE
    found = problems_of(tmp_path, [(sparse, b""), *pairs("b")])
    assert "a.jpg: expected a regular file, found a sparse file" in found


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("size", "-5", "invalid member size of -5 bytes"),
        ("path", "../../etc/passwd.jpg", "expected a relative name without '..'"),
        ("path", "/etc/passwd.jpg", "expected a relative name without '..'"),
    ],
)
def test_pax_headers_cannot_smuggle_in_sizes_and_paths(tmp_path, field, value, expected):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {field: value}
    assert expected in problems_of(tmp_path, [(info, jpeg(0)), ("a.txt", b"x")])


class _Loud:
    def __reduce__(self):
        return open, (_Loud.path, "w")


def test_pickles_in_tars_are_bytes_like_any_other(tmp_path):
    _Loud.path = str(tmp_path / "was_loaded")
    payload = pickle.dumps(_Loud())
    extensions = ("pkl", "pyd", "pickle", "pth", "npy")
    members = [*pairs("a"), *((f"a.{extension}", payload) for extension in extensions)]
    write_tar(tmp_path / "tars" / "a.tar", members)
    dataset = index(tmp_path / "tars", tmp_path / "index")
    assert dataset.read_sample(0).members["pkl"] == payload
    verify(tmp_path / "index", decode=True)
    assert not (tmp_path / "was_loaded").exists()


def test_no_module_of_data_prep_can_load_a_pickle():
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch"}
    for path in Path(data_prep.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert forbidden.isdisjoint(name.partition(".")[0] for name in names), path
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path
