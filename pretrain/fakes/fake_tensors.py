"""Fake tensors: modules that run without values, to determine shapes, memory and FLOPs.

A module on the meta device has no values either. But libraries do not expect that device: they read
values there, or use autocast, which it lacks. To any code, fakes are tensors on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.func import functional_call

CPU = torch.device("cpu")


def fake_mode() -> FakeTensorMode:
    """Returns a mode in which operators run on fakes; real tensors become fakes."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def as_fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Returns a fake on the CPU with the shape and type of a tensor on the meta device."""
    if isinstance(tensor, FakeTensor):
        return tensor
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(FakeTensor(mode, empty, CPU), requires_grad=tensor.requires_grad)
    return FakeTensor(mode, empty, CPU)


def become_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces all parameters and buffers of a module; shared ones stay shared."""
    originals = [*module.parameters(), *module.buffers()]
    fakes = {id(tensor): as_fake(tensor, mode) for tensor in originals}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fakes[id(tensor)]


def run_on_fakes(module: nn.Module, inputs: Tensor) -> Tensor:
    """Returns what a module on the meta device computes of an input, as a fake; without gradients.

    Raises:
        ValueError: if the module reads values of tensors.
    """
    mode = fake_mode()
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    fakes = {name: as_fake(tensor, mode) for name, tensor in tensors.items()}
    with torch.device("cpu"), mode, torch.no_grad():
        try:
            return functional_call(module, fakes, (as_fake(inputs, mode),))
        except DataDependentOutputException as error:
            raise ValueError(
                f"it reads values of tensors ({error}), which a model without weights does not "
                "have; choose a similar model of another library"
            ) from None
