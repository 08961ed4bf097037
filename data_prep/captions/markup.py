"""Removal of HTML, web and email addresses, and invisible characters from captions.

Each function is one step of `captions.cleaning`. The steps are repeated until the caption no longer
changes, because removing some text may expose other text to an earlier step.
"""

from __future__ import annotations

import html
import re
from functools import lru_cache
from html.entities import html5

import regex

# Only current and obsolete HTML elements: <3, <PERSON> (in CC12M) and <unk> are not markup.
_INLINE_ELEMENTS = (
    "a|abbr|acronym|b|bdi|bdo|big|blink|cite|code|data|del|dfn|em|font|i|ins|kbd|label|mark"
    "|nobr|q|rb|rp|rt|rtc|ruby|s|samp|small|span|strike|strong|sub|sup|time|tt|u|var|wbr"
)
_BLOCK_ELEMENTS = (
    "address|applet|area|article|aside|audio|base|basefont|blockquote|body|br|button|canvas"
    "|caption|center|circle|col|colgroup|datalist|dd|details|dialog|dir|div|dl|dt|embed"
    "|fieldset|figcaption|figure|footer|form|frame|frameset|g|h1|h2|h3|h4|h5|h6|head|header"
    "|hr|html|iframe|img|input|legend|li|link|main|map|marquee|menu|meta|meter|nav|noembed"
    "|noframes|noscript|object|ol|optgroup|option|output|p|param|path|picture|pre|progress"
    "|rect|script|search|section|select|slot|source|style|summary|svg|table|tbody|td|template"
    "|textarea|tfoot|th|thead|title|tr|track|ul|video|xmp"
)

# Possessive quantifiers and bounded quoted values prevent quadratic time on any caption.
_ATTRIBUTES = r"""(?:\s(?:[^<>"'=]++|=\s*+"[^"]{0,2000}+"|=\s*+'[^']{0,2000}+'|["'=])*+)?/?"""
_HIDDEN = re.compile(
    rf"<!--.*?(?:-->|\Z)|<[!?][a-zA-Z\[][^<>]*+>"
    rf"|<(script|style){_ATTRIBUTES}>.*?(?:</\1\s*>|\Z)",
    re.IGNORECASE | re.DOTALL,
)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE_ELEMENTS}){_ATTRIBUTES}>", re.IGNORECASE)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCK_ELEMENTS}){_ATTRIBUTES}>", re.IGNORECASE)
# The semicolon is optional only for the most common references, because of "black&white".
_CHARACTER_REFERENCE = re.compile(
    r"&(?:#(?:\d{1,8}|[xX][0-9a-fA-F]{1,8});|[a-zA-Z][a-zA-Z0-9]{1,31};|(?:amp|gt|lt|nbsp|quot)\b)"
)


def strip_html(text: str) -> str:
    """Removes tags, comments, scripts and styles, and resolves references such as &amp;.

    Text that is not markup is kept: `a < b`, `<3`, `<PERSON>`.
    """
    if "<" in text:
        text = _HIDDEN.sub(" ", text)
        text = _INLINE_TAG.sub("", text)  # H<sub>2</sub>O is one word
        text = _BLOCK_TAG.sub(" ", text)
    if "&" in text:
        text = _CHARACTER_REFERENCE.sub(_referenced_character, text)
    return text


def _referenced_character(match: re.Match[str]) -> str:
    reference = match[0]
    if reference[1] == "#":
        return html.unescape(reference)
    name = reference[1:] if reference[-1] == ";" else f"{reference[1:]};"
    return html5.get(name, reference)


# A run without whitespace that may contain an address; most captions need no slow search.
_MAY_HOLD_ADDRESS = re.compile(r"(?<!\S)\S*?(?:\.\w|://)\S*")


@lru_cache
def _address_expression() -> regex.Pattern[str]:
    # A letter of a script written without spaces ends the address: the sentence continues there.
    character = (
        r"[[\w\-.~:/?\#@!$&'*+,;=%\[\]]"
        r"--[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]"
    )
    in_brackets = rf"\({character}*\)"  # as in Wikipedia's addresses
    last = (
        rf"[{character}--[.,;:!?'\[\]]]"  # other characters after an address belong to the sentence
    )
    rest = rf"(?:{character}|{in_brackets})*(?:{last}|{in_brackets})"
    label = r"[\p{L}\p{N}][\p{L}\p{N}\-]{0,62}"
    return regex.compile(
        rf"""(?xiV1)
        (?(DEFINE)(?P<address>
            (?:mailto:)? (?<![\w.+\-]) [\w.+\-%]{{1,64}}@{label}(?:\.{label}){{1,8}}
            | (?:https?|ftp)://(?:{rest})?
            | (?<![\w.\-]) www\.{rest}
            | (?<![\w.@\-]) (?:{label}\.){{1,8}}(?:com|org|net|edu|gov|info|co\.[a-z]{{2}})\b
              (?!\.?[\w@\-]) (?:/(?:{rest})?)?
        ))
        \((?&address)\) | \[(?&address)\] | <(?&address)> | (?&address)
        """
    )


def strip_urls(text: str) -> str:
    """Removes web addresses (http://..., www..., example.com/...) and email addresses."""
    return _MAY_HOLD_ADDRESS.sub(lambda run: _address_expression().sub(" ", run[0]), text)


_SPACES = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
# Flags written with tag characters, such as England's, come first. Then single characters: soft
# hyphen, zero-width spaces, joiners, direction marks, byte order mark, deprecated format
# characters, annotation anchors, other tags, and halves of surrogate pairs.
_INVISIBLE = re.compile(
    "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]+\U000e007f"
    "|[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0001\U000e0020-\U000e007f]"
)
_ZERO_WIDTH_NON_JOINER, _ZERO_WIDTH_JOINER = "\u200c\u200d"
# Scripts in which joiners distinguish words. A character may belong to several
# (Script_Extensions).
_JOINING_SCRIPTS = (
    "Arabic Bengali Devanagari Gujarati Gurmukhi Kannada Khmer Malayalam Mandaic Manichaean"
    " Mongolian Myanmar Nko Oriya Sinhala Syriac Tamil Telugu Tibetan"
)


def strip_invisible(text: str) -> str:
    """Removes invisible characters; collapses whitespace and control characters to one space.

    Joiners are kept where they change the visible text: inside an emoji, and in scripts such as
    Arabic and Devanagari.
    """
    if not text.isascii():
        text = _INVISIBLE.sub(_visible_part, text)
    return _SPACES.sub(" ", text)


def _visible_part(match: re.Match[str]) -> str:
    found = match[0]
    start, end = match.span()
    before, after = match.string[max(0, start - 1) : start], match.string[end : end + 1]
    joins_letters, starts_emoji, goes_on = _joiner_expressions()
    if found == _ZERO_WIDTH_JOINER:
        keep = joins_letters.match(before) or (starts_emoji.match(before) and goes_on.match(after))
    elif found == _ZERO_WIDTH_NON_JOINER:
        keep = joins_letters.match(before) and joins_letters.match(after)
    else:
        keep = len(found) > 1  # a flag
    return found if keep else ""


@lru_cache
def _joiner_expressions() -> tuple[regex.Pattern[str], ...]:
    """Builds expressions for the characters adjacent to a joiner.

    In order: before the joiner in a script, before it in an emoji, after it in an emoji.
    """
    scripts = "".join(rf"\p{{scx={script}}}" for script in _JOINING_SCRIPTS.split())
    pictograph = r"\p{Extended_Pictographic}"
    expressions = (
        rf"[\p{{L}}\p{{M}}&&[{scripts}]]",
        rf"[{pictograph}\p{{Emoji_Modifier}}\ufe0f]",
        pictograph,
    )
    return tuple(regex.compile(f"(?V1){expression}") for expression in expressions)
