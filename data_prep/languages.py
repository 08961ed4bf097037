"""The language of a text, by the model that comes with py3langid (Lui and Baldwin 2012)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier


def language_of(text: str, *, min_probability: float) -> str | None:
    """ISO 639 code of the likeliest language; None if it is less probable than asked."""
    language, probability = _language_identifier().classify(text)
    return language if probability >= min_probability else None


def check_language(code: str) -> None:
    """Checks that this is a code which language_of can give.

    Raises:
        ValueError: it is none; names all codes.
    """
    known = _language_identifier().labels
    if code not in known:
        raise ValueError(f"{code!r} is no language that can be told; known: {', '.join(known)}")


@lru_cache
def _language_identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
