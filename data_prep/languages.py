"""Language detection with py3langid's model (Lui and Baldwin 2012), and script fractions."""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier


# Suggested for a misspelled name; any Unicode script is accepted.
COMMON_SCRIPTS = (
    *("Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek"),
    *("Gujarati", "Gurmukhi", "Han", "Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana"),
    *("Khmer", "Lao", "Latin", "Malayalam", "Mongolian", "Myanmar", "Oriya", "Sinhala", "Tamil"),
    *("Telugu", "Thai", "Tibetan"),
)


def language_of(text: str, *, min_probability: float) -> str | None:
    """Returns the ISO 639 code of the likeliest language; None below the minimum probability."""
    language, probability = _language_identifier().classify(text)
    return language if probability >= min_probability else None


def check_language(code: str) -> None:
    """Checks that `language_of` can return a code.

    Raises:
        ValueError: if the code is unknown; the message lists all codes.
    """
    known = _language_identifier().labels
    if code not in known:
        raise ValueError(
            f"{code!r} is not a language that can be detected; known: {', '.join(known)}"
        )


@lru_cache
def _language_identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_script(name: str) -> None:
    """Checks that a name is the name of a Unicode script.

    Raises:
        ValueError: if it is not; the message suggests the nearest name.
    """
    try:
        is_known = regex.compile(rf"\p{{Script={name}}}") and regex.fullmatch("[A-Za-z_ ]+", name)
    except regex.error:
        is_known = False
    if not is_known:
        nearest = difflib.get_close_matches(name.title(), COMMON_SCRIPTS, n=1, cutoff=0.5)
        known = ", ".join(COMMON_SCRIPTS)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"examples: {known}"
        raise ValueError(f"{name!r} is not a Unicode script; {hint}")


def script_fraction(text: str, scripts: tuple[str, ...]) -> float:
    """Computes the fraction of a text's letters that belong to scripts; 1 if it has no letters.

    Letters shared by several scripts, such as the Japanese long vowel mark, do not count.
    """
    letters, letters_of_scripts = _letter_expressions(scripts)
    if text.isascii() and letters_of_scripts.match("a"):
        return 1.0  # all ASCII letters are Latin
    num_letters = len(letters.findall(text))
    return len(letters_of_scripts.findall(text)) / num_letters if num_letters else 1.0


@lru_cache
def _letter_expressions(scripts: tuple[str, ...]) -> tuple[regex.Pattern[str], regex.Pattern[str]]:
    letters = r"[\p{L}--[\p{Script=Common}\p{Script=Inherited}]]"
    wanted = "".join(rf"\p{{Script={script}}}" for script in scripts)
    return regex.compile(f"(?V1){letters}"), regex.compile(f"(?V1)[{letters}&&[{wanted}]]")
