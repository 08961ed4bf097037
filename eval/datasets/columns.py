"""Config values that locate a dataset, name its views, and describe a table of media files."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from data_prep.config import Separator
from data_prep.config_file import MAY_BE_URL, Section
from pretrain.settings.views import View, ViewName

# Path or URL of Isopair shards, tars (see eval.datasets.tar_dataset), one folder per class, or a
# table (.csv, .tsv or .jsonl; see eval.datasets.table)
DatasetLocation = Annotated[str, BeforeValidator(str), MAY_BE_URL]


def _check_has_no_augmentation(name: str) -> str:
    view = View.parse(name)
    if view.augmentation != 1:
        plain = str(View(view.modality, view.member))
        raise ValueError(f"{name!r}: evaluation augments nothing; write {plain!r}")
    return name


# A modality of the model, such as image, or {text: title}: another text of the dataset, encoded as
# the modality `text`
EvaluatedView = Annotated[ViewName, AfterValidator(_check_has_no_augmentation)]


class TableColumns(Section):
    """Names of the columns of a table of media files, and how its fields are separated."""

    # Path of the file relative to the table, with columns in braces, such as "audio/{filename}"
    media: str = "{file}"
    key: str | None = None  # rows with the same key form one sample; null: rows with the same file
    # Captions may be spread over several columns, several rows of one file, or both
    captions: list[str] = ["caption"]
    class_name: str = "class_name"
    class_names: str = "class_names"  # column that holds all classes of a file
    class_separator: str = ","  # between the classes of a cell
    # whether fields may be quoted; null: yes in .csv, detected in .tsv
    quotes: bool | None = None
    # one character between the columns of .csv and .tsv; null: detected from the header
    separator: Separator | None = None
