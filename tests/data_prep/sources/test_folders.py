import errno
import json
import os

import fsspec
import pytest

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.sample import captions_of
from data_prep.sources import item_file
from data_prep.sources.formats import input_state
from data_prep.storage import remote_file
from data_prep.storage.retry import RetryPolicy
from tests.support.toy_pairs import picture_bytes, rejected_rows, shard, write_pictures
from tests.support.toy_sources import contents_of, pairs_of, reasons_of, source_of


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def captions(pairs):
    return [(pair.media, pair.caption) for pair in pairs]


# ---------------------------------------------------------------------------------- sidecars


FILES = {
    "a.jpg": b"A",
    "a.txt": b"from txt\n",
    "sub/b.webp": b"B",
    "sub/b.json": b'{"captions": ["x", "y"], "class_name": "c", "uid": 7, "licence": "CC0"}',
    "sub/b.txt": b"not looked at",
    "sub/c.PNG": b"C",
    "sub/c.json": b'{"width": 3}',
    "sub/c.txt": b"the .json has no caption",
    "notes.md": b"no pair",
    "d.wav": b"of the other kind",
    ".hidden.jpg": b"",
    ".cache/e.jpg": b"",
}


def test_media_take_their_captions_from_the_files_beside_them(tmp_path):
    pairs = pairs_of(write(tmp_path, FILES), keep_columns=("licence",))
    assert captions(pairs) == [
        ("a.jpg", "from txt"),
        ("sub/b.webp", "x"),
        ("sub/b.webp", "y"),
        ("sub/c.PNG", "the .json has no caption"),
    ]
    assert [pair.row for pair in pairs] == [1, 2, 2, 3]
    assert (pairs[1].class_name, pairs[1].uid, pairs[1].kept) == ("c", "7", '{"licence": "CC0"}')
    assert contents_of(tmp_path) == [b"A", b"B", b"B", b"C"]


def test_a_folder_behind_a_url_reads_the_same(tmp_path):
    local = pairs_of(write(tmp_path, FILES))
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/shots/{name}": content for name, content in FILES.items()})
    assert pairs_of("memory://shots") == local
    assert contents_of("memory://shots/") == contents_of(tmp_path)


def test_columns_name_other_keys_of_the_json(tmp_path):
    values = {"blurb": "one", "caption": "two", "kind": "cat", "id": "u1"}
    write(tmp_path, {"a.jpg": b"A", "a.json": json.dumps(values).encode()})
    columns = Columns(caption="blurb", class_name="kind", uid="id")
    (pair,) = pairs_of(tmp_path, columns=columns)
    assert (pair.caption, pair.class_name, pair.uid) == ("one", "cat", "u1")
    with pytest.raises(InputError, match=r"columns\.media=image is not supported for format=fol"):
        pairs_of(tmp_path, columns=Columns(media="image"))


def test_every_bad_sidecar_has_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.folders.MAX_SIDECAR_BYTES", 1000)
    sidecars = {
        "0.txt": b"fine",
        "1.md": b"no sidecar",
        "2.txt": b" ",
        "3.txt": b"caf\xe9",
        "4.json": b"{",
        "5.json": b'["a list"]',
        "6.json": b"[" * 900,
        "7.json": b'{"caption": ["", "fine"]}',
        "8.txt": b"x" * 1001,
    }
    media = {f"{number}.jpg": b"x" for number in range(10)}
    write(tmp_path, {**sidecars, **media})
    os.mkfifo(tmp_path / "9.txt")
    found = [pair.reason for pair in pairs_of(tmp_path)]
    assert found == [
        None,
        "missing_caption",
        "empty_caption",
        "not_utf8",
        "not_json",
        "not_json",
        "not_json",
        "empty_caption",
        None,
        "unreadable_caption",
        "unreadable_caption",
    ]


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    other = write(tmp_path / "other", {"x.jpg": b"X", "x.txt": b"x"})
    main = write(tmp_path / "main", {"a.jpg": b"A", "a.txt": b"a"})
    (main / "linked").symlink_to(other)
    (other / "back").symlink_to(main)
    (main / "gone.jpg").symlink_to(tmp_path / "nothing")
    (main / "gone.txt").write_text("its media is missing")
    assert captions(pairs_of(main))[:2] == [("a.jpg", "a"), ("gone.jpg", "its media is missing")]
    assert contents_of(main) == [b"A", "missing_file", b"X"]


def test_the_state_of_a_folder_tells_names_and_sizes(tmp_path):
    config = source_of(write(tmp_path, FILES))
    before = input_state(config)
    assert before == input_state(config)
    (tmp_path / "a.txt").write_bytes(b"from text\n")
    after = input_state(config)
    assert after["bytes"] == before["bytes"] + 1
    assert after["names_and_sizes_sha256"] != before["names_and_sizes_sha256"]


# ----------------------------------------------------------------------------- class folders


def test_class_folders_take_captions_from_the_template(tmp_path):
    files = ("cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg", "loose.jpg", "dog/1.txt")
    write(tmp_path, dict.fromkeys(files, b"x"))
    pairs = pairs_of(tmp_path, caption_template="a photo of a {}.")
    assert [(p.media, p.caption, p.class_name, p.reason) for p in pairs] == [
        ("cat/1.jpg", "a photo of a cat.", "cat", None),
        ("cat/deep/2.jpg", "a photo of a cat.", "cat", None),
        ("dog/1.jpg", "a photo of a dog.", "dog", None),
        ("loose.jpg", "", None, "no_class_folder"),
    ]
    assert reasons_of(tmp_path, format="class_folders")[1] is None
    with pytest.raises(InputError, match=r"expected text with \{\} in place of the class name"):
        pairs_of(tmp_path, caption_template="a photo", format="class_folders")


def test_underscores_of_class_folders_stay_or_become_spaces(tmp_path):
    names = ["great_white_shark", "_odd__name_", "a b", "plain"]
    write(tmp_path, dict.fromkeys((f"{name}/x_1.jpg" for name in names), b"x"))
    spaces = ["odd name", "a b", "great white shark", "plain"]
    for template in ("{}", "a photo of a {}."):
        found = pairs_of(tmp_path, caption_template=template, underscores="spaces")
        assert [pair.class_name for pair in found] == spaces
        assert [pair.caption for pair in found] == [template.format(name) for name in spaces]
        assert {pair.media for pair in found} == {f"{name}/x_1.jpg" for name in names}
    found = pairs_of(tmp_path, format="class_folders")
    assert [pair.caption for pair in found] == sorted(names)


# ------------------------------------------------------------------------------------- media


def test_what_is_wrong_with_a_media_file_has_a_reason_and_never_hangs(tmp_path):
    write(tmp_path, {"good.jpg": b"12345", "empty.jpg": b"", "large.jpg": b"123456"})
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    names = {
        "good.jpg": b"12345",
        "empty.jpg": "empty_file",
        "large.jpg": "too_large",
        "folder.jpg": "not_a_file",
        "pipe.jpg": "not_a_file",
        "loop.jpg": "missing_file",
        "/dev/zero": "not_a_file",
        "good.jpg/x.jpg": "missing_file",
        "x" * 300: "missing_file",
        "unheard://x.jpg": "unknown_scheme",
        "file:///%00": "missing_file",
        f"file://{tmp_path}/good.jpg": b"12345",
        f"{tmp_path}/good.jpg": b"12345",
    }
    manifest = tmp_path / "pairs.tsv"
    manifest.write_text("path\tcaption\n" + "".join(f"{name}\tx\n" for name in names))
    assert contents_of(manifest, max_media_bytes=5) == list(names.values())


def test_an_unreadable_file_is_rejected_but_a_failing_disk_stops_the_run(tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": b"A", "a.txt": b"a"})
    pairs = pairs_of(tmp_path)
    monkeypatch.setattr(item_file, "POLICY", RetryPolicy(2, first_delay_seconds=0))
    failures = []
    real = remote_file.open_binary

    def failing(number, times):
        def open_binary(path):
            if path.endswith(".jpg") and len(failures) < times:
                failures.append(path)
                raise OSError(number, os.strerror(number))
            return real(path)

        monkeypatch.setattr(remote_file, "open_binary", open_binary)

    failing(errno.EACCES, 1)
    assert contents_of(tmp_path, pairs) == ["unreadable_file"]
    failing(errno.EIO, 3)
    assert contents_of(tmp_path, pairs) == [b"A"]  # the third attempt
    failures.clear()
    with pytest.raises(RuntimeError, match=r"unreadable after 3 attempts: .*finished shards"):
        contents_of(tmp_path, pairs)


class FakeDownloader:
    """Answers as media_download.Downloader does, from its own memory."""

    forgotten: list[str] = []

    def __init__(self, options, *, cache, max_bytes, retried):
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def fetch_all(self, urls):
        for url in urls:
            yield url.encode()

    def forget(self, urls):
        FakeDownloader.forgotten += urls


def test_web_addresses_go_to_the_downloader_in_the_order_of_the_items(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.download.downloader.Downloader", FakeDownloader)
    write(tmp_path, {"x y.jpg": b"local"})
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/far/{n}.jpg": b"%d" % n for n in range(40)})
    names = [
        "https://h/1.jpg",
        "x y.jpg",
        "HTTP://h/2.jpg",
        *(f"memory://far/{n}.jpg" for n in range(40)),
    ]
    manifest = tmp_path / "pairs.tsv"
    manifest.write_text("path\tcaption\n" + "".join(f"{name}\tx\n" for name in names))
    far = [b"%d" % n for n in range(40)]
    assert contents_of(manifest) == [b"https://h/1.jpg", b"local", b"HTTP://h/2.jpg", *far]
    root = contents_of(manifest, media_root="https://host/some%20folder")
    assert root[1] == b"https://host/some%20folder/x%20y.jpg"


NAMES = [" lead.jpg", "trail .jpg", "new\nline.jpg", "a#b.jpg", "q?.jpg", "p%41.jpg", "[x].jpg"]
NAMES += [" folder [y]/ s.jpg", "\u00e9\u4e2d.jpg", "http:/h.jpg", "back\\slash.jpg"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_every_name_that_a_file_can_have_is_found_again(tmp_path, scheme):
    folder = tmp_path / "pile"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture_bytes(0))
        (folder / name).with_suffix(".txt").write_text(f"caption of {name!r}")
    dataset = Dataset(shard(f"{scheme}{folder}", tmp_path / "dataset"))
    found = {captions_of(dataset.read_sample(number))[0] for number in range(len(dataset))}
    assert found == {f"caption of {name!r}" for name in NAMES}


def test_a_file_url_of_a_manifest_may_be_encoded(tmp_path):
    manifest = write_pictures(tmp_path / "with space", 2)
    dataset = Dataset(shard(manifest.as_uri(), tmp_path / "dataset"))
    assert len(dataset) == 2


def test_a_name_and_a_detail_that_are_no_utf8_are_listed(tmp_path):
    name = os.fsdecode(b"\xff")
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / f"{name}.txt").symlink_to("/dev/null")  # no ordinary file
    (tmp_path / "pile" / f"{name}.jpg").write_bytes(picture_bytes(0))
    write_pictures(tmp_path / "pile", 1)
    (tmp_path / "pile" / "picture_0.txt").write_text("a good one")
    output = shard(
        tmp_path / "pile", tmp_path / "dataset", format="folder", max_rejected_fraction=1
    )
    (row,) = rejected_rows(output)
    assert row["reason"] == "unreadable_caption"
    assert "udcff" in row["detail"]
