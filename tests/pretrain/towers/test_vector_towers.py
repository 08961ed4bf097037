import pytest
import torch

from pretrain.settings.model import VectorTower
from pretrain.towers.vector_towers import build_vector_backbone


def test_vectors_are_encoded_row_by_row():
    backbone = build_vector_backbone(VectorTower(width=8, num_layers=3), input_width=5)
    values = torch.randn(4, 5)
    features = backbone(values)
    assert features.shape == (4, 8)
    torch.testing.assert_close(backbone(values[1:2]), features[1:2])
    assert sum(1 for name, _ in backbone.named_parameters() if name.endswith("weight")) == 3


def test_arrays_are_encoded_to_their_last_row():
    config = VectorTower(name="gru", width=8, is_bidirectional=True)
    backbone = build_vector_backbone(config, input_width=5)
    arrays, lengths = torch.randn(3, 6, 5), torch.tensor([6, 2, 4])
    features = backbone(arrays, lengths)
    assert features.shape == (3, 8)
    for row, length in enumerate(lengths):
        alone = backbone(arrays[row : row + 1, :length])[0]
        torch.testing.assert_close(features[row], alone)


@pytest.mark.parametrize("changes", [{"name": "mlp"}, {"name": "gru", "width": 7}])
def test_two_directions_need_a_gru_of_even_width(changes):
    with pytest.raises(ValueError, match="it is for gru with an even width"):
        VectorTower(**changes, is_bidirectional=True)
