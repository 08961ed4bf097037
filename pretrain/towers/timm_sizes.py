"""Input sizes handed over to timm models that are built for one size."""

from __future__ import annotations

from typing import Any

# Options with which a model takes any size.
_ANY_SIZE = ("img_size", "dynamic_img_size", "strict_img_size")


def timm_size_options(
    name: str, options: dict[str, Any], input_shape: tuple[int, int] | None
) -> dict[str, tuple[int, int]]:
    """Returns {"img_size": ...} for a model of a fixed size that differs from its input's.

    Args:
        name: name of a timm model.
        options: options of the tower; those about sizes are left as they are.
        input_shape: (H, Wd) or (F, S); None leaves the model's own.
    """
    import timm

    if input_shape is None or any(option in options for option in _ANY_SIZE):
        return {}
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is None or not known.fixed_input_size:
        return {}
    size = tuple(input_shape)
    return {} if size == tuple(known.input_size[1:]) else {"img_size": size}
