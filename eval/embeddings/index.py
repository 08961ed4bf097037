"""An index of embeddings that finds the nearest ones: exact for as many as are quickly compared
with each, else a graph of neighbours (HNSW, Malkov and Yashunin 2016), both by faiss."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError

NEIGHBOURS = 32  # of each item in the graph
SEARCH_WIDTH = 256  # items of the graph that are looked at; more find more
BUILD_WIDTH = 200


def open_index(folder: Path, embeddings: np.ndarray, *, origin: str, exact_up_to: int) -> Any:
    """The faiss index of embeddings, from the folder if it was built there, else built and kept.

    Args:
        folder: for index.faiss and index.origin.
        embeddings: float32 [Q, D], L2-normalised.
        origin: what they are of; an index of others is built anew.
        exact_up_to: items; of more, nearly all that are nearest are found.

    Raises:
        InputError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise InputError(
            "faiss is not installed: pip install 'isopair[search]' (eval.search needs it)"
        ) from None
    is_exact = len(embeddings) <= exact_up_to
    mark, path = folder / "index.origin", folder / "index.faiss"
    wanted = f"{origin} {'exact' if is_exact else 'graph'}"
    if path.exists() and mark.exists() and mark.read_text() == wanted:
        return faiss.read_index(str(path))
    if is_exact:
        index = faiss.IndexFlatIP(embeddings.shape[1])
    else:
        index = faiss.IndexHNSWFlat(embeddings.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = BUILD_WIDTH, SEARCH_WIDTH
    index.add(np.ascontiguousarray(embeddings))
    mark.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    faiss.write_index(index, str(partial))
    partial.replace(path)
    mark.write_text(wanted)  # last: an index without it is unfinished
    return index
