"""Types of kept columns, which must represent every value of the input."""

import json
import math
from itertools import permutations

import pyarrow
import pytest

from data_prep.shards.columns import KEPT_TYPES, KeptTypes, kept_value
from data_prep.sources.rows import kept_json

LARGE = 2**53 + 1  # the first integer that a double rounds
COLUMNS = {
    "int64": ([1, 2], [-(2**63), 2**63 - 1], [LARGE, 1], [None, 3]),
    "double": ([1, 0.6], [0.5], [2**53, 0.25], [math.inf, 1], [-math.inf, None, 2.5]),
    "string": (["a", 1], [LARGE, 0.5], [2**63, 1], [True, 1], [1, LARGE, 0.6]),
    "bool": ([True, False], [None, True]),
}


def cells(values):
    """Returns the values as make_shards reads them: through the JSON of the plan."""
    return [json.loads(kept_json({"x": value}, ["x"]) or "{}").get("x") for value in values]


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_keeps_every_value_in_any_order(kind):
    for values in COLUMNS[kind]:
        for ordered in permutations(values):
            types = KeptTypes(["x"])
            read = cells(ordered)
            for value in read:
                types.add({"x": value})
            assert types.types(found_in="input") == {"x": kind}
            column = pyarrow.array([kept_value(v, kind) for v in read], KEPT_TYPES[kind])
            found = column.to_pylist()
            as_stored = [json.dumps(v) if kind == "string" and v is not None else v for v in read]
            as_stored = [json.loads(v) if v == '"a"' else v for v in as_stored]
            assert found == as_stored
            assert kind == "string" or found == list(ordered)


def test_types_of_parts_join_like_those_of_the_whole():
    for parts in permutations(([1], [0.5], [LARGE])):
        whole = KeptTypes(["x"])
        for part in parts:
            types = KeptTypes(["x"])
            for value in part:
                types.add({"x": value})
            whole.merge(types.known)
        assert whole.types(found_in="input") == {"x": "string"}


def test_infinity_is_a_value_and_nan_is_none():
    assert cells([math.inf, -math.inf, math.nan, 0.0]) == [math.inf, -math.inf, None, 0.0]
