"""DeepSpeed's ZeRO, stages 0 to 3, behind the interface of pretrain.distributed.engine.

Each rank updates its share of flat fp32 tensors, and the model's parameters are copies of them (of
stage 1 on). So nothing may change the parameters but the optimizer's own step, and what a rank
holds of a parameter is a fragment of it.

Reads attributes of DeepSpeed 0.19.8 that are no public interface: `_hp_mapping`, the stages' flat
groups, `persistent_parameters`.
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

from data_prep.errors import InputError
from pretrain.config import PretrainConfig
from pretrain.distributed.deepspeed_config import deepspeed_settings
from pretrain.distributed.engine import OPTIMIZER_MOMENTS, Engine, Fragment, refuse_non_finite_norm


def deepspeed_plugin(config: PretrainConfig) -> DeepSpeedPlugin:
    """What makes Accelerate use DeepSpeed.

    Raises:
        InputError: the launcher's config names a DeepSpeed file of its own.
    """
    file_of_launcher = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file_of_launcher != "none":
        raise InputError(
            f"accelerate launch was given deepspeed_config_file={file_of_launcher}; leave it out: "
            "DeepSpeed is configured by engine.strategy and engine.deepspeed_config"
        )
    if os.environ["DS_ACCELERATOR"] == "cpu":
        # Else DeepSpeed compiles an operator for shared memory, and a compilation that was killed
        # leaves a lock at which every later process waits for ever.
        deepspeed.ops.__compatible_ops__ = {}
    # Of a function of torch that DeepSpeed calls.
    warnings.filterwarnings("ignore", message=".*_into_tensor. is deprecated")
    # The model is built whole in every process: a function of the seed alone.
    return DeepSpeedPlugin(hf_ds_config=deepspeed_settings(config), zero3_init_flag=False)


class ZeroEngine(Engine):
    """An engine whose model, gradients and optimizer are DeepSpeed's."""

    def _wrap(self) -> None:
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        # Always written: Accelerate's own default is to clip at 1.
        clipping = self.gradient_clipping if math.isfinite(self.gradient_clipping) else 0.0
        self.stage = settings["zero_optimization"]["stage"]
        # At stage 0 DeepSpeed tells nobody the norm that it clips with: there we clip.
        settings["gradient_clipping"] = clipping if self.stage > 0 else 0.0
        self._wrapped_model, self._wrapped_optimizer = self.accelerator.prepare(
            self.model, self.optimizer
        )
        self._zero = self._wrapped_model.optimizer
        self._reduction = ExitStack()
        self._is_reduction_open = False

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Surrounds the forward and backward of one micro-batch: gradients only add up on this rank
        until after the last one, when their sum is averaged over ranks, once."""
        if self.stage == 0:
            self._wrapped_model.set_gradient_accumulation_boundary(is_last)
        elif not self._is_reduction_open:
            self._reduction.enter_context(self._wrapped_model.coalesce_grad_reduction())
        self._is_reduction_open = not is_last
        yield
        if is_last:
            self._reduction.close()

    def backward(self, loss: Tensor) -> None:
        """Adds a loss's gradients, averaged over ranks unless inside a micro-batch."""
        self._wrapped_model.backward(loss)

    def step(self, *, learning_rate: float) -> float:
        """One optimizer step with the gradients so far; returns their global norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; nothing was changed, the gradients are gone.
        """
        self._set_learning_rate(learning_rate)
        if self.stage == 0:
            parameters = self.model.parameters()
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clipping).item()
            if math.isfinite(norm):
                self._wrapped_model.step()
            self.model.zero_grad()
        else:
            # If the norm is not finite, DeepSpeed drops the gradients without applying them.
            self._wrapped_model.step()
            norm = float(self._wrapped_model.get_global_grad_norm())
        refuse_non_finite_norm(norm)
        self.num_updates += 1
        return norm

    @property
    def changes_sums_after_backward(self) -> bool:
        """Never: DeepSpeed's buckets are those of the first step."""
        return False

    def _whole_gradient(self, parameter: Tensor) -> Tensor | None:
        if not parameter.requires_grad:
            return None
        return parameter.grad if self.stage == 0 else safe_get_full_grad(parameter)

    def drop_gradients(self) -> None:
        """Forgets the gradients so far, instead of a step."""
        if self.stage == 0:
            self.model.zero_grad()
            return
        # DeepSpeed drops by itself, and cleans up after, what has a norm that is not finite.
        # Padding stays zero: it is never written again.
        for gradients in self._zero.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.masked_fill_(gradient != 0, math.nan)
        self._wrapped_model.step()

    # ------------------------------------------------------------------------------- fragments

    def fragments(self) -> Iterator[Fragment]:
        """Every parameter and the moments of those that are trained, as far as this rank holds
        them: of stage 1 on, fragments of the flat fp32 tensors that the optimizer updates."""
        if self.stage == 0:
            yield from super().fragments()
            return
        place_of = self._place_at_stage_3 if self.stage == 3 else self._place_at_stages_1_and_2
        for name, parameter in self.model.named_parameters():
            flat, start, offset, length = place_of(parameter)
            if length == 0:
                continue
            total = getattr(parameter, "ds_numel", parameter.numel())
            whole = {"parameter": flat}
            if parameter.requires_grad:
                state = self._state_of(flat)
                whole |= {moment: state[moment] for moment in OPTIMIZER_MOMENTS}
            is_shared = self.stage < 3 and not parameter.requires_grad
            for key, values in whole.items():
                held = values.detach().narrow(0, start, length)
                yield Fragment(name, key, held, offset, total, is_shared)

    def _place_at_stages_1_and_2(self, parameter: Tensor) -> tuple[Tensor, int, int, int]:
        """(flat tensor, place of the fragment in it, place of the fragment in the parameter, its
        length)"""
        if not parameter.requires_grad:
            return parameter.data.view(-1), 0, 0, parameter.numel()
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it is on other ranks
            return parameter.data, 0, 0, 0
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, in_flat.start, in_parameter.start, in_flat.numel

    def _place_at_stage_3(self, parameter: Tensor) -> tuple[Tensor, int, int, int]:
        """Likewise; every rank has an equally long part, of which the last ones may be padding."""
        part = parameter.partition_numel()
        offset = min(self.accelerator.process_index * part, parameter.ds_numel)
        length = min(part, parameter.ds_numel - offset)
        if not parameter.requires_grad:
            return parameter.ds_tensor.data, 0, offset, length
        group, start, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return self._zero.fp32_partitioned_groups_flat[group], start, offset, length

    def after_load(self, *, num_updates: int) -> None:
        """To be called when `fragments` were written to: sets the optimizer's step count and copies
        the flat tensors into the model."""
        super().after_load(num_updates=num_updates)
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:
            self._refresh_stage_3()

    @torch.no_grad()
    def _refresh_stage_3(self) -> None:
        persistent = self._zero.persistent_parameters
        if persistent:  # held whole besides their parts
            persistent[0].partition(persistent)
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent:
            persistent[0].all_gather(persistent)

    def close(self) -> None:
        """Closes the trackers, frees DeepSpeed's buffers and leaves the process group."""
        self.accelerator.free_memory()  # while there is a group: DeepSpeed asks for its rank
        del self._zero
        super().close()
