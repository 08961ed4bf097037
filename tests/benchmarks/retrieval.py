"""Time and memory of retrieval metrics on a COCO-sized set and against a million captions.

    python -m tests.benchmarks.retrieval

clip_benchmark's code runs on the same COCO-sized set if it is installed (pip install --no-deps
clip-benchmark==1.6.2); it takes minutes. Each measurement has its own process; memory excludes the
embeddings.
"""

import importlib.util
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

WIDTH = 512
COCO = (5000, 5)  # media items, captions per item
MILLION = 1_000_000
NUM_QUERIES = 1000


def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def coco_embeddings():
    num_media, captions_per_media = COCO
    generator = torch.Generator().manual_seed(0)
    media = torch.randn(num_media, WIDTH, generator=generator)
    owners = torch.arange(num_media).repeat_interleave(captions_per_media)
    texts = media[owners] + 6 * torch.randn(len(owners), WIDTH, generator=generator)
    return normalize(media, dim=-1), normalize(texts, dim=-1), owners


def ours():
    from eval.metrics.relevance import relevance_of_owners
    from eval.metrics.retrieval import retrieval_relevance

    media, texts, owners = coco_embeddings()
    before, start = peak_bytes(), time.perf_counter()
    metrics = {}
    both = retrieval_relevance(media, texts, relevance=relevance_of_owners(owners.numpy()))
    for name, ranked in zip(("image to text", "text to image"), both, strict=True):
        for k in (1, 5, 10):
            metrics[f"{name} @{k}"] = float(ranked.query_ranks().hits_at(k).mean())
        ranked.average_precision()
        ranked.ndcg_at(10)
        ranked.reciprocal_rank()
    return time.perf_counter() - start, peak_bytes() - before, metrics


def clip_benchmark():
    """Runs the code of its evaluate() from the scores on."""
    from clip_benchmark.metrics import zeroshot_retrieval as metrics

    media, texts, owners = coco_embeddings()
    before, start = peak_bytes(), time.perf_counter()
    scores = texts @ media.T
    is_right = torch.zeros_like(scores, dtype=bool)
    is_right[torch.arange(len(owners)), owners] = True
    recalls = {}
    for k in (1, 5, 10):
        for name, (s, p) in {
            "image to text": (scores.T, is_right.T),
            "text to image": (scores, is_right),
        }.items():
            found = metrics.batchify(metrics.recall_at_k, s, p, 64, "cpu", k=k)
            recalls[f"{name} @{k}"] = float((found > 0).float().mean())
    return time.perf_counter() - start, peak_bytes() - before, recalls


def against_a_million():
    from eval.metrics.relevance import relevance_of_owners
    from eval.metrics.retrieval import retrieval_relevance

    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.f32"
        captions = np.memmap(path, np.float32, "w+", shape=(MILLION, WIDTH))
        for start in range(0, MILLION, 10_000):
            rows = torch.randn(10_000, WIDTH, generator=generator)
            captions[start : start + 10_000] = normalize(rows, dim=-1).numpy()
        captions.flush()
        on_disk = torch.from_numpy(np.memmap(path, np.float32, "c", shape=(MILLION, WIDTH)))
        media = normalize(torch.randn(NUM_QUERIES, WIDTH, generator=generator), dim=-1)
        start = time.perf_counter()
        retrieval_relevance(
            media,
            media + 0.1,
            relevance=relevance_of_owners(np.arange(NUM_QUERIES)),
            distractor_embeddings=on_disk,
        )
        seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return seconds, 1024 * int(anonymous.split()[1])


def in_own_process(function):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def main():
    seconds, memory, metrics = in_own_process(ours)
    print(f"COCO-sized, 5,000 x 25,000 x {WIDTH}: ours {seconds:.1f} s, {memory / 1e9:.2f} GB")
    if importlib.util.find_spec("clip_benchmark"):
        peer_seconds, peer_memory, peer_metrics = in_own_process(clip_benchmark)
        furthest = max(abs(metrics[name] - value) for name, value in peer_metrics.items())
        print(
            f"  clip_benchmark {peer_seconds:.1f} s, {peer_memory / 1e9:.2f} GB: "
            f"{peer_seconds / seconds:.1f} times as long; recalls differ by {furthest:.1e}"
        )
    seconds, memory = in_own_process(against_a_million)
    per_query = seconds / NUM_QUERIES
    print(
        f"{NUM_QUERIES:,} queries against {MILLION:,} captions on disk: {seconds:.1f} s, "
        f"{1000 * per_query:.1f} ms each, {memory / 1e9:.2f} GB in addition to the file; a million "
        f"queries: {per_query * MILLION / 3600:.1f} h"
    )


if __name__ == "__main__":
    main()
