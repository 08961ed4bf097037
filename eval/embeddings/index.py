"""Nearest-neighbour index of embeddings, built with faiss.

Small sets are searched exactly, large ones approximately with a neighbour graph (HNSW, Malkov and
Yashunin 2016).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError

NEIGHBOURS = 32  # neighbours of each item in the graph
SEARCH_WIDTH = 256  # candidates kept during a search; a higher value raises recall and time
BUILD_WIDTH = 200  # candidates kept while building the graph


def open_index(folder: Path, embeddings: np.ndarray, *, origin: str, exact_up_to: int) -> Any:
    """Loads the faiss index from a folder, or builds and saves it.

    Args:
        folder: folder that holds index.faiss and index.origin.
        embeddings: float32 [Q, D], L2-normalised.
        origin: identifies the embeddings; an index of a different origin is rebuilt.
        exact_up_to: largest number of items to search exactly. Above it, a search finds nearly
            all of the nearest items.

    Raises:
        InputError: if faiss is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise InputError(
            "faiss is not installed: pip install 'isopair[search]' (eval.search needs it)"
        ) from None
    is_exact = len(embeddings) <= exact_up_to
    origin_path, path = folder / "index.origin", folder / "index.faiss"
    wanted = f"{origin} {'exact' if is_exact else 'graph'}"
    if path.exists() and origin_path.exists() and origin_path.read_text() == wanted:
        return faiss.read_index(str(path))
    if is_exact:
        index = faiss.IndexFlatIP(embeddings.shape[1])
    else:
        index = faiss.IndexHNSWFlat(embeddings.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = BUILD_WIDTH, SEARCH_WIDTH
    index.add(np.ascontiguousarray(embeddings))
    origin_path.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    faiss.write_index(index, str(partial))
    partial.replace(path)
    origin_path.write_text(wanted)  # written last: an index without it is incomplete
    return index
