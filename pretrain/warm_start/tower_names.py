"""Names of a tower's tensors as the library that built it names them."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.model.contrastive_model import Tower

PROJECTION = "projection."
_BACKBONE = "backbone."
# Our modules, and parts of models within transformers' classes with a projection.
_OUTER = (_BACKBONE, "vision_model.", "text_model.", "audio_model.")


def library_names(tower: Tower, library: str) -> dict[str, str]:
    """Returns {name in the library: name in the tower} of all parameters and buffers.

    The layers of the projection after the backbone are "projection.0", "projection.1".

    Args:
        tower: tower whose tensors are named.
        library: library of the backbone.
    """
    outside = [name for name in tower_tensors(tower) if not name.startswith(PROJECTION)]
    if library == "transformers":
        names = {inner_name(name): name for name in outside}
        model = tower.backbone.backbone
        names |= {
            old: names[new] for old, new in _names_in_files(model).items() if old not in names
        }
    else:
        names = {name.removeprefix(_BACKBONE): name for name in outside}
    return names | _projection_names(tower.projection)


def _names_in_files(model: nn.Module) -> dict[str, str]:
    """{name in a file: name in the model} of a transformers model, as its save_pretrained writes.

    Files keep the names of older versions, such as encoder.layer.0 for layers.0.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}
    own = {(tensor.data_ptr(), tensor.shape): name for name, tensor in state.items()}
    saved = revert_weight_conversion(model, state)
    places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in saved.items()}
    return {name: own[place] for name, place in places.items() if place in own}


def inner_name(name: str) -> str:
    """Returns a name in a tower without the prefixes of the modules around the model itself."""
    while name.startswith(_OUTER):
        name = name.partition(".")[2]
    return name


def _projection_names(projection: nn.Module) -> dict[str, str]:
    layers = [
        (name, layer)
        for name, layer in projection.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    return {
        f"{PROJECTION}{number}.{parameter}": ".".join(
            part for part in (PROJECTION[:-1], name, parameter) if part
        )
        for number, (name, layer) in enumerate(layers)
        for parameter, _ in layer.named_parameters(recurse=False)
    }


def tower_tensors(tower: Tower) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a tower's backbone and projection by name.

    Buffers that are not saved are among them: other versions of a library save them.
    """
    found: dict[str, Tensor] = dict(tower.named_parameters(remove_duplicate=False))
    found |= dict(tower.named_buffers(remove_duplicate=False))
    return {
        name: tensor for name, tensor in found.items() if name.startswith((_BACKBONE, PROJECTION))
    }
