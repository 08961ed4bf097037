"""Evaluation sets read from class folders, tables and URLs."""

import csv
import gzip
import io
import itertools
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep.errors import InputError
from eval.config import EvaluateConfig
from eval.tasks.readers import fetch_datasets, read_tasks
from tests.eval.datasets.test_tar_dataset import write_set
from tests.support.toy_evaluation import picture_sample, sound_sample, write_dataset
from tests.support.toy_shards import jpeg


def config_of(task, dataset, **section):
    top = {key: section.pop(key) for key in ("skip_missing",) if key in section}
    values = {"task": task, "dataset": str(dataset), **section}
    config = {"checkpoint": "run", "output": "out", "evaluations": {"set": values}} | top
    return EvaluateConfig.model_validate(config)


def task_of(task, dataset, **section):
    (task,) = read_tasks(config_of(task, dataset, **section).evaluations).present
    return task


def write_folders(folder, names, *, split="."):
    for place, name in enumerate(names):
        (folder / split / name / "more").mkdir(parents=True)
        for number in range(2):
            (folder / split / name / f"{number}.JPEG").write_bytes(jpeg(10 * place + number))
        (folder / split / name / "more" / "2.png").write_bytes(b"")
        (folder / split / name / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("split", [".", "test"])
def test_a_folder_per_class_needs_no_class_names(tmp_path, split):
    folder = write_folders(tmp_path / "set", ["sea_lion", "cat"], split=split)
    task = task_of("zero_shot_classification", folder, prompt_templates=["a {}"])
    assert task.class_names == ["cat", "sea lion"]
    assert task.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert task.keys == [
        f"{c}/{n}" for c in ("cat", "sea_lion") for n in ("0.JPEG", "1.JPEG", "more/2.png")
    ]
    assert task.texts == ["a cat", "a sea lion"]
    sample = task.dataset.read_sample(3)
    assert sample.members["jpeg"] == jpeg(0)
    assert set(task.dataset.read_sample(3, fields=["json"]).members) == {"json"}
    before = task.dataset.fingerprint
    path = folder / split / "cat" / "0.JPEG"
    path.write_bytes(path.read_bytes() + b" ")
    assert (
        task_of("zero_shot_classification", folder, prompt_templates=["{}"]).dataset.fingerprint
        != before
    )


def test_folders_are_named_classes_or_stand_for_them_in_their_order(tmp_path):
    folder = write_folders(tmp_path / "set", ["n02", "n01", "n03"])
    names = ["tench", "goldfish", "great white shark"]
    task = task_of("zero_shot_classification", folder, class_names=names, prompt_templates=["{}"])
    assert task.targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    named = write_folders(tmp_path / "named", ["great_white_shark", "tench"])
    task = task_of("zero_shot_classification", named, class_names=names, prompt_templates=["{}"])
    assert task.targets.tolist() == [2] * 3 + [0] * 3
    with pytest.raises(InputError, match=r"expected folders named after the 2 classes, .* found 3"):
        task_of("zero_shot_classification", folder, class_names=names[:2], prompt_templates=["{}"])


def test_open_clips_class_names_and_templates_are_taken_by_name(tmp_path):
    folder = write_folders(tmp_path / "set", ["tench", "goldfish"])
    section = {"class_names": "open_clip:imagenet", "prompt_templates": "open_clip:imagenet"}
    task = task_of("zero_shot_classification", folder, **section)
    assert (len(task.class_names), len(task.texts)) == (1000, 80_000)
    assert task.texts[0] == "a bad photo of a tench."
    assert task.targets.tolist() == [1] * 3 + [0] * 3
    with pytest.raises(InputError, match="expected open_clip:imagenet or open_clip:simple"):
        task_of("zero_shot_classification", folder, prompt_templates="open_clip:imgnet")


def test_classes_may_have_prompts_of_their_own(tmp_path):
    folder = write_folders(tmp_path / "set", ["cat", "dog"])
    prompts = {"cat": ["it purrs", "it sits"], "dog": ["it barks"], "cow": ["it moos"]}
    (tmp_path / "cupl.json").write_text(json.dumps(prompts))
    section = {"class_prompts": str(tmp_path / "cupl.json")}
    task = task_of("zero_shot_classification", folder, **section)
    assert (task.prompts.templates, task.prompts.of_class) == (
        [],
        [["it purrs", "it sits"], ["it barks"]],
    )
    with pytest.raises(InputError, match="expected a list of prompts for the class 'sea lion'"):
        task_of(
            "zero_shot_classification", folder, class_names=["cat", "dog", "sea lion"], **section
        )


def write_sounds(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound_sample("low", seed=number)["wav"])


def test_tables_as_esc_50_clotho_audiocaps_and_fsd50k_come_are_read(tmp_path):
    write_sounds(tmp_path, ["audio/1.wav", "audio/2.wav"])
    esc = tmp_path / "esc50.csv"
    esc.write_text("filename,fold,category\n1.wav,1,crying_baby\n2.wav,2,dog\n")
    columns = {"media": "audio/{filename}", "class_name": "category"}
    section = {
        "class_names": ["dog", "crying baby"],
        "prompt_templates": ["{}"],
        "columns": columns,
    }
    task = task_of("zero_shot_classification", esc, group_by="fold", **section)
    assert (task.targets.tolist(), task.groups) == ([1, 0], ["1", "2"])
    assert task.dataset.info.media == "audio"

    clotho = tmp_path / "clotho.csv"
    clotho.write_text('file_name,caption_1,caption_2\n1.wav,"a, b",c\n2.wav,d,\n')
    columns = {"media": "audio/{file_name}", "captions": ["caption_1", "caption_2"]}
    task = task_of("retrieval", clotho, columns=columns)
    assert (task.captions, task.media_of_text.tolist()) == (["a, b", "c", "d"], [0, 0, 1])

    audiocaps = tmp_path / "audiocaps.csv"
    audiocaps.write_text("youtube_id,caption\n2,x\n1,y\n2,z\n")
    task = task_of("retrieval", audiocaps, columns={"media": "audio/{youtube_id}.wav"})
    assert (task.keys, task.captions) == (["audio/2.wav", "audio/1.wav"], ["x", "z", "y"])

    fsd = tmp_path / "eval.csv"
    fsd.write_text('fname,labels\n1,"Bark,Dog"\n2,Rain\n')
    columns = {"media": "audio/{fname}.wav", "class_names": "labels"}
    section = {
        "class_names": ["Bark", "Dog", "Rain"],
        "prompt_templates": ["{}"],
        "columns": columns,
    }
    task = task_of("multi_label_classification", fsd, **section)
    assert task.is_of_class.tolist() == [[True, True, False], [False, False, True]]

    pairs = [
        {"id": n, "file": "audio/1.wav", "caption": "a", "negative_caption": "b"} for n in "12"
    ]
    crepe = tmp_path / "crepe.jsonl"
    crepe.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    task = task_of("caption_choice", crepe, columns={"key": "{id}"})
    assert (task.keys, task.captions) == (["1", "2"], [["a", "b"]] * 2)

    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"file": "audio/1.wav", "caption": "a"}\n')
    assert task_of("retrieval", lines).captions == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "file,caption\naudio/1.wav,a\naudio/3.wav,b\n",
            r"1 of 2 files are missing, .*audio/3\.wav",
        ),
        (
            "path,caption\naudio/1.wav,a\n",
            r"row 1: columns\.media is '\{file\}', .* found .*'path'",
        ),
        ("file,caption\n", "found no files|found 'no files'"),
        ("file,caption\naudio/1.wav,\n", r"sample audio/1.wav: expected a caption"),
        ("file,caption\naudio/1.wav,a,b\n", "line 2: expected 2 columns, found 3"),
        ("file,caption\naudio/1.wav\n", "line 2: expected 2 columns, found 1"),
        ('file,caption\naudio/1.wav,"a\n', "quotes=false|unexpected end of data"),
        ("file,caption,file\naudio/1.wav,a,b\n", "duplicate column 'file'"),
        ("file,caption\n" + "x" * 300 + ".wav,a\n", "1 of 1 files are missing"),
        (
            "file,caption\naudio/1.wav,caf\udce9\n",
            "line 2: column 'caption': expected text in UTF-8",
        ),
        ('file,caption\naudio/1.wav,"a" b\n', r"line 2: .* set columns\.quotes=false"),
        ("file^caption\naudio/1.wav^a\n", r"'file\^caption'; .* set columns\.separator"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path, content, message):
    write_sounds(tmp_path, ["audio/1.wav"])
    (tmp_path / "table.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        task_of("retrieval", tmp_path / "table.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["audio/1.wav", "a"]', "line 1: expected an object"),
        ('"audio/1.wav"', "line 1: expected an object"),
        ('{"file": "audio/1.wav"', "line 1: Expecting"),
        ("[" * 100_000, "line 1: "),
        ('{"caption": "a"}', r"row 1: columns\.media"),
        ('{"file": null, "caption": "a"}', "1 of 1 files are missing"),
        ('{"file": ["audio/1.wav"], "caption": "a"}', "1 of 1 files are missing"),
        ('{"file": "audio/1.wav", "caption": {"en": "a"}}', "row 1: caption: expected text"),
        ('{"file": "audio/1.wav", "caption": [["a"]]}', "row 1: caption: expected text"),
        *(
            (
                f'{{"file": "audio/1.wav", "caption": "a", "more": {value}}}',
                r"jsonl: line 1: .*'more'",
            )
            for value in (
                *('"\\ud800"', '["a", "\\ud800"]', '{"a": {"b": ["\\ud800"]}}', '{"\\ud800": 1}'),
                *('"\\ude00\\ud83d"', '[[["\\ud800"]]]'),
            )
        ),
        ('{"file": "audio/1.wav", "caption": ["a", "\\ud800"]}', "line 1: column 'caption'"),
        ('{"file": "audio/1.wav", "caption": "a", "\\ud800": 1}', r"line 1: column '\\ud800'"),
        ('{"file": "audio/1.wav", "caption": "a", "class_name": ["x", "y"]}', "one class"),
        ('{"file": "audio/1.wav", "caption": null}', "expected a caption"),
    ],
)
def test_a_line_of_jsonl_that_does_not_fit_is_named(tmp_path, line, message):
    write_sounds(tmp_path, ["audio/1.wav"])
    (tmp_path / "table.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        task_of("retrieval", tmp_path / "table.jsonl")


def test_numbers_and_lists_in_a_table_become_text(tmp_path):
    write_sounds(tmp_path, ["audio/1.wav", "audio/2.wav"])
    rows = [
        {"file": "audio/1.wav", "caption": 5, "class_name": 1, "class_names": ["a", 2]},
        {"file": "audio/2.wav", "caption": ["x", 0.5, None], "class_name": "b", "class_names": "a"},
    ]
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert task_of("retrieval", path).captions == ["5", "x", "0.5"]
    section = {"prompt_templates": ["{}"], "class_names": ["1", "b"]}
    assert task_of("zero_shot_classification", path, **section).targets.tolist() == [0, 1]
    section = {"prompt_templates": ["{}"], "class_names": ["a", "2"]}
    labels = task_of("multi_label_classification", path, **section).is_of_class
    assert labels.tolist() == [[True, True], [True, False]]


def test_tables_are_read_as_data_prep_reads_them(tmp_path):
    write_sounds(tmp_path, ["audio/1.wav", "audio/2.wav"])
    texts = ['he said "hi"', "a; b, c"]
    for separator, suffix in itertools.product(",;\t|", ("csv", "tsv", "csv.gz", "tsv.gz")):
        sink = io.StringIO(newline="")
        rows = [("file", "caption"), *zip(("audio/1.wav", "audio/2.wav"), texts, strict=True)]
        csv.writer(sink, delimiter=separator, lineterminator="\n").writerows(rows)
        content = sink.getvalue().encode()
        path = tmp_path / f"table.{suffix}"
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
        assert task_of("retrieval", path).captions == texts
    plain = tmp_path / "plain.tsv"
    plain.write_text('file\tcaption\naudio/1.wav\t"open\naudio/2.wav\ta 5" pipe\n')
    assert task_of("retrieval", plain).captions == ['"open', 'a 5" pipe']


def test_separator_and_quotes_of_a_table_may_be_stated(tmp_path):
    write_sounds(tmp_path, ["audio/1.wav", "audio/2.wav"])
    path = tmp_path / "table.csv"
    path.write_text('file^caption\naudio/1.wav^"open\naudio/2.wav^a 5" pipe\n')
    columns = {"separator": "^", "quotes": False}
    assert task_of("retrieval", path, columns=columns).captions == ['"open', 'a 5" pipe']
    path = tmp_path / "table.tsv"
    path.write_text('file\tcaption\naudio/1.wav\t"a ""b"""\naudio/2.wav\tc\n')
    for quotes, caption in ((None, 'a "b"'), (True, 'a "b"'), (False, '"a ""b"""')):
        assert task_of("retrieval", path, columns={"quotes": quotes}).captions == [caption, "c"]
    lines = tmp_path / "table.jsonl"
    lines.write_text('{"file": "audio/1.wav", "caption": "a"}\n')
    for name, value in columns.items():
        with pytest.raises(InputError, match=rf"columns\.{name} is for \.csv and \.tsv"):
            task_of("retrieval", lines, columns={name: value})
    with pytest.raises(ValueError, match="separator"):
        config_of("retrieval", path, columns={"separator": ",,"})


def test_what_is_missing_says_how_to_get_it_or_is_left_out(tmp_path):
    section = {"how_to_get": "download it from nowhere"}
    with pytest.raises(InputError, match=r"set: .*/none: expected .*; download it from"):
        task_of("retrieval", tmp_path / "none", **section)
    config = config_of("retrieval", tmp_path / "none", skip_missing=True, **section)
    assert not read_tasks(config.evaluations, skip_missing=True).present
    folder = write_dataset(tmp_path / "toy", [picture_sample("red", seed=0)])
    there = config_of("retrieval", folder).evaluations["set"]
    both = config.model_copy(update={"evaluations": config.evaluations | {"there": there}})
    found = read_tasks(both.evaluations, skip_missing=both.skip_missing)
    assert [task.name for task in found.present] == ["there"]
    assert "download it from nowhere" in found.skipped["set"]
    with pytest.raises(InputError, match=r"expected 3 items \(expected_items\), found 1"):
        task_of("retrieval", folder, expected_items=3)


@pytest.fixture
def web(tmp_path):
    """Serves tmp_path/web, and counts requests by path."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

    (tmp_path / "web").mkdir()
    handler = partial(Handler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def test_sets_behind_urls_are_fetched_once(tmp_path, web, monkeypatch):
    url, requests = web
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    samples = [{"jpg": jpeg(n), "cls": str(n % 2).encode()} for n in range(5)]
    write_set(tmp_path / "web/tars", samples, classes=["cat", "dog"])
    shards = [picture_sample("red", seed=n) for n in range(2)]
    write_dataset(tmp_path / "web/shards", shards)
    published = config_of("zero_shot_classification", f"{url}/tars")
    own = config_of("retrieval", f"{url}/shards")
    with pytest.raises(InputError, match="not fetched yet"):
        read_tasks(published.evaluations)
    for config, num_items in ((published, 5), (own, 2)):
        fetch_datasets(config.evaluations)
        (task,) = read_tasks(config.evaluations).present
        assert len(task.dataset) == num_items
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    num_requests = len(requests)
    fetch_datasets(published.evaluations)
    fetch_datasets(own.evaluations)
    assert len(requests) == num_requests
    with pytest.raises(InputError, match=r"absent: expected a dataset: .*nshards\.txt"):
        fetch_datasets(config_of("retrieval", f"{url}/absent").evaluations)
    # Files fetched before a failure are kept.
    shutil.rmtree(tmp_path / "cache")
    tar = tmp_path / "web/tars/test/2.tar"
    tar.rename(tmp_path / "2.tar")
    with pytest.raises(InputError, match=r"test/2\.tar"):
        fetch_datasets(published.evaluations)
    (tmp_path / "2.tar").rename(tar)
    requests.clear()
    fetch_datasets(published.evaluations)
    assert set(requests) == {"/tars/dataset.json", "/tars/dataset_type.txt", "/tars/test/2.tar"}
    assert len(read_tasks(published.evaluations).present[0].dataset) == 5
