"""DeepSpeed's ZeRO, stages 0 to 3, behind the interface of pretrain.distributed.engine.

From stage 1 on, each rank updates its part of flat fp32 tensors, and the model's parameters are
copies of these. So only the optimizer's own step may change parameters, and a rank holds slices of
the flat tensors.

This module reads private attributes of DeepSpeed 0.19.8: `_hp_mapping`, the flat groups of the
stages, `persistent_parameters`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import deepspeed
import deepspeed.ops
import torch
from accelerate.utils import DeepSpeedPlugin
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from data_prep.errors import InputError
from pretrain.config import Engine as EngineConfig
from pretrain.distributed.deepspeed_config import deepspeed_settings
from pretrain.distributed.engine import Engine, refuse_non_finite_norm
from pretrain.distributed.tensor_slice import PARAMETER, HeldSlice, TensorSlice


def deepspeed_plugin(config: EngineConfig) -> DeepSpeedPlugin:
    """Builds the plugin with which Accelerate runs DeepSpeed.

    Raises:
        InputError: if the launcher's config sets a DeepSpeed file.
    """
    file_of_launcher = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file_of_launcher != "none":
        raise InputError(
            f"accelerate launch has deepspeed_config_file={file_of_launcher}; remove it: "
            "DeepSpeed is configured by engine.strategy and engine.deepspeed_config"
        )
    if os.environ["DS_ACCELERATOR"] == "cpu":
        # Otherwise DeepSpeed compiles an operator for shared memory. A killed compilation leaves
        # a lock file, on which every later process hangs.
        deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed calls a deprecated function of torch.
    warnings.filterwarnings("ignore", message=".*_into_tensor. is deprecated")
    # Every process builds the full model, so that its weights depend on the seed alone.
    return DeepSpeedPlugin(hf_ds_config=deepspeed_settings(config), zero3_init_flag=False)


def keep_models_whole() -> None:
    """Makes transformers build whole models, not one partition on each process.

    Accelerate registers DeepSpeed's settings with transformers even if `zero3_init_flag` is off.
    The engine partitions the whole model, and a teacher stays whole.
    """
    unset_hf_deepspeed_config()


class ZeroEngine(Engine):
    """An engine in which DeepSpeed manages model, gradients and optimizer."""

    def _wrap(self) -> None:
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        # Always set, because Accelerate clips at 1 by default.
        clipping = self.gradient_clipping if math.isfinite(self.gradient_clipping) else 0.0
        self.stage = settings["zero_optimization"]["stage"]
        # At stage 0 DeepSpeed does not expose the norm that it clips with, so `step` clips.
        settings["gradient_clipping"] = clipping if self.stage > 0 else 0.0
        self._wrapped_model, self._wrapped_optimizer = self.accelerator.prepare(
            self.model, self.optimizer
        )
        self._zero = self._wrapped_model.optimizer
        self._reduction = ExitStack()
        self._is_reduction_open = False

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Returns a context for the forward and backward of one micro-batch.

        Gradients accumulate on this rank; after the last micro-batch, their sum is averaged over
        ranks once.
        """
        if self.stage == 0:
            self._wrapped_model.set_gradient_accumulation_boundary(is_last)
        elif not self._is_reduction_open:
            self._reduction.enter_context(self._wrapped_model.coalesce_grad_reduction())
        self._is_reduction_open = not is_last
        yield
        if is_last:
            self._reduction.close()

    def backward(self, loss: Tensor) -> None:
        """Accumulates a loss's gradients, averaged over ranks unless inside a micro-batch."""
        self._wrapped_model.backward(loss)

    def step(self, *, learning_rate: float) -> float:
        """Takes an optimizer step and returns the global gradient norm before clipping.

        Raises:
            FloatingPointError: if the norm is not finite. The gradients are dropped, and
                parameters and optimizer state are unchanged.
        """
        self._prepare_optimizer(learning_rate)
        if self.stage == 0:
            parameters = self.model.parameters()
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clipping).item()
            if math.isfinite(norm):
                self._wrapped_model.step()
            self.model.zero_grad()
        else:
            # DeepSpeed drops gradients with a non-finite norm without applying them.
            self._wrapped_model.step()
            norm = float(self._wrapped_model.get_global_grad_norm())
        refuse_non_finite_norm(norm)
        self.num_updates += 1
        return norm

    @property
    def changes_sums_after_backward(self) -> bool:
        """Always False: DeepSpeed does not rebuild its buckets."""
        return False

    def _full_gradient(self, parameter: Tensor) -> Tensor | None:
        if not parameter.requires_grad:
            return None
        return parameter.grad if self.stage == 0 else safe_get_full_grad(parameter)

    def drop_gradients(self) -> None:
        """Drops the accumulated gradients without taking a step."""
        if self.stage == 0:
            self.model.zero_grad()
            return
        # DeepSpeed's step drops gradients with a non-finite norm and resets its buffers, so the
        # gradients are set to NaN. Padding must stay zero, because it is never written again.
        for gradients in self._zero.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.masked_fill_(gradient != 0, math.nan)
        self._wrapped_model.step()

    # ---------------------------------------------------------------------------------- slices

    def slices(self) -> Iterator[HeldSlice]:
        """Yields the slices that this rank holds of all parameters and of the optimizer's tensors.

        From stage 1 on, they are views of the flat fp32 tensors that the optimizer updates.
        """
        if self.stage == 0:
            yield from super().slices()
            return
        for name, parameter in self.model.named_parameters():
            flat, start, offset, length = self._locate(parameter)
            if length == 0:
                continue
            values_by_key = {PARAMETER: flat}
            if self._is_trained(name, parameter):
                values_by_key |= self.optimizer.tensors_of(flat)
            is_replicated = self.stage < 3 and not parameter.requires_grad
            for key, values in values_by_key.items():
                held = TensorSlice(f"{key}/{name}", offset, length)
                yield HeldSlice(held, values.detach().narrow(0, start, length), is_replicated)

    def _tensors_of_state(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage == 0:
            yield from super()._tensors_of_state()
            return
        for name, parameter in self.model.named_parameters():
            flat, _, _, length = self._locate(parameter)
            if length > 0 and self._is_trained(name, parameter):
                yield name, flat

    def _locate(self, parameter: Tensor) -> tuple[Tensor, int, int, int]:
        """(flat tensor, start of the slice in it, offset in the parameter, length)"""
        if self.stage == 3:
            return self._locate_at_stage_3(parameter)
        return self._locate_at_stages_1_and_2(parameter)

    def _locate_at_stages_1_and_2(self, parameter: Tensor) -> tuple[Tensor, int, int, int]:
        if not parameter.requires_grad:
            return parameter.data.view(-1), 0, 0, parameter.numel()
        mapping = parameter._hp_mapping
        if mapping is None:  # other ranks hold all of the parameter
            return parameter.data, 0, 0, 0
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, in_flat.start, in_parameter.start, in_flat.numel

    def _locate_at_stage_3(self, parameter: Tensor) -> tuple[Tensor, int, int, int]:
        # Parts have equal length; the last may be padded.
        part = parameter.partition_numel()
        offset = min(self.accelerator.process_index * part, parameter.ds_numel)
        length = min(part, parameter.ds_numel - offset)
        if not parameter.requires_grad:
            return parameter.ds_tensor.data, 0, offset, length
        group, start, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return self._zero.fp32_partitioned_groups_flat[group], start, offset, length

    def _refresh_model(self) -> None:
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:
            self._refresh_stage_3()

    @torch.no_grad()
    def _refresh_stage_3(self) -> None:
        persistent = self._zero.persistent_parameters
        if persistent:  # small parameters, which every rank also holds unpartitioned
            persistent[0].partition(persistent)
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent:
            persistent[0].all_gather(persistent)

    def close(self) -> None:
        """Closes the trackers, frees DeepSpeed's buffers and destroys the process group."""
        self.accelerator.free_memory()  # needs the process group, because DeepSpeed reads the rank
        del self._zero
        super().close()
