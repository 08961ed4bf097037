import pytest
import torch

from pretrain.towers.pooling import pool_tokens

HIDDEN = torch.tensor([[[1.0, -2.0], [3.0, -4.0], [50.0, 60.0]], [[7.0, 8.0]] * 3])
MASK = torch.tensor([[True, True, False], [False, False, False]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("first", [[1.0, -2.0], [7.0, 8.0]]),
        ("last", [[3.0, -4.0], [7.0, 8.0]]),
        ("mean", [[2.0, -3.0], [0.0, 0.0]]),
        ("max", [[3.0, -2.0], [0.0, 0.0]]),
    ],
)
def test_padding_is_not_pooled(pooling, expected):
    assert pool_tokens(HIDDEN, MASK, pooling=pooling).tolist() == expected


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "max"])
def test_padding_gets_no_gradient(pooling):
    hidden = HIDDEN.clone().requires_grad_()
    pool_tokens(hidden, MASK, pooling=pooling)[0].sum().backward()
    assert hidden.grad[0].any()
    assert not hidden.grad[0, 2].any()


def test_padding_on_the_left_leaves_the_last_token():
    mask = torch.tensor([[False, True, True]])
    assert pool_tokens(HIDDEN[:1], mask, pooling="last").tolist() == [[50.0, 60.0]]
