"""Configs of version 0.1, whose pairings are streams with one objective each today."""

from __future__ import annotations

from typing import Any

import yaml

OBJECTIVE_KEYS = ("loss", "label_smoothing", "direction", "negatives", "duplicates", "teacher")
OLD_KEYS = ("pairings", "pairings_per_step")


def has_old_form(values: Any) -> bool:
    """Returns whether the values of a config have pairings."""
    return isinstance(values, dict) and any(key in values for key in OLD_KEYS)


def in_new_form(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a config with streams in place of pairings."""
    new = {key: value for key, value in values.items() if key not in OLD_KEYS}
    per_step = values.get("pairings_per_step", "all")
    if "pairings_per_step" in values:
        new["streams_per_step"] = per_step
    pairings = values.get("pairings")
    new["streams"] = pairings
    if isinstance(pairings, dict):
        new["streams"] = {
            name: _stream(name, pairing, takes_all=per_step == "all")
            for name, pairing in pairings.items()
        }
    validation = values.get("validation")
    if isinstance(validation, dict) and "pairings" in validation:
        others = {key: value for key, value in validation.items() if key != "pairings"}
        new["validation"] = others | {"streams": validation["pairings"]}
    return new


def _stream(name: str, pairing: Any, *, takes_all: bool) -> Any:
    if not isinstance(pairing, dict):
        return pairing
    objective = {key: pairing[key] for key in OBJECTIVE_KEYS if key in pairing}
    stream = {key: value for key, value in pairing.items() if key not in OBJECTIVE_KEYS}
    if takes_all and "weight" in stream:
        objective["weight"] = stream.pop("weight")
    return stream | {"objectives": {name: objective}}


def describe_new_form(values: dict[str, Any]) -> str:
    """Returns the part of a config that changes, in its new form, as YAML."""
    new = in_new_form(values)
    changed = {key: new[key] for key in ("streams", "streams_per_step", "validation") if key in new}
    return yaml.safe_dump(changed, sort_keys=False, default_flow_style=None, width=100)
