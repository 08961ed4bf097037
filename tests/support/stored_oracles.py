"""Stored results of ranx for a matrix of scores, librosa for a sound, pycocoevalcap for captions.

The tests do not install these packages. To compute the results again:

    python3.11 -m venv oracle
    oracle/bin/pip install ranx librosa "numpy<2.3"
    oracle/bin/pip install --no-deps pycocoevalcap
    oracle/bin/python -m tests.support.stored_oracles > tests/support/stored_oracles.json
"""

import json

import numpy as np

RATE_HZ = 48_000
KS = (1, 5, 10)


def scores_and_right():
    """Draws scores, float32 [40, 200] without ties, and relevance, bool [40, 200].

    Each row has one to six relevant candidates, and every fifth 25 more.
    """
    generator = np.random.default_rng(0)
    right = np.zeros((40, 200), dtype=bool)
    for row in range(40):
        right[row, generator.choice(200, 1 + row % 6 + 25 * (row % 5 == 0), replace=False)] = True
    scores = generator.standard_normal((40, 200)) + 1.5 * right
    return scores.astype(np.float32), right


def chirp():
    """Synthesizes a rising tone with noise of a fifth of a second: float32 [9600]."""
    time = np.arange(9600) / RATE_HZ
    noise = np.random.default_rng(0).standard_normal(9600)
    return (0.5 * np.sin(2 * np.pi * (200 + 20_000 * time) * time) + 0.01 * noise).astype(
        np.float32
    )


def captions_and_references():
    """Draws 12 captions and one to five references of each, of few words, so that many match."""
    generator = np.random.default_rng(0)
    words = ["a", "red", "dog", "on", "the", "grass", "runs", "and", "jumps"]

    def draw(shortest, longest):
        count = generator.integers(shortest, longest)
        return " ".join(words[each] for each in generator.integers(len(words), size=count))

    references = [[draw(1, 14) for _ in range(1 + number % 5)] for number in range(12)]
    captions = [draw(0, 14) for _ in references]
    captions[3] = references[3][0]
    captions[7] = references[7][1] + " never seen"
    captions[8] = "grass"
    return captions, references


def pycocoevalcap_cider():
    """Computes CIDEr-D of every item."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for caption, own in zip(*captions_and_references(), strict=True):
        scorer += (caption, own)
    return scorer.compute_score()[1].tolist()


def ranx_metrics():
    from ranx import Qrels, Run, evaluate

    scores, right = scores_and_right()
    queries = [str(n) for n in range(len(scores))]
    qrels = Qrels(
        {q: {str(d): 1 for d in np.flatnonzero(r)} for q, r in zip(queries, right, strict=True)}
    )
    run = Run(
        {
            q: {str(d): float(s) for d, s in enumerate(row)}
            for q, row in zip(queries, scores, strict=True)
        }
    )
    names = ["map", "map@10", "mrr", "ndcg@10"]
    names += [f"{name}@{k}" for name in ("hit_rate", "recall") for k in KS]
    return {name: float(value) for name, value in evaluate(qrels, run, names).items()}


def librosa_decibels():
    """Computes mel scale -> [frames][64] decibels, the input of CLAP's towers."""
    import librosa

    power = np.abs(librosa.stft(chirp(), n_fft=1024, hop_length=480, pad_mode="reflect")) ** 2
    found = {}
    for scale, options in (("htk", {"htk": True, "norm": None}), ("slaney", {})):
        bank = librosa.filters.mel(
            sr=RATE_HZ, n_fft=1024, n_mels=64, fmin=50, fmax=14_000, **options
        )
        decibels = 10 * np.log10(np.maximum(bank @ power, 1e-10))
        found[scale] = decibels.T.round(5).tolist()
    return found


if __name__ == "__main__":
    found = {"ranx": ranx_metrics(), "librosa": librosa_decibels(), "cider": pycocoevalcap_cider()}
    print(json.dumps(found, indent=None))
