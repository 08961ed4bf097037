"""The fields of a config, with the names of a tree that is walked to its leaves.

In a name, `*` is any key or index, as in "streams.*.sources.*.weight".
"""

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from data_prep.config_file import Section
from pretrain.objectives.objective import objective_types
from pretrain.settings.objectives import ObjectiveSection


def fields_of(section: type[Section], prefix: str = "") -> dict[str, Any]:
    """Returns {dotted name: annotation} of all fields that hold no sections."""
    found = {}
    for name, field in section.model_fields.items():
        inner = _fields_in(field.annotation, f"{prefix}{name}")
        found |= inner or {f"{prefix}{name}": field.annotation}
    return found


def objective_sections() -> list[type[ObjectiveSection]]:
    """Returns the sections of all objectives except those of tests."""
    return [
        each.section_type
        for each in objective_types().values()
        if each.__module__.startswith("pretrain.")
    ]


def _fields_in(annotation, name):
    if annotation is ObjectiveSection:  # the section of any objective
        return {
            key: value
            for each in objective_sections()
            for key, value in fields_of(each, f"{name}.").items()
        }
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return fields_of(annotation, f"{name}.")
    inner = f"{name}.*" if get_origin(annotation) in (dict, list) else name
    return {
        key: value
        for part in get_args(annotation)
        for key, value in _fields_in(part, inner).items()
    }


def values_of(config: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name as in `fields_of`, value) of all fields of a config that hold no sections."""
    for name in type(config).model_fields:
        yield from _values_in(getattr(config, name), f"{prefix}{name}")


def _values_in(value, name):
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, Section):
        yield from values_of(value, f"{name}.")
    elif isinstance(value, dict | list) and any(isinstance(each, Section) for each in inner):
        for each in inner:
            yield from _values_in(each, f"{name}.*")
    else:
        yield name, value
