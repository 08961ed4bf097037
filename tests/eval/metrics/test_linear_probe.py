import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy, normalize

from eval.metrics.linear_probe import L2_GRID, accuracy_of, fit_probe, search_l2, with_ones


def some_items(num_items, *, num_classes=5, width=12, noise=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(9))
    targets = torch.randint(num_classes, (num_items,), generator=generator)
    items = centers[targets] + noise * torch.randn(num_items, width, generator=generator)
    return normalize(items, dim=-1), targets


@pytest.mark.parametrize("l2", [0.001, 0.1, 3.16, 100.0])
def test_the_objective_is_scikit_learns(l2):
    items, targets = some_items(300)
    probe = fit_probe(items, targets, num_classes=5, l2=l2)
    theirs = LogisticRegression(C=1 / l2, max_iter=10_000, tol=1e-10)
    theirs.fit(items.double().numpy(), targets.numpy())
    logits = torch.from_numpy(theirs.decision_function(items.double().numpy()))
    expected = cross_entropy(logits, targets).item()
    expected += l2 * (theirs.coef_**2).sum() / (2 * len(items))
    assert probe.objective == pytest.approx(expected, rel=1e-5)
    ours = items.double() @ probe.weights.T + probe.biases
    assert (ours.argmax(dim=1).numpy() == theirs.predict(items.double().numpy())).all()
    np.testing.assert_allclose(
        with_ones(items).double() @ probe.as_class_embeddings().T, ours, rtol=1e-12, atol=1e-12
    )


def test_beginning_elsewhere_ends_at_the_same_place():
    items, targets = some_items(200)
    far = fit_probe(items, targets, num_classes=5, l2=1e-3)
    ours, from_far = (
        fit_probe(items, targets, num_classes=5, l2=1.0, start=start) for start in (None, far)
    )
    torch.testing.assert_close(from_far.weights, ours.weights, rtol=1e-4, atol=1e-5)


def test_the_search_finds_the_peak_also_where_many_are_equal():
    def peak_at(place, *, width=0.0):
        return lambda l2: -max(width, abs(np.log10(l2) - place))

    for place in (-6.0, -3.6, 0.1, 2.3, 6.0):
        found, tried = search_l2(peak_at(place))
        assert abs(np.log10(found) - place) <= 1 / 16 + 1e-9
        assert len(tried) <= 7 + 2 * 4
    # A plateau of two decades around 1: its stronger end.
    found, _ = search_l2(peak_at(0.0, width=1.0))
    assert found == pytest.approx(10.0)
    assert len(L2_GRID) == 97


def test_a_searched_probe_is_better_than_the_weakest_and_the_strongest():
    train, validation, test = (some_items(n, seed=n) for n in (150, 151, 4000))

    def accuracy_at(l2):
        return accuracy_of(fit_probe(*train, num_classes=5, l2=l2), *validation)

    best, _ = search_l2(accuracy_at)
    accuracies = [
        accuracy_of(fit_probe(*train, num_classes=5, l2=l2), *test)
        for l2 in (best, L2_GRID[0], L2_GRID[-1])
    ]
    assert accuracies[0] > accuracies[1] + 0.02
    assert accuracies[0] > accuracies[2] - 0.01
