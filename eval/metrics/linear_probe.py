"""Linear probe: softmax regression on frozen embeddings (CLIP, Radford et al. 2021, section A.3).

    minimise over W, b:   mean cross-entropy of softmax(X W + b)  +  l2 * |W|^2 / (2 n)

which is scikit-learn's LogisticRegression with C = 1 / l2. The penalty weight l2 is chosen on
validation data from a grid with 8 steps per decade, from 1e-6 to 1e6. The regression is then fitted
to training and validation data together.
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
FIRST_STEP = 16  # grid steps between the first candidates: two decades
MAX_ITERATIONS = 1000  # as in the paper


@dataclass(frozen=True)
class LinearProbeResult(ClassificationResult):
    """Metrics of a linear probe, and the search for its penalty weight."""

    l2: float
    validation_accuracies: dict[float, float]  # l2 -> validation accuracy


@dataclass(frozen=True)
class Probe:
    """Fitted softmax regression."""

    weights: Tensor  # float64 [K, D]
    biases: Tensor  # float64 [K]
    objective: float  # value at the minimum
    l2: float

    def as_class_embeddings(self) -> Tensor:
        """Returns [weights, biases], [K, D + 1]; products with `with_ones` rows are logits."""
        return torch.cat([self.weights, self.biases[:, None]], dim=1)


def with_ones(embeddings: Tensor) -> Tensor:
    """Appends a column of ones for the biases: [n, D] -> [n, D + 1]."""
    return functional.pad(embeddings, (0, 1), value=1.0)


def train_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    l2: float | None = None,
) -> tuple[Probe, dict[float, float]]:
    """Fits the regression to all items, with the l2 that is best on the validation items.

    Args:
        train: [n, D] embeddings and [n] classes, from 0 to K - 1.
        validation: embeddings and classes of the validation items, in the same form.
        num_classes: K.
        l2: weight of the penalty; None: chosen on the validation items.

    Returns:
        The regression, and {l2: validation accuracy} for every l2 that was tried.
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
    """Minimises the objective by L-BFGS in float64.

    Args:
        embeddings: [n, D]
        targets: [n] integers from 0 to K - 1.
        num_classes: K.
        l2: weight of the penalty.
        start: another regression on the same data, used as the starting point; None: zeros.
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
    """Searches the grid for the l2 with the highest accuracy, halving the step around the best.

    Ties are resolved in favour of the largest l2. With few validation items, many values reach the
    same accuracy, and the smallest of them would be a poor start for the next step.

    Args:
        accuracy_at: returns the validation accuracy at an l2.

    Returns:
        The best l2, and {l2: accuracy} for every l2 that was tried.
    """
    tried: dict[int, float] = {}
    step = FIRST_STEP
    wanted = range(0, len(L2_GRID), step)
    while True:
        for index in wanted:
            if index not in tried and 0 <= index < len(L2_GRID):
                tried[index] = accuracy_at(float(L2_GRID[index]))
        best = max(tried, key=lambda index: (tried[index], index))
        if step == 1:
            found = {float(L2_GRID[index]): tried[index] for index in sorted(tried)}
            return float(L2_GRID[best]), found
        step //= 2
        wanted = (best - step, best + step)


def accuracy_of(probe: Probe, embeddings: Tensor, targets: Tensor) -> float:
    """Computes the expected fraction of items whose class is first, over random orders of ties."""
    logits = embeddings.double() @ probe.weights.T + probe.biases
    is_best = logits == logits.amax(dim=1, keepdim=True)
    of_target = is_best.gather(1, targets[:, None])[:, 0]
    return (of_target.double() / is_best.sum(dim=1)).mean().item()
