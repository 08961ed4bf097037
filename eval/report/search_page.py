"""The web page of eval.search, which finds media items by text, image or sound.

The server listens on this machine only, unless the config sets another host.
"""

from __future__ import annotations

import io
import mimetypes
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_prep.command import say
from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.shards.sample import (
    CorruptSampleError,
    media_extension_of,
    media_kind_of,
)
from eval.datasets.datasets import EvaluationSet
from eval.datasets.labels import texts_of
from eval.models.encoder import Encoder

if TYPE_CHECKING:
    from flask import Flask

MAX_UPLOAD_BYTES = 1 << 26
PAGE = Path(__file__).parent / "templates" / "search.html"


class SearchEngine:
    """Nearest-neighbour search in a dataset, with its index and the model that built it.

    Args:
        dataset: Q media items.
        encoder: encoder that computed the indexed embeddings.
        index: faiss index of the items, in dataset order.
        num_results: number of results per search.
    """

    def __init__(
        self, dataset: EvaluationSet, encoder: Encoder, index: Any, *, num_results: int
    ) -> None:
        self.dataset = dataset
        self.encoder = encoder
        self.index = index
        self.num_results = min(num_results, len(dataset))
        self._turn = Lock()  # one request is encoded at a time

    def by_text(self, text: str) -> list[dict[str, Any]]:
        """Finds the items nearest to a text."""
        with self._turn:
            query = self.encoder.encode_texts([text])
        return self._nearest(query.numpy())

    def by_media(self, content: bytes, name: str) -> list[dict[str, Any]]:
        """Finds the items nearest to an image or a sound.

        Args:
            content: bytes of the file.
            name: name of the file; its extension selects the decoder.

        Raises:
            InputError: if the file cannot be decoded, or the model has no tower for it.
        """
        extension = PurePosixPath(name).suffix[1:].lower()
        kind = media_kind_of(extension)
        if kind not in self.encoder.front_ends:
            known = " and ".join(sorted(self.encoder.front_ends))
            raise InputError(f"{name}: expected {known}, found .{extension}")
        try:
            windows = self.encoder.front_ends[kind].prepare_file(content, extension)
        except MediaError as error:
            raise InputError(f"{name}: cannot be decoded: {error}") from None
        with self._turn:
            query = self.encoder.encode_items(kind, windows, [len(windows)])
        return self._nearest(query.numpy())

    def like(self, ordinal: int) -> list[dict[str, Any]]:
        """Finds the items nearest to an item of the dataset; the item itself comes first."""
        return self._nearest(self.index.reconstruct(ordinal)[None])

    def media(self, ordinal: int) -> tuple[bytes, str]:
        """Reads (content, MIME type) of an item."""
        sample = self.dataset.read_sample(ordinal)
        extension = media_extension_of(sample.members, self.dataset.info.media)
        kind = mimetypes.types_map.get(f".{extension}", f"{self.dataset.info.media}/{extension}")
        return sample.members[extension], kind

    def _nearest(self, query: np.ndarray) -> list[dict[str, Any]]:
        scores, ordinals = self.index.search(query, self.num_results)
        return [
            self._described(ordinal, score)
            for ordinal, score in zip(ordinals[0].tolist(), scores[0].tolist(), strict=True)
            if ordinal >= 0  # an approximate index may find fewer
        ]

    def _described(self, ordinal: int, score: float) -> dict[str, Any]:
        sample = self.dataset.read_sample(ordinal, fields=("json", "txt"))
        try:
            captions = texts_of(sample, self.dataset)
        except InputError:  # a classification set has no captions
            captions = []
        return {
            "ordinal": ordinal,
            "key": sample.key,
            "score": score,
            "captions": captions,
            "kind": self.dataset.info.media,
        }


def build_app(engine: SearchEngine) -> Any:
    """Builds the Flask application.

    Raises:
        InputError: if Flask is not installed.
    """
    try:
        from flask import Flask, jsonify, send_file
    except ImportError:
        raise InputError(
            "flask is not installed: pip install 'isopair[search]' (eval.search needs it)"
        ) from None
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MAX_UPLOAD_BYTES

    @app.get("/")
    def page() -> Any:
        return send_file(PAGE)

    @app.get("/about")
    def about() -> Any:
        return jsonify(
            items=len(engine.dataset),
            kind=engine.dataset.info.media,
            folder=str(engine.dataset.folder),
            model=str(engine.encoder.origin.folder),
            accepts=sorted(engine.encoder.front_ends),
        )

    _add_searches(app, engine)
    _add_items(app, engine)
    return app


def _add_searches(app: Flask, engine: SearchEngine) -> None:
    from flask import abort, jsonify, request

    @app.get("/search")
    def search() -> Any:
        text = request.args.get("text", "").strip()
        return jsonify(engine.by_text(text) if text else [])

    @app.post("/search")
    def search_media() -> Any:
        file = request.files.get("file")
        if file is None or not file.filename:
            abort(400, "expected a file")
        try:
            return jsonify(engine.by_media(file.read(), file.filename))
        except InputError as error:
            return jsonify(error=str(error)), 422


def _add_items(app: Flask, engine: SearchEngine) -> None:
    from flask import abort, jsonify, send_file

    def checked(ordinal: int) -> int:
        if ordinal >= len(engine.dataset):
            abort(404, f"expected an item below {len(engine.dataset)}, found {ordinal}")
        return ordinal

    @app.get("/like/<int:ordinal>")
    def like(ordinal: int) -> Any:
        return jsonify(engine.like(checked(ordinal)))

    @app.get("/media/<int:ordinal>")
    def media(ordinal: int) -> Any:
        try:
            content, kind = engine.media(checked(ordinal))
        except CorruptSampleError as error:
            return str(error), 500
        return send_file(io.BytesIO(content), mimetype=kind)


def serve(engine: SearchEngine, *, host: str, port: int) -> None:
    """Serves the page until interrupted."""
    torch.set_grad_enabled(False)
    say(f"http://{host}:{port}  (press Ctrl-C to stop)")
    build_app(engine).run(host=host, port=port, threaded=True)
