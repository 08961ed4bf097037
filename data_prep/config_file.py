"""Reads a typed config: defaults, then a YAML file, then `section.key=value` from the command line.

Every command of the project goes through `run_command`, so that all of them take the same
arguments (`CONFIG.yaml [section.key=value ...] [--dry-run]`), refuse unknown keys with the nearest
known name, and end with status 0 (done), 1 (failed) or 2 (wrong usage or config).
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SectionT = TypeVar("SectionT", bound="Section")
# What they say is shown from INFO on, what libraries say from WARNING on.
OWN_LOGGERS = ("data_prep", "pretrain", "eval")
SECONDS_TO_LET_RANK_0_SPEAK = 3.0


class InputError(ValueError):
    """Something a person gave cannot be used: a value, a file, a dataset.

    The message says what was expected, what was found, where, and what to do; commands print it
    alone, without a traceback.
    """


class ConfigError(InputError):
    """A config or command line that is wrong before anything was run (exit status 2)."""


class RunError(RuntimeError):
    """A run that cannot go on. The message says why and what to do; commands print it alone."""


class Section(BaseModel):
    """Base of every config section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _suggest_known_key(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(_unknown_key_message(str(key), list(cls.model_fields)))
        return values


def free(default: Any = ..., **field_options: Any) -> Any:
    """A config field that may differ when a run is resumed: it cannot change the result."""
    return Field(default, json_schema_extra={"free": True}, **field_options)


def _unknown_key_message(key: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {key!r}; {hint}"


# ---------------------------------------------------------------------------------------- YAML


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
    """Quotes the texts that the loader would take for something else."""

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
                None, None, f"key {key!r} stands twice", key_node.start_mark
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Yaml12Loader.add_constructor("tag:yaml.org,2002:map", _refuse_duplicate_keys)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something else than a mapping.
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
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys to values, found {type(values).__name__}"
        )
    return values


# ----------------------------------------------------------------------------------- overrides


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"{override!r}: expected section.key=value")
    try:
        new_value = yaml.load(text, Loader=_Yaml12Loader) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: value is not readable as YAML: {error}") from None
    *parents, last = dotted.split(".")
    place: Any = values
    for depth, key in enumerate(parents):
        if isinstance(place, list):
            place = place[_list_index(place, key, override)]
        elif isinstance(place, dict):
            place = place.setdefault(key, {})
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
    """A copy in which no part stands at two places, as YAML's anchors make them: an override of one
    must not reach the other."""
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
    """A checked config section from a YAML file and `section.key=value` overrides.

    Raises:
        ConfigError: naming the file, the key and the value of everything that is wrong.
    """
    values = _unshared(read_yaml(path))
    for override in overrides:
        _apply_override(values, override)
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_validation_message(path, error)) from None


def _validation_message(path: Path, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        found = ""
        if problem["type"] == "missing":
            message = "this key is required"
        elif problem["type"] != "value_error":
            found = f"; found {problem['input']!r}"
        lines.append(f"{path}: {where + ': ' if where else ''}{message}{found}")
    return "\n".join(lines)


def to_yaml(config: Section) -> str:
    """The resolved config as YAML, in the order of its definition."""
    values = json.loads(config.model_dump_json())
    return yaml.dump(values, Dumper=_Yaml12Dumper, sort_keys=False, allow_unicode=True)


def fixed_values(section: Any) -> Any:
    """The config as nested plain values without the fields marked `free`: what a run's result is a
    function of. Two attempts at one run must agree on it."""
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


def differing_keys(old: Any, new: Any, *, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), wherever two nested values of `fixed_values` differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    different: dict[str, tuple[Any, Any]] = {}
    for key in list(old) + [key for key in new if key not in old]:
        dotted = f"{prefix}.{key}" if prefix else str(key)
        different |= differing_keys(old.get(key), new.get(key), prefix=dotted)
    return different


# ------------------------------------------------------------------------------------- command


def run_command(
    section: type[SectionT],
    *,
    run: Callable[[SectionT], None],
    dry_run: Callable[[SectionT], None],
    description: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs one command of the project and returns its exit status.

    Args:
        section: the type of the command's config.
        run: does the work.
        dry_run: checks what can be checked without doing the work, and prints derived numbers.
        description: the command's module docstring, shown by --help.
        arguments: the command line after the program's name (default: sys.argv).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="resolve and check the config, print it, and exit"
    )
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in OWN_LOGGERS:
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        config = read_config(section, options.config, overrides=options.overrides)
        if options.dry_run:
            print(to_yaml(config))  # noqa: T201
            dry_run(config)
        else:
            run(config)
    except (InputError, RunError) as error:
        _print_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if error.filename is None:
            raise
        _print_error(InputError(f"{error.filename}: {error.strerror}"))
        return 1
    except KeyboardInterrupt:
        _print_error(RunError("interrupted; the same command goes on where this one was"))
        return 130
    return 0


def check_output_folder(folder: Path, *, key: str) -> None:
    """Checks that a folder can be written or made, without making it.

    Raises:
        ConfigError: naming the key and what stands in the way.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"{key}={folder}: expected a folder, found a file at {nearest}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder}: {nearest} cannot be written; choose another")


def _print_error(error: Exception) -> None:
    """Prints the message; of several processes that fail alike, mostly the first one's alone.

    The others wait a little, because a launcher ends them as soon as one has failed.
    """
    rank = os.environ.get("RANK")
    if rank not in (None, "0"):
        time.sleep(SECONDS_TO_LET_RANK_0_SPEAK)
    prefix = "" if rank is None else f"rank {rank}: "
    print(f"error: {prefix}{error}", file=sys.stderr, flush=True)  # noqa: T201
