"""Typed configs, read from defaults, a YAML file and `section.key=value` overrides, in this order.

An unknown key is an error, whose message suggests the nearest known key.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from data_prep.errors import ConfigError

SectionT = TypeVar("SectionT", bound="Section")
STORED = {"is_stored": True}  # validation context of a config that an earlier run wrote
MAY_BE_URL = "may be a URL"  # in the annotation of such a text field
Location = Annotated[
    str,
    BeforeValidator(lambda place: str(place) if isinstance(place, Path) else place),
    MAY_BE_URL,
]  # folder, file or URL


class Section(BaseModel):
    """Base of every config section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    # Old key -> new key; a config that uses an old key is refused, and the new key is suggested.
    renamed: ClassVar[dict[str, str]] = {}
    # Removed key -> reason for its removal. A config that uses it is refused with this reason; in
    # the stored config of an earlier run it is ignored.
    removed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _suggest_known_key(cls, values: Any, info: ValidationInfo) -> Any:
        if isinstance(values, dict):
            if info.context == STORED:
                removed = cls._of_all_bases("removed")
                values = {key: value for key, value in values.items() if key not in removed}
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(cls._unknown_key_message(str(key)))
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_url_as_path(cls, value: Any, info: ValidationInfo) -> Any:
        # Path("s3://bucket/run") is "s3:/bucket/run", a local folder that would be created.
        if _holds_paths(cls.model_fields[info.field_name].annotation):
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and "://" in text:
                    raise PydanticCustomError(
                        "url_as_path",
                        "expected a local path, found the URL {url}",
                        {"url": repr(text)},
                    )
        return value

    @classmethod
    def _of_all_bases(cls, name: str) -> dict[str, str]:
        merged: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            merged |= vars(base).get(name, {})
        return merged

    @classmethod
    def _unknown_key_message(cls, key: str) -> str:
        if new_key := cls._of_all_bases("renamed").get(key):
            return f"{key!r} was renamed to {new_key!r}"
        if reason := cls._of_all_bases("removed").get(key):
            return f"{key!r} was removed: {reason}"
        known = sorted(cls.model_fields)
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"


def url_settings(section: type[Section]) -> Iterator[str]:
    """Yields the dotted keys of the settings that may be a URL; `*` is any name or index."""
    for name, field in section.model_fields.items():
        for part in (*field.metadata, field.annotation):
            yield from _url_settings_in(part, name)


def _url_settings_in(annotation: Any, key: str) -> Iterator[str]:
    if annotation == MAY_BE_URL:
        yield key
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield from (f"{key}.{below}" for below in url_settings(annotation))
    else:
        below = f"{key}.*" if get_origin(annotation) in (dict, list, tuple) else key
        for part in get_args(annotation):
            yield from _url_settings_in(part, below)


def _holds_paths(annotation: Any) -> bool:
    return annotation is Path or any(_holds_paths(part) for part in get_args(annotation))


def free(default: Any = ..., **field_options: Any) -> Any:
    """Defines a config field that may change on resume, because it cannot change the result."""
    return Field(default, json_schema_extra={"free": True}, **field_options)


class _Yaml12Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2's scalars: 5e-4 is a number; off, on, yes, no, dates are text."""


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if not tag.endswith((":bool", ":float", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"
    ),
    list("-+.0123456789"),
)


class _Yaml12Dumper(yaml.SafeDumper):
    """Safe dumper that quotes strings that the loader would not read as strings."""

    yaml_implicit_resolvers = _Yaml12Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refuse_duplicate_keys(
    loader: _Yaml12Loader, node: yaml.MappingNode, deep: bool = False
) -> dict:
    mapping = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=deep)
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key {key!r}", key_node.start_mark
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Yaml12Loader.add_constructor("tag:yaml.org,2002:map", _refuse_duplicate_keys)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
        ConfigError: if the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml12Loader)
    except FileNotFoundError:
        siblings = (
            sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        )
        found = f"; files there: {', '.join(siblings)}" if siblings else ""
        raise ConfigError(f"{path}: no such config file{found}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys to values, found {type(values).__name__}"
        )
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"{override!r}: expected section.key=value")
    try:
        new_value = yaml.load(text, Loader=_Yaml12Loader) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from None
    *parents, last = dotted.split(".")
    place: Any = values
    for depth, key in enumerate(parents):
        if isinstance(place, list):
            place = place[_list_index(place, key, override)]
        elif isinstance(place, dict):
            if isinstance(place.get(key), bool | None):  # a section that is absent or has defaults
                place[key] = {}
            place = place[key]
        else:
            where = ".".join(parents[:depth])
            raise ConfigError(f"{override!r}: {where} is {place!r}, which holds no keys")
    if isinstance(place, list):
        place[_list_index(place, last, override)] = new_value
    elif isinstance(place, dict):
        place[last] = new_value
    else:
        raise ConfigError(f"{override!r}: {'.'.join(parents)} is {place!r}, which holds no keys")


def _unshared(value: Any) -> Any:
    """Copies nested values, so that no two keys share an object, as with YAML anchors.

    Otherwise an override of one key would also change the other.
    """
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _list_index(items: list, key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(
            f"{override!r}: expected an index from 0 to {len(items) - 1}, found {key!r}"
        )
    return int(key)


def read_config(section: type[SectionT], path: Path, *, overrides: Sequence[str] = ()) -> SectionT:
    """Reads and validates a config from a YAML file and `section.key=value` overrides.

    Raises:
        ConfigError: if any value is invalid; the message lists file, key and value of each error.
    """
    values = _unshared(read_yaml(path))
    for override in overrides:
        _apply_override(values, override)
    return _validated(section, values, path)


def read_stored_config(section: type[SectionT], path: Path) -> SectionT:
    """Returns the config that a run of this or an earlier version wrote, without removed keys.

    Raises:
        ConfigError: if any value is invalid; the message lists file, key and value of each error.
    """
    return _validated(section, read_yaml(path), path, context=STORED)


def _validated(
    section: type[SectionT], values: dict[str, Any], path: Path, *, context: dict | None = None
) -> SectionT:
    try:
        return section.model_validate(values, context=context)
    except ValidationError as error:
        raise ConfigError(_validation_message(section, path, error)) from None


def _validation_message(section: type[Section], path: Path, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        found = ""
        if problem["type"] == "missing":
            message = "this key is required"
        elif problem["type"] == "url_as_path":
            allowed = ", ".join(url_settings(section)) or "none of this command"
            found = f"; settings that may be a URL: {allowed}"
        elif problem["type"] != "value_error":
            found = f"; found {problem['input']!r}"
        lines.append(f"{path}: {where + ': ' if where else ''}{message}{found}")
    return "\n".join(lines)


def to_yaml(config: Section) -> str:
    """Formats a resolved config as YAML, in the order of its definition."""
    values = json.loads(config.model_dump_json())
    return yaml.dump(values, Dumper=_Yaml12Dumper, sort_keys=False, allow_unicode=True)


def fixed_values(section: Any) -> Any:
    """Returns a config as nested plain values, without the fields marked `free`.

    The result of a run is a function of these values. They must be equal in all attempts at a run.
    """
    if isinstance(section, Section):
        return {
            name: fixed_values(getattr(section, name))
            for name, field in type(section).model_fields.items()
            if not (field.json_schema_extra or {}).get("free")
        }
    if isinstance(section, dict):
        return {key: fixed_values(value) for key, value in section.items()}
    if isinstance(section, list | tuple):
        return [fixed_values(value) for value in section]
    return str(section) if isinstance(section, Path) else section


def default_values(section: type[Section]) -> dict[str, Any]:
    """Returns the default of every field that has one and is not marked `free`, as plain values."""
    return {
        name: fixed_values(field.get_default(call_default_factory=True))
        for name, field in section.model_fields.items()
        if not field.is_required() and not (field.json_schema_extra or {}).get("free")
    }


def with_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns values with defaults for the keys that they lack, at any depth.

    An earlier version did not have these keys, and did what the defaults say.
    """
    filled = defaults | values
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(filled[key], dict):
            filled[key] = with_defaults(filled[key], default)
    return filled


def differing_keys(old: Any, new: Any, *, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns {dotted key: (old, new)} for all differences between two `fixed_values`."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    different: dict[str, tuple[Any, Any]] = {}
    for key in list(old) + [key for key in new if key not in old]:
        dotted = f"{prefix}.{key}" if prefix else str(key)
        different |= differing_keys(old.get(key), new.get(key), prefix=dotted)
    return different
