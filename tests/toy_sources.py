"""Short ways to read the pairs and the media of an input, for the tests of the sources."""

from pathlib import Path

from data_prep.config import MakeShards
from data_prep.media_reader import MediaReader
from data_prep.pair import BadItemError, Item, Pair
from data_prep.pair_sources import read_pairs


def config_for(source: Path | str, **fields) -> MakeShards:
    """A config that reads pictures from `source`."""
    fields = {"media": "image", "output": Path("unused")} | fields
    return MakeShards(input=str(source), **fields)


def pairs_of(source: Path | str, **fields) -> list[Pair]:
    return list(read_pairs(config_for(source, **fields)))


def reasons_of(source: Path | str, **fields) -> dict[int, str | None]:
    """Row -> reason, of an input with one pair per row."""
    return {pair.row: pair.reason for pair in pairs_of(source, **fields)}


def contents_of(
    source: Path | str, pairs: list[Pair] | None = None, *, downloads: Path = Path(), **fields
) -> list[bytes | str]:
    """The media of every pair: its bytes, or the reason why there are none."""
    config = config_for(source, **fields)
    pairs = list(read_pairs(config)) if pairs is None else pairs
    items = [Item(number, p.media, p.place, [p]) for number, p in enumerate(pairs)]
    with MediaReader(config, downloads) as reader:
        found = list(reader.read_all(items))
    assert [item for item, _ in found] == items
    return [c.reason if isinstance(c, BadItemError) else c for _, c in found]
