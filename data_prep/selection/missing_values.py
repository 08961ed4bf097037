"""NaN as a missing value: in columns of a table, and in the operands of comparisons.

DuckDB orders NaN above all other numbers, so that NaN > 5 holds. Here a NaN becomes NULL: in
columns when they are read, and in computed operands, such as a / b, by rewriting the condition.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

FLOAT_TYPES = ("FLOAT", "DOUBLE")
LIST_TYPE = re.compile(r"(.*)\[\d*\]")
OPERANDS = ("left", "right", "input", "lower", "upper", "child")
COMPARISONS = ("COMPARISON", "BETWEEN")
LISTED_COMPARISONS = ("COMPARE_IN", "COMPARE_NOT_IN")
CLEAN_CLASSES = ("CONSTANT", "COMPARISON", "CONJUNCTION", "BETWEEN")


def without_nan(expression: str, kind: str) -> str:
    """Returns an SQL expression in which NaN is replaced by NULL, also in lists.

    Args:
        expression: SQL expression.
        kind: DuckDB type of the expression.
    """
    if kind in FLOAT_TYPES:
        return f"CASE WHEN isnan({expression}) THEN NULL ELSE {expression} END"
    if holds_floats(kind):
        depth = kind.count("[")
        element = without_nan(f"e{depth}", LIST_TYPE.fullmatch(kind)[1])
        return f"list_transform({expression}, lambda e{depth}: {element})"
    return expression


def holds_floats(kind: str) -> bool:
    """Returns True for floating-point numbers and lists of them, at any depth."""
    while found := LIST_TYPE.fullmatch(kind):
        kind = found[1]
    return kind in FLOAT_TYPES


def condition_without_nan(
    connection: DuckDBPyConnection,
    tree: dict[str, Any],
    condition: str,
    *,
    columns: Collection[str],
) -> str:
    """Returns a condition whose comparisons take a NaN that they compute for NULL.

    Args:
        connection: any database.
        tree: result of json_serialize_sql for `SELECT (condition)`.
        condition: returned as it is unless a comparison computes an operand.
        columns: lower-case names of columns, in which NaN is NULL already.
    """
    if not _wrap_operands(connection, tree, columns):
        return condition
    query = connection.execute("SELECT json_deserialize_sql(?)", [json.dumps(tree)]).fetchone()[0]
    return query.removeprefix("SELECT ")


def _wrap_operands(connection: DuckDBPyConnection, tree: Any, columns: Collection[str]) -> int:
    """Wraps the computed operands of all comparisons, innermost first; returns their number."""
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    num_wrapped = sum(_wrap_operands(connection, part, columns) for part in list(parts))
    if not isinstance(tree, dict):
        return num_wrapped
    if tree.get("class") in COMPARISONS:
        for key in OPERANDS:
            if key in tree and _is_computed(tree[key], columns):
                tree[key] = _wrapped(connection, tree[key])
                num_wrapped += 1
    elif tree.get("type") in LISTED_COMPARISONS:
        is_computed = [_is_computed(child, columns) for child in tree["children"]]
        tree["children"] = [
            _wrapped(connection, child) if computed else child
            for child, computed in zip(tree["children"], is_computed, strict=True)
        ]
        num_wrapped += sum(is_computed)
    return num_wrapped


def _is_computed(operand: dict[str, Any], columns: Collection[str]) -> bool:
    if operand.get("class") == "COLUMN_REF":  # also a field of a struct, or a lambda's parameter
        name = ".".join(operand["column_names"]).lower()
        return name not in columns
    return operand.get("class") not in CLEAN_CLASSES


def _wrapped(connection: DuckDBPyConnection, operand: dict[str, Any]) -> dict[str, Any]:
    """Returns CASE WHEN the operand is NaN THEN NULL ELSE operand END; its type is unknown yet."""
    is_nan = "typeof(x) IN ('FLOAT', 'DOUBLE') AND CAST(x AS VARCHAR) IN ('nan', '-nan')"
    query = f"SELECT CASE WHEN {is_nan} THEN NULL ELSE x END"
    text = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchone()[0]
    template = json.loads(text)["statements"][0]["node"]["select_list"][0]
    return _with_operand(template, operand)


def _with_operand(template: Any, operand: dict[str, Any]) -> Any:
    if isinstance(template, dict):
        if template.get("class") == "COLUMN_REF":
            return operand
        return {key: _with_operand(value, operand) for key, value in template.items()}
    if isinstance(template, list):
        return [_with_operand(value, operand) for value in template]
    return template
