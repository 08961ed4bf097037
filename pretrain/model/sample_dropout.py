"""Dropout, stochastic depth and patch dropout that no split of the batch changes.

torch draws them from a generator that the rows of a process share. Here, whether a place is dropped
is a function of (seed, pairing, step, slot in the global batch, layer, its call, place in the
sample), by the same integer hash as the order of samples (pretrain.sampling.keyed_random):

    Draws (step and slots of the pairs) -> pair_keys [B] -> TowerDraws, for the time of one call of
    a tower -> a layer's row keys -> 32 bits for every place

So ranks, micro-batches, the second pass of gradient caching and recomputed activations drop alike.
A place is named by its coordinates, so that padding behind it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.sampling.keyed_random import GOLDEN_GAMMA, MASK, key_of

# ---------------------------------------------------------------------------------------- hash


def signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


_GAMMA, _FIRST, _SECOND = map(signed, (GOLDEN_GAMMA, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def scramble(values: Tensor) -> Tensor:
    """int64 -> int64: keyed_random.scramble, on any device."""
    values = values + _GAMMA
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, num_bits: int) -> Tensor:
    """To the right, with zeros coming in: torch's own shift of int64 keeps the sign."""
    return (values >> num_bits) & ((1 << (64 - num_bits)) - 1)


def spread_keys(keys: Tensor, num_places: int) -> Tensor:
    """A key for every place: int64 [...] -> [..., places]."""
    return scramble(keys[..., None] ^ torch.arange(num_places, device=keys.device))


def kept_places(keys: Tensor, shape: Sequence[int], *, rate: float) -> Tensor:
    """Which places are not dropped, each by itself: bool [R, *shape].

    Args:
        keys: int64 [R].
        shape: of a row; at least one axis.
        rate: probability of dropping, exact to 2**-32.
    """
    for length in shape[:-1]:
        keys = spread_keys(keys, length)
    # Two places share the 64 bits of a key.
    bits = spread_keys(keys, (shape[-1] + 1) // 2).view(torch.int32)[..., : shape[-1]]
    return bits >= round(rate * (1 << 32)) - (1 << 31)


# --------------------------------------------------------------------------------------- draws


class Draws(NamedTuple):
    """The pairs that a model's layers draw for."""

    step: Tensor  # int64 [] of the run
    slots: Tensor  # int64 [B] places in the pairing's global batch


def pair_keys(draws: Draws, *, seed: int, pairing: str) -> Tensor:
    """int64 [B]: all that a pair's draws depend on, but for the layer."""
    step_key = scramble(draws.step ^ signed(key_of(seed, "dropping", pairing)))
    return scramble(step_key ^ draws.slots)


class TowerDraws:
    """What the layers of one tower draw from during a call of the tower; shared by all of them."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._num_calls: dict[str, int] = {}

    @contextmanager
    def of_pairs(self, keys: Tensor | None) -> Iterator[None]:
        """Surrounds a call of the tower; keys are `pair_keys`, None where nothing is drawn."""
        self._keys, self._num_calls = keys, {}
        try:
            yield
        finally:
            self._keys = None

    def mark(self) -> tuple[Tensor | None, dict[str, int]]:
        """Where in a call of the tower we are, for `again_from`."""
        return self._keys, dict(self._num_calls)

    @contextmanager
    def again_from(self, mark: tuple[Tensor | None, dict[str, int]]) -> Iterator[None]:
        """Surrounds what is computed there, for the first time or again."""
        keys_before = self._keys
        self._keys, self._num_calls = mark[0], dict(mark[1])
        try:
            yield
        finally:
            self._keys = keys_before

    def row_keys(self, layer: SampleDrop, *, num_rows: int) -> Tensor:
        """int64 [R]: keys of the rows that a layer is called with, each sample's side by side.

        A layer that is called again in the same call of the tower draws anew.
        """
        if self._keys is None:
            raise RuntimeError(
                f"{layer.name} drops in training, and was not told which pairs it is given; pass "
                "PairInputs.draws, or call eval() on the model"
            )
        if num_rows % len(self._keys):
            raise RuntimeError(
                f"{layer.name} was given {num_rows} rows for {len(self._keys)} samples; expected "
                "a multiple"
            )
        call = self._num_calls.get(layer.name, 0)
        self._num_calls[layer.name] = call + 1
        keys = scramble(self._keys ^ layer.key ^ signed(call * GOLDEN_GAMMA & MASK))
        return spread_keys(keys, num_rows // len(self._keys)).flatten()  # [B, R / B] -> [R]


# -------------------------------------------------------------------------------------- layers


class SampleDrop(nn.Module):
    """What the layers below have in common.

    Args:
        name: of the layer, with its tower; part of every key.
        draws: of its tower.
    """

    def __init__(self, name: str, draws: TowerDraws) -> None:
        super().__init__()
        self.name = name
        self.draws = draws
        # A tensor, so that compiled blocks do not differ by it.
        key = torch.tensor(signed(key_of(name)))
        self.register_buffer("key", key, persistent=False)


class SampleDropout(SampleDrop):
    """In place of nn.Dropout, or of one of its forms that drop whole channels.

    Args:
        name, draws: as SampleDrop.
        p: probability of dropping (named as there, because other layers read it).
        drops_channels: whether all places of a row's channel are dropped together.
    """

    def __init__(self, name: str, draws: TowerDraws, *, p: float, drops_channels: bool) -> None:
        super().__init__(name, draws)
        self.p = p
        self.drops_channels = drops_channels

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        shape = values.shape[1:2] if self.drops_channels else values.shape[1:]
        keys = self.draws.row_keys(self, num_rows=len(values))
        kept = kept_places(keys, shape, rate=self.p)
        kept = kept.reshape(*kept.shape, *[1] * (values.ndim - kept.ndim))
        return torch.where(kept, values / (1 - self.p), 0.0)


class SampleDropPath(SampleDrop):
    """In place of a DropPath (stochastic depth), which drops whole rows.

    Args:
        name, draws: as SampleDrop.
        drop_prob: probability of dropping.
        scale_by_keep: whether rows that are kept are divided by the probability of keeping.
    """

    def __init__(
        self, name: str, draws: TowerDraws, *, drop_prob: float, scale_by_keep: bool
    ) -> None:
        super().__init__(name, draws)
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        keys = self.draws.row_keys(self, num_rows=len(values))
        kept = kept_places(keys, (1,), rate=self.drop_prob)
        kept = kept.reshape(-1, *[1] * (values.ndim - 1))
        scaled = values / (1 - self.drop_prob) if self.scale_by_keep else values
        return torch.where(kept, scaled, 0.0)


class SamplePatchDropout(SampleDrop):
    """In place of a PatchDropout: [B, P, W] -> [B, kept, W], equally many of each sample.

    Args:
        name, draws: as SampleDrop.
        prob: share of the patches that is dropped.
        num_prefix_tokens: tokens before the patches that are never dropped.
        is_ordered: whether kept patches stay in their order.
        returns_indices: whether to return (patches, indices of those kept, or None).
    """

    def __init__(
        self,
        name: str,
        draws: TowerDraws,
        *,
        prob: float,
        num_prefix_tokens: int,
        is_ordered: bool = False,
        returns_indices: bool = False,
    ) -> None:
        super().__init__(name, draws)
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens
        self.is_ordered = is_ordered
        self.returns_indices = returns_indices

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        if not self.training:
            return (tokens, None) if self.returns_indices else tokens
        num_prefix = self.num_prefix_tokens
        prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
        num_patches = patches.shape[1]
        num_kept = max(1, int(num_patches * (1 - self.prob)))
        keys = self.draws.row_keys(self, num_rows=len(tokens))
        order = spread_keys(keys, num_patches).argsort(dim=1, stable=True)
        indices = order[:, :num_kept]
        if self.is_ordered:
            indices = indices.sort(dim=1).values
        where = indices.reshape(*indices.shape, *[1] * (patches.ndim - 2))
        kept = patches.gather(1, where.expand(-1, -1, *patches.shape[2:]))
        kept = torch.cat([prefix, kept], dim=1)
        return (kept, indices) if self.returns_indices else kept
