"""Config values that name a dataset, and the columns of a table of media files."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from data_prep.config_file import Section

# A path or URL of: Isopair shards, tars (see eval.datasets.tar_dataset), one folder per class, or a
# table (.csv, .tsv or .jsonl; see eval.datasets.file_dataset)
DatasetLocation = Annotated[str, BeforeValidator(str)]


class TableColumns(Section):
    """What the columns of a table of media are called."""

    # Of the media's file, beside the table: any columns in braces, such as "audio/{filename}"
    media: str = "{file}"
    key: str | None = None  # rows of one key are one sample; null: rows of one file are
    captions: list[str] = ["caption"]  # several columns, or several rows of one file, or both
    class_name: str = "class_name"
    class_names: str = "class_names"  # several in one cell
    class_separator: str = ","  # between these
