"""The samples of a dataset as a DuckDB view over its Parquet files, scores and embeddings.

Each row of the view `samples` is a sample. It has the columns of the shards' Parquet files and of
joined scores, and isopair_ordinal, the ordinal of the sample. If embeddings are joined, it also has
a column clip_score. NaN is read as NULL. The time zone is UTC. No sample is kept in memory: DuckDB
reads the files for each query.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import InputError
from data_prep.selection.missing_values import holds_floats, without_nan
from data_prep.selection.scores import check_types_of_scores, local_copies
from data_prep.shards.embeddings import CAPTION_EMBEDDINGS, MEDIA_EMBEDDING, check_embeddings
from data_prep.shards.manifest import read_dataset_files
from data_prep.shards.parquet import check_parquet_sum

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ORDINAL = "isopair_ordinal"
CLIP_SCORE = "clip_score"
FOREIGN_ADVICE = (
    "if another program wrote it, put the original back; if that is lost, move the file out of the "
    "folder and rebuild it with python -m data_prep.verify_shards and repair=true: its rows are "
    "measured again, but source, language, marks and kept columns are lost"
)


@contextmanager
def open_duckdb(*, memory_gb: float, workers: int) -> Iterator[DuckDBPyConnection]:
    """Opens a database with a memory limit, which spills to a temporary folder on disk (TMPDIR)."""
    import duckdb

    with tempfile.TemporaryDirectory(prefix="isopair-") as folder:
        settings = {
            "memory_limit": f"{memory_gb}GB",
            "threads": workers,
            "temp_directory": folder,
            # It concludes from the minimum and maximum in a Parquet file that there is no NaN.
            "disabled_optimizers": "statistics_propagation",
        }
        with duckdb.connect(config=settings) as connection:
            connection.execute("SET TimeZone = 'UTC'")  # otherwise that of the machine
            yield connection


@contextmanager
def duckdb_errors(what: str) -> Iterator[None]:
    """Converts errors of DuckDB to InputErrors whose message begins with `what`."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise InputError(f"{what}: raise memory_gb; {_first_line(error)}") from None
    except duckdb.Error as error:
        raise InputError(f"{what}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def text_literal(text: object) -> str:
    """Returns a string as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def name_literal(name: str) -> str:
    """Returns the name of a column as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def files_literal(files: Sequence[Path]) -> str:
    """Formats a list of files for SQL."""
    return "[" + ", ".join(text_literal(path) for path in files) + "]"


def unknown_column_message(name: str, columns: Sequence[str]) -> str:
    """Builds the error message for an unknown column, with the nearest column names or all."""
    nearest = difflib.get_close_matches(name.lower(), columns, n=3, cutoff=0.6)
    if nearest:
        return f"there is no column {name!r}; did you mean {' or '.join(map(repr, nearest))}?"
    return f"there is no column {name!r}; columns: {', '.join(columns)}"


class SampleTable:
    """Builds the view `samples` of a dataset in a database.

    Args:
        connection: database to create the view in.
        dataset: dataset folder.

    Raises:
        InputError: if the dataset or a Parquet file is missing or damaged, or the number of rows is
            wrong.
    """

    def __init__(self, connection: DuckDBPyConnection, dataset: Path) -> None:
        self.connection = connection
        self.dataset = dataset
        self.info, self.manifest = read_dataset_files(dataset)
        self.notes: list[str] = []  # descriptions of the joined files
        self.files: list[Path] = []  # all files that the view reads
        if not self.manifest:
            raise InputError(f"{dataset}: expected samples, found an empty dataset")
        files = self._files_of_shards(dataset)
        self._check_row_counts(files)
        for path, row in zip(files, self.manifest, strict=True):
            check_parquet_sum(path, row)
        self._write_shards_table(files)
        self._check_types(files)
        replaced = self._columns_without_nan(f"FROM read_parquet({files_literal(files[:1])})")
        connection.execute(
            "CREATE VIEW sidecars AS SELECT p.* EXCLUDE (isopair_file, file_row_number) "
            f"{replaced}, start + file_row_number AS {ORDINAL}, shard AS isopair_shard FROM "
            f"read_parquet({files_literal(files)}, filename = 'isopair_file', "
            "file_row_number = true) p JOIN shards USING (isopair_file)"
        )
        self._columns = ["sidecars.* EXCLUDE (isopair_shard)"]
        self._joins: list[str] = []
        self._make_view()

    def _files_of_shards(self, folder: Path) -> list[Path]:
        files = [(folder / f"{row.name}.parquet").absolute() for row in self.manifest]
        for path in files:
            if not path.exists():
                raise InputError(
                    f"{path}: expected the columns of a shard, found no such file; create it with "
                    "python -m data_prep.make_shards or index_shards"
                )
        self.files += files
        return files

    def _check_row_counts(self, files: Sequence[Path]) -> None:
        with duckdb_errors(str(self.dataset)):
            found = dict(
                self.connection.execute(
                    f"SELECT file_name, num_rows FROM parquet_file_metadata({files_literal(files)})"
                ).fetchall()
            )
        for path, row in zip(files, self.manifest, strict=True):
            if found[str(path)] != row.num_samples:
                raise InputError(
                    f"{path}: expected {row.num_samples} rows (manifest.jsonl), found "
                    f"{found[str(path)]}; {FOREIGN_ADVICE}"
                )

    def _write_shards_table(self, files: Sequence[Path]) -> None:
        import pyarrow

        sizes = np.array([row.num_samples for row in self.manifest], dtype=np.int64)
        columns = {
            "isopair_file": [str(path) for path in files],
            "shard": [row.name for row in self.manifest],
            "start": np.cumsum(sizes) - sizes,
        }
        self.connection.register("shard_columns", pyarrow.table(columns))
        self.connection.execute("CREATE TABLE shards AS FROM shard_columns")
        self.connection.unregister("shard_columns")

    def _check_types(self, files: Sequence[Path]) -> None:
        """Checks that all Parquet files have the columns of the first: DuckDB takes its types."""
        with duckdb_errors(str(self.dataset)):
            rows = self.connection.execute(
                "SELECT min(file_name), columns FROM (SELECT file_name, "
                "list_sort(list((name, type, converted_type, logical_type))) AS columns "
                f"FROM parquet_schema({files_literal(files)}) GROUP BY file_name) "
                "GROUP BY columns ORDER BY min(file_name)"
            ).fetchall()
        if len(rows) > 1:
            first, other = ({tuple(map(str, each)) for each in columns} for _, columns in rows[:2])
            different = sorted({name for name, *_ in first ^ other})
            raise InputError(
                f"{rows[1][0]}: expected the columns and types of {rows[0][0]}, found differences "
                f"in {', '.join(different)}; {FOREIGN_ADVICE}"
            )

    def _columns_without_nan(self, source: str) -> str:
        """Returns REPLACE (...) for the columns of a query that may hold NaN."""
        found = self.connection.sql(source)
        replaced = [
            f"{without_nan(name_literal(name), str(kind))} AS {name_literal(name)}"
            for name, kind in zip(found.columns, found.types, strict=True)
            if holds_floats(str(kind))
        ]
        return f"REPLACE ({', '.join(replaced)})" if replaced else ""

    def _make_view(self) -> None:
        self.connection.execute(
            f"CREATE OR REPLACE VIEW samples AS SELECT {', '.join(self._columns)} "
            f"FROM sidecars {' '.join(self._joins)}"
        )

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the view `samples`: name -> DuckDB type."""
        view = self.connection.view("samples")
        return dict(zip(view.columns, map(str, view.types), strict=True))

    def _number(self, query: str) -> int:
        return self.connection.execute(query).fetchone()[0]

    # ----------------------------------------------------------------------------------- scores

    def join_scores(self, pattern: str, *, number: int, downloads: Path) -> None:
        """Joins the columns of a user's Parquet files by uid; NULL for samples without a row.

        Args:
            pattern: path, URL or glob pattern of the files.
            number: unique index of this call.
            downloads: folder for copies of remote files; required while the database is open.

        Raises:
            InputError: if there is no file or no column uid, or a uid is duplicate. Also if a
                column already exists, has different kinds of values in the files, or no uid
                belongs to the dataset.
        """
        files = local_copies(pattern, downloads=downloads / f"scores_{number}")
        self.files += files
        view = f"scores_{number}"
        with duckdb_errors(f"scores: {pattern}"):
            check_types_of_scores(self.connection, files, pattern)
            source = f"FROM read_parquet({files_literal(files)}, union_by_name = true)"
            names = self.connection.sql(source).columns
            self._check_names_of_scores(pattern, names)
            replaced = self._columns_without_nan(source)
            self.connection.execute(
                f"CREATE VIEW {view} AS SELECT * REPLACE (CAST(uid AS VARCHAR) AS uid) "
                f"FROM (SELECT * {replaced} {source})"
            )
            self._check_uids(view, pattern)
        self._columns += [f"{view}.{name_literal(name)}" for name in names if name != "uid"]
        self._joins.append(f"LEFT JOIN {view} ON {view}.uid = sidecars.uid")
        self._make_view()

    def _check_names_of_scores(self, pattern: str, names: Sequence[str]) -> None:
        if "uid" not in names:
            raise InputError(
                f"scores: {pattern}: expected a column uid, found {', '.join(names)}; rename the "
                "column that holds the uids of the samples"
            )
        known = {name.lower() for name in self.columns} - {"uid"}
        for name in names:
            if name.lower() in known:
                raise InputError(
                    f"scores: {pattern}: duplicate column {name!r}, also in the dataset or in "
                    "other scores; rename it"
                )

    def _check_uids(self, view: str, pattern: str) -> None:
        for table, where in (("sidecars", self.dataset), (view, f"scores: {pattern}")):
            repeated = self.connection.execute(
                f"SELECT uid, count(*) FROM {table} WHERE uid IS NOT NULL "
                "GROUP BY uid HAVING count(*) > 1 ORDER BY uid LIMIT 1"
            ).fetchone()
            if repeated:
                raise InputError(
                    f"{where}: duplicate uid {repeated[0]!r} in {repeated[1]} rows; scores are "
                    "joined by uid, which must be unique"
                )
        rows = self._number(f"SELECT count(*) FROM {view}")
        matched = self._number(f"SELECT count(*) FROM {view} SEMI JOIN sidecars USING (uid)")
        if not matched:
            expected, found = (
                self.connection.execute(f"SELECT min(uid) FROM {table}").fetchone()[0]
                for table in ("sidecars", view)
            )
            raise InputError(
                f"scores: {pattern}: none of {rows} uids is in {self.dataset}; expected uids like "
                f"{expected!r}, found {found!r}"
            )
        without = self.info.num_samples - matched
        self.notes.append(
            f"scores {pattern}: {matched:,} of {rows:,} rows match a sample, {rows - matched:,} "
            f"match none; {without:,} samples have no score"
        )

    # ------------------------------------------------------------------------------- embeddings

    def join_embeddings(self, folder: Path) -> None:
        """Joins clip_score, the cosine between a sample's media and its best caption.

        Args:
            folder: output folder of python -m eval.embed.

        Raises:
            InputError: if the folder is unfinished or belongs to a different dataset, or the
                column clip_score already exists.
        """
        columns = (MEDIA_EMBEDDING, CAPTION_EMBEDDINGS)
        check_embeddings(folder, self.info.fingerprint, columns=columns)
        if CLIP_SCORE in (name.lower() for name in self.columns):
            raise InputError(
                f"embeddings: {folder}: duplicate column {CLIP_SCORE}, also in the dataset"
            )
        files = self._files_of_shards(folder)
        with duckdb_errors(f"embeddings: {folder}"):
            self.connection.execute(
                "CREATE TABLE embedded AS SELECT unnest(?::VARCHAR[]) AS file, "
                "unnest(?::VARCHAR[]) AS shard",
                [list(map(str, files)), [row.name for row in self.manifest]],
            )
            cosines = (
                "list_transform(caption_embeddings, lambda caption: "
                "list_cosine_similarity(caption, media_embedding))"
            )
            score = f"list_max({without_nan(cosines, 'FLOAT[]')})"
            # list_cosine_similarity, because Parquet has no lists of fixed length.
            self.connection.execute(
                f"CREATE VIEW embeddings AS SELECT shard, key, {score} AS {CLIP_SCORE} "
                f"FROM read_parquet({files_literal(files)}, filename = 'file') "
                "JOIN embedded USING (file)"
            )
            rows = self._number("SELECT count(*) FROM embeddings")
        self._columns.append(f"embeddings.{CLIP_SCORE}")
        self._joins.append(
            "LEFT JOIN embeddings ON embeddings.shard = sidecars.isopair_shard "
            "AND embeddings.key = sidecars.key"
        )
        self._make_view()
        self.notes.append(
            f"embeddings {folder}: {rows:,} samples have embeddings, "
            f"{self.info.num_samples - rows:,} have none"
        )
