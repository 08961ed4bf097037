"""Facts about towers: parameters, FLOPs and tokens per sample, shapes, frozen parts, pooling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import PretrainConfig
from pretrain.model.activation_checkpointing import blocks_of
from pretrain.model.contrastive_model import Tower
from pretrain.planning.passes import PassTrace, running
from pretrain.planning.planned_model import PlannedModel
from pretrain.settings.model import TextTower, TowerSection, VectorTower
from pretrain.settings.views import View

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TowerFacts:
    """Facts about one tower; FLOPs and tokens are per sample.

    Attributes:
        name: name of the modality that it is declared for.
        section: config section.
        num_parameters: parameters with those of the projection.
        num_trained: trained parameters.
        flops: FLOPs of a forward pass.
        num_tokens: tokens between blocks; None for models without tokens.
        inputs: shapes of the tensors of a batch, without rows.
        front: shape of the backbone's input.
        blocks: (number, shape) of consecutive blocks with outputs of one shape.
        width: shape of the backbone's output.
        joint: shape of the features.
        pooling: pooling of tokens.
        front_end: how inputs are prepared.
        frozen: (name, parameters) of the largest parts that are frozen.
    """

    name: str
    section: TowerSection
    num_parameters: int
    num_trained: int
    flops: float
    num_tokens: int | None
    inputs: list[Shape]
    front: Shape
    blocks: list[tuple[int, Shape]]
    width: Shape
    joint: Shape
    pooling: str
    front_end: str
    frozen: list[tuple[str, int]]


def facts_of_towers(config: PretrainConfig, planned: PlannedModel) -> list[TowerFacts]:
    """Returns the facts about every tower that a stream uses.

    Args:
        config: config of the run.
        planned: its model, after `measure_model`.
    """
    views = {
        config.model.tower_of(View.parse(view).modality): (stream, view)
        for stream, section in reversed(config.streams.items())
        for view in reversed(section.views)
    }
    return [_facts(config, planned, name, *views[name]) for name in config.model.towers]


def _facts(
    config: PretrainConfig, planned: PlannedModel, name: str, stream: str, view: str
) -> TowerFacts:
    tower, section = planned.model.towers[name], config.model.towers[name]
    inputs = planned.inputs(planned.layouts[0], stream, num_rows=1)[stream].views[view]
    seen = _Shapes(tower)
    trace = PassTrace([])
    is_bf16 = config.engine.precision == "bf16"
    with running(planned, is_bf16=is_bf16, is_gpu=True), torch.no_grad(), seen, trace:
        keys = torch.zeros(1, dtype=torch.int64)
        joint = tower(*inputs, keys=keys)
    parameters = list(tower.parameters())
    return TowerFacts(
        name=name,
        section=section,
        num_parameters=sum(each.numel() for each in parameters),
        num_trained=sum(each.numel() for each in parameters if each.requires_grad),
        flops=trace.flops,
        num_tokens=_num_tokens(section, seen.blocks),
        inputs=[tuple(each.shape[1:]) for each in inputs],
        front=seen.front,
        blocks=[(len(list(same)), shape) for shape, same in groupby(seen.blocks)],
        width=seen.width,
        joint=tuple(joint.shape[1:]),
        pooling=_pooling(tower.backbone, section),
        front_end=_front_end(config, name, section),
        frozen=list(_frozen_parts(tower)),
    )


class _Shapes:
    """A context that records shapes inside a tower, without rows."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.front: Shape = ()
        self.width: Shape = ()
        self.blocks: list[Shape] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _Shapes:
        backbone = self.tower.backbone
        self._hooks = [
            backbone.register_forward_pre_hook(self._before),
            backbone.register_forward_hook(self._after),
            *(block.register_forward_hook(self._after_block) for block in blocks_of(backbone)),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.front = tuple(inputs[0].shape[1:])

    def _after(self, _: nn.Module, inputs: Any, output: Any) -> None:
        self.width = tuple(_first_tensor(output).shape[1:])

    def _after_block(self, _: nn.Module, inputs: Any, output: Any) -> None:
        self.blocks.append(tuple(_first_tensor(output).shape[1:]))


def _first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _num_tokens(section: TowerSection, blocks: list[Shape]) -> int | None:
    if isinstance(section, TextTower):
        return section.context_length
    of_blocks = [shape[0] for shape in blocks if len(shape) == 2]  # [tokens, W]
    return max(of_blocks, default=None)


def _pooling(backbone: nn.Module, section: TowerSection) -> str:
    if getattr(section, "pooling", None) is not None and section.library != "open_clip":
        return section.pooling
    if section.library == "transformers":
        return "own, or mean"
    for module in (backbone, *backbone.children()):
        for name in ("pool_type", "global_pool"):
            value = getattr(module, name, None)
            value = getattr(value, "pool_type", value)
            if isinstance(value, str) and value:
                return value
    return "own"


def _front_end(config: PretrainConfig, name: str, section: TowerSection) -> str:
    kind = config.model.kinds[name]
    if kind == "image":
        image = config.image
        sizes = " -> ".join(map(str, image.sizes.values()))
        return f"{sizes} pixels, {image.interpolation}, mean {_list(image.mean)}, std " + _list(
            image.std
        )
    if kind == "audio":
        audio, mel = config.audio, config.audio.log_mel
        return (
            f"{audio.clip_seconds:g} s at {audio.sample_rate_hz} Hz, log-mel ({mel.frontend}): "
            f"{mel.num_mel_bins} bins x {audio.num_frames} frames"
        )
    if isinstance(section, TextTower):
        tokenizer = section.tokenizer or section.own_tokenizer
        return f"tokenizer: {tokenizer}; {section.context_length} tokens"
    return "standardised by the statistics of the data"


def _list(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values) + "]"


def _frozen_parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, int]]:
    parameters = list(module.parameters())
    if not any(each.requires_grad for each in parameters):
        if parameters:
            yield name or "all", sum(each.numel() for each in parameters)
        return
    for own, parameter in module.named_parameters(recurse=False):
        if not parameter.requires_grad:
            yield f"{name}.{own}".lstrip("."), parameter.numel()
    for child, part in module.named_children():
        yield from _frozen_parts(part, f"{name}.{child}".lstrip("."))


def describe_tower(facts: TowerFacts) -> list[str]:
    """Describes a tower in a few lines."""
    section, million = facts.section, 1e6
    library = "torch" if isinstance(section, VectorTower) else section.library
    tokens = "" if facts.num_tokens is None else f", {facts.num_tokens} tokens"
    blocks = " -> ".join(f"{number} x {_shape(shape)}" for number, shape in facts.blocks[:6])
    more = f" -> {len(facts.blocks) - 6} more" if len(facts.blocks) > 6 else ""
    inputs = " and ".join(_shape(each) for each in facts.inputs)
    lines = [
        f"{facts.name}: {section.name} ({library}): {facts.num_parameters / million:,.1f} M "
        f"parameters, {facts.num_trained / million:,.1f} M trained; {facts.flops / 1e9:,.2f} GFLOPs"
        f"{tokens} per sample",
        f"  front end: {facts.front_end}",
        f"  shapes: {inputs} -> {_shape(facts.front)} -> {blocks or 'backbone'}{more} -> "
        f"{_shape(facts.width)} -> {_shape(facts.joint)}",
        f"  pooling: {facts.pooling}; projection: {section.projection}",
    ]
    if facts.frozen:
        parts = ", ".join(f"{name} ({number:,})" for name, number in facts.frozen[:6])
        rest = f" and {len(facts.frozen) - 6} more" if len(facts.frozen) > 6 else ""
        lines.append(f"  frozen: {parts}{rest}")
    return lines


def _shape(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
