"""Errors that a user can cause; commands print their message without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Something a person gave cannot be used: a value, a file, a dataset.

    The message says what was expected, what was found, where, and what to do; commands print it
    alone, without a traceback.
    """


class ConfigError(InputError):
    """A config or command line that is wrong before anything was run (exit status 2)."""


class RunError(RuntimeError):
    """A run that cannot go on. The message says why and what to do; commands print it alone."""
