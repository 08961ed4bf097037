"""Nearest-neighbour index of embeddings, built with faiss.

Small sets are searched exactly; large ones through a graph of neighbours (HNSW, Malkov and Yashunin
2016).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError

NEIGHBOURS = 32  # neighbours of each item in the graph
SEARCH_WIDTH = 256  # candidates kept during a search; more raise recall and time
BUILD_WIDTH = 200  # candidates kept while the graph is built


def open_index(folder: Path, embeddings: np.ndarray, *, origin: str, exact_up_to: int) -> Any:
    """Loads the faiss index of a folder, or builds and stores it.

    Args:
        folder: folder of index.faiss and index.origin.
        embeddings: float32 [Q, D], L2-normalised.
        origin: identifies the embeddings; an index of a different origin is rebuilt.
        exact_up_to: largest number of items that are searched exactly. Above it, a search finds
            nearly all of the nearest items.

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
    origin_path.write_text(wanted)  # last: an index without it is unfinished
    return index
