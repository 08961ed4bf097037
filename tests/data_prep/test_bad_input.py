"""make_shards over every kind of bad input: each is counted for its reason, good pairs stay."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.config import AudioOptions, ImageOptions
from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.sample import captions_of
from data_prep.storage import retry
from tests.support.bad_media import AUDIO_FILTERS, BAD_MEDIA, IMAGE_FILTERS, picture, sound
from tests.support.toy_pairs import contents, rejected_rows, shard, verify, write_pictures

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = {"image": picture, "audio": sound}
# What a manifest's row can be, apart from its media: the row without its line end -> reason.
BAD_ROWS = {
    b"{": "not_json",
    b"[1, 2]": "not_json",
    b'"text"': "not_json",
    b"\xff\xfe\x00": "not_json",
    b'{"path": "good.media", "caption": "caf\xe9"}': "not_utf8",
    b'{"path": "good.media", "caption": "\\ud800"}': "not_utf8",
    b'{"path": "good.media", "caption": "a\\u0000b"}': "nul_character",
    b'{"path": "good\\u0000.media", "caption": "x"}': "nul_character",
    b'{"path": "good.media"}': "empty_caption",
    b'{"path": "good.media", "caption": null}': "empty_caption",
    b'{"path": "good.media", "caption": []}': "empty_caption",
    b'{"path": "good.media", "caption": " \\t\\u200b "}': "empty_caption",
    b'{"caption": "x"}': "missing_media_path",
    b'{"path": "", "caption": "x"}': "missing_media_path",
    b'{"path": "../outside.media", "caption": "x"}': "path_outside_root",
    b'{"path": "folder/../../outside.media", "caption": "x"}': "path_outside_root",
    b'{"path": "absent.media", "caption": "x"}': "missing_file",
    b'{"path": "good.media/inside", "caption": "x"}': "missing_file",
    b'{"path": "' + b"n" * 5000 + b'", "caption": "x"}': "missing_file",
    b'{"path": "endless_link", "caption": "x"}': "missing_file",
    b'{"path": "dangling_link", "caption": "x"}': "missing_file",
    b'{"path": "folder", "caption": "x"}': "not_a_file",
    b'{"path": "pipe", "caption": "x"}': "not_a_file",
    b'{"path": "large", "caption": "x"}': "too_large",
    b'{"path": "http://[no-address/x", "caption": "x"}': "download_bad_url",
    b'{"path": "http://127.0.0.1:9/x", "caption": "x"}': "download_private_host",
}


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_each_kind_of_bad_input_is_counted_and_every_good_pair_around_it_is_kept(tmp_path, kind):
    media = tmp_path / "media"
    write_odd_files(media, kind)
    reasons, lines = {}, []
    for name, (make, bad_kind, reason) in BAD_MEDIA.items():
        if bad_kind == kind:
            (media / name).write_bytes(make())
            lines.append(json.dumps({"path": name, "caption": "x"}).encode())
            reasons[2 * len(lines) - 1] = reason
    for line, reason in BAD_ROWS.items():
        lines.append(line)
        reasons[2 * len(lines) - 1] = reason
    good = [json.dumps({"path": f"good_{n}", "caption": f"good {n}"}) for n in range(len(lines))]
    for number in range(len(lines)):
        (media / f"good_{number}").write_bytes(GOOD[kind]())
    manifest = media / "pairs.jsonl"
    rows = [row for pair in zip(lines, map(str.encode, good), strict=True) for row in pair]
    manifest.write_bytes(b"\n".join(rows) + b"\n")

    options = {"image": ImageOptions(**IMAGE_FILTERS), "audio": AudioOptions(**AUDIO_FILTERS)}
    dataset = shard(
        manifest,
        tmp_path / "dataset",
        media=kind,
        samples_per_shard=50,
        max_media_bytes=3_000_000,
        max_rejected_fraction=0.6,
        **options,
    )
    assert {row["row"]: row["reason"] for row in rejected_rows(dataset)} == reasons
    read = Dataset(dataset)
    captions = [captions_of(read.read_sample(number)) for number in range(len(read))]
    assert captions == [[f"good {number}"] for number in range(len(lines))]
    assert sum(read.info.rejected.values()) == len(lines)
    verify(dataset, decode=True)


def write_odd_files(folder, kind):
    folder.mkdir()
    (folder.parent / "outside.media").write_bytes(GOOD[kind]())
    (folder / "good.media").write_bytes(GOOD[kind]())
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "endless_link").symlink_to("endless_link")
    (folder / "dangling_link").symlink_to("nothing")
    with (folder / "large").open("wb") as file:
        file.truncate(3_000_001)


def test_there_are_more_than_forty_kinds():
    assert len(BAD_MEDIA) + len(BAD_ROWS) > 40


def test_a_full_disk_stops_the_run_and_what_was_finished_is_used_by_the_next(tmp_path):
    manifest = write_pictures(tmp_path / "media", 60)
    (tmp_path / "media" / "picture_25.jpg").write_bytes(picture(size=(400, 300)))
    whole = shard(manifest, tmp_path / "whole", samples_per_shard=20)
    config = tmp_path / "config.yaml"
    config.write_text("media: image\nsamples_per_shard: 20\n")
    command = [sys.executable, "-m", "data_prep.make_shards", str(config), f"input={manifest}"]
    command.append(f"output={tmp_path / 'dataset'}")
    # The second of three shards does not fit.
    second = (whole / "00000001.tar").stat().st_size
    assert second > max((whole / name).stat().st_size for name in ("00000000.tar", "00000000.idx"))

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (second - 1, second - 1))

    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=limit_files
    )
    assert result.returncode == 1
    assert "00000001.tar" in result.stderr
    assert "Traceback" not in result.stderr
    dataset = tmp_path / "dataset"
    assert [path.name for path in dataset.glob("*.idx")] == ["00000000.idx"]
    assert not list(dataset.glob(".*.tmp"))
    written = (dataset / "00000000.idx").stat().st_mtime_ns
    shard(manifest, dataset, samples_per_shard=20)
    assert contents(dataset) == contents(whole)
    assert (dataset / "00000000.idx").stat().st_mtime_ns == written


def test_a_disk_that_fails_stops_the_run_instead_of_dropping_pairs(tmp_path, monkeypatch):
    manifest = write_pictures(tmp_path / "media", 4)
    opened, failing = os.open, str(tmp_path / "media" / "picture_2.jpg")

    def fail(path, *arguments, **options):
        if str(path) == failing:
            raise OSError(5, "Input/output error", failing)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    with pytest.raises((InputError, RuntimeError, OSError), match=r"picture_2\.jpg"):
        shard(manifest, tmp_path / "dataset")
    monkeypatch.undo()
    shard(manifest, tmp_path / "dataset")
    assert len(Dataset(tmp_path / "dataset")) == 4
