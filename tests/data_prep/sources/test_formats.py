"""The same pictures and captions, from every format, become the same samples."""

import io
import json
import tarfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.config import Columns, DownloadOptions
from data_prep.shards.dataset import Dataset
from tests.support.toy_pairs import picture_bytes, shard, verify
from tests.support.toy_sources import served

PICTURES = [picture_bytes(number) for number in range(4)]
CAPTIONS = [[f"caption {number}"] for number in range(3)] + [["one", "two"]]
NAMES = [f"{number}.jpg" for number in range(4)]
ROWS = [(name, text) for name, texts in zip(NAMES, CAPTIONS, strict=True) for text in texts]
IMAGE = Columns(media="image")


def write_media(folder):
    folder.mkdir()
    for name, picture in zip(NAMES, PICTURES, strict=True):
        (folder / name).write_bytes(picture)
    return folder


def csv_of_paths(folder, _root):
    path = write_media(folder) / "pairs.csv"
    path.write_text("path,caption\n" + "".join(f"{name},{text}\n" for name, text in ROWS))
    return {"input": path}


def jsonl_of_urls(folder, root):
    folder.mkdir()
    lines = [{"path": f"{root}/{name}", "caption": text} for name, text in ROWS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    download = DownloadOptions(private_hosts=True)
    return {"input": folder / "pairs.jsonl", "download": download}


def folder_of_sidecars(folder, _root):
    write_media(folder)
    for name, captions in zip(NAMES, CAPTIONS, strict=True):
        (folder / name).with_suffix(".json").write_text(json.dumps({"captions": captions}))
    return {"input": folder}


def coco(folder, _root):
    images = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    texts = [{"image_id": NAMES.index(name), "caption": text} for name, text in ROWS]
    path = write_media(folder) / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": texts}))
    return {"input": path}


def parquet_of_bytes(folder, _root):
    folder.mkdir()
    table = pyarrow.table({"image": PICTURES, "caption": CAPTIONS})
    pyarrow.parquet.write_table(table, folder / "pairs.parquet")
    return {"input": folder / "pairs.parquet", "columns": IMAGE}


def huggingface(folder, _root):
    images = [{"bytes": picture, "path": None} for picture in PICTURES]
    dataset = datasets.Dataset.from_dict({"image": images, "caption": CAPTIONS})
    dataset.cast_column("image", datasets.Image()).save_to_disk(folder)
    return {"input": folder, "columns": IMAGE}


def tars(folder, _root):
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, picture, captions in zip(NAMES, PICTURES, CAPTIONS, strict=True):
            members = {name: picture, f"{name[0]}.json": json.dumps({"text": captions}).encode()}
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return {"input": folder}


def our_own(folder, root):
    fields = csv_of_paths(folder, root)
    return {"input": shard(fields["input"], folder / "dataset")}


@pytest.mark.parametrize(
    "write",
    [
        csv_of_paths,
        jsonl_of_urls,
        folder_of_sidecars,
        coco,
        parquet_of_bytes,
        huggingface,
        tars,
        our_own,
    ],
)
def test_every_format_becomes_the_same_samples(tmp_path, write):
    files = {f"/{name}": picture for name, picture in zip(NAMES, PICTURES, strict=True)}
    with served(files) as root:
        fields = write(tmp_path / "source", root)
        dataset = shard(fields.pop("input"), tmp_path / "dataset", **fields)
    verify(dataset, decode=True)
    read = Dataset(dataset)
    found = [read.read_sample(number) for number in range(len(read))]
    assert [sample.members["jpg"] for sample in found] == PICTURES
    assert [sample.members["txt"].decode() for sample in found] == [texts[0] for texts in CAPTIONS]
    assert json.loads(found[3].members["json"]) == {"captions": ["one", "two"]}
