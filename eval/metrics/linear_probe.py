"""Linear probe: a softmax regression on embeddings that stay as they are, after Radford et al. 2021
(CLIP), section A.3.

    minimise over W, b:   mean cross-entropy of softmax(X W + b)  +  l2 * |W|^2 / (2 n)

which is scikit-learn's LogisticRegression at C = 1 / l2. The l2 is searched on
validation data, 8 steps to a decade from 1e-6 to 1e6; the regression is then fitted to training and
validation data together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from eval.metrics.zero_shot import ClassificationResult

L2_GRID = 10.0 ** (np.arange(97) / 8 - 6)
FIRST_STEP = 16  # of the search: every second decade
MAX_ITERATIONS = 1000  # as in the paper


@dataclass(frozen=True)
class LinearProbeResult(ClassificationResult):
    """The metrics of a linear probe, and how it was regularised."""

    l2: float
    validation_accuracies: dict[float, float]  # by l2; of those that were tried


@dataclass(frozen=True)
class Probe:
    """A fitted regression."""

    weights: Tensor  # float64 [K, D]
    biases: Tensor  # float64 [K]
    objective: float
    l2: float

    def as_class_embeddings(self) -> Tensor:
        """[K, D + 1] whose products with `with_ones` are the logits."""
        return torch.cat([self.weights, self.biases[:, None]], dim=1)


def with_ones(embeddings: Tensor) -> Tensor:
    """[n, D] -> [n, D + 1] with a one at the end of each row, for the biases."""
    return functional.pad(embeddings, (0, 1), value=1.0)


def train_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    l2: float | None = None,
) -> tuple[Probe, dict[float, float]]:
    """The regression over all items, at the l2 that is best for the validation items.

    Args:
        train: [n, D] embeddings and [n] classes, from 0 to K - 1.
        validation: likewise.
        num_classes: K.
        l2: of the regularisation; None: searched.

    Returns:
        The regression, and the accuracy on validation items at every l2 that was tried.
    """
    last: Probe | None = None

    def accuracy_at(value: float) -> float:
        nonlocal last
        last = fit_probe(*train, num_classes=num_classes, l2=value, start=last)
        return accuracy_of(last, *validation)

    tried: dict[float, float] = {}
    if l2 is None:
        l2, tried = search_l2(accuracy_at)
    both = [torch.cat(parts) for parts in zip(train, validation, strict=True)]
    return fit_probe(*both, num_classes=num_classes, l2=l2, start=last), tried


def fit_probe(
    embeddings: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    l2: float,
    start: Probe | None = None,
) -> Probe:
    """The regression of least objective, by L-BFGS in float64.

    Args:
        embeddings: [n, D]
        targets: [n] integers from 0 to K - 1.
        num_classes: K.
        l2: of the regularisation.
        start: another regression of the same data, to begin from.
    """
    values = embeddings.double()
    weights = values.new_zeros(num_classes, values.shape[1]) if start is None else start.weights
    biases = values.new_zeros(num_classes) if start is None else start.biases
    parameters = [each.clone().requires_grad_() for each in (weights, biases)]
    solver = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_ITERATIONS,
        history_size=10,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        loss = functional.cross_entropy(values @ parameters[0].T + parameters[1], targets)
        return loss + l2 * parameters[0].square().sum() / (2 * len(values))

    def closure() -> Tensor:
        solver.zero_grad()
        value = objective()
        value.backward()
        return value

    solver.step(closure)
    with torch.no_grad():
        least = objective().item()
    return Probe(parameters[0].detach(), parameters[1].detach(), least, l2)


def search_l2(accuracy_at: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The l2 of the highest accuracy, found by halving the steps around the best so far.

    Of equal accuracies the stronger regularisation is taken: where few validation items tell
    little, the first of many equal ones would lead nowhere.

    Args:
        accuracy_at: l2 -> accuracy on validation data.

    Returns:
        The l2, and the accuracy at every l2 that was tried.
    """
    tried: dict[int, float] = {}
    step = FIRST_STEP
    wanted = range(0, len(L2_GRID), step)
    while True:
        for place in wanted:
            if place not in tried and 0 <= place < len(L2_GRID):
                tried[place] = accuracy_at(float(L2_GRID[place]))
        best = max(tried, key=lambda place: (tried[place], place))
        if step == 1:
            found = {float(L2_GRID[place]): tried[place] for place in sorted(tried)}
            return float(L2_GRID[best]), found
        step //= 2
        wanted = (best - step, best + step)


def accuracy_of(probe: Probe, embeddings: Tensor, targets: Tensor) -> float:
    """Share of items whose class has the highest logit."""
    logits = embeddings.double() @ probe.weights.T + probe.biases
    return (logits.argmax(dim=1) == targets).double().mean().item()
