"""Checks the English of docstrings, comments, messages and documentation.

    python -m tests.support.language pretrain/loss README.md     prints what to mend, a line each

Checked are banned words, the length of sentences in docstrings, how modules open, and that the
docstring of a public function starts with a verb. The rest is reading.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_WORDS = 25  # of a sentence in a docstring
BANNED = (
    *("becomes of", "became of", "come to count", "is told", "are told", "stands twice"),
    *("may pass", "for ever", "heed", "heeded", "heeds", "gives way", "at hand", "of ours"),
    *("beside", "besides", "in so many words", "for want of", "robbed", "comes no further"),
    *("of which", "to which that", "tried again while"),
)
BANNED_PATTERN = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
WRONG_OPENINGS = ("What", "Who", "Whether", "How")
# Third-person verbs that docstrings of functions may start with.
VERBS = frozenset((Path(__file__).parent / "verbs.txt").read_text().split())


def faults_of(path: Path) -> Iterator[str]:
    """ "<file>:<line>: <fault>" for every fault of a Python or Markdown file."""
    name = path.relative_to(ROOT)
    text = path.read_text()
    if path.suffix != ".py":
        for number, line in enumerate(text.splitlines(), start=1):
            for found in BANNED_PATTERN.findall(line):
                yield f"{name}:{number}: banned: {found!r}"
        return
    tree = ast.parse(text)
    for number, words in _texts(text):
        for found in BANNED_PATTERN.findall(words):
            yield f"{name}:{number}: banned: {found!r}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring is None:
                continue
            line = node.body[0].lineno
            for sentence in sentences(docstring):
                if len(sentence.split()) > MOST_WORDS:
                    yield f"{name}:{line}: {len(sentence.split())} words: {sentence[:70]}..."
            first = docstring.split()[0].rstrip(":,.")
            if isinstance(node, ast.Module) and first in WRONG_OPENINGS:
                yield f"{name}:{line}: module opens with {first}"
            if _is_public_function(node) and first not in VERBS:
                yield f"{name}:{line}: {node.name}: starts with {first!r}, no verb of the list"


def sentences(docstring: str) -> Iterator[str]:
    """The sentences of a docstring, without code, tables and shapes."""
    for block in re.split(r"\n\s*\n", docstring):
        if re.match(r"\s{4}|\s*(\||>>>|```)", block):
            continue
        entries = re.split(r"\n(?=\s*(?:\w[\w, ]*:|[-*]|\d+\.)\s)|\n(?=\s*\S+ {2,}\S)", block)
        for entry in entries:
            if re.search(r"\S {2,}\S", entry):  # a line of a table
                continue
            # A colon at the end of a line opens a list or an example.
            yield from filter(None, re.split(r"(?<=[.!?])\s+|:\n", entry.strip()))


def _texts(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment and string."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or token.type == getattr(
            tokenize, "FSTRING_MIDDLE", None
        ):
            yield token.start[0], " ".join(token.string.split())


def _is_public_function(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
        return False
    names = {ast.unparse(each) for each in node.decorator_list}
    is_noun = any("property" in name or name.endswith((".setter", "fixture")) for name in names)
    return not is_noun


def files_of(places: list[str]) -> Iterator[Path]:
    """Yields the Python and Markdown files at some places, relative to the repository."""
    for place in places:
        path = ROOT / place
        yield from [path] if path.is_file() else sorted({*path.rglob("*.py"), *path.rglob("*.md")})


if __name__ == "__main__":
    places = sys.argv[1:] or ["data_prep", "pretrain", "eval", "README.md", "docs"]
    faults = [fault for path in files_of(places) for fault in faults_of(path)]
    print("\n".join(faults))
    print(f"{len(faults)} faults")
    sys.exit(bool(faults))
