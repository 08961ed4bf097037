"""Captions: what is cleaned away, what stays, and which filters find what."""

import pickle
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_prep.captions.cleaning import CaptionCleaner
from data_prep.config import FILTER_REASONS, CaptionOptions

EVERYTHING = {"strip_html": True, "strip_urls": True, "fix_encoding": True}
ZWNJ, ZWJ, ZWSP = "\u200c", "\u200d", "\u200b"


def cleaned(text, **options):
    return CaptionCleaner(CaptionOptions(**options)).clean(text).text


def found(text, **options):
    return CaptionCleaner(CaptionOptions(**options)).clean(text).found


# ------------------------------------------------------------------------------------ cleaning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < b and c > d", "a < b and c > d"),
        ("I <3 my dog", "I <3 my dog"),
        ("<PERSON> at home", "<PERSON> at home"),
        ("AT&T, fish&chips, black&white, Q&A;", "AT&T, fish&chips, black&white, Q&A;"),
        ("H<sub>2</sub>O", "H2O"),
        ("<p class='x'>one</p><p>two<br/>three</p>", "one two three"),
        ('<img alt="a > b" src=x>a picture', "a picture"),
        ("cat <script>if (a < b) run()</script>and <style>p {}</style>dog", "cat and dog"),
        ("cat<!-- <b>not</b> shown -->", "cat"),
        ("<!DOCTYPE html>cat<script>never closed", "cat"),
        ("caf&eacute; &#233; &#xe9; &amp;amp; &nbsp; b", "caf\u00e9 \u00e9 \u00e9 & b"),
        ("&amp;lt;b&amp;gt;bold&amp;lt;/b&amp;gt;", "bold"),
        ("salt &amp pepper", "salt & pepper"),
    ],
)
def test_html_goes_and_what_only_looks_like_it_stays(text, expected):
    assert cleaned(text, strip_html=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat https://example.org/a?b=c#d.", "a cat ."),
        ("a cat (http://x.org/Cat_(pet)) sleeps", "a cat sleeps"),
        ("a cat <https://x.org>", "a cat"),
        ("mail cat.lover+1@mail.example.org now", "mail now"),
        ("www.example.de shows a cat", "shows a cat"),
        ("stock photo, example.com/cats", "stock photo,"),
        (
            "a Node.js sticker, e.g. in the U.S.A. @home",
            "a Node.js sticker, e.g. in the U.S.A. @home",
        ),
        ("\u732bhttp://x.org/\u732b\u304c\u597d\u304d", "\u732b \u732b\u304c\u597d\u304d"),
        ("10.5 by 3.com", "10.5 by"),
    ],
)
def test_addresses_go_and_the_sentence_stays(text, expected):
    assert cleaned(text, strip_urls=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\t\ncat\x00\x1b on\u3000a\u00a0mat \r\n", "a cat on a mat"),
        (f"\ufeffin{ZWSP}visible so\u00adft \u202eevil\u2066", "invisible soft evil"),
        (f"a{ZWJ}b{ZWNJ}c", "abc"),
        (f"\U0001f468{ZWJ}\U0001f469\U0001f3fd{ZWJ}\U0001f467 family", None),
        (f"\u2764\ufe0f{ZWJ}\U0001f525", None),
        (f"\u0645\u06cc{ZWNJ}\u062e\u0648\u0627\u0647\u0645", None),  # Persian
        (f"\u0915\u094d{ZWJ}\u0937", None),  # Devanagari
        (f"\u0645\u06cc{ZWNJ}{ZWNJ} x", "\u0645\u06cc x"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", None),  # England
        ("hidden\U000e0068\U000e0069", "hidden"),
        ("half \ud800 a pair", "half a pair"),
    ],
)
def test_only_what_is_seen_stays(text, expected):
    assert cleaned(text) == (text if expected is None else expected)


def test_steps_are_only_those_asked_for():
    text = " <b>caf\u0065\u0301</b>  http://x.org \ufb01sh "
    assert cleaned(text, unicode=None, collapse_spaces=False) == text.strip()
    assert cleaned(text, unicode="nfc") == "<b>caf\u00e9</b> http://x.org \ufb01sh"
    assert cleaned(text, unicode="nfkc") == "<b>caf\u00e9</b> http://x.org fish"
    assert cleaned("caf\u00c3\u00a9", fix_encoding=True) == "caf\u00e9"
    assert cleaned("caf\u00c3\u00a9") == "caf\u00c3\u00a9"


CLEANERS = [
    CaptionCleaner(CaptionOptions(unicode=unicode, collapse_spaces=collapse, **steps))
    for unicode in (None, "nfc", "nfkc")
    for collapse in (True, False)
    for steps in ({}, EVERYTHING)
]
NASTY = (
    '< > & amp; &lt; &#38; <b> <script> </script> <!-- --> http:// www. a@b.c .com ( ) [ / " ='
    " &#x200b; &#xD800; \u200b \u200c \u200d \u0301 \uff1c \ufe64 \u0915\u094d \U0001f469 \ufeff"
    " \u00c3\u00a9 \u00e2\u20ac\u2122 \ud800 \x00 \u037e \u1fef"
)
CAPTIONS = st.lists(
    st.one_of(st.text(max_size=4), st.sampled_from(NASTY.split(" ")), st.characters()), max_size=12
).map("".join)


@settings(max_examples=400)
@given(CAPTIONS)
def test_cleaning_a_clean_caption_changes_nothing(text):
    for cleaner in CLEANERS:
        once = cleaner.clean(text)
        assert cleaner.clean(once.text) == once
        assert once.text == once.text.strip()
        if cleaner.options.unicode:
            form = cleaner.options.unicode.upper()
            assert unicodedata.is_normalized(form, once.text)


@given(st.text(alphabet=st.characters(max_codepoint=126, min_codepoint=32)))
def test_quick_way_for_plain_captions_equals_the_slow_one(text):
    for cleaner in CLEANERS:
        slow = text
        while True:
            before = slow
            for step in cleaner._steps:
                slow = step(slow)
            if slow == before:
                break
        assert cleaner.clean(text).text == slow


@pytest.mark.parametrize(
    "text",
    [
        "&" + "amp;" * 20_000,
        "<a " * 30_000,
        "<a b='" * 20_000,
        "<!--" * 20_000,
        "a@" * 30_000,
        "www." * 20_000,
        ("a" * 63 + ".") * 1_000,
        "a" * 100_000 + "@b.c",
        ZWJ * 30_000,
        " \0" * 30_000,
    ],
)
def test_no_caption_takes_long(text):
    cleaner = CaptionCleaner(CaptionOptions(**EVERYTHING))
    start = time.process_time()
    cleaner.clean(text)
    assert time.process_time() - start < 20  # CPU seconds


def test_markup_nested_without_end_is_no_caption():
    result = CaptionCleaner(CaptionOptions(strip_html=True)).clean("&" + "amp;" * 1000 + "lt;")
    assert (result.text, result.found) == ("", ("caption_too_short",))


# ------------------------------------------------------------------------------------- filters


def test_lengths_are_code_points_and_words_of_the_cleaned_caption():
    assert found("<b></b>", strip_html=True) == ("caption_too_short",)
    assert found("?!") == ("caption_too_short",)  # no word
    assert found("  a cat  ", min_characters=6) == ("caption_too_short",)
    assert found("  a cat  ", min_characters=5, max_characters=5) == ()
    assert found("a cat", max_characters=4) == ("caption_too_long",)
    assert found("it's a cat", min_words=3, max_words=3) == ()
    assert found("it's a cat", min_words=4) == ("caption_too_short",)
    assert found("\u732b\u304c\u597d\u304d", min_words=4, max_words=4) == ()
    assert found("\u0939\u093f\u0928\u094d\u0926\u0940 \u092a\u093e\u0920", max_words=2) == ()


def test_script_filter_looks_at_the_share_of_letters():
    assert found("a cat, 42!", scripts=("Latin",)) == ()
    assert found("42!", scripts=("Latin",)) == ()  # no letters
    assert found("a cat", scripts=("Han",)) == ("caption_script",)
    assert found("\u041a\u043e\u0442 cat", scripts=("Latin",)) == ("caption_script",)
    options = {"scripts": ("Latin",), "min_script_fraction": 0.5}
    assert found("\u041a\u043e\u0442 cat", **options) == ()
    japanese = ("Han", "Hiragana", "Katakana")
    assert found("\u30b9\u30fc\u30d1\u30fc\u306e\u732b", scripts=japanese) == ()
    assert found("\u00b5 \u00e9t\u00e9", scripts=("latin",)) == ()


def test_language_filter_drops_what_is_uncertain():
    cleaner = CaptionCleaner(CaptionOptions(languages=("en", "de")))
    english = cleaner.clean("A brown dog runs over the green grass of a large park")
    assert (english.language, english.found) == ("en", ())
    assert cleaner.clean("Ein Hund l\u00e4uft \u00fcber die Wiese").language == "de"
    spanish = cleaner.clean("Un perro corre por el c\u00e9sped verde del parque")
    assert (spanish.language, spanish.found) == ("es", ("caption_language",))
    unknown = cleaner.clean("DSC_0001")
    assert (unknown.language, unknown.found) == (None, ("caption_language",))


def test_language_is_only_detected_where_asked_for():
    text = "A brown dog runs over the green grass of a large park"
    assert CaptionCleaner(CaptionOptions()).clean(text).language is None
    assert CaptionCleaner(CaptionOptions(detect_language=True)).clean(text).language == "en"


def test_all_findings_in_a_fixed_order():
    options = CaptionOptions(
        min_words=9,
        max_characters=3,
        scripts=("Han",),
        languages=("zh",),
        boilerplate=("nothing", r"(?i)CLICK\s+here"),
    )
    cleaner = pickle.loads(pickle.dumps(CaptionCleaner(options)))
    result = cleaner.clean("click here")
    assert result.found == (
        *("caption_too_short", "caption_too_long", "caption_script", "caption_language"),
        "caption_boilerplate",
    )
    assert set(result.found) <= FILTER_REASONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scripts": ("Latim",)}, "did you mean 'Latin'"),
        ({"scripts": ("]",)}, "not a Unicode script"),
        (
            {"languages": ("english",)},
            "'english' is not a language .*; known: .*en",
        ),
        ({"boilerplate": ("(",)}, "not a regular expression"),
        ({"min_words": 5, "max_words": 4}, "max_words=4 is below min_words=5"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        CaptionOptions(**options)
