"""Errors that a user can cause; commands print their message without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """A value, file or dataset given by the user cannot be used.

    The message states what was expected, what was found, where, and what to do. Commands print
    only the message, without a traceback.
    """


class ConfigError(InputError):
    """A config or command line is invalid; detected before any work (exit status 2)."""


class RunError(RuntimeError):
    """A run cannot continue; the message states the reason and the remedy."""
