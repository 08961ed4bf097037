"""Items with identical media files are found in sets of any form."""

import hashlib

import torch

from eval.datasets.columns import TableColumns
from eval.datasets.datasets import open_dataset
from eval.embeddings.equal_media import EmbeddedItems, equal_media
from eval.embeddings.items import MediaSet
from tests.eval.tasks.test_test_items_in_training import (
    NUM_ITEMS,
    write_class_folders,
    write_shards,
    write_table,
    write_tars,
)


def embedded(location, embedding_of):
    """Opens a set; its items' embeddings are a function of their media."""
    dataset = open_dataset(str(location), split="test", subset=None, columns=TableColumns())
    contents = [dataset.read_sample(n, fields=["jpg"]).members["jpg"] for n in range(len(dataset))]
    rows = torch.tensor([embedding_of(each) for each in contents])
    items = MediaSet(dataset, list(map(str, range(len(dataset)))))
    return EmbeddedItems(items, range(len(dataset)), rows), contents


def test_equal_files_are_counted_by_content_whatever_else_is_equal(tmp_path):
    folders = write_class_folders(tmp_path / "folders")
    table = write_table(tmp_path / "table.csv", "folders", [*range(3, NUM_ITEMS)])
    tars = write_tars(tmp_path / "tars", first=NUM_ITEMS - 4)
    shards = write_shards(tmp_path / "shards", first=NUM_ITEMS // 2)

    def by_content(content):
        return [float(byte) for byte in hashlib.sha256(content).digest()[:3]]

    for embedding_of in (by_content, lambda content: [1.0]):  # the last: a collapsed model
        sets = [embedded(each, embedding_of) for each in (folders, table, tars, shards)]
        for first, first_contents in sets:
            for second, second_contents in sets:
                found, others = equal_media(first, second)
                assert found.tolist() == [
                    n for n, content in enumerate(first_contents) if content in second_contents
                ]
                assert others.tolist() == [
                    n for n, content in enumerate(second_contents) if content in first_contents
                ]


def test_only_chosen_items_are_compared(tmp_path):
    items, _ = embedded(write_tars(tmp_path / "tars"), lambda content: [1.0])
    chosen = EmbeddedItems(items.source, [2, 5], items.embeddings[:2])
    found, others = equal_media(items, chosen)
    assert (found.tolist(), others.tolist()) == ([2, 5], [0, 1])
    none = EmbeddedItems(items.source, [], items.embeddings[:0])
    assert [each.tolist() for each in equal_media(items, none)] == [[], []]
