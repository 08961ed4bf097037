"""Config values that locate a dataset and name the columns of a table of media files."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from data_prep.config_file import MAY_BE_URL, Section

# Path or URL of Isopair shards, tars (see eval.datasets.tar_dataset), one folder per class, or a
# table (.csv, .tsv or .jsonl; see eval.datasets.file_dataset)
DatasetLocation = Annotated[str, BeforeValidator(str), MAY_BE_URL]


class TableColumns(Section):
    """Names of the columns of a table of media files."""

    # Path of the file relative to the table; columns in braces, such as "audio/{filename}"
    media: str = "{file}"
    key: str | None = None  # rows with the same key are one sample; null: rows with the same file
    captions: list[str] = ["caption"]  # several columns, several rows of one file, or both
    class_name: str = "class_name"
    class_names: str = "class_names"  # several classes in one cell
    class_separator: str = ","  # between the classes of a cell
