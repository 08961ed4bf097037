"""Every damage of a kind to the bytes of a small file."""

import copy
import json

# A value of each type, and numbers that no file holds.
OTHER_VALUES = (None, True, -1, 0, 7, 10**30, 1.5, "text", [], [1], ["text"], {}, {"key": 1})
# Texts that json.loads reads, or fails on, in ways of their own.
OTHER_TEXTS = (
    *("NaN", "Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 100_000, '{"a": 1, "a": 2}', ""),
)


def single_bit_flips(content):
    """Yields the content with each of its bits flipped."""
    flipped = bytearray(content)
    for place in range(len(content)):
        for bit in range(8):
            flipped[place] ^= 1 << bit
            yield bytes(flipped)
            flipped[place] ^= 1 << bit


def truncations(content):
    """Yields the content cut at each length."""
    for length in range(len(content)):
        yield content[:length]


def edits(content):
    """Yields a JSON object without each key at any depth, and with each value replaced."""
    values = json.loads(content)
    for keys in paths_in(values):
        yield json.dumps(edited(values, keys)).encode()
        for other in OTHER_VALUES:
            yield json.dumps(edited(values, keys, other)).encode()
        for text in OTHER_TEXTS:
            yield json.dumps(edited(values, keys, "HERE")).replace('"HERE"', text).encode()
    yield from (json.dumps(other).encode() for other in OTHER_VALUES)


def paths_in(values):
    """Yields (key, key, ...) of every value in nested objects and lists."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *rest) for rest in paths_in(value))


def edited(values, keys, *replacement):
    """Returns a copy with one value replaced, or deleted if there is no replacement."""
    values = copy.deepcopy(values)
    place = values
    for key in keys[:-1]:
        place = place[key]
    if replacement:
        place[keys[-1]] = replacement[0]
    else:
        del place[keys[-1]]
    return values


def outcomes_of(read, damaged, *, error):
    """Yields what `read` returns for each damaged content, except those that raise `error`."""
    for content in damaged:
        try:
            yield content, read(content)
        except error:
            continue
