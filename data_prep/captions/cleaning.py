"""Caption cleaning and filtering.

The configured steps run in this order, and are repeated until the caption no longer changes.
Cleaning is therefore idempotent:

1. repair wrong encoding (ftfy)
2. remove HTML
3. remove web and email addresses
4. convert to a Unicode normal form
5. remove invisible characters; collapse whitespace and control characters to one space
6. strip whitespace at the ends (always)

The filters then check the cleaned caption. Lengths are in code points. A word is a run of letters
and digits; in scripts written without spaces (Chinese, Japanese, Thai, ...), each letter is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import regex

from data_prep.captions.markup import strip_html, strip_invisible, strip_urls
from data_prep.config import CaptionOptions
from data_prep.languages import language_of, script_fraction

# Captions that still change after this many rounds contain maliciously nested markup.
MAX_ROUNDS = 50
_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_ASCII_WORD = re.compile(r"[A-Za-z0-9][\w']*")


@dataclass(frozen=True, slots=True)
class CleanedCaption:
    """A caption as stored, and the filters that match it."""

    text: str
    language: str | None  # ISO 639 code; None if not requested, or too uncertain
    found: tuple[str, ...]  # filters (config.FILTER_REASONS) that would drop it, in fixed order


class CaptionCleaner:
    """Cleans captions with fixed options; can be pickled.

    A caption that is empty after cleaning matches `caption_too_short`. A caption without letters
    passes the script filter. A caption in an uncertain language fails the language filter.
    """

    def __init__(self, options: CaptionOptions):
        self.options = options
        self._steps = _cleaning_steps(options)
        self._untidy = _untidy_expression(options)
        self._boilerplate = tuple(re.compile(expression) for expression in options.boilerplate)

    def clean(self, text: str) -> CleanedCaption:
        """Returns the cleaned caption, its language and the matching filters; never raises."""
        text = self._cleaned(text)
        language = None
        if text and (self.options.detect_language or self.options.languages):
            language = language_of(text, min_probability=self.options.min_language_probability)
        return CleanedCaption(text, language, tuple(self._findings(text, language)))

    def _cleaned(self, text: str) -> str:
        text = text.strip()
        if text.isascii() and self._untidy.search(text) is None:
            return text
        for _ in range(MAX_ROUNDS):
            cleaned = text
            for step in self._steps:
                cleaned = step(cleaned)
            if cleaned == text:
                return text
            text = cleaned
        return ""

    def _findings(self, text: str, language: str | None) -> list[str]:
        options = self.options
        if not text:
            return ["caption_too_short"]
        found = []
        num_words = self._num_words(text)
        if len(text) < options.min_characters or num_words < options.min_words:
            found.append("caption_too_short")
        if _is_above(len(text), options.max_characters) or _is_above(num_words, options.max_words):
            found.append("caption_too_long")
        if options.scripts and script_fraction(text, options.scripts) < options.min_script_fraction:
            found.append("caption_script")
        if options.languages and language not in options.languages:
            found.append("caption_language")
        if any(expression.search(text) for expression in self._boilerplate):
            found.append("caption_boilerplate")
        return found

    def _num_words(self, text: str) -> int:
        """Counts words; stops at 1 if the limits do not require an exact count."""
        expression = _ASCII_WORD if text.isascii() else _word_expression()
        if self.options.min_words == 1 and self.options.max_words is None:
            return int(expression.search(text) is not None)
        return len(expression.findall(text))


def _is_above(number: int, limit: int | None) -> bool:
    return limit is not None and number > limit


# ------------------------------------------------------------------------------------ cleaning


def _cleaning_steps(options: CaptionOptions) -> tuple[Callable[[str], str], ...]:
    steps: list[Callable[[str], str]] = []
    if options.fix_encoding:
        steps.append(_fix_encoding)
    if options.strip_html:
        steps.append(strip_html)
    if options.strip_urls:
        steps.append(strip_urls)
    if options.unicode is not None:
        steps.append(partial(unicodedata.normalize, options.unicode.upper()))
    if options.collapse_spaces:
        steps.append(strip_invisible)
    return (*steps, str.strip)


def _untidy_expression(options: CaptionOptions) -> re.Pattern[str]:
    """Builds an expression that matches ASCII captions that may need cleaning; most do not."""
    signs = []
    if options.strip_html:
        signs.append("[<&]")
    if options.strip_urls:
        signs.append(r"\.\w|://")
    if options.collapse_spaces:
        signs.append(r"[\x00-\x1f\x7f]|  ")
    return re.compile("|".join(signs) or r"(?!)")  # (?!) never matches


def _fix_encoding(text: str) -> str:
    from ftfy import fix_encoding

    return fix_encoding(text)


# ------------------------------------------------------------------------------------- filters


@lru_cache
def _word_expression() -> regex.Pattern[str]:
    return regex.compile(
        rf"(?V1)[[\p{{L}}\p{{N}}]&&[{_WITHOUT_SPACES}]]"
        rf"|[[\p{{L}}\p{{N}}]--[{_WITHOUT_SPACES}]][[\w'\u2019\u200c\u200d]--[{_WITHOUT_SPACES}]]*"
    )
