import json
import time
from urllib.parse import quote

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.sources.formats import input_state
from data_prep.sources.input_files import format_of, media_root_of
from data_prep.storage import remote_file, retry, web_file
from tests.support.toy_sources import contents_of, pairs_of, served, source_of

# ---------------------------------------------------------------------------------- web files


def test_any_part_of_a_file_on_a_web_server_can_be_read():
    generator = np.random.default_rng(0)
    content = generator.bytes(3_000_000)
    with served({"/x": content}) as root, remote_file.open_binary(f"{root}/x") as file:
        for _ in range(20):
            start, length = generator.integers(0, 3_100_000), generator.integers(0, 400_000)
            assert file.seek(start) == start
            assert file.read(length) == content[start : start + length]
        assert file.seek(-10, 2) == 2_999_990
        assert file.read() == content[-10:]


def test_a_body_that_breaks_off_is_continued_where_it_broke_off():
    content = np.random.default_rng(0).bytes(400_000)
    with served({"/x": content}, most_bytes=150_000) as root:
        assert remote_file.read_bytes(f"{root}/x") == content


def test_a_body_that_broke_off_before_it_was_read_is_asked_for_in_shorter_ranges(monkeypatch):
    def request_and_wait(file, request=web_file.WebFile._request):
        stream = request(file)
        while not (stream.r.content.is_eof() or stream.r.content.exception()):
            time.sleep(0)  # until all that the server sends has arrived
        return stream

    monkeypatch.setattr(web_file.WebFile, "_request", request_and_wait)
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    content = np.random.default_rng(0).bytes(120_000)
    with served({"/x": content}, most_bytes=30_000) as root:
        assert remote_file.read_bytes(f"{root}/x") == content


def test_a_server_that_gives_no_parts_is_refused_when_they_are_needed():
    files = {"/x": b"x" * 3_000_000}
    with (
        served(files, knows_ranges=False) as root,
        remote_file.open_binary(f"{root}/x") as file,
    ):
        assert len(file.read()) == 3_000_000
        file.seek(1000)
        with pytest.raises(OSError, match="download it and use its local path"):
            file.read(1)


def test_a_web_server_that_fails_for_a_moment_is_asked_again(monkeypatch):
    delays = []
    monkeypatch.setattr(retry, "pause", delays.append)
    failures = [429, 500, 502, 503]
    with served({"/x": b"content"}, failures=failures) as root:
        assert remote_file.read_bytes(f"{root}/x") == b"content"
    assert (failures, len(delays)) == ([], 4)


def test_a_web_server_that_keeps_failing_is_named_with_its_status(monkeypatch):
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    failures = [503] * (web_file.RETRIES + 1)
    with (
        served({"/x": b"content"}, failures=failures) as root,
        pytest.raises(OSError, match=r"/x: HTTP status 503 \(tried 5 times\)"),
    ):
        remote_file.read_bytes(f"{root}/x")
    assert failures == []


def test_a_web_file_that_changes_while_it_is_read_is_refused():
    files = {"/x": b"a" * 3_000_000}
    with served(files) as root, remote_file.open_binary(f"{root}/x") as file:
        assert file.read(10) == b"a" * 10
        files["/x"] = b"b" * 3_000_000
        file.seek(2_000_000)
        with pytest.raises(OSError, match="the file has changed; download it"):
            file.read(1)


@pytest.mark.parametrize("name", ["a b.csv", "\u00e9::[1].csv?x=1:2", "a%20b.csv"])
def test_addresses_are_percent_encoded_where_they_need_it(name):
    encoded = quote(name, safe="/%?&=+:")
    with served({f"/{encoded}": b"content"}) as root:
        assert remote_file.read_bytes(f"{root}/{name}") == b"content"


def test_a_manifest_on_a_web_server_is_read_and_what_is_wrong_with_it_told(monkeypatch):
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    sink = pyarrow.BufferOutputStream()
    table = {"image": pyarrow.array([b"A", b"B"]), "caption": ["x", "y"]}
    pyarrow.parquet.write_table(pyarrow.table(table), sink)
    manifest = b"path,caption\na b.jpg,one\n"
    files = {"/pairs.csv?a=1": manifest, "/p.parquet": sink.getvalue().to_pybytes()}
    with served(files) as root:
        (pair,) = pairs_of(f"{root}/pairs.csv?a=1")
        assert (pair.media, pair.caption) == ("a b.jpg", "one")
        assert media_root_of(source_of(f"{root}/pairs.csv?a=1")) == root
        assert input_state(source_of(f"{root}/pairs.csv?a=1"))["bytes"] == len(manifest)
        found = contents_of(f"{root}/p.parquet", columns=Columns(media="image"))
        assert found == [b"A", b"B"]
        for name, status in (("none.csv", 404), ("secret.csv", 403)):
            with pytest.raises(InputError, match=f"cannot be read: .*HTTP status {status}"):
                pairs_of(f"{root}/{name}")
    with pytest.raises(InputError, match="cannot be read: "):
        pairs_of(f"{root}/none.csv")


# --------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("media", "a.jpg", "media/a.jpg"),
        ("media/", "a.jpg", "media/a.jpg"),
        ("/", "a.jpg", "/a.jpg"),
        (".", "a.jpg", "./a.jpg"),
        ("media", "/a.jpg", "/a.jpg"),
        ("media", "s3://b/a.jpg", "s3://b/a.jpg"),
        ("s3://bucket", "a b.jpg", "s3://bucket/a b.jpg"),
        ("https://h/d", "a b.jpg", "https://h/d/a%20b.jpg"),
        ("https://h/d/", "sub/\u00e9.jpg?x=1", "https://h/d/sub/%C3%A9.jpg?x=1"),
    ],
)
def test_names_are_joined_to_folders_and_urls(folder, name, joined):
    assert remote_file.join(folder, name) == joined


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a.csv", (".", "a.csv")),
        ("/a.csv", ("/", "a.csv")),
        ("d/a.csv", ("d", "a.csv")),
        ("s3://bucket/d/a.csv", ("s3://bucket/d", "a.csv")),
        ("https://h/d/a.csv?sig=1/2", ("https://h/d", "a.csv?sig=1/2")),
    ],
)
def test_a_path_splits_into_folder_and_name_and_joins_again(path, parts):
    assert remote_file.split_path(path) == parts
    assert remote_file.join(*parts).removeprefix("./") == path


def test_patterns_match_below_the_first_folder_without_wildcards(tmp_path):
    for name in ("a/1.csv", "a/b/2.csv", ".hidden/3.csv", "a/[x].csv", "a/folder.csv/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = remote_file.glob_files(f"{tmp_path}/**/*.csv")
    assert found == (str(tmp_path), ["a/1.csv", "a/[x].csv", "a/b/2.csv"])
    assert not remote_file.is_pattern(f"{tmp_path}/a/[x].csv")  # a file of just this name
    assert remote_file.glob_files(f"{tmp_path}/a/[0-9].csv") == (f"{tmp_path}/a", ["1.csv"])


# -------------------------------------------------------------------------------------- formats


def test_the_format_is_found_from_name_and_content(tmp_path):
    found = {}
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.tar"):
        (tmp_path / name).touch()
        found[name] = format_of(source_of(tmp_path / name))
    assert list(found.values()) == [
        *("csv", "tsv", "jsonl", "jsonl", "coco", "parquet", "webdataset")
    ]
    assert format_of(source_of(tmp_path)) == "webdataset"  # tars, whatever else is in the folder
    (tmp_path / "a.tar").unlink()
    assert format_of(source_of(tmp_path)) == "parquet"
    assert format_of(source_of(tmp_path / "a.csv", format="jsonl")) == "jsonl"
    (tmp_path / "state.json").write_text(json.dumps({}))
    assert format_of(source_of(tmp_path)) == "huggingface"
    (tmp_path / "dataset.json").touch()
    assert format_of(source_of(tmp_path)) == "webdataset"
    (tmp_path / "media").mkdir()
    assert format_of(source_of(tmp_path / "media")) == "folder"
    config = source_of(tmp_path / "media", caption_template="a {}")
    assert format_of(config) == "class_folders"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "expected a manifest or a folder of pairs .* found nothing"),
        ("*.csv", "found nothing"),
        ("a.xlsx", r"expected one of \.csv .* found \.xlsx; set the format"),
        ("unheard://x.csv", "Protocol not known"),
    ],
)
def test_an_input_that_is_none_is_refused(tmp_path, name, message):
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(InputError, match=message):
        format_of(source_of(name if "://" in name else tmp_path / name))


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    def url_to_fs(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(InputError, match="Install s3fs to access S3; or copy the files"):
        pairs_of("s3://bucket/pairs.csv")
