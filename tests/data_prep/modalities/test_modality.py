import pytest

from data_prep.errors import InputError
from data_prep.modalities.modality import MAX_MODALITIES, Modalities, Modality


def test_members_of_a_modality_have_its_name_unless_the_name_is_its_kind():
    modalities = Modalities(
        {
            "image": Modality("image"),
            "scan": Modality("image"),
            "vector": Modality("vector"),
            "values": Modality("vector"),
            "text": Modality("text"),
            "title": Modality("text"),
        }
    )
    members = ["scan.png", "png", "jpg", "npy", "values.npy", "txt", "json", "title.txt"]
    found = {name: modalities.member_of(name, members) for name in modalities}
    assert (found["image"], found["scan"]) == ("jpg", "scan.png")
    assert (found["vector"], found["values"]) == ("npy", "values.npy")
    assert modalities.extensions_of("title") == ("json", "title.txt")
    assert modalities.extensions_of("text") == ("json", "txt")
    assert modalities.media == ("image", "scan")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[
            (name, "image")
            for name in ("", "Scan", "1st", "a-b", "a.b", "a b", "a\n", "_a", "\xe9")
        ],
        *[(name, "text") for name in ("uid", "captions", "class_name", "labels", "json", "image")],
        ("vector", "audio"),
    ],
)
def test_names_with_another_meaning_are_refused(name, kind):
    with pytest.raises(InputError, match="modality"):
        Modalities({name: Modality(kind)})


def test_masks_name_the_modalities_in_order():
    names = [f"m{number}" for number in range(MAX_MODALITIES)]
    modalities = Modalities({name: Modality("text") for name in names})
    for mask in (1 << bit for bit in range(MAX_MODALITIES)):
        assert modalities.mask_of(modalities.names_in(mask)) == mask
    assert modalities.mask_of(names) == 2**MAX_MODALITIES - 1
    with pytest.raises(InputError, match="1 to 32 modalities, found 33"):
        Modalities({name: Modality("text") for name in [*names, "one_more"]})
    with pytest.raises(InputError, match="1 to 32 modalities, found 0"):
        Modalities({})


def test_the_record_in_dataset_json_keeps_counts_of_zero_and_statistics():
    modalities = Modalities(
        {
            "scan": Modality("image", num_samples=0),
            "values": Modality("vector", 2, 3, True, 7, (0.1, 1e-300, -3.0), (0.0, 1.0, 2.0)),
        }
    )
    assert dict(Modalities.from_json(modalities.to_json())) == dict(modalities)
    assert modalities.to_json()["scan"] == {"kind": "image", "num_samples": 0}


@pytest.mark.parametrize("values", [{"kind": "video"}, {}, {"kind": "text", "what": 1}])
def test_damaged_records_are_refused(values):
    with pytest.raises((TypeError, ValueError)):
        Modalities.from_json({"name": values})
