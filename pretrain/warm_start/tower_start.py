"""Warm start of one tower: every tensor of the source and of the tower is accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from data_prep.errors import ConfigError, InputError
from pretrain.model.contrastive_model import Tower
from pretrain.model.library_errors import describe_library_error
from pretrain.settings.warm_start import Start
from pretrain.warm_start.conversion import convert
from pretrain.warm_start.key_table import SEPARATOR, KeyRow, Status, refuse_unnamed_keys
from pretrain.warm_start.layouts import Layout
from pretrain.warm_start.resampling import Grid, filter_by_timm, grid_of, resample
from pretrain.warm_start.tower_names import PROJECTION, inner_name, library_names, tower_tensors
from pretrain.warm_start.weights import Weight, Weights

_DECODER = "decoder."  # of a module that decodes captions
_TRUNK = "trunk."  # of open_clip's image towers that timm builds


def start_tower(
    tower: Tower, layout: Layout, start: Start, *, part: str, where: str, library: str
) -> list[KeyRow]:
    """Sets the weights of a tower to those of a source.

    Args:
        tower: new tower, changed in place.
        layout: tensors of the source.
        start: config section of the warm start.
        part: tower of the source.
        where: config key of the section, for messages.
        library: library of its backbone.

    Returns:
        A row for every tensor of the source and of the tower.

    Raises:
        InputError: if the source has no such tower, or a shape differs beyond resampling.
        ConfigError: if the config does not name a tensor that is unused or missing.
    """
    named = _named(layout, start, part=part, where=where)
    is_checkpoint = layout.form == "isopair"
    names = {n: n for n in tower_tensors(tower)} if is_checkpoint else library_names(tower, library)
    weights = {name: _as_float32(weight) for name, weight in named.items()}
    try:
        weights = convert(weights, form=layout.form, library=library, kind=part, names=names)
        filtered = _filtered(weights, tower, "backbone." if is_checkpoint else "", library)
    except InputError as error:
        raise InputError(f"{where}.from={start.location}: {error}") from None
    fit = _Fit(
        tower,
        tower_tensors(tower),
        names,
        may_resample=start.resample,
        where=f"{where}.from={start.location}",
        grid=grid_of(tower.backbone),
        is_frozen=tower.is_frozen,
    )
    rows = list(fit.take_over(filtered, shapes={n: w.tensor.shape for n, w in weights.items()}))
    return _all_rows(rows, layout, start, named=named, part=part, where=where)


def start_module(
    module: nn.Module, layout: Layout, start: Start, *, part: str, where: str
) -> list[KeyRow]:
    """Sets the weights of a module of an objective to those of a source; see `start_tower`.

    open_clip's decoder of captions is the part `decoder` of a `CaptionDecoder`.

    Args:
        module: new module, changed in place.
        layout: tensors of the source.
        start: config section of the warm start.
        part: part of the source.
        where: config key of the section, for messages.
    """
    named = _named(layout, start, part=part, where=where)
    tensors: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    prefix = "" if layout.form == "isopair" else _DECODER
    fit = _Fit(
        module,
        tensors,
        {name.removeprefix(prefix): name for name in tensors},
        may_resample=start.resample,
        where=f"{where}.from={start.location}",
    )
    weights = {name: _as_float32(weight) for name, weight in named.items()}
    rows = list(fit.take_over(weights, shapes={n: w.tensor.shape for n, w in weights.items()}))
    return _all_rows(rows, layout, start, named=named, part=part, where=where)


def _named(layout: Layout, start: Start, *, part: str, where: str) -> Weights:
    """The weights of a part of a source that the config does not ignore"""
    if part not in layout.towers:
        raise ConfigError(
            f"{where}.from={start.location}: expected a tower for {part}, found towers for "
            f"{' and '.join(sorted(layout.towers)) or 'nothing'}; set {where}.tower to one of them"
        )
    return {
        name: weight
        for name, weight in layout.towers[part].items()
        if not any(fnmatchcase(each, p) for each in weight.names for p in start.ignore)
    }


def _all_rows(
    rows: list[KeyRow], layout: Layout, start: Start, *, named: Weights, part: str, where: str
) -> list[KeyRow]:
    """The rows with those of all other tensors of the source, once the config names them"""
    ignored = [
        _row("unused", weight.names, weight.tensor)
        for name, weight in layout.towers[part].items()
        if name not in named
    ]
    rows = [*ignored, *rows, *_other_parts(layout, part)]
    refuse_unnamed_keys(rows, expect_missing=start.expect_missing, ignore=start.ignore, where=where)
    return rows


def _row(status: Status, source_names: tuple[str, ...], tensor: Tensor) -> KeyRow:
    return KeyRow(status, SEPARATOR.join(source_names), source_shape=tuple(tensor.shape))


def _as_float32(weight: Weight) -> Weight:
    is_float = weight.tensor.is_floating_point()
    return Weight(weight.names, weight.tensor.float() if is_float else weight.tensor)


def _other_parts(layout: Layout, part: str) -> Iterator[KeyRow]:
    others = [each for kind, each in layout.towers.items() if kind != part]
    for weights in others:
        for weight in weights.values():
            yield _row("other part", weight.names, weight.tensor)
    for name, tensor in layout.temperatures.items():
        yield _row("other part", (name,), tensor)
    for weight in layout.rest.values():
        yield _row("unused", weight.names, weight.tensor)


def _filtered(weights: Weights, tower: Tower, prefix: str, library: str) -> Weights:
    """The weights after timm's own conversion, if timm built the backbone or its trunk"""
    model = tower.backbone
    if library == "open_clip" and hasattr(model, "trunk"):
        prefix, model = f"{prefix}{_TRUNK}", model.trunk
    elif library != "timm":
        return weights
    inner, outer = {}, {}
    for name, weight in weights.items():
        if name.startswith(prefix) and not name.startswith(PROJECTION):
            inner[name.removeprefix(prefix)] = weight
        else:
            outer[name] = weight
    try:
        inner = filter_by_timm(inner, model)
    except Exception as error:  # a filter of timm raises errors of any type
        raise InputError(
            f"timm cannot convert these weights for {type(model).__name__}: "
            f"{describe_library_error(error)}"
        ) from error
    return outer | {f"{prefix}{name}": weight for name, weight in inner.items()}


class _Fit:
    """Copies weights into a tower, with interpolation where shapes differ.

    Args:
        tower: tower or other module, changed in place.
        tensors: its tensors that are accounted for, by name.
        names: name in the library -> name in the tower.
        may_resample: whether shapes may differ.
        where: config key and value of the source, for messages.
        grid: see `grid_of`.
        is_frozen: whether the tower is not trained.
    """

    def __init__(
        self,
        tower: nn.Module,
        tensors: Mapping[str, Tensor],
        names: Mapping[str, str],
        *,
        may_resample: bool,
        where: str,
        grid: Grid | None = None,
        is_frozen: bool = False,
    ) -> None:
        self.tensors = tensors
        self.names = names
        self.may_resample = may_resample
        self.where = where
        self.grid = grid
        self.is_frozen = is_frozen
        self.saved = tower.state_dict().keys()

    def take_over(
        self, weights: Weights, *, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[KeyRow]:
        """Copies weights, and yields a row for each of them and for each tensor without one.

        Args:
            weights: weights by name in the library.
            shapes: their shapes before timm's filter.
        """
        done = set()  # tied weights are one tensor under several names
        for name, weight in weights.items():
            row = _row("unused", weight.names or (name,), weight.tensor)
            row = replace(row, source_shape=tuple(shapes.get(name, weight.tensor.shape)))
            if name not in self.names:
                yield row
                continue
            own = self.tensors[self.names[name]]
            done.add(id(own))
            row = replace(row, tower=self.names[name], tower_shape=tuple(own.shape))
            yield replace(row, status=self._copy(name, weight.tensor, own, row))
        for name, own in self.tensors.items():
            if id(own) not in done:
                status = "missing" if self._needs_value(name, own) else "kept"
                yield KeyRow(status, tower=name, tower_shape=tuple(own.shape))

    def _copy(self, name: str, tensor: Tensor, own: Tensor, row: KeyRow) -> Status:
        if not own.is_floating_point() or row.tower not in self.saved:
            return "kept"  # a constant that the model computes
        value = tensor.reshape(own.shape) if tensor.numel() == own.numel() == 1 else tensor
        if value.shape != own.shape:
            inner_names = {inner_name(each) for each in self.names}
            value = resample(inner_name(name), tensor, own, names=inner_names, grid=self.grid)
        if value is None or not value.is_floating_point():
            raise InputError(
                f"{self.where}: {row.source}: expected {list(own.shape)} as in the tower, found "
                f"{list(row.source_shape)} of {tensor.dtype}, which is not resampled; build the "
                "tower with the source's sizes (name, options)"
            )
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"{self.where}: {row.source}: expected finite numbers, found NaN or infinity; use "
                "another source"
            )
        if row.source_shape == row.tower_shape or value.numel() == 1:
            status: Status = "taken"
        elif self.may_resample:
            status = "resampled"
        else:
            raise ConfigError(
                f"{self.where}: {row.source}: expected {list(own.shape)} as in the tower, found "
                f"{list(row.source_shape)}; set resample: true to interpolate it"
            )
        with torch.no_grad():
            own.copy_(value)
        return status

    def _needs_value(self, name: str, own: Tensor) -> bool:
        is_constant = not own.is_floating_point() or name not in self.saved
        # Of a trained tower, the probe has frozen the parameters that no feature depends on.
        is_idle = isinstance(own, nn.Parameter) and not own.requires_grad
        return not (is_constant or (is_idle and not self.is_frozen))
