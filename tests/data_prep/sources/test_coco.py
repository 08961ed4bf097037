import json

import pytest

from data_prep.config import Columns
from data_prep.errors import InputError
from tests.support.toy_sources import contents_of, pairs_of

IMAGES = [
    {"id": 9, "file_name": "b.jpg", "license": 3, "coco_url": "memory://coco/b.jpg"},
    {"id": 4, "file_name": "a.jpg", "license": 1},
    {"id": 5, "file_name": "none.jpg"},
    "no image",
]
ANNOTATIONS = [
    {"id": 1, "image_id": 4, "caption": "one"},
    {"id": 2, "image_id": 9, "caption": "two "},
    {"id": 3, "image_id": 4, "caption": ["three"]},
    {"id": 4, "image_id": 77, "caption": "of no image"},
    {"id": 5, "image_id": 9, "caption": None},
]


def write_coco(folder, **values):
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": IMAGES, "annotations": ANNOTATIONS, **values}))
    return path


def test_annotations_are_joined_to_their_images_in_the_order_of_the_images(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"A")
    (tmp_path / "b.jpg").write_bytes(b"B")
    path = write_coco(tmp_path, images=IMAGES[:2], annotations=ANNOTATIONS[:2])
    slow = [
        (image["file_name"], annotation["caption"].strip())
        for image in IMAGES[:2]
        for annotation in ANNOTATIONS[:2]
        if annotation["image_id"] == image["id"]
    ]
    pairs = pairs_of(path, columns=Columns(uid="id"), keep_columns=("license",))
    assert [(pair.media, pair.caption) for pair in pairs] == slow
    assert [pair.uid for pair in pairs] == ["9", "4"]
    assert [pair.kept for pair in pairs] == ['{"license": 3}', '{"license": 1}']
    assert contents_of(path) == [b"B", b"A"]


def test_what_does_not_fit_together_has_its_reason(tmp_path):
    found = [(pair.row, pair.media, pair.reason) for pair in pairs_of(write_coco(tmp_path))]
    assert found == [
        (1, "b.jpg", None),
        (1, "b.jpg", "empty_caption"),
        (2, "a.jpg", None),
        (2, "a.jpg", "not_text"),
        (3, "none.jpg", "missing_caption"),
        (4, "", "not_json"),
        (4, "", "unknown_image"),
    ]


def test_media_may_be_named_by_another_key(tmp_path):
    path = write_coco(tmp_path, images=IMAGES[:1], annotations=ANNOTATIONS[1:2])
    (pair,) = pairs_of(path, columns=Columns(media="coco_url"))
    assert pair.media == "memory://coco/b.jpg"


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"images": []}', '{"annotations": 3}', "[" * 9999]
)
def test_other_json_is_refused(tmp_path, content):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"captions\.json: expected .*COCO captions"):
        pairs_of(path)
