"""Validation of an SQL condition over the columns of a view.

Statements, subqueries, file access, and functions of the time or the session are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from data_prep.selection.missing_values import condition_without_nan
from data_prep.selection.sample_table import duckdb_errors, unknown_column_message

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

REFUSED_CLASSES = {
    "SUBQUERY": "a subquery",
    "WINDOW": "a window function",
    "PARAMETER": "a parameter",
}


# Functions that DuckDB lists as constant, but whose result depends on the time or the session.
SESSION_FUNCTIONS = re.compile(
    r"(current|get_current|has|inet)_\w+|pg_(?!typeof$|size_pretty$)\w+|(session_)?user|version|ago"
    r"|txid_current|getvariable|getenv|get_block_size|in_search_path|currval|nextval|write_log"
)


def checked_condition(connection: DuckDBPyConnection, condition: str, *, view: str) -> str:
    """Checks that a text is a single SQL condition that is a function of one row.

    Returns:
        The condition, in which a NaN that a comparison computes counts as NULL.

    Args:
        connection: database that contains the view.
        condition: SQL expression, such as "height >= 256 and language = 'en'".
        view: view whose columns the condition may use.

    Raises:
        InputError: if the text is not a condition, or uses a refused feature. For an unknown
            column, the message suggests the nearest names.
    """
    import duckdb

    what = f"where: {condition!r}"
    with duckdb_errors(f"{what}: expected one SQL condition, such as height >= 256"):
        expression = duckdb.SQLExpression(condition)
    tree = _syntax_tree(connection, condition, what)
    nodes = list(_nodes(tree))
    samples = connection.view(view)
    _check_names(nodes, [view, *samples.columns], what)
    _check_nodes(connection, nodes, what)
    with duckdb_errors(what):
        types = [str(each) for each in samples.select(expression).types]
    if types != ["BOOLEAN"]:
        raise InputError(
            f"{what}: expected a condition, which is true or false; found {', '.join(types)}"
        )
    names = {name.lower() for name in samples.columns} - _lambda_parameters(nodes)
    columns = names | {f"{view}.{name}" for name in names}
    return condition_without_nan(connection, tree, condition, columns=columns)


def _syntax_tree(connection: DuckDBPyConnection, condition: str, what: str) -> dict[str, Any]:
    """Parses the condition with DuckDB; the newline ends a comment in the condition."""
    query = f"SELECT ({condition}\n)"
    text = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchone()[0]
    tree = json.loads(text)
    if tree["error"]:
        raise InputError(f"{what}: expected one SQL condition: {tree['error_message']}")
    return tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for part in parts:
        yield from _nodes(part)


def _names(nodes: Iterable[dict[str, Any]]) -> list[str]:
    """Returns the first parts of column references, which include current_date and user."""
    return [node["column_names"][0] for node in nodes if node.get("class") == "COLUMN_REF"]


def _lambda_parameters(nodes: list[dict[str, Any]]) -> set[str]:
    lambdas = [node for node in nodes if node.get("class") == "LAMBDA"]
    return {name.lower() for node in lambdas for name in _names(_nodes(node["lhs"]))}


def _check_names(nodes: list[dict[str, Any]], columns: Sequence[str], what: str) -> None:
    known = {name.lower() for name in columns} | _lambda_parameters(nodes)
    for name in _names(nodes):
        if name.lower() not in known:
            raise InputError(f"{what}: {unknown_column_message(name, columns[1:])}")


def _check_nodes(connection: DuckDBPyConnection, nodes: list[dict[str, Any]], what: str) -> None:
    changing = connection.execute(
        "SELECT DISTINCT function_name FROM duckdb_functions() "
        "WHERE stability IN ('VOLATILE', 'CONSISTENT_WITHIN_QUERY')"
    ).fetchall()
    changing_functions = {name for (name,) in changing}
    for node in nodes:
        if node.get("class") in REFUSED_CLASSES:
            raise InputError(
                f"{what}: expected a condition on the columns of one sample, found "
                f"{REFUSED_CLASSES[node['class']]}"
            )
        name = str(node.get("function_name", "")).lower()
        if name == "unnest":
            raise InputError(
                f"{what}: expected one value per sample, found unnest(), which returns several; "
                "use, for example, list_contains or list_any_value"
            )
        if name in changing_functions:
            raise InputError(
                f"{what}: {name}() returns a different value in every run, but a subset must be "
                "reproducible; for a random fraction use, for example, md5_number(uid) % 10 = 0"
            )
        if name == "age" and len(node.get("arguments", node.get("children", ()))) == 1:
            raise InputError(
                f"{what}: age() with one argument depends on today's date, but a subset must be "
                "reproducible; use age(TIMESTAMP '2026-01-01', ...)"
            )
        if SESSION_FUNCTIONS.fullmatch(name):
            raise InputError(
                f"{what}: {name}() depends on the time or the session, but a subset must be "
                "reproducible: use columns and constants"
            )
