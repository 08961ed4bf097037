"""Caption cleaning in microseconds of CPU time each, compared with ftfy's fix_text (best of three).

python -m tests.benchmarks.captions
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import ftfy

from data_prep.captions.cleaning import CaptionCleaner
from data_prep.config import CaptionOptions

NUM_CAPTIONS = 2000
NUM_RUNS = 3
WORDS = (
    "a the two brown dog cat man woman running sitting standing on under near green grass table "
    "kitchen street with red ball in large small photo of an old wooden boat near mountains"
)
EVERYTHING = {
    "strip_html": True,
    "strip_urls": True,
    "fix_encoding": True,
    "min_words": 2,
    "max_words": 77,
    "scripts": ("Latin",),
    "boilerplate": ("(?i)click here", "stock photo"),
}


def main() -> None:
    plain = captions()
    accented = [f"{caption} \u2014 caf\u00e9 \u201cok\u201d" for caption in plain]
    dirty = [f"<p>{caption}&nbsp;<br> see https://example.org/?a=b&amp;c" for caption in plain]
    default, everything = CaptionOptions(), CaptionOptions(**EVERYTHING)
    language = CaptionOptions(**EVERYTHING, detect_language=True)
    for what, options, texts in (
        ("plain, default", default, plain),
        ("plain, all steps and filters", everything, plain),
        ("plain, language as well", language, plain),
        ("not ASCII, default", default, accented),
        ("not ASCII, all steps and filters", everything, accented),
        ("HTML and URL, all steps and filters", everything, dirty),
    ):
        ours = microseconds(CaptionCleaner(options).clean, texts)
        theirs = microseconds(ftfy.fix_text, texts)
        print(f"{what}: {ours:.1f} us; ftfy.fix_text {theirs:.1f} us")


def captions() -> list[str]:
    generator, words = random.Random(0), WORDS.split()
    return [
        " ".join(generator.choices(words, k=generator.randint(5, 18))) for _ in range(NUM_CAPTIONS)
    ]


def microseconds(clean: Callable[[str], object], texts: list[str]) -> float:
    clean(texts[0])  # triggers lazy loading
    seconds = []
    for _ in range(NUM_RUNS):
        start = time.process_time()
        for text in texts:
            clean(text)
        seconds.append(time.process_time() - start)
    return min(seconds) / len(texts) * 1e6


if __name__ == "__main__":
    main()
