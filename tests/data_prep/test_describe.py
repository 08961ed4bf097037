"""The data sheet: its statistics compared with slow counts in Python, and the page itself."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import regex

from data_prep import describe as verb
from data_prep.config import Describe
from data_prep.dedup.duplicate_table import DATASETS_KEY
from data_prep.describe import describe, measure
from data_prep.errors import InputError
from data_prep.report.data_sheet import SheetContent
from data_prep.report.rejected import rejected_examples
from data_prep.shards.dataset import Dataset
from data_prep.shards.subset import Subset
from tests.support.toy_shards import record_sidecars
from tests.support.toy_sheets import (
    PICTURE_COLUMNS,
    assert_counts,
    picture_row,
    sound_row,
    write_dataset,
)

CONFIG = str(Path(__file__).parents[2] / "configs/data_prep/describe.yaml")
NUM_PICTURES = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheet") / "pictures"
    samples = [picture_row(number) for number in range(NUM_PICTURES)]
    rejected = {"missing_file": 9, "caption_too_short": 1, "clip_audio_silent": 2}
    preparation = {"command": "make_shards", "config": {"input": "data/pairs.tsv"}}
    options = {"rejected": rejected, "preparation": preparation, "isopair_version": "0.1"}
    write_dataset(folder, samples, kept=PICTURE_COLUMNS, **options)
    lines = [{"row": row, "media": f"<u>{row}</u>", "reason": "missing_file"} for row in range(9)]
    lines.append({"row": 99, "media": "b\udc80", "reason": "caption_too_short", "detail": "1 word"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rejected.jsonl").write_text(text)
    return folder


def sheet(dataset, output, **fields):
    describe(Describe(dataset=dataset, output=output, **fields))
    return output.read_text(encoding="utf-8")


def content_of(dataset, **fields):
    content = measure(Describe(dataset=dataset, output="unused.html", **fields))
    assert isinstance(content, SheetContent)
    return content


# ------------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_a_slow_count(pictures):
    statistics = content_of(pictures).statistics
    rows = [picture_row(number) for number in range(NUM_PICTURES)]
    captions = [caption for _, _, values in rows for caption in values["captions"]]
    by_title = {measure.title: counts for measure, counts in statistics.measures.items()}

    assert statistics.captions.num_filled == len(captions)
    assert statistics.captions.num_distinct == len(set(captions))
    words = Counter(w for c in captions for w in regex.findall(r"[\p{L}\p{M}\p{N}']+", c.lower()))
    assert dict(statistics.words.most_frequent) == dict(words)
    lengths = [len(caption.split()) for caption in captions]
    assert_counts(by_title["Words in a caption"], lengths)
    assert_counts(by_title["Characters in a caption"], [len(caption) for caption in captions])
    sides = [min(values["height"], values["width"]) for _, _, values in rows]
    assert_counts(by_title["Shorter side"], sides)
    assert_counts(by_title["Size of an image"], [len(content) for content, _, _ in rows])
    pixels = [values["height"] * values["width"] / 1e6 for _, _, values in rows]
    assert_counts(by_title["Megapixels"], pixels)
    for script, num in statistics.scripts.items():
        assert num == sum(bool(regex.search(rf"\p{{{script}}}", caption)) for caption in captions)
    assert set(statistics.scripts) == {"Latin", "Cyrillic", "Han"}
    assert statistics.num_reencoded == sum(values["is_reencoded"] for _, _, values in rows)
    assert dict(statistics.languages.most_frequent) == {"en": 10, "ru": 10}
    assert dict(statistics.tags.most_frequent) == {"image_too_small": 6}
    assert statistics.hashes.num_distinct == len({content for content, _, _ in rows})
    prices = [values['price in $ "x"'] for _, _, values in rows]
    kind, counts = statistics.kept['price in $ "x"']
    assert kind == "DOUBLE"
    assert_counts(counts, [price for price in prices if price == price])


def test_a_subset_is_described_as_a_dataset_of_its_own(pictures, tmp_path):
    content = content_of(pictures)
    bitmap = np.arange(NUM_PICTURES) % 3 > 0
    path = tmp_path / "some.subset"
    Subset.from_bitmap(content.kept.info, bitmap, preparation={"where": "x < 3"}).write(path)
    samples = [picture_row(number) for number in np.flatnonzero(bitmap).tolist()]
    write_dataset(tmp_path / "alone", samples, kept=PICTURE_COLUMNS)
    alone, subset = content_of(tmp_path / "alone"), content_of(pictures, subset=path)
    assert subset.members == alone.members
    mine, theirs = vars(subset.statistics).copy(), vars(alone.statistics).copy()
    groups = [values.pop("duplicate_keys") for values in (mine, theirs)]
    assert mine == theirs
    assert [num for num, _ in groups[0]] == [num for num, _ in groups[1]]
    page = sheet(pictures, tmp_path / "sheet.html", subset=path)
    assert "20 kept by the subset: 66.7 % of 30" in page
    assert "x &lt; 3" in page


def test_an_empty_subset_has_a_sheet(pictures, tmp_path):
    info = content_of(pictures).kept.info
    path = tmp_path / "none.subset"
    Subset.from_bitmap(info, np.zeros(NUM_PICTURES, dtype=bool), preparation={}).write(path)
    assert "0 kept by the subset" in sheet(pictures, tmp_path / "sheet.html", subset=path)


# ---------------------------------------------------------------------------------------- page


def test_the_sheet_needs_nothing_besides_itself_and_repeats_itself(pictures, tmp_path):
    page = sheet(pictures, tmp_path / "one.html")
    assert page == sheet(pictures, tmp_path / "two.html", workers=3, memory_gb=0.5)
    assert page != sheet(pictures, tmp_path / "three.html", seed=1)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert not re.search(r"url\((?!#)", page)
    assert page.count('<img src="data:image/jpeg;base64,') == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.html",
        "three.html",
        "two.html",
    ]


def test_the_sheet_says_what_the_dataset_says(pictures, tmp_path):
    page = sheet(pictures, tmp_path / "sheet.html", num_samples_shown=3)
    info = json.loads((pictures / "dataset.json").read_text())
    for text in (info["fingerprint"], "data/pairs.tsv", "missing_file", "10 pairs, and 2 clips"):
        assert text in page
    for line in (pictures / "manifest.jsonl").read_text().splitlines():
        assert json.loads(line)["tar_sha256"] in page
    assert "<h2>Licences</h2>" in page
    assert "<h2>Classes</h2>" in page
    assert "CC0" in page
    assert "b\\udc80" in page
    for harmful in ("<b>large", "<u>", "<i>own"):
        assert harmful not in page
    assert "&lt;b&gt;large" in page


def test_fractions_of_languages_say_of_what_they_are(pictures, tmp_path):
    page = sheet(pictures, tmp_path / "sheet.html")
    assert "Detected in 20 of 30 samples; fractions of these." in page


def test_sounds_can_be_listened_to(tmp_path):
    samples = [sound_row(number) for number in range(20)]
    samples[3][2]["captions"] = ["tone"] * 9
    write_dataset(tmp_path / "sounds", samples, media="audio")
    page = sheet(tmp_path / "sounds", tmp_path / "sheet.html")
    assert page.count("<audio controls") == 20
    total = sum(values["seconds"] for _, _, values in samples)
    assert f"{total:.3g} seconds in all" in page
    assert "16,000 Hz for all" in page
    assert "and 4 more" in page
    assert "Licences" not in page.partition("</nav>")[0]


def test_without_parquets_the_sheet_says_what_is_missing(pictures, tmp_path):
    samples = [picture_row(number) for number in range(10)]
    write_dataset(tmp_path / "bare", samples, kept=PICTURE_COLUMNS)
    (tmp_path / "bare/00000001.parquet").unlink()
    page = sheet(tmp_path / "bare", tmp_path / "sheet.html")
    assert "1 of 2 shards have no Parquet file" in page
    assert "index_shards" in page
    assert page.count("<img ") == 10
    assert ".png" in page
    assert "<h2>Captions</h2>" not in page


def test_a_damaged_sample_is_shown_as_such(tmp_path):
    samples = [picture_row(number) for number in range(4)]
    samples[2] = (b"no picture", "jpg", samples[2][2])
    write_dataset(tmp_path / "some", samples, kept=PICTURE_COLUMNS)
    page = sheet(tmp_path / "some", tmp_path / "sheet.html")
    assert page.count('badge bad">damaged') == 1
    assert page.count("<img ") == 3


# --------------------------------------------------------------------------- drops, duplicates


def test_a_few_examples_of_each_reason_are_read_and_no_more(tmp_path):
    path = tmp_path / "rejected.jsonl"
    lines = [json.dumps({"row": row, "reason": "ab"[row % 2]}) for row in range(20)]
    path.write_text("\n".join(lines) + "\nno json")
    examples = rejected_examples(path, {"a", "b", "clip_audio_silent"})
    assert {reason: [row["row"] for row in rows] for reason, rows in examples.items()} == {
        "a": [0, 2, 4],
        "b": [1, 3, 5],
    }
    with pytest.raises(InputError, match="line 21 is damaged"):
        rejected_examples(path, {"a", "b", "c"})
    assert rejected_examples(tmp_path / "none.jsonl", {"a"}) == {}


def test_fractions_of_drops_are_of_all_pairs(tmp_path):
    samples = [picture_row(number) for number in range(6)]
    preparation = {"command": "index_shards"}
    options = {"preparation": preparation, "rejected": {"missing_media": 2}}
    write_dataset(tmp_path / "some", samples, kept=PICTURE_COLUMNS, **options)
    (rejection,) = content_of(tmp_path / "some").rejections
    assert (rejection.fraction, rejection.kind) == (2 / 8, "unusable")


def duplicate_rows(name):
    """Returns rows where samples 0 and 1 match, 5 and 6 match, and 7 is in a test set."""

    def row(ordinal, group, method, match=None, match_dataset=None, similarity=None):
        return {
            "dataset": name,
            "ordinal": ordinal,
            "key": f"{ordinal:012d}",
            "uid": f"{ordinal:012d}",
            "group": group,
            "method": method,
            "kept": match is None,
            "match_dataset": match_dataset,
            "match_ordinal": match,
            "match_key": None if match is None else f"{match:012d}",
            "similarity": similarity,
        }

    return [
        row(0, 0, "exact"),
        row(1, 0, "exact", 0, name, 1.0),
        row(5, 1, "near_media"),
        row(6, 1, "near_media", 5, name, 0.93),
        row(7, 2, "near_media", 3, "datasets/<test>", 0.91),
        {**row(8, 3, "exact", 0, "elsewhere", 1.0), "dataset": "elsewhere"},
    ]


def write_duplicates(folder, rows, fingerprints):
    folder.mkdir()
    types = {"group": "int64", "ordinal": "int64", "match_ordinal": "int64"}
    types |= {"kept": "bool", "similarity": "double"}
    schema = pyarrow.schema([(key, types.get(key, "string")) for key in rows[0]])
    schema = schema.with_metadata({DATASETS_KEY: json.dumps(fingerprints)})
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    pyarrow.parquet.write_table(table, folder / "duplicates.parquet")
    return folder


def test_duplicates_of_this_dataset_are_counted_by_method_and_match(pictures, tmp_path):
    fingerprints = {"elsewhere": "0", str(pictures): Dataset(pictures).info.fingerprint}
    found = write_duplicates(tmp_path / "found", duplicate_rows(str(pictures)), fingerprints)
    duplicates = content_of(pictures, duplicates=found).duplicates
    assert (duplicates.num_groups, duplicates.num_grouped) == (3, 5)
    found_by = [(each.method, each.is_this_dataset) for each in duplicates.matches]
    assert found_by == [("exact", True), ("near_media", True), ("near_media", False)]
    assert [each.num_samples for each in duplicates.matches] == [1, 1, 1]
    page = sheet(pictures, tmp_path / "sheet.html", duplicates=found, num_samples_shown=0)
    assert "datasets/&lt;test&gt;" in page
    assert page.count("<img ") == 5

    bitmap = np.arange(NUM_PICTURES) > 5
    info = content_of(pictures).kept.info
    Subset.from_bitmap(info, bitmap, preparation={}).write(tmp_path / "late.subset")
    options = {"duplicates": found, "subset": tmp_path / "late.subset"}
    assert content_of(pictures, **options).duplicates.num_grouped == 2


def test_duplicates_of_another_dataset_are_refused(pictures, tmp_path):
    found = write_duplicates(tmp_path / "found", duplicate_rows("elsewhere"), {"elsewhere": "0"})
    with pytest.raises(InputError, match=r"was created from elsewhere, and not from "):
        content_of(pictures, duplicates=found)
    with pytest.raises(InputError, match="find_duplicates"):
        content_of(pictures, duplicates=tmp_path)


# -------------------------------------------------------------------------------------- errors


def test_damaged_sidecars_are_named(tmp_path):
    samples = [picture_row(number) for number in range(10)]
    write_dataset(tmp_path / "some", samples, kept=PICTURE_COLUMNS)
    path = tmp_path / "some/00000001.parquet"
    whole = path.read_bytes()
    path.write_bytes((tmp_path / "some/00000000.parquet").read_bytes())
    with pytest.raises(InputError, match=r"00000001.parquet: expected 2 rows"):
        content_of(tmp_path / "some")
    path.write_bytes(whole[:50])
    with pytest.raises(InputError, match="some"):
        content_of(tmp_path / "some")
    for name in ("00000000", "00000001"):
        num_rows = 8 if name == "00000000" else 2
        table = pyarrow.table({"key": ["x"] * num_rows, "captions": [["x"]] * num_rows})
        pyarrow.parquet.write_table(table, tmp_path / f"some/{name}.parquet")
    record_sidecars(tmp_path / "some")
    with pytest.raises(InputError, match="expected Parquet files with a column"):
        content_of(tmp_path / "some")


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["describe", CONFIG, *map(str, arguments)])
    return verb.main()


def test_a_dry_run_says_what_would_be_read_and_writes_nothing(
    pictures, tmp_path, monkeypatch, capsys
):
    where = [f"dataset={pictures}", f"output={tmp_path / 'new/sheet.html'}"]
    assert run(monkeypatch, *where, "--dry-run") == 0
    assert "would read 4 Parquet files and 4 indexes" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert run(monkeypatch, *where, "num_samples_shown=1") == 0
    assert "data sheet of 30 samples" in capsys.readouterr().out


def test_an_output_that_is_no_html_file_is_refused(pictures, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, f"dataset={pictures}", f"output={pictures / 'dataset.json'}") == 2
    assert "expected the name of an .html file" in capsys.readouterr().err
    (tmp_path / "folder.html").mkdir()
    assert run(monkeypatch, f"dataset={pictures}", f"output={tmp_path / 'folder.html'}") == 2
    assert "found a folder" in capsys.readouterr().err
