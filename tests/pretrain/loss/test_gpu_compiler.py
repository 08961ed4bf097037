import pytest
import torch
import torch._dynamo.testing

from pretrain.loss.gpu_compiler import compiled_on_gpu
from pretrain.loss.in_batch_recall import nearness
from pretrain.loss.sigmoid import losses_of_negatives
from pretrain.loss.softmax_sums import sum_of_probabilities, sums_of_exponentials


def tile(rows, columns):
    """Returns logits with excluded entries, and one row in which all are excluded."""
    logits = 20 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    logits[2] = -torch.inf
    logits.fill_diagonal_(-torch.inf)
    return logits


def arguments_of(function, logits):
    """Returns (arguments on a GPU, arguments on a CPU with scratch memory, settings)."""
    row, column = logits.clamp(min=-50).mean(dim=1), logits.clamp(min=-50).mean(dim=0)
    scratch, out = logits.clone(), torch.empty_like(logits)
    if function is sums_of_exponentials:
        values = torch.ones_like(logits)
        return (values, None), (values, scratch), {"is_plain": False}
    if function is sum_of_probabilities:
        weights = row[:, None].exp(), column.exp()
        return (*weights, None, None), (*weights, scratch, out), {"is_plain": True}
    if function is nearness:
        return (row, column), (row, column), {}
    return (), (), {}


def flat(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for part in found for tensor in flat(part) if tensor is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [sums_of_exponentials, sum_of_probabilities, nearness, losses_of_negatives],
    ids=lambda function: function.__name__,
)
def test_a_compiled_function_gives_what_it_gives_as_it_is(function):
    torch._dynamo.reset()
    for shape in ((12, 20), (7, 33)):
        logits = tile(*shape)
        for_gpu, for_cpu, settings = arguments_of(function, logits)
        kept = logits.clone()
        with torch.no_grad():
            found = function.compiled()(logits, *for_gpu, **settings)
        assert logits.equal(kept)  # a fused kernel writes only its result
        expected = function(logits, *for_cpu, **settings)
        for ours, theirs in zip(flat(found), flat(expected), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_one_compilation_serves_all_sizes():
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    function = torch.compile(nearness.__wrapped__, dynamic=True, backend=graphs)
    for rows, columns in ((12, 20), (7, 33), (12, 21)):
        function(tile(rows, columns), torch.zeros(rows), torch.zeros(columns))
    assert graphs.frame_count == 1


def test_nothing_is_compiled_for_the_cpu():
    def double(values):
        assert not torch.compiler.is_compiling()
        return values * 2

    assert compiled_on_gpu(double)(torch.ones(2)).tolist() == [2, 2]
