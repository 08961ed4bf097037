import copy

import pytest
import timm
import torch
from torch import nn

from pretrain.towers.frozen_statistics import freeze_batch_norms, has_frozen_statistics


def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def test_training_computes_as_in_evaluation_and_trains_the_weights():
    net, images = small_net(), torch.randn(5, 3, 6, 6)
    expected = copy.deepcopy(net).eval()(images)
    assert freeze_batch_norms(net) == ["1"]
    net.train()
    output = net(images)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(net(images[:1])[0], output[0])
    output.sum().backward()
    assert net[1].weight.grad is not None
    assert torch.equal(net[1].running_mean, small_net()[1].running_mean)
    assert net[1].num_batches_tracked == 0


def test_names_of_parameters_and_buffers_stay():
    net = small_net()
    names = net.state_dict().keys()
    freeze_batch_norms(net)
    assert net.state_dict().keys() == names
    net.load_state_dict(small_net().state_dict())


def test_copies_stay_frozen_and_a_second_call_changes_nothing():
    net = small_net()
    freeze_batch_norms(net)
    layer_class = type(net[1])
    freeze_batch_norms(net)
    copied = copy.deepcopy(net).train()
    assert type(copied[1]) is layer_class
    assert has_frozen_statistics(copied[1])
    assert not copied[1].training


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_timms_layers_with_activations_are_frozen_too(name):
    net, images = timm.create_model(name, num_classes=0), torch.randn(3, 3, 32, 32)
    expected = copy.deepcopy(net).eval()(images)
    assert freeze_batch_norms(net)
    torch.testing.assert_close(net.train()(images), expected)
