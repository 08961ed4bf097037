"""Searches a dataset by text, image, sound or vector, on a web page.

    python -m eval.search configs/eval/search.yaml
    python -m eval.search configs/eval/search.yaml checkpoint=runs/mine dataset=datasets/mine

1. encode the views of the dataset, reusing stored embeddings         eval.embeddings.store
2. build an index of each view's embeddings, and save it              eval.embeddings.index
3. serve the page until Ctrl-C                                        eval.report.search_page

With serve=false the command ends after stage 2. Requires the extra: pip install 'isopair[search]'
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from eval.config import SearchConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(SearchConfig, __doc__)

import hashlib
import sys
from typing import TYPE_CHECKING

from eval.datasets.datasets import EvaluationSet, open_dataset
from eval.datasets.download import fetch_dataset
from eval.datasets.labels import read_texts
from eval.datasets.views import has_any_with, media_view, modalities_of, samples_having
from eval.models.model_source import find_model
from pretrain.settings.views import View

if TYPE_CHECKING:
    from eval.embeddings.store import EmbeddingStore
    from eval.report.search_engine import ViewIndex


def run(config: SearchConfig) -> None:
    """Builds the indexes and serves the page."""
    # Imported here because torch and the model libraries load slowly, and a dry run needs neither.
    from eval.embeddings.store import EmbeddingStore
    from eval.models.encoder import load_encoder
    from eval.report.search_engine import SearchEngine
    from eval.report.search_page import serve

    check_output_folder(config.output, key="output")
    fetch_dataset(config.dataset, split=config.split)
    dataset = _open(config)
    views = _views_of(config, dataset)
    encoder = load_encoder(config)
    if config.views is None:  # those that the model can encode; without any, the first is refused
        known = [view for view in views if View.parse(view).modality in encoder.kinds]
        views = known or views[:1]
    store = EmbeddingStore(config.output / "embeddings", encoder)
    indexes = [_index_view(config, dataset, view, store) for view in views]
    if config.serve:
        engine = SearchEngine(dataset, encoder, indexes, num_results=config.num_results)
        serve(engine, host=config.host, port=config.port)


def _views_of(config: SearchConfig, dataset: EvaluationSet) -> list[str]:
    """Returns the views to index, if the model has towers for them.

    Raises:
        InputError: if the dataset does not have a modality.
    """
    modalities = modalities_of(dataset)
    if config.views is None:
        if modalities.is_pair:
            return [media_view(dataset)]
        return [name for name in modalities if has_any_with(dataset, [name])]
    members = [View.parse(view).member for view in config.views]
    modalities.check_known(members, where=str(dataset.folder))
    return list(config.views)


def _index_view(
    config: SearchConfig, dataset: EvaluationSet, view: str, store: EmbeddingStore
) -> ViewIndex:
    """Encodes the items of a view, and builds or loads their index."""
    from eval.embeddings.index import open_index
    from eval.embeddings.items import read_items
    from eval.report.search_engine import ViewIndex

    having = samples_having(dataset, [view])
    items = read_items(having, [sample.key for sample in read_texts(having)], view)
    items.check(store.encoder)
    items.encode(store)
    embeddings = items.embeddings(store).numpy()
    folder = config.output / "indexes" / view
    folder.mkdir(parents=True, exist_ok=True)
    index = open_index(
        folder,
        embeddings,
        origin=hashlib.sha256(embeddings.tobytes()).hexdigest(),
        exact_up_to=config.exact_up_to,
    )
    return ViewIndex(items, index)


def _open(config: SearchConfig) -> EvaluationSet:
    return open_dataset(
        config.dataset, split=config.split, subset=config.subset, columns=config.columns
    )


def dry_run(config: SearchConfig) -> None:
    """Checks the model and the dataset, and prints what would be indexed and served."""
    check_output_folder(config.output, key="output")
    find_model(
        config.checkpoint, architecture=config.open_clip_architecture, weights=config.weights
    )
    dataset = _open(config)
    say(
        f"would index {len(dataset):,} {', '.join(_views_of(config, dataset))} items of "
        f"{dataset.folder}, and serve "
        f"http://{config.host}:{config.port}"
    )


def main() -> int:
    """Runs the command."""
    return run_command(SearchConfig, run=run, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
