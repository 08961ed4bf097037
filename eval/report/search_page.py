"""The web page of eval.search, which finds samples by text, image, sound or vector.

The server listens on this machine only, unless the config sets another host.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.command import say
from data_prep.errors import InputError
from data_prep.shards.sample import CorruptSampleError
from eval.datasets.views import modalities_of
from eval.report.search_engine import SearchEngine

if TYPE_CHECKING:
    from flask import Flask

MAX_UPLOAD_BYTES = 1 << 26
PAGE = Path(__file__).parent / "templates" / "search.html"


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
        indexes = list(engine.indexes.values())
        return jsonify(
            items=sum(len(each.items.owners) for each in indexes),
            views={each.view: len(each.items.owners) for each in indexes},
            folder=str(engine.dataset.folder),
            model=str(engine.encoder.origin.folder),
            accepts=engine.encoder.kinds,
        )

    _add_searches(app, engine)
    _add_items(app, engine)
    return app


def _add_searches(app: Flask, engine: SearchEngine) -> None:
    from flask import abort, jsonify, request

    @app.get("/search")
    def search() -> Any:
        text = request.args.get("text", "").strip()
        if not text:
            return jsonify([])
        try:
            return jsonify(engine.by_text(text, modality=request.args.get("modality") or None))
        except InputError as error:
            return jsonify(error=str(error)), 422

    @app.post("/search")
    def search_file() -> Any:
        file = request.files.get("file")
        if file is None or not file.filename:
            abort(400, "expected a file")
        modality = request.form.get("modality") or None
        try:
            return jsonify(engine.by_file(file.read(), file.filename, modality=modality))
        except InputError as error:
            return jsonify(error=str(error)), 422


def _add_items(app: Flask, engine: SearchEngine) -> None:
    from flask import abort, jsonify, request, send_file

    views, members = list(engine.indexes), modalities_of(engine.dataset)

    def chosen(name: str, known: list[str], default: str) -> str:
        value = request.args.get(name) or default
        if value not in known:
            abort(404, f"expected {name} {', '.join(known)}; found {value}")
        return value

    @app.get("/like/<int:item>")
    def like(item: int) -> Any:
        view = chosen("view", views, views[0])
        num_items = len(engine.indexes[view].items.owners)
        if item >= num_items:
            abort(404, f"expected an item below {num_items}, found {item}")
        return jsonify(engine.like(view, item))

    @app.get("/media/<int:ordinal>")
    def media(ordinal: int) -> Any:
        member = chosen("member", list(members), engine.indexes[views[0]].member)
        if ordinal >= engine.num_samples:
            abort(404, f"expected a sample below {engine.num_samples}, found {ordinal}")
        try:
            content, kind = engine.content(ordinal, member)
        except CorruptSampleError as error:
            return str(error), 500
        return send_file(io.BytesIO(content), mimetype=kind)


def serve(engine: SearchEngine, *, host: str, port: int) -> None:
    """Serves the page until interrupted."""
    torch.set_grad_enabled(False)
    say(f"http://{host}:{port}  (press Ctrl-C to stop)")
    build_app(engine).run(host=host, port=port, threaded=True)
