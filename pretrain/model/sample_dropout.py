"""Dropout, stochastic depth and patch dropout that do not depend on how the batch is split.

torch draws random numbers from a generator that all rows of a process share. Here, a keyed hash
determines whether an element is dropped. Its inputs are the seed, stream, step, slot in the
global batch, layer, call of the layer, and position in the sample. The same integer hash orders
samples (pretrain.sampling.keyed_random):

    DropKeys (step and slots of the pairs) -> pair_keys [B] -> TowerDropKeys, during one call of a
    tower -> row keys of a layer -> 32 bits for each position

So ranks, micro-batches, the second pass of gradient caching and recomputed activations drop the
same elements. A position is identified by its coordinates, so padding after it changes nothing.
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
    """Converts an unsigned 64-bit integer to the int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


_GAMMA, _FIRST, _SECOND = map(signed, (GOLDEN_GAMMA, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def scramble(values: Tensor) -> Tensor:
    """Hashes int64 values like keyed_random.scramble, on any device; same shape."""
    values = values + _GAMMA
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, num_bits: int) -> Tensor:
    """Shifts right and fills with zeros; torch's own shift of int64 would copy the sign."""
    return (values >> num_bits) & ((1 << (64 - num_bits)) - 1)


def spread_keys(keys: Tensor, num_positions: int) -> Tensor:
    """Derives a key for each position: int64 [...] -> [..., positions]."""
    return scramble(keys[..., None] ^ torch.arange(num_positions, device=keys.device))


def keep_mask(keys: Tensor, shape: Sequence[int], *, rate: float) -> Tensor:
    """Computes a mask of the elements to keep, drawn independently: bool [R, *shape].

    Args:
        keys: int64 [R].
        shape: shape of a row; at least one axis.
        rate: probability of dropping, exact to 2**-32.
    """
    for length in shape[:-1]:
        keys = spread_keys(keys, length)
    # Two elements share the 64 bits of a key.
    bits = spread_keys(keys, (shape[-1] + 1) // 2).view(torch.int32)[..., : shape[-1]]
    return bits >= round(rate * (1 << 32)) - (1 << 31)


# ---------------------------------------------------------------------------------------- keys


class DropKeys(NamedTuple):
    """Identity of the pairs in a batch, from which dropout masks are derived."""

    step: Tensor  # int64 [], step of the run
    slots: Tensor  # int64 [B], positions in the stream's global batch


def pair_keys(drop_keys: DropKeys, *, seed: int, stream: str, view: str) -> Tensor:
    """Hashes all inputs of the dropout masks except layer and position: int64 [B]."""
    step_key = scramble(drop_keys.step ^ signed(key_of(seed, "dropping", stream, view)))
    return scramble(step_key ^ drop_keys.slots)


class TowerDropKeys:
    """Keys of the pairs in the current call of a tower, shared by all its dropout layers."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._num_calls: dict[str, int] = {}

    @contextmanager
    def set_pairs(self, keys: Tensor | None) -> Iterator[None]:
        """Sets the keys for the duration of the block, one call of the tower.

        Args:
            keys: int64 [B] from `pair_keys`; None without dropout.
        """
        self._keys, self._num_calls = keys, {}
        try:
            yield
        finally:
            self._keys = None

    def snapshot(self) -> tuple[Tensor | None, dict[str, int]]:
        """Returns the current state within a call of the tower, for `replay`."""
        return self._keys, dict(self._num_calls)

    @contextmanager
    def replay(self, snapshot: tuple[Tensor | None, dict[str, int]]) -> Iterator[None]:
        """Restores the state of a snapshot for the duration of the block."""
        keys_before = self._keys
        self._keys, self._num_calls = snapshot[0], dict(snapshot[1])
        try:
            yield
        finally:
            self._keys = keys_before

    def row_keys(self, layer: SampleDrop, *, num_rows: int) -> Tensor:
        """Derives the keys of the rows that a layer receives: int64 [R].

        The rows of a sample are adjacent. A layer that is called again in the same call of the
        tower gets new keys.
        """
        if self._keys is None:
            raise RuntimeError(
                f"{layer.name} has dropout in training and needs the keys of its pairs; pass "
                "StreamInputs.drop_keys, or call eval() on the model"
            )
        if num_rows % len(self._keys):
            raise RuntimeError(
                f"{layer.name}: expected a multiple of {len(self._keys)} rows, the number of "
                f"samples, found {num_rows}"
            )
        call = self._num_calls.get(layer.name, 0)
        self._num_calls[layer.name] = call + 1
        keys = scramble(self._keys ^ layer.key ^ signed(call * GOLDEN_GAMMA & MASK))
        return spread_keys(keys, num_rows // len(self._keys)).flatten()  # [B, R / B] -> [R]


# -------------------------------------------------------------------------------------- layers


class SampleDrop(nn.Module):
    """Base class of dropout layers with a mask per sample.

    Args:
        name: name of the layer, starting with its tower; part of every key.
        drop_keys: keys of its tower.
    """

    def __init__(self, name: str, drop_keys: TowerDropKeys) -> None:
        super().__init__()
        self.name = name
        self.drop_keys = drop_keys
        # A tensor, so that the compiler does not specialise on the key of each block.
        key = torch.tensor(signed(key_of(name)))
        self.register_buffer("key", key, persistent=False)


class SampleDropout(SampleDrop):
    """Replaces nn.Dropout, and its variants that drop entire channels.

    Args:
        name, drop_keys: see SampleDrop.
        p: probability of dropping; has the name of nn.Dropout's attribute, which other layers read.
        drops_channels: whether entire channels of a row are dropped.
    """

    def __init__(
        self, name: str, drop_keys: TowerDropKeys, *, p: float, drops_channels: bool
    ) -> None:
        super().__init__(name, drop_keys)
        self.p = p
        self.drops_channels = drops_channels

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        shape = values.shape[1:2] if self.drops_channels else values.shape[1:]
        keys = self.drop_keys.row_keys(self, num_rows=len(values))
        kept = keep_mask(keys, shape, rate=self.p)
        kept = kept.reshape(*kept.shape, *[1] * (values.ndim - kept.ndim))
        return torch.where(kept, values / (1 - self.p), 0.0)


class SampleDropPath(SampleDrop):
    """Replaces a DropPath (stochastic depth), which drops entire rows.

    Args:
        name, drop_keys: see SampleDrop.
        drop_prob: probability of dropping.
        scale_by_keep: whether to divide kept rows by the probability of keeping.
    """

    def __init__(
        self, name: str, drop_keys: TowerDropKeys, *, drop_prob: float, scale_by_keep: bool
    ) -> None:
        super().__init__(name, drop_keys)
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        keys = self.drop_keys.row_keys(self, num_rows=len(values))
        kept = keep_mask(keys, (1,), rate=self.drop_prob)
        kept = kept.reshape(-1, *[1] * (values.ndim - 1))
        scaled = values / (1 - self.drop_prob) if self.scale_by_keep else values
        return torch.where(kept, scaled, 0.0)


class SamplePatchDropout(SampleDrop):
    """Replaces a PatchDropout: [B, P, W] -> [B, kept, W], the same number for each sample.

    Args:
        name, drop_keys: see SampleDrop.
        prob: fraction of patches to drop; `set_patch_dropout` changes it.
        num_prefix_tokens: number of tokens before the patches, which are never dropped.
        is_ordered: whether kept patches stay in order.
        returns_indices: whether to return (patches, indices of the kept patches or None).
    """

    def __init__(
        self,
        name: str,
        drop_keys: TowerDropKeys,
        *,
        prob: float,
        num_prefix_tokens: int,
        is_ordered: bool = False,
        returns_indices: bool = False,
    ) -> None:
        super().__init__(name, drop_keys)
        self.prob = self.first_prob = prob
        self.num_prefix_tokens = num_prefix_tokens
        self.is_ordered = is_ordered
        self.returns_indices = returns_indices

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        if not self.training or self.prob == 0:
            return (tokens, None) if self.returns_indices else tokens
        num_prefix = self.num_prefix_tokens
        prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
        num_patches = patches.shape[1]
        num_kept = max(1, int(num_patches * (1 - self.prob)))
        keys = self.drop_keys.row_keys(self, num_rows=len(tokens))
        order = spread_keys(keys, num_patches).argsort(dim=1, stable=True)
        indices = order[:, :num_kept]
        if self.is_ordered:
            indices = indices.sort(dim=1).values
        where = indices.reshape(*indices.shape, *[1] * (patches.ndim - 2))
        kept = patches.gather(1, where.expand(-1, -1, *patches.shape[2:]))
        kept = torch.cat([prefix, kept], dim=1)
        return (kept, indices) if self.returns_indices else kept


def patch_dropouts(model: nn.Module) -> list[SamplePatchDropout]:
    """Returns all layers that drop patches."""
    return [each for each in model.modules() if isinstance(each, SamplePatchDropout)]


def set_patch_dropout(model: nn.Module, rate: float | None) -> None:
    """Sets the fraction of patches that every patch dropout of a model drops in training.

    Args:
        model: model with any number of them.
        rate: fraction in [0, 1); None for the one that each layer was built with.
    """
    for layer in patch_dropouts(model):
        layer.prob = layer.first_prob if rate is None else rate
