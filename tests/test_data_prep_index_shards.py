import gzip
import io
import tarfile

import pytest
from toy_shards import jpeg

from data_prep.config import IndexShards, VerifyShards
from data_prep.config_file import InputError
from data_prep.index_shards import index_shards
from data_prep.shard_format import Dataset, captions_of
from data_prep.verify_shards import verify_shards


def index(tars, output, **fields):
    index_shards(IndexShards(input=str(tars), output=output, media="image", **fields))
    return Dataset(output)


def verify(dataset, **fields):
    verify_shards(VerifyShards(dataset=dataset, **fields))


def write_tar(path, members, *, tar_format=tarfile.PAX_FORMAT):
    """A tar of (name or TarInfo, content) by Python's own writer."""
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
    dataset = index(tmp_path / "tars", tmp_path / "tars")  # sidecars beside the tars
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


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "a\n.jpg"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    found = problems_of(tmp_path, [(name, jpeg(0)), ("a.txt", b"x")])
    assert "expected a printable relative name" in found


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = kind, "b.jpg"
    assert "a.tar: a.jpg: expected an ordinary file" in problems_of(tmp_path, [(link, b"")])


def test_scattered_and_repeated_keys_are_refused(tmp_path):
    a, b = pairs("a"), pairs("b")
    assert "sample a: its members are not side by side" in problems_of(
        tmp_path, [a[0], *b, a[1]], skip_incomplete=True
    )
    assert "sample a: .jpg stands twice" in problems_of(tmp_path, [*a, a[0]], skip_incomplete=True)


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
    with pytest.raises(InputError, match=r"a\.tar: (cut short|corrupt|expected a header)"):
        index(tmp_path / "tars", tmp_path / "index")


def test_huge_name_headers_and_compressed_tars_are_refused(tmp_path):
    tar = write_tar(tmp_path / "tars" / "a.tar", pairs("k" * 70_000))
    with pytest.raises(InputError, match="at most 65536 are read for a name"):
        index(tmp_path / "tars", tmp_path / "index")
    tar.write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(InputError, match="expected a plain tar, found gzip"):
        index(tmp_path / "tars", tmp_path / "index")


def test_a_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"expected uncompressed \.tar files \(input\), found none"
    ):
        index(tmp_path, tmp_path / "index")
