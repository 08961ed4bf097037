"""Errors of libraries as one sentence, for the messages of `InputError`."""

from __future__ import annotations

# Some messages list every model of a library.
MOST_CHARACTERS = 400


def describe_library_error(error: Exception) -> str:
    """Returns the message of a library's error on one line, with the package to install if any.

    Args:
        error: error that a library raised while it built a model or a tokenizer.
    """
    text = " ".join(str(error).split())
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}..."
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{text}; install the package that provides {error.name}, then run again"
    # Messages of these are often a bare name, such as "'hidden'".
    is_bare = not text or isinstance(error, LookupError | AttributeError)
    return f"{type(error).__name__}{': ' if text else ''}{text}" if is_bare else text
