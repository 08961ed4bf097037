import math

import torch

from pretrain.distributed.backward_scale import backward_scale, divide_gradients
from tests.pretrain.training.test_gradient_cache import config_of, gradients_of
from tests.support.gloo_processes import run_in_processes


def test_the_scale_completes_every_number_of_processes_to_a_power_of_two():
    for num_processes in range(1, 5000):
        scale = backward_scale("bf16", num_processes=num_processes)
        assert 1 <= scale < 2
        assert math.log2(round(scale * num_processes, 6)).is_integer()
        assert backward_scale("fp32", num_processes=num_processes) == 1
    assert backward_scale("bf16", num_processes=96) == 128 / 96


def test_divided_gradients_are_those_of_the_loss_itself():
    gradients = {}
    for scale in (1.0, 128 / 96):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        model[0].bias.requires_grad_(False)
        divide_gradients(model, scale)
        for _ in range(2):  # it accumulates
            (scale * model(torch.ones(3, 4)).square().sum()).backward()
        gradients[scale] = [p.grad for p in model.parameters() if p.requires_grad]
        assert model[0].bias.grad is None
    for scaled, plain in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=0)


def test_in_bf16_three_processes_round_like_one(toy_data, tmp_path):
    config = config_of(toy_data, tmp_path / "run", micro_batch_size=64)
    engine = config.engine.model_copy(update={"precision": "bf16"})
    config = config.model_copy(update={"engine": engine})
    alone, three = (joined(run_in_processes(n, gradients_of, config)[0]) for n in (1, 3))
    # One rounding to bf16 of every gradient of a weight, on each side; without the scale, 5.1e-3.
    assert (three - alone).norm() < 2.5e-3 * alone.norm()


def joined(result):
    return torch.cat([torch.tensor(each).flatten() for _, each in sorted(result[1].items())])
