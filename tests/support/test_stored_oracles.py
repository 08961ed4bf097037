"""Metrics compared with ranx and pycocoevalcap, log-mels with librosa (see stored_oracles.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.captions.cider import cider_d
from eval.metrics.ranked_relevance import ranked_relevance
from pretrain.model.log_mel import LogMelSpectrogram
from pretrain.settings.transforms import AudioTransform
from tests.support.stored_oracles import (
    KS,
    RATE_HZ,
    captions_and_references,
    chirp,
    scores_and_right,
)

STORED = json.loads((Path(__file__).parent / "stored_oracles.json").read_text())


def test_ranking_metrics_are_those_of_ranx():
    scores, right = scores_and_right()
    query, candidate = np.nonzero(right)
    wrong = np.where(right, -np.inf, scores)
    above = (wrong[query] > scores[query, candidate][:, None]).sum(axis=1)
    ranked = ranked_relevance(
        query,
        scores[query, candidate],
        num_irrelevant_above=above,
        num_irrelevant_tied=np.zeros_like(above),
        gallery_size=scores.shape[1],
    )
    found = {
        "map": ranked.average_precision(),
        "map@10": ranked.average_precision(10),
        "mrr": ranked.reciprocal_rank(),
        "ndcg@10": ranked.ndcg_at(10),
    }
    found |= {f"hit_rate@{k}": ranked.query_ranks().hits_at(k) for k in KS}
    found |= {f"recall@{k}": ranked.true_recall_at(k) for k in KS}
    means = {name: values.mean() for name, values in found.items()}
    assert means == pytest.approx(STORED["ranx"], abs=1e-6)


@pytest.mark.parametrize(("mel_scale", "mel_norm"), [("htk", None), ("slaney", "slaney")])
def test_decibels_are_those_of_librosa(mel_scale, mel_norm):
    options = {"mean_db": 0, "std_db": 1, "low_hz": 50, "high_hz": 14_000, "num_mel_bins": 64}
    options["hop_samples"] = 480
    config = AudioTransform(
        sample_rate_hz=RATE_HZ, log_mel=options | {"mel_scale": mel_scale, "mel_norm": mel_norm}
    )
    ours = LogMelSpectrogram(config)(torch.from_numpy(chirp())[None])[0, 0].T  # [S, F]
    theirs = torch.tensor(STORED["librosa"][mel_scale])
    assert ours.shape == theirs.shape == (21, 64)
    assert (ours - theirs).abs().max() < 1e-3


def test_cider_is_that_of_pycocoevalcap():
    captions, references = captions_and_references()
    found = cider_d(
        [text.split() for text in captions], [[text.split() for text in own] for own in references]
    )
    np.testing.assert_allclose(found, STORED["cider"], rtol=1e-12, atol=1e-12)
    assert found.min() == 0
    assert found.max() > 1
