import pytest
import torch
from torch import nn

from pretrain.model.named_modules import NamedParameters, NamedTowers

NAMES = [
    "image",
    "values",
    "values_",
    "values__",
    "keys",
    "items",
    "train",
    "training",
    "training_",
    "type",
]
NAMES += ["image_", "image-text", "forward", "t_destination", "call_super_init", "dump_patches"]


@pytest.mark.parametrize(
    ("dictionary", "entry"),
    [
        (NamedTowers, lambda number: nn.Linear(1, 1 + number)),
        (NamedParameters, lambda number: nn.Parameter(torch.full((1,), float(number)))),
    ],
)
def test_any_name_is_kept_and_has_one_place_in_the_state(dictionary, entry):
    entries = {name: entry(number) for number, name in enumerate(NAMES)}
    made = dictionary(entries)
    assert list(made) == made.keys()
    assert sorted(made) == sorted(NAMES)  # parameters are sorted by name
    assert dict(made.items()) == entries
    assert made.values() == [entries[name] for name in made]
    assert all(name in made and made[name] is each for name, each in entries.items())
    assert "nothing" not in made
    state = made.state_dict()
    assert len(state) == len(list(made.parameters()))
    again = dictionary({name: entry(number) for number, name in enumerate(NAMES)})
    again.load_state_dict(state)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())
    assert "image.weight" in state or "image" in state  # names of earlier checkpoints
