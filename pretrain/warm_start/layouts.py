"""Layouts of sources: which tensors are a tower's, and which are the temperature's.

    isopair        towers.<kind>.*                     log_logit_scale.*, logit_bias.*
    open_clip      visual.*  text.* (or at the top)    logit_scale, logit_bias
                   text_decoder.* (CoCa)
    transformers   vision_model.*  text_model.*  audio_model.*  *_projection.*   logit_scale*
    laion_clap     audio_branch.*  text_branch.*  *_projection.*                 logit_scale_a, _t
    single         any other names: one tower

A tower's tensors are named as in its library; the layers of a projection after the backbone are
"projection.0", "projection.1" in every layout but Isopair's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from pretrain.warm_start.laion_clap import is_laion_clap, to_transformers_names
from pretrain.warm_start.weights import Weight, Weights

Form = Literal["isopair", "open_clip", "transformers", "single"]

# Kind of tower and name in it, for a name in the source; None for a tensor of no tower.
Place = Callable[[str], tuple[str, str] | None]

_TEMPERATURE = re.compile(r"(log_)?logit_(scale|bias)([_.].+)?")
_TRANSFORMERS_PARTS = {"vision_model": "image", "text_model": "text", "audio_model": "audio"}
_TRANSFORMERS_PROJECTIONS = {
    "visual_projection": "image",
    "text_projection": "text",
    "audio_projection": "audio",
}
TEXT_DECODER = "text_decoder"  # of CoCa in open_clip
_LAYERS_OF_PROJECTION = {"linear1": "0", "linear2": "1"}  # of CLAP
# Names of CLIP's text tower in open_clip's models whose text tower is not separate.
_TEXT_AT_TOP = (
    *("transformer", "token_embedding", "positional_embedding", "ln_final"),
    *("text_projection", "attn_mask", "cls_emb"),
)


@dataclass(frozen=True)
class Layout:
    """The tensors of a source by tower.

    Attributes:
        form: naming of the towers' tensors.
        towers: kind of tower, or name of a module of an objective -> weights.
        temperatures: logit scales and biases, by name.
        rest: all other tensors.
    """

    form: Form
    towers: dict[str, Weights] = field(default_factory=dict)
    temperatures: dict[str, Tensor] = field(default_factory=dict)
    rest: Weights = field(default_factory=dict)

    def put(self, kind: str, name: str, weight: Weight) -> None:
        """Adds a tensor to a tower."""
        self.towers.setdefault(kind, {})[name] = weight


def read_layout(tensors: dict[str, Tensor], *, kind: str) -> Layout:
    """Assigns the tensors of a source to its towers.

    Args:
        tensors: name -> tensor.
        kind: kind of tower that a source of a single tower is.
    """
    weights = {name: Weight((name,), tensor) for name, tensor in tensors.items()}
    if any(name.startswith("towers.") for name in tensors):
        return _assigned("isopair", weights, _place_in_isopair)
    if is_laion_clap(tensors):
        return _assigned("transformers", to_transformers_names(weights), _place_in_transformers)
    if any(name.startswith("visual.") for name in tensors):
        return _assigned("open_clip", weights, _place_in_open_clip)
    if _is_dual_of_transformers(tensors):
        return _assigned("transformers", weights, _place_in_transformers)
    temperatures = {n: w.tensor for n, w in weights.items() if _TEMPERATURE.fullmatch(n)}
    own = {name: weight for name, weight in weights.items() if name not in temperatures}
    return Layout("single", {kind: own}, temperatures)


def _is_dual_of_transformers(names: Iterable[str]) -> bool:
    return any(name.partition(".")[0] in _TRANSFORMERS_PARTS for name in names)


def _assigned(form: Form, weights: Weights, place: Place) -> Layout:
    layout = Layout(form)
    for name, weight in weights.items():
        if _TEMPERATURE.fullmatch(name):
            layout.temperatures[name] = weight.tensor
        elif (found := place(name)) is not None:
            layout.put(*found, weight)
        else:
            layout.rest[name] = weight
    return layout


def _place_in_isopair(name: str) -> tuple[str, str] | None:
    top, kind, rest = (*name.split(".", 2), "", "")[:3]
    return (kind, rest) if top in ("towers", "objective_modules") else None


def _place_in_open_clip(name: str) -> tuple[str, str] | None:
    first, _, rest = name.partition(".")
    if first == "visual":
        return "image", rest
    if first in ("text", TEXT_DECODER):
        return first, rest
    return ("text", name) if first in _TEXT_AT_TOP else None


def _place_in_transformers(name: str) -> tuple[str, str] | None:
    first, _, rest = name.partition(".")
    if first in _TRANSFORMERS_PARTS:
        return _TRANSFORMERS_PARTS[first], rest
    if first in _TRANSFORMERS_PROJECTIONS:
        layer, _, parameter = rest.rpartition(".")
        layer = _LAYERS_OF_PROJECTION.get(layer, layer or "0")
        return _TRANSFORMERS_PROJECTIONS[first], f"projection.{layer}.{parameter}"
    return None
