import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.make_shards import main
from data_prep.shards.dataset import Dataset
from data_prep.shards.folder import lock_folder
from data_prep.shards.sample import (
    captions_of,
    metadata_of,
)
from tests.support.toy_pairs import (
    contents,
    picture_bytes,
    rejected_rows,
    shard,
    sound_bytes,
    verify,
    write_pictures,
    write_tsv,
)
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


def all_captions(dataset):
    read = Dataset(dataset)
    return [captions_of(read.read_sample(number)) for number in range(len(read))]


def command_line(tmp_path, monkeypatch, *arguments):
    config = tmp_path / "config.yaml"
    config.write_text("media: image\n")
    monkeypatch.setattr(sys, "argv", ["make_shards", str(config), *arguments])
    return main()


# --------------------------------------------------------------------------------------- bytes


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    manifest = write_pictures(tmp_path / "media", 10)
    one = shard(manifest, tmp_path / "one", workers=1)
    two = shard(manifest, tmp_path / "two", workers=2)
    assert contents(one) == contents(two)
    assert len(list(one.glob("*.tar"))) == 4  # 10 items, 3 per shard
    verify(one, decode=True)


def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(tmp_path):
    manifest = write_pictures(tmp_path / "media", 400)
    output = tmp_path / "dataset"
    script = [sys.executable, str(REPOSITORY / "tests" / "support" / "killed_at_random.py")]
    result = subprocess.run(
        [*script, str(manifest), str(output), "20", "0"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 20
    assert contents(output) == contents(tmp_path / "dataset_whole")


def children_of(pid):
    """Returns the ids of a process's children."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for each in lists for child in each.read_text().split()]


def has_ended(pid):
    """Returns True if a process is gone, or has nobody to collect its exit status."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def test_killed_with_its_workers_and_run_again_it_keeps_finished_shards(tmp_path):
    manifest = write_pictures(tmp_path / "media", 400)
    whole = shard(manifest, tmp_path / "whole")
    killed = tmp_path / "killed"
    config = tmp_path / "config.yaml"
    config.write_text(f"input: {manifest}\noutput: {killed}\nmedia: image\nsamples_per_shard: 3\n")
    command = [sys.executable, "-m", "data_prep.make_shards", str(config), "workers=2"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        while len(list(killed.glob("*.idx"))) < 5:
            assert process.poll() is None
            time.sleep(0.002)
        workers = children_of(process.pid)
        assert len(workers) >= 2
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: all(map(has_ended, workers)))
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("*.idx")}
    assert 5 <= len(kept) < 134
    assert not (killed / "dataset.json").exists()
    (killed / ".00000007.tar.another-host.99999.tmp").write_bytes(b"left by a dead attempt")
    shard(manifest, killed)
    assert contents(killed) == contents(whole)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())


def test_a_finished_dataset_says_so_and_stays_as_it_is(tmp_path, capsys):
    manifest = write_pictures(tmp_path / "media", 5)
    dataset = shard(manifest, tmp_path / "dataset")
    before = contents(dataset)
    shard(manifest, dataset, workers=2)
    assert "already finished" in capsys.readouterr().out
    assert contents(dataset) == before


def test_a_deleted_shard_is_made_again(tmp_path):
    manifest = write_pictures(tmp_path / "media", 5)
    dataset = shard(manifest, tmp_path / "dataset")
    before = contents(dataset)
    (dataset / "00000001.tar").unlink()
    shard(manifest, dataset)
    assert contents(dataset) == before


def test_another_config_or_input_is_refused_with_what_differs(tmp_path):
    manifest = write_pictures(tmp_path / "media", 5)
    dataset = shard(manifest, tmp_path / "dataset")
    with pytest.raises(InputError, match=r"config\.samples_per_shard: 3, now 4"):
        shard(manifest, dataset, samples_per_shard=4)
    with manifest.open("a") as file:
        file.write("picture_0.jpg\tone more\n")
    with pytest.raises(
        InputError, match=r"was created with a different config or input:\n  input\."
    ):
        shard(manifest, dataset)


def test_a_folder_with_tars_of_another_origin_is_refused(tmp_path):
    manifest = write_pictures(tmp_path / "media", 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.tar").touch()
    with pytest.raises(InputError, match=r"found mine\.tar"):
        shard(manifest, tmp_path / "other")


def test_a_second_command_on_the_same_folder_is_refused(tmp_path):
    manifest = write_pictures(tmp_path / "media", 2)
    with (
        lock_folder(tmp_path / "dataset"),
        pytest.raises(InputError, match="another command is writing"),
    ):
        shard(manifest, tmp_path / "dataset")


# --------------------------------------------------------------------------------------- pairs


def test_rows_of_one_media_file_become_one_item_or_several(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture_bytes(0))
    (tmp_path / "b.JPEG").write_bytes(picture_bytes(1))
    rows = [("a.jpg", "one"), ("b.JPEG", "two"), ("a.jpg", "three")]
    manifest = write_tsv(tmp_path / "pairs.tsv", rows)
    grouped = shard(manifest, tmp_path / "grouped")
    assert all_captions(grouped) == [["one", "three"], ["two"]]
    sample = Dataset(grouped).read_sample(0)
    assert sample.members["txt"] == b"one"  # for readers that know no .json
    assert sorted(Dataset(grouped).read_sample(1).members) == ["jpg", "txt"]
    rows = shard(manifest, tmp_path / "rows", captions_per_item="row")
    assert all_captions(rows) == [["one"], ["two"], ["three"]]


def test_class_names_and_uids_are_kept_in_json_and_parquet(tmp_path):
    (tmp_path / "a.wav").write_bytes(sound_bytes(0))
    manifest = tmp_path / "pairs.csv"
    manifest.write_text('file,text,label,id\na.wav,"hum, low",tone,u1\n')
    columns = Columns(media="file", caption="text", class_name="label", uid="id")
    dataset = shard(manifest, tmp_path / "dataset", media="audio", columns=columns)
    metadata = metadata_of(Dataset(dataset).read_sample(0))
    assert metadata == {"captions": ["hum, low"], "class_name": "tone", "uid": "u1"}
    (row,) = pyarrow.parquet.read_table(dataset / "00000000.parquet").to_pylist()
    assert (row["uid"], row["class_name"], row["source"]) == ("u1", "tone", "a.wav")
    assert (row["seconds"], row["sample_rate_hz"]) == (0.2, 8000)  # 1600 samples at 8 kHz


# ----------------------------------------------------------------------------------- bad pairs


def write_bad_pairs(folder):
    """Writes a manifest with one pair for every reason, and one good pair."""
    folder.mkdir()
    ogg = sound_bytes(0, "OGG", "VORBIS")
    files = {
        "good.jpg": picture_bytes(0),
        "cut.jpg": picture_bytes(1)[:-40],
        "cut.png": picture_bytes(1, "PNG")[:-40],
        "is_png.jpg": picture_bytes(2, "PNG"),
        "empty.jpg": b"",
        "text.jpg": b"<html>not found</html>",
        "sound.ogg": ogg,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rows = [
        ("good.jpg", "fine", "a"),
        ("cut.jpg", "x", "a"),
        ("cut.png", "x", "a"),
        ("is_png.jpg", "named wrongly", "a"),
        ("empty.jpg", "x", "a"),
        ("text.jpg", "x", "a"),
        ("sound.ogg", "x", "a"),
        ("absent.jpg", "x", "a"),
        ("", "x", "a"),
        ("good.jpg", "  ", "a"),
        ("good.jpg", "too", "many", "columns"),
        ("good.jpg", "other class", "b"),
    ]
    manifest = write_tsv(folder / "pairs.tsv", rows, ("path", "caption", "class_name"))
    with manifest.open("ab") as file:
        file.write(b"good.jpg\tcaf\xe9\ta\n")
    return manifest


REASONS = {
    3: "undecodable",
    4: "truncated",
    6: "empty_file",
    7: "unknown_format",
    8: "wrong_media_kind",
    9: "missing_file",
    10: "missing_media_path",
    11: "empty_caption",
    12: "wrong_column_count",
    13: "conflicting_class_name",
    14: "not_utf8",
}


def test_every_bad_pair_is_listed_with_its_reason_and_fails_the_job(tmp_path):
    manifest = write_bad_pairs(tmp_path / "media")
    fields = {"columns": Columns(class_name="class_name"), "samples_per_shard": 4}
    dataset = tmp_path / "dataset"
    with pytest.raises(InputError, match=r"11 of 13 pairs are bad \(84.6%\): "):
        shard(manifest, dataset, **fields)
    assert not (dataset / "dataset.json").exists()
    assert {row["row"]: row["reason"] for row in rejected_rows(dataset)} == REASONS

    written = {path: path.stat().st_mtime_ns for path in dataset.glob("*.tar")}
    shard(manifest, dataset, max_rejected_fraction=0.95, **fields)
    assert {path: path.stat().st_mtime_ns for path in dataset.glob("*.tar")} == written
    assert all_captions(dataset) == [["fine"], ["named wrongly"]]
    assert sorted(Dataset(dataset).read_sample(1).members) == ["json", "png", "txt"]
    assert Dataset(dataset).info.rejected["undecodable"] == 1
    assert len(rejected_rows(dataset)) == 11
    verify(dataset, decode=True)


@pytest.mark.parametrize(
    ("sound_format", "subtype", "extension", "reason"),
    [
        ("WAV", "PCM_16", "wav", "truncated"),
        ("FLAC", "PCM_16", "flac", "undecodable"),
        ("OGG", "VORBIS", "ogg", "truncated"),
    ],
)
def test_clips_that_were_cut_short_are_rejected(tmp_path, sound_format, subtype, extension, reason):
    content = sound_bytes(0, sound_format, subtype)
    (tmp_path / f"whole.{extension}").write_bytes(content)
    (tmp_path / f"cut.{extension}").write_bytes(content[: len(content) * 2 // 3])
    rows = [(f"whole.{extension}", "x"), (f"cut.{extension}", "x")]
    manifest = write_tsv(tmp_path / "pairs.tsv", rows)
    dataset = shard(manifest, tmp_path / "dataset", media="audio", max_rejected_fraction=0.5)
    assert [row["reason"] for row in rejected_rows(dataset)] == [reason]


def test_an_input_without_a_usable_pair_is_an_error(tmp_path):
    manifest = write_tsv(tmp_path / "pairs.tsv", [("absent.jpg", "x")])
    with pytest.raises(InputError, match="no usable pair among 1"):
        shard(manifest, tmp_path / "dataset", max_rejected_fraction=1)
    empty = write_tsv(tmp_path / "empty.tsv", [])
    with pytest.raises(InputError, match="found none"):
        shard(empty, tmp_path / "other")


@pytest.mark.parametrize("suffix", ["tsv", "jsonl"])
def test_a_wrong_column_lists_those_found_and_suggests_the_nearest(tmp_path, suffix):
    manifest = write_tsv(tmp_path / "pairs.tsv", [("a.jpg", "x")], ("path", "captoin"))
    if suffix == "jsonl":
        manifest = tmp_path / "pairs.jsonl"
        manifest.write_text('{"path": "a.jpg", "captoin": "x"}\n')
    with pytest.raises(InputError, match="found path, captoin; did you mean 'captoin'"):
        shard(manifest, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


# ------------------------------------------------------------------------------------- command


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    manifest = write_pictures(tmp_path / "media", 7)
    arguments = (f"input={manifest}", f"output={tmp_path / 'out'}", "samples_per_shard=3")
    assert command_line(tmp_path, monkeypatch, *arguments, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "pairs: 10\nitems: 7\nshards: 3 of at most 3 samples" in printed
    assert not (tmp_path / "out").exists()


def test_a_missing_input_ends_with_status_1(tmp_path, monkeypatch, capsys):
    arguments = (f"input={tmp_path / 'none.tsv'}", f"output={tmp_path / 'out'}")
    assert command_line(tmp_path, monkeypatch, *arguments, "--dry-run") == 1
    assert command_line(tmp_path, monkeypatch, *arguments) == 1
    assert "none.tsv: expected a manifest or a folder" in capsys.readouterr().err


def test_data_prep_starts_without_torch():
    modules = ["make_shards", "verify_shards", "index_shards", "make_demo_data", "make_subset"]
    modules += ["finalize", "describe", "find_duplicates"]
    imports = "; ".join(f"import data_prep.{name}" for name in modules)
    heavy = "{'torch', 'duckdb', 'soundfile', 'sklearn', 'pretrain', 'eval'}"
    code = f"import sys; {imports}; sys.exit(str({heavy} & set(sys.modules) or ''))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.stderr.strip() == ""


def test_a_folder_of_the_users_own_is_never_taken_for_downloads(tmp_path):
    media = tmp_path / "pile"
    manifest = write_pictures(media, 2)
    (media / "downloads").mkdir()
    (media / "downloads" / "picture.jpg").write_bytes(picture_bytes(0))
    with pytest.raises(InputError, match=r"expected a new folder.*found downloads"):
        shard(manifest, media)
    assert (media / "downloads" / "picture.jpg").exists()


@pytest.mark.parametrize("output", [".", "below"])
def test_an_output_in_the_folder_that_is_looked_through_is_refused(tmp_path, output):
    write_pictures(tmp_path, 2)
    with pytest.raises(InputError, match="expected a folder outside"):
        shard(tmp_path, tmp_path / output, format="folder")
    assert not (tmp_path / "below").exists()


def test_a_dry_run_looks_only_for_media_that_would_be_read(tmp_path, monkeypatch, capsys):
    rows = [
        ("../secret.jpg", "leads outside"),
        ("long" * 100 + ".jpg", "no file can have this name"),
    ]
    manifest = write_tsv(tmp_path / "pairs.tsv", rows)
    arguments = (f"input={manifest}", f"output={tmp_path / 'dataset'}", "--dry-run")
    assert command_line(tmp_path, monkeypatch, *arguments) == 0
    assert "media files missing: 1 of 1 checked" in capsys.readouterr().out


def test_a_full_disk_during_the_plan_is_named(tmp_path):
    manifest = write_pictures(tmp_path / "media", 50)
    config = tmp_path / "config.yaml"
    config.write_text(f"input: {manifest}\noutput: {tmp_path / 'dataset'}\nmedia: image\n")
    command = f"ulimit -f 1; exec {sys.executable} -m data_prep.make_shards {config}"
    result = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert str(tmp_path / "dataset") in result.stderr
    assert not (tmp_path / "dataset").exists()


def test_a_dataset_that_an_earlier_version_began_is_continued(tmp_path):
    dataset = shard(write_pictures(tmp_path, 3), tmp_path / "dataset")
    before = contents(dataset)
    path = dataset / "plan" / "plan.json"
    plan = json.loads(path.read_text())
    for name in ("caption_source", "underscores"):
        del plan["made_from"]["config"][name]
    del plan["made_from"]["config"]["image"]["first_frame"]
    path.write_text(json.dumps(plan))
    (dataset / "00000000.tar").unlink()
    shard(tmp_path / "pairs.tsv", dataset)
    assert contents(dataset)["00000000.tar"] == before["00000000.tar"]
    with pytest.raises(InputError, match=r"config\.caption_source: 'json', now 'txt'"):
        shard(tmp_path / "pairs.tsv", dataset, caption_source="txt")
