import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from eval.metrics.relevance import relevance_of_owners
from eval.metrics.retrieval import recall_at_k, retrieval_relevance, retrieve


def random_pairs(num_media, captions_per_media, *, width=8, num_distractors=0, noise=1.0, seed=0):
    """Draws media [Q, D], captions [M, D], media_of_text [M] and distractors [X, D]."""
    generator = np.random.default_rng(seed)
    media_of_text = np.repeat(np.arange(num_media), captions_per_media)
    media = generator.standard_normal((num_media, width))
    text = media[media_of_text] + noise * generator.standard_normal((len(media_of_text), width))
    distractors = generator.standard_normal((num_distractors, width))
    return (
        *(normalize(torch.tensor(rows).float(), dim=-1) for rows in (media, text)),
        media_of_text,
        normalize(torch.tensor(distractors).float(), dim=-1),
    )


def dense_first_ranks(scores, is_right):
    """Finds the first relevant candidate the slow way, by sorting each row."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.array(
        [np.flatnonzero(right[row])[0] for row, right in zip(order, is_right, strict=True)]
    )


def oracle_ranks(media, text, media_of_text, distractors):
    gallery = np.concatenate([text.numpy(), distractors.numpy()]).astype(np.float64)
    scores = media.numpy().astype(np.float64) @ gallery.T
    owners = np.concatenate([media_of_text, np.full(len(distractors), -1)])
    is_right = owners[None] == np.arange(len(media))[:, None]
    num_captions = len(media_of_text)
    return (
        dense_first_ranks(scores, is_right),
        dense_first_ranks(scores.T[:num_captions], is_right.T[:num_captions]),
    )


@pytest.mark.parametrize(("tile", "num_media"), [(1, 12), (7, 50), (64, 50), (10_000, 50)])
@pytest.mark.parametrize("num_distractors", [0, 23])
def test_tiled_ranks_equal_a_full_sort_for_any_tile_size(tile, num_media, num_distractors):
    captions_per_media = np.random.default_rng(1).integers(1, 7, size=num_media)
    media, text, owners, distractors = random_pairs(
        num_media, captions_per_media, num_distractors=num_distractors
    )
    found = retrieval_relevance(
        media,
        text,
        relevance=relevance_of_owners(owners),
        distractor_embeddings=distractors,
        tile=tile,
    )
    for ranked, expected in zip(found, oracle_ranks(media, text, owners, distractors), strict=True):
        ranks = ranked.query_ranks()
        np.testing.assert_array_equal(ranks.first_ranks() - 1, expected)
        for k in (1, 5, 10):
            np.testing.assert_array_equal(ranks.hits_at(k), expected < k)


def test_near_ties_are_ranked_alike_by_every_tile_size():
    media, text, owners, _ = random_pairs(300, 5, width=64)
    crowded = normalize(media[:1] + 1e-3 * media, dim=-1)
    expected = None
    for tile in (13, 256, 4096):
        found = [
            ranked.query_ranks().first_ranks()
            for ranked in retrieval_relevance(
                crowded, text, relevance=relevance_of_owners(owners), tile=tile
            )
        ]
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_ranks_do_not_depend_on_the_order_of_items_and_captions():
    media, text, owners, _ = random_pairs(40, 3)
    media_order, text_order = torch.randperm(40), torch.randperm(120)
    index_of = torch.argsort(media_order).numpy()
    by_media, by_text = retrieval_relevance(
        media, text, relevance=relevance_of_owners(owners), tile=16
    )
    moved_by_media, moved_by_text = retrieval_relevance(
        media[media_order],
        text[text_order],
        relevance=relevance_of_owners(index_of[owners[text_order]]),
        tile=16,
    )
    np.testing.assert_array_equal(
        moved_by_media.query_ranks().first_ranks(),
        by_media.query_ranks().first_ranks()[media_order],
    )
    np.testing.assert_array_equal(
        moved_by_text.query_ranks().first_ranks(), by_text.query_ranks().first_ranks()[text_order]
    )


def test_collapsed_model_scores_exactly_chance():
    media, text = normalize(torch.ones(30, 5), dim=-1), normalize(torch.ones(90, 5), dim=-1)
    owners = np.repeat(np.arange(30), 3)
    result = retrieve(media, text, media_of_text=owners)
    for name, score in result.scores.items():
        if name != "media_to_text_median_rank":  # the median of expected ranks is not exact there
            assert score.value == pytest.approx(score.chance, abs=1e-9), name
    assert result.scores["text_to_media_recall@5"].value == pytest.approx(5 / 30)
    # One caption of three among 5 of 90: 1 - (87/90)(86/89)(85/88)(84/87)(83/86), by hand.
    expected = 1 - (85 * 84 * 83) / (90 * 89 * 88)
    assert result.scores["media_to_text_recall@5"].value == pytest.approx(expected)


def test_perfect_model_finds_every_pair_first():
    media, text, owners, _ = random_pairs(20, 2, noise=0.0)
    result = retrieve(media, text, media_of_text=owners)
    for name, score in result.scores.items():
        # Only one of an item's two captions can be first.
        assert score.value == (0.5 if name == "media_to_text_true_recall@1" else 1), name
    assert result.scores["media_to_text_recall@1"].low < 1  # 20 items cannot prove 100 %


def test_k_above_the_gallery_size_counts_as_the_gallery_size():
    media, text, owners, _ = random_pairs(3, 1)
    recalls = recall_at_k(media, text, media_of_text=owners, ks=(3, 10))
    assert set(recalls.values()) == {1.0}


def test_distractors_lower_media_to_text_only():
    media, text, owners, distractors = random_pairs(40, 2, num_distractors=200)
    alone = retrieve(media, text, media_of_text=owners).scores
    among = retrieve(
        media,
        text,
        media_of_text=owners,
        distractor_embeddings=distractors,
    ).scores
    for name in alone:
        if name.startswith("text_to_media"):
            assert among[name] == alone[name]
    assert among["media_to_text_recall@1"].value < alone["media_to_text_recall@1"].value
    assert among["media_to_text_recall@1"].chance == pytest.approx(2 / 280)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_embeddings_that_are_not_finite_raise(bad):
    media, text, owners, _ = random_pairs(4, 1)
    text[2, 0] = bad
    with pytest.raises(ValueError, match=r"text_embeddings: 1 of 4 .* row 2"):
        recall_at_k(media, text, media_of_text=owners)


def test_media_item_without_caption_raises():
    media, text, owners, _ = random_pairs(4, 1)
    with pytest.raises(ValueError, match="media item 3 has no caption"):
        recall_at_k(media, text[:3], media_of_text=owners[:3])


def test_median_rank_is_the_one_that_papers_print():
    media, text, owners, _ = random_pairs(30, 1, noise=2.0)
    scores = retrieve(media, text, media_of_text=owners).scores
    by_media, by_text = oracle_ranks(media, text, owners, torch.empty(0, 8))
    for direction, ranks in (("media_to_text", by_media), ("text_to_media", by_text)):
        # open_clip's get_clip_metrics: floor(median of ranks from 0) + 1
        assert scores[f"{direction}_median_rank"].value == np.floor(np.median(ranks)) + 1
        assert scores[f"{direction}_mean_rank"].value == pytest.approx(ranks.mean() + 1)
