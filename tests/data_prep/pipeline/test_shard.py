"""Tests of captions, filters, columns to keep and clips on their way into a shard."""

import io
import json

import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from data_prep.config import AudioOptions, CaptionOptions, Columns, ImageOptions
from data_prep.errors import InputError
from data_prep.media.decode import decode_image
from data_prep.shards.dataset import Dataset
from data_prep.shards.sample import captions_of
from tests.support.toy_pairs import picture_bytes, rejected_rows, shard, verify


def write_pairs(folder, captions, **further):
    """Writes a JSONL of one picture per caption, with further columns."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, caption in enumerate(captions):
        (folder / f"{number}.jpg").write_bytes(picture_bytes(number))
        values = {name: column[number] for name, column in further.items()}
        lines.append(json.dumps({"path": f"{number}.jpg", "caption": caption} | values))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def rows_of(dataset):
    return pyarrow.parquet.ParquetDataset(sorted(dataset.glob("*.parquet"))).read().to_pylist()


def all_captions(dataset):
    read = Dataset(dataset)
    return [captions_of(read.read_sample(number)) for number in range(len(read))]


@pytest.mark.parametrize("workers", [1, 2])
def test_captions_are_cleaned_and_filters_drop_what_they_find(tmp_path, workers):
    captions = [
        "A  caf\u0065\u0301 &amp; <b>bar</b>",
        "ein Haus am See",
        "DSC_0001",
        "ok ok",
        "\u732b",
    ]
    manifest = write_pairs(tmp_path / "media", captions)
    options = CaptionOptions(
        strip_html=True, boilerplate=(r"^DSC_\d+",), min_words=2, scripts=("Latin",)
    )
    dataset = shard(
        manifest, tmp_path / "dataset", captions=options, workers=workers, max_rejected_fraction=1
    )
    assert all_captions(dataset) == [["A caf\u00e9 & bar"], ["ein Haus am See"], ["ok ok"]]
    reasons = {row["row"]: row["reason"] for row in rejected_rows(dataset)}
    assert reasons == {3: "caption_too_short", 5: "caption_too_short"}


def test_filters_named_in_mark_only_mark_and_drop_nothing(tmp_path):
    manifest = write_pairs(tmp_path / "media", ["one two three", "one", "one two three"])
    options = CaptionOptions(min_words=2, max_repeats=1)
    fields = {"captions": options, "image": ImageOptions(min_side=17), "max_rejected_fraction": 1}
    marking = ("caption_too_short", "caption_repeated", "image_too_small")
    dataset = shard(manifest, tmp_path / "marked", mark_only=marking, **fields)
    small = ["image_too_small"]  # 16 pixels wide
    marks = [row["marks"] for row in rows_of(dataset)]
    assert marks == [small, ["caption_too_short", *small], ["caption_repeated", *small]]
    info = Dataset(dataset).info
    assert info.rejected == {}
    assert info.marked == {"caption_repeated": 1, "caption_too_short": 1, "image_too_small": 3}
    verify(dataset)

    dropping = shard(manifest, tmp_path / "dropped", mark_only=marking[2:], **fields)
    assert Dataset(dropping).info.rejected == {"caption_repeated": 1, "caption_too_short": 1}
    with pytest.raises(InputError, match="no usable pair among 3"):
        shard(manifest, tmp_path / "nothing", **fields)


def test_of_one_caption_the_first_items_are_kept_whatever_its_case(tmp_path):
    captions = ["Sold out", "a dog", "SOLD OUT", ["sold out", "a cat"], "sold out"]
    manifest = write_pairs(tmp_path / "media", captions)
    options = CaptionOptions(max_repeats=2)
    dataset = shard(manifest, tmp_path / "dataset", captions=options, max_rejected_fraction=1)
    assert all_captions(dataset) == [["Sold out"], ["a dog"], ["SOLD OUT"], ["a cat"]]
    assert [row["row"] for row in rejected_rows(dataset)] == [4, 5]
    assert rejected_rows(dataset)[0]["detail"] == "2 earlier items have this caption"


def test_columns_to_keep_have_the_type_that_holds_all_their_values(tmp_path):
    further = {
        "licence": ["cc0", None, "cc-by"],
        "score": [1, 0.5, None],
        "tags": [["a"], {"b": 1}, "c"],
        "size": [3, 4, 5],
    }
    manifest = write_pairs(tmp_path / "media", ["x", "y", "z"], **further)
    dataset = shard(
        manifest, tmp_path / "dataset", keep_columns=tuple(further), samples_per_shard=2
    )
    rows = rows_of(dataset)
    assert [row["licence"] for row in rows] == ["cc0", None, "cc-by"]
    assert [row["score"] for row in rows] == [1.0, 0.5, None]
    assert [row["tags"] for row in rows] == ['["a"]', '{"b": 1}', "c"]
    assert [row["size"] for row in rows] == [3, 4, 5]
    schemas = {str(pyarrow.parquet.read_schema(path)) for path in dataset.glob("*.parquet")}
    assert len(schemas) == 1
    with pytest.raises(
        InputError, match="keep_columns: key: built-in Parquet columns have these names; rename"
    ):
        shard(manifest, tmp_path / "other", keep_columns=("key",))


def test_pictures_are_scaled_down_and_their_source_size_is_noted(tmp_path):
    manifest = write_pairs(tmp_path / "media", ["x", "y"])
    image = ImageOptions(shorter_side=16, reencode="always", format="png")
    dataset = shard(manifest, tmp_path / "dataset", image=image)
    read = Dataset(dataset)
    assert decode_image(read.read_sample(1).members["png"], "png").shape == (21, 16, 3)
    row = rows_of(dataset)[1]
    assert (row["source_height"], row["source_width"], row["is_reencoded"]) == (21, 16, True)
    verify(dataset, decode=True)


def test_a_long_sound_becomes_clips_with_keys_and_uids_of_their_own(tmp_path):
    tone = 0.5 * np.sin(np.arange(8000 * 5) * 0.3)
    tone[8000 * 2 : 8000 * 4] = 0  # silence in the middle
    sink = io.BytesIO()
    soundfile.write(sink, tone, 8000, format="WAV")
    (tmp_path / "long.wav").write_bytes(sink.getvalue())
    manifest = tmp_path / "pairs.csv"
    manifest.write_text("path,caption,id\nlong.wav,a hum,u\n")
    dataset = shard(
        manifest,
        tmp_path / "dataset",
        media="audio",
        columns=Columns(uid="id"),
        audio=AudioOptions(clip_seconds=2, min_peak_dbfs=-60),
    )
    rows = rows_of(dataset)
    assert [(row["uid"], row["start_seconds"]) for row in rows] == [("u_0000", 0), ("u_0002", 4)]
    assert [row["key"] for row in rows] == ["000000000000_0000", "000000000000_0002"]
    info = Dataset(dataset).info
    assert (info.num_samples, info.rejected) == (2, {"clip_audio_silent": 1})
    verify(dataset, decode=True)


def test_shards_are_made_again_for_reasons_that_were_mended(tmp_path):
    manifest = write_pairs(tmp_path / "media", ["a", "b", "c", "d", "e"])
    content = (tmp_path / "media" / "4.jpg").read_bytes()
    (tmp_path / "media" / "4.jpg").unlink()
    dataset = shard(manifest, tmp_path / "dataset", max_rejected_fraction=1)
    (tmp_path / "media" / "4.jpg").write_bytes(content)
    first = (dataset / "00000000.tar").stat().st_mtime_ns
    shard(manifest, dataset, max_rejected_fraction=1)
    assert len(Dataset(dataset)) == 4  # finished shards stay as they are, unless it is asked for
    shard(manifest, dataset, remake=("missing_file",))
    assert len(Dataset(dataset)) == 5
    assert not (dataset / "rejected.jsonl").exists()
    assert (dataset / "00000000.tar").stat().st_mtime_ns == first
    verify(dataset)
