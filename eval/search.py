"""Searches a dataset by text, image or sound, on a web page.

    python -m eval.search configs/eval/search.yaml
    python -m eval.search configs/eval/search.yaml checkpoint=runs/mine dataset=datasets/mine

1. encode the media of the dataset, reusing stored embeddings         eval.embeddings.store
2. build an index of the embeddings, and save it                      eval.embeddings.index
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

from eval.datasets.datasets import EvaluationSet, open_dataset
from eval.datasets.download import fetch_dataset
from eval.models.model_source import find_model


def run(config: SearchConfig) -> None:
    """Builds the index and serves the page."""
    # Imported here because torch and the model libraries load slowly, and a dry run needs neither.
    from eval.datasets.labels import read_texts
    from eval.embeddings.index import open_index
    from eval.embeddings.store import EmbeddingStore
    from eval.models.encoder import load_encoder
    from eval.report.search_page import SearchEngine, serve

    check_output_folder(config.output, key="output")
    fetch_dataset(config.dataset, split=config.split)
    dataset = _open(config)
    encoder = load_encoder(config)
    keys = [sample.key for sample in read_texts(dataset)]
    store = EmbeddingStore(config.output / "embeddings", encoder)
    store.encode_media(dataset, keys)
    embeddings = store.media(dataset, keys).numpy()
    index = open_index(
        config.output,
        embeddings,
        origin=hashlib.sha256(embeddings.tobytes()).hexdigest(),
        exact_up_to=config.exact_up_to,
    )
    if config.serve:
        engine = SearchEngine(dataset, encoder, index, num_results=config.num_results)
        serve(engine, host=config.host, port=config.port)


def _open(config: SearchConfig) -> EvaluationSet:
    return open_dataset(
        config.dataset, split=config.split, subset=config.subset, columns=config.columns
    )


def dry_run(config: SearchConfig) -> None:
    """Checks the model and the dataset, and prints what would be indexed and served."""
    check_output_folder(config.output, key="output")
    find_model(config.checkpoint, architecture=config.open_clip_architecture)
    dataset = _open(config)
    say(
        f"would index {len(dataset):,} {dataset.info.media} items of {dataset.folder}, and serve "
        f"http://{config.host}:{config.port}"
    )


def main() -> int:
    """Runs the command."""
    return run_command(SearchConfig, run=run, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
