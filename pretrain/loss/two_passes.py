"""The two passes over the N x N logits that compute the exact loss and its gradients.

Each rank compares its own B media with all N captions (its row block of the logits), tile by tile.
See reference.py for a diagram of the communication. Two modes compute the same result:

    strip1  Gathers the captions. Each tile adds G T to the gradient of this rank's media, and G^T I
            to the gradients of the captions, which are summed over ranks at the end.
    strip2  Gathers captions and media. The gradient of the media is computed from the row block,
            that of the captions from the column block of the own captions. Nothing is sent back.

strip1 computes less, strip2 sends less. Both either keep the gathered rows until the end, or stream
them in pieces, once per pass, so that memory does not grow with N.

The loss is symmetric in media and captions. If the gather of the media was started while the
captions were being encoded, the sides are swapped: below, "media" then means the captions and
"text" the media.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pretrain.distributed.collectives import RowBlock, RowGather, RowSplit, RowStream, RowSum
from pretrain.loss.in_batch_recall import num_packed_codes
from pretrain.loss.logit_tiles import Features, LogitTiles, Tile, add_product, as_factor
from pretrain.loss.options import LossOptions, Mode

# On a GPU, rows per rank above which strip1 is faster: it sends more, but computes less. The
# break-even point is at 1.6k rows with 450 GB/s between GPUs, and at 14k rows with 50 GB/s.
MIN_ROWS_OF_STRIP1 = 4096
GATHERED_BYTES = 256 * 2**20  # rows of all ranks are streamed if they take more
# float32 bytes of all ranks in one piece of a stream. GPUs need larger pieces to stay busy.
PIECE_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}


class TiledLoss(Protocol):
    """A loss as a function of logit tiles; implemented in softmax.py, sigmoid.py and fused.py."""

    needs_all_tiles_first: bool  # whether G depends on all tiles of all ranks (softmax loss)
    positives: Tensor  # [N] logits of the own pairs
    value: Tensor  # float64 scalar, the global loss, after `merge`
    scale_sum: Tensor | None  # float64 scalar, sum of G_ij <I_i, T_j> over own rows, if computed

    def observe(self, tile: Tile) -> None: ...

    def merge(self, *, for_all_rows: bool) -> None: ...

    def coefficients(self, tile: Tile) -> Tensor: ...

    def own_coefficients(self, tile: Tile) -> Tensor: ...


@dataclass(frozen=True)
class GradientSums:
    """Products with G, without their common factors."""

    media: Tensor  # [B, D] sum_j G_ij T_j
    text: Tensor  # [B, D] sum_i G_ij I_i


@dataclass
class LossPasses:
    """One evaluation of a loss over the global batch."""

    media: Features  # [B, D] of this rank
    text: Features  # [B, D] of this rank
    loss: TiledLoss
    tiles: LogitTiles
    split: RowSplit
    mode: Mode
    piece_rows: int  # rows of each rank gathered at once
    media_gather: RowGather | None = None  # gather of `text.features`, if already started

    def compute_value(self) -> None:
        """Computes only loss and recall, with one matrix product; every rank must call it."""
        self._observe_all(self._stream(with_media=False))
        self.loss.merge(for_all_rows=False)

    def compute_value_and_gradients(self) -> GradientSums:
        """Computes the loss, recall and products with G; every rank must call it."""
        sends_media = self.mode == "strip2"
        stream = self._stream(with_media=sends_media)
        if self.loss.needs_all_tiles_first:
            is_kept = stream.kept is not None
            self._observe_all(stream if is_kept else self._stream(with_media=False))
            self.loss.merge(for_all_rows=sends_media)
        compute = self._gradients_in_strip2 if sends_media else self._gradients_in_strip1
        sums = compute(stream)
        if not self.loss.needs_all_tiles_first:
            self.loss.merge(for_all_rows=sends_media)
        return sums

    def _stream(self, *, with_media: bool) -> RowStream:
        own = self.loss.positives[self.split.own]
        tensors = [own]
        if self.media_gather is None:
            tensors += [self.text.features, self.text.teacher]
        if with_media:
            tensors += [self.media.features, self.media.teacher]
        present = [tensor for tensor in tensors if tensor is not None]
        return RowStream(present, self.split, piece_rows=self.piece_rows, begun=self.media_gather)

    def _read(self, block: RowBlock) -> list[Features]:
        """Returns a block's captions, then its media if gathered; stores its positives."""
        positives, *features = block.tensors
        if self.media_gather is not None:  # RowStream puts rows that were gathered earlier last
            features = [features[-1], *features[:-1]]
        self.loss.positives[block.first : block.first + len(positives)] = positives
        per_side = 1 if self.text.teacher is None else 2
        return [
            Features(block.first, *features[start : start + per_side])
            for start in range(0, len(features), per_side)
        ]

    def _observe_all(self, stream: RowStream) -> None:
        for _, blocks in stream:
            for block in blocks:
                text = self._read(block)[0]
                for tile, _, _ in self.tiles.compute(self.media, text):
                    self.loss.observe(tile)

    def _add_row_block_gradients(
        self, text: Features, media_sum: Tensor, text_sum: Tensor | None
    ) -> None:
        """Adds G T to the gradients of the media and, in strip1, G^T I to those of captions."""
        for tile, rows, columns in self.tiles.compute(self.media, text):
            gradient = as_factor(self.loss.own_coefficients(tile), text.features)
            add_product(media_sum[rows], gradient, text.features[columns])
            if text_sum is not None:
                add_product(text_sum[columns], gradient.T, self.media.features[rows])

    def _gradients_in_strip1(self, stream: RowStream) -> GradientSums:
        media_sum, text_sum = self._zeros(len(self.media)), self._zeros(len(self.text))
        pending = None
        for piece, blocks in stream:
            parts = self._zeros(len(blocks), len(piece))  # [ranks, rows, D]
            for block in blocks:
                self._add_row_block_gradients(self._read(block)[0], media_sum, parts[block.holder])
            pending = self._receive(pending, text_sum, (RowSum(parts), piece))
        self._receive(pending, text_sum, None)
        return GradientSums(media_sum, text_sum)

    def _receive(
        self,
        pending: tuple[RowSum, range] | None,
        text_sum: Tensor,
        following: tuple[RowSum, range] | None,
    ) -> tuple[RowSum, range] | None:
        """Stores the sum over ranks of a piece while that of the next piece is in flight."""
        if pending is not None:
            total, piece = pending
            rows = text_sum[piece.start : piece.stop]
            rows.copy_(total.wait()[: len(rows)])
        return following

    def _gradients_in_strip2(self, stream: RowStream) -> GradientSums:
        media_sum, text_sum = self._zeros(len(self.media)), self._zeros(len(self.text))
        for _, blocks in stream:
            for block in blocks:
                text, media = self._read(block)
                self._add_row_block_gradients(text, media_sum, None)
                for tile, rows, columns in self.tiles.compute(media, self.text):
                    gradient = as_factor(self.loss.coefficients(tile), media.features)
                    add_product(text_sum[columns], gradient.T, media.features[rows])
        return GradientSums(media_sum, text_sum)

    def _zeros(self, *size: int) -> Tensor:
        features = self.media.features
        return features.new_zeros(*size, features.shape[1], dtype=self.tiles.dtype)


# ------------------------------------------------------------------------------------- traffic


def choose_mode(split: RowSplit, device: torch.device) -> Mode:
    """Returns the faster mode; on CPUs always strip1, which computes less."""
    rows = split.total / len(split.counts)
    is_bound_by_products = (
        device.type == "cpu" or len(split.counts) == 1 or rows >= MIN_ROWS_OF_STRIP1
    )
    return "strip1" if is_bound_by_products else "strip2"


def choose_piece_rows(split: RowSplit, *, width: int, device_type: str = "cpu") -> int:
    """Chooses how many rows of each rank are gathered at once.

    These are all rows if they fit in GATHERED_BYTES, else as many as fit in PIECE_BYTES.
    """
    num_ranks, most = len(split.counts), max(split.counts)
    # Captions, and either their gradients or the media, in float32 at most.
    if num_ranks == 1 or 2 * 4 * num_ranks * most * width <= GATHERED_BYTES:
        return most
    return max(1, min(most, PIECE_BYTES[device_type] // (4 * num_ranks * width)))


def received_bytes(
    counts: Sequence[int],
    *,
    options: LossOptions,
    width: int,
    feature_bytes: int,
    device: torch.device,
) -> int:
    """Computes the bytes a rank receives for the loss and its gradients, without padding.

    Args:
        counts: number of pairs of each rank.
        width: D.
        feature_bytes: bytes of one element of the features.
    """
    split = RowSplit(tuple(counts))
    num_ranks, num_rows = len(counts), len(counts) * max(counts)
    mode = choose_mode(split, device) if options.mode == "auto" else options.mode
    piece_rows = options.piece_rows or choose_piece_rows(
        split, width=width, device_type=device.type
    )
    captions = num_rows * (width * feature_bytes + 4)  # including the logits of own pairs
    # In the second pass of the softmax loss, streamed pieces are gathered again.
    gathered = captions * (2 if options.kind == "softmax" and piece_rows < max(counts) else 1)
    gathered += num_rows * width * (4 if mode == "strip1" else feature_bytes)  # sums or media
    if options.duplicates != "negatives":
        gathered += num_rows * 2 * 8  # keys
    num_sums = num_packed_codes(split.total, num_ranks)
    if options.kind == "softmax":
        num_sums += split.total * (1 if mode == "strip1" else 2)
    return round((gathered + 2 * 8 * num_sums) * (num_ranks - 1) / num_ranks)
