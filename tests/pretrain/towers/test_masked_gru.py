import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pretrain.towers.masked_gru import MaskedGru

LENGTHS = torch.tensor([7, 1, 4, 6])


def packed_oracle(network, inputs, lengths, *, is_bidirectional):
    """Computes (states, last states) by torch's GRU with packed sequences."""
    for layer, ahead in enumerate(network.forwards):
        gru = nn.GRU(
            ahead.input_size, ahead.hidden_size, batch_first=True, bidirectional=is_bidirectional
        ).double()
        weights = ahead.state_dict()
        if is_bidirectional:
            back = network.backwards[layer].state_dict()
            weights |= {f"{name}_reverse": value for name, value in back.items()}
        gru.load_state_dict(weights)
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        states, last = gru(packed)
        inputs = pad_packed_sequence(states, batch_first=True, total_length=inputs.shape[1])[0]
    return inputs, torch.cat(list(last), dim=1)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_states_equal_those_of_packed_sequences(num_layers, is_bidirectional):
    torch.manual_seed(0)
    network = MaskedGru(5, 6, num_layers=num_layers, is_bidirectional=is_bidirectional).double()
    inputs = torch.randn(4, 7, 5, dtype=torch.float64)
    states, last = network(inputs, LENGTHS)
    expected = packed_oracle(network, inputs, LENGTHS, is_bidirectional=is_bidirectional)
    torch.testing.assert_close(states, expected[0])
    torch.testing.assert_close(last, expected[1])


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_padding_changes_no_state_and_gets_no_gradient(is_bidirectional):
    torch.manual_seed(0)
    network = MaskedGru(3, 4, num_layers=2, is_bidirectional=is_bidirectional).double()
    inputs = torch.randn(4, 7, 3, dtype=torch.float64)
    _, expected = network(inputs, LENGTHS)
    longer = torch.cat([inputs, torch.full((4, 3, 3), torch.nan, dtype=torch.float64)], dim=1)
    for row, length in enumerate(LENGTHS):
        longer[row, length:] = torch.nan if row % 2 else 1e9
    longer.requires_grad_()
    states, last = network(longer, LENGTHS)
    torch.testing.assert_close(last, expected)
    (states.sum() + last.sum()).backward()
    for row, length in enumerate(LENGTHS):
        assert longer.grad[row, :length].all()
        assert not longer.grad[row, length:].any()
        assert not states[row, length:].any()


def test_a_row_without_positions_is_zero():
    network = MaskedGru(3, 4, is_bidirectional=True)
    _, last = network(torch.randn(2, 5, 3), torch.tensor([0, 5]))
    assert not last[0].any()
    assert last[1].all()


def test_states_are_float32_under_autocast():
    network = MaskedGru(3, 4)
    inputs = torch.randn(2, 5, 3)
    expected = network(inputs, torch.tensor([5, 2]))[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(inputs, torch.tensor([5, 2]))[1], expected)
