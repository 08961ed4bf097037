"""The passes over the strips of the N x N logits that give the loss and its gradients, exactly.

Each rank compares its own B media with all N captions, tile by tile (its strip). Two modes give the
same numbers:

    strip1  captions travel. A tile's G gives this rank's media their gradient, G T, and all
            captions a part of theirs, G^T I, which is summed over ranks at the end.
    strip2  captions and media travel. The strip gives the media's gradient; the strip of all media
            with the own captions gives the captions'. Nothing travels back.

strip1 multiplies less, strip2 sends less. Either holds what was gathered until the end, or streams
it in pieces, once per pass, so that memory does not grow with N.

The loss is the same with media and captions exchanged. Where the media are on their way before the
captions are encoded, it is they that travel: then "media" below are the captions, and "text" the
media.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pretrain.distributed.collectives import RowBlock, RowGather, RowSplit, RowStream, RowSum
from pretrain.loss.logit_tiles import Features, LogitTiles, Tile, add_product, as_factor
from pretrain.loss.options import Mode


class Strips(Protocol):
    """A loss, as its tiles see it: SoftmaxStrips or SigmoidStrips, or their fused_strips."""

    needs_all_tiles_first: bool  # G is known only when all tiles of all ranks were observed
    positives: Tensor  # [N] logits of the own pairs
    value: Tensor  # float64 scalar, the global loss, after `merge`
    scale_sum: Tensor | None  # float64 scalar, sum of G_ij <I_i, T_j> over own rows, if taken apart

    def observe(self, tile: Tile) -> None: ...

    def merge(self, *, for_all_rows: bool) -> None: ...

    def coefficients(self, tile: Tile) -> Tensor: ...

    def own_coefficients(self, tile: Tile) -> Tensor: ...


@dataclass(frozen=True)
class GradientSums:
    """Sums over G, before the factors that all of them share."""

    media: Tensor  # [B, D] sum_j G_ij T_j
    text: Tensor  # [B, D] sum_i G_ij I_i


@dataclass
class LossPasses:
    """One evaluation of a loss over the global batch."""

    media: Features  # this rank's
    text: Features
    strips: Strips
    tiles: LogitTiles
    split: RowSplit
    mode: Mode
    piece_rows: int  # rows of each rank that travel at once
    begun: RowGather | None = None  # of the captions' features, on their way since earlier

    def take_value(self) -> None:
        """The loss and hits alone: one product of the strip. Every rank must reach it."""
        self._observe_all(self._stream(with_media=False))
        self.strips.merge(for_all_rows=False)

    def take_value_and_gradients(self) -> GradientSums:
        """The loss and hits, and sums for the gradients. Every rank must reach it."""
        sends_media = self.mode == "strip2"
        stream = self._stream(with_media=sends_media)
        if self.strips.needs_all_tiles_first:
            is_kept = stream.kept is not None
            self._observe_all(stream if is_kept else self._stream(with_media=False))
            self.strips.merge(for_all_rows=sends_media)
        take = self._gradients_by_strip2 if sends_media else self._gradients_by_strip1
        sums = take(stream)
        if not self.strips.needs_all_tiles_first:
            self.strips.merge(for_all_rows=sends_media)
        return sums

    def _stream(self, *, with_media: bool) -> RowStream:
        own = self.strips.positives[self.split.own]
        tensors = [own]
        if self.begun is None:
            tensors += [self.text.features, self.text.teacher]
        if with_media:
            tensors += [self.media.features, self.media.teacher]
        present = [tensor for tensor in tensors if tensor is not None]
        return RowStream(present, self.split, piece_rows=self.piece_rows, begun=self.begun)

    def _read(self, block: RowBlock) -> list[Features]:
        """Captions, and media if they travelled, of a block; its positives are noted."""
        positives, *features = block.tensors
        if self.begun is not None:  # they follow what else travels
            features = [features[-1], *features[:-1]]
        self.strips.positives[block.first : block.first + len(positives)] = positives
        per_side = 1 if self.text.teacher is None else 2
        return [
            Features(block.first, *features[start : start + per_side])
            for start in range(0, len(features), per_side)
        ]

    def _observe_all(self, stream: RowStream) -> None:
        for _, blocks in stream:
            for block in blocks:
                text = self._read(block)[0]
                for tile, _, _ in self.tiles.of(self.media, text):
                    self.strips.observe(tile)

    def _own_strip(self, text: Features, media_sum: Tensor, text_sum: Tensor | None) -> None:
        """Adds what the own media and some captions give each other."""
        for tile, rows, columns in self.tiles.of(self.media, text):
            gradient = as_factor(self.strips.own_coefficients(tile), text.features)
            add_product(media_sum[rows], gradient, text.features[columns])
            if text_sum is not None:
                add_product(text_sum[columns], gradient.T, self.media.features[rows])

    def _gradients_by_strip1(self, stream: RowStream) -> GradientSums:
        media_sum, text_sum = self._zeros(len(self.media)), self._zeros(len(self.text))
        waiting = None
        for piece, blocks in stream:
            parts = self._zeros(len(blocks), len(piece))  # [ranks, rows, D]
            for block in blocks:
                self._own_strip(self._read(block)[0], media_sum, parts[block.holder])
            waiting = self._receive(waiting, text_sum, (RowSum(parts), piece))
        self._receive(waiting, text_sum, None)
        return GradientSums(media_sum, text_sum)

    def _receive(
        self,
        waiting: tuple[RowSum, range] | None,
        text_sum: Tensor,
        following: tuple[RowSum, range] | None,
    ) -> tuple[RowSum, range] | None:
        """Keeps what ranks added to the captions of a piece, while the following one travels."""
        if waiting is not None:
            total, piece = waiting
            rows = text_sum[piece.start : piece.stop]
            rows.copy_(total.wait()[: len(rows)])
        return following

    def _gradients_by_strip2(self, stream: RowStream) -> GradientSums:
        media_sum, text_sum = self._zeros(len(self.media)), self._zeros(len(self.text))
        for _, blocks in stream:
            for block in blocks:
                text, media = self._read(block)
                self._own_strip(text, media_sum, None)
                for tile, rows, columns in self.tiles.of(media, self.text):
                    gradient = as_factor(self.strips.coefficients(tile), media.features)
                    add_product(text_sum[columns], gradient.T, media.features[rows])
        return GradientSums(media_sum, text_sum)

    def _zeros(self, *size: int) -> Tensor:
        features = self.media.features
        return features.new_zeros(*size, features.shape[1], dtype=self.tiles.dtype)
