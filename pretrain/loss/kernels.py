"""Triton kernels that compute the losses of a tile; see logit_kernels, softmax_sums and sigmoid.

observe_softmax     partial sums of exponentials of rows and columns, and nearness codes
write_coefficients  G of the softmax loss
compute_sigmoid     loss, nearness codes and G of the sigmoid loss
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.loss.logit_kernels import (
    block_logits,
    block_of_program,
    inside,
    may_hold_own,
    negatives,
    write_block,
    write_nearness,
)

LOWEST = tl.constexpr(-1e30)  # stands in for the maximum of a row without entries


@triton.jit
def _write_sums(
    sums,
    logits,
    exponentials,
    largest,
    indices,
    num_indices,
    block,
    num_blocks,
    AXIS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
):
    """Writes sums of exponentials and, as a second [blocks, rows], the subtracted maxima."""
    offset = block.to(tl.int64) * num_indices + indices
    if not IS_PLAIN:
        largest = tl.maximum(largest, LOWEST)
        exponentials = tl.exp(logits - tl.expand_dims(largest, AXIS))
        after_sums = tl.cast(num_blocks, tl.int64) * num_indices
        tl.store(sums + after_sums + offset, largest, mask=indices < num_indices)
    tl.store(sums + offset, tl.sum(exponentials, AXIS), mask=indices < num_indices)


# Slices of vectors may start at any address; do not recompile kernels for each alignment.
@triton.jit(
    do_not_specialize=["own_shift"], do_not_specialize_on_alignment=["row_own", "column_own"]
)
def observe_softmax(
    media,  # [num_rows, WIDTH]
    text,  # [num_columns, WIDTH]
    row_own,  # [num_rows] logits of the own pairs
    column_own,
    row_sums,  # [1 if IS_PLAIN else 2, column blocks, num_rows]
    column_sums,  # [1 if IS_PLAIN else 2, row blocks, num_columns]
    row_codes,  # [column blocks, num_rows]
    column_codes,
    num_rows,
    num_columns,
    own_shift,
    scale,
    tolerance,
    IS_PLAIN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    i, rows, j, columns = block_of_program(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    x = block_logits(
        media, text, rows, columns, num_rows, num_columns, scale, 0.0, WIDTH, BLOCK_WIDTH
    )
    x = negatives(x, rows, columns, num_rows, num_columns, own_shift)
    of_row = write_nearness(row_codes, x, row_own, rows, num_rows, j, tolerance, 1)
    of_column = write_nearness(column_codes, x, column_own, columns, num_columns, i, tolerance, 0)
    exponentials = tl.exp(x) if IS_PLAIN else x
    num_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    _write_sums(row_sums, x, exponentials, of_row, rows, num_rows, j, num_blocks, 1, IS_PLAIN)
    num_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    _write_sums(
        column_sums, x, exponentials, of_column, columns, num_columns, i, num_blocks, 0, IS_PLAIN
    )


@triton.jit(
    do_not_specialize=["own_shift"],
    do_not_specialize_on_alignment=["row_weights", "column_weights", "own_gradient"],
)
def write_coefficients(
    media,
    text,
    row_weights,  # [num_rows] exp(-r) if IS_PLAIN, else r
    column_weights,
    own_gradient,  # [num_rows] G at own pairs
    gradient,  # [num_rows, num_columns]
    totals,  # [blocks] sums of G * logit
    num_rows,
    num_columns,
    own_shift,
    scale,
    COUNTS: tl.constexpr,  # whether totals are written
    IS_PLAIN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    _, rows, _, columns = block_of_program(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    x = block_logits(
        media, text, rows, columns, num_rows, num_columns, scale, 0.0, WIDTH, BLOCK_WIDTH
    )
    beyond: tl.constexpr = 0.0 if IS_PLAIN else float("inf")
    of_row = tl.load(row_weights + rows, mask=rows < num_rows, other=beyond)[:, None]
    of_column = tl.load(column_weights + columns, mask=columns < num_columns, other=beyond)[None, :]
    if IS_PLAIN:
        g = tl.exp(x) * (of_row + of_column)
    else:
        g = tl.exp(x - of_row) + tl.exp(x - of_column)
    if may_hold_own(rows, columns, own_shift):
        own = tl.load(own_gradient + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
        g = tl.where((rows + own_shift)[:, None] == columns[None, :], own[:, None], g)
    if COUNTS:
        is_counted = inside(rows, columns, num_rows, num_columns)
        tl.store(totals + tl.program_id(0), tl.sum(tl.where(is_counted, g * x, 0.0)))
    write_block(gradient, g, rows, columns, num_rows, num_columns)


@triton.jit
def _log1p(x):
    """Computes log(1 + x) for 0 <= x <= 1 in float32 precision, even for tiny x."""
    z = x / (2.0 + x)  # log(1 + x) = 2 artanh(z), and z <= 1/3
    square = z * z
    series = 1 / 13 * square + 1 / 11
    series = series * square + 1 / 9
    series = series * square + 1 / 7
    series = series * square + 1 / 5
    series = series * square + 1 / 3
    return 2.0 * z * (series * square + 1.0)


@triton.jit(
    do_not_specialize=["own_shift"], do_not_specialize_on_alignment=["row_own", "column_own"]
)
def compute_sigmoid(
    media,
    text,
    row_own,  # [num_rows] logits of the own pairs
    column_own,
    gradient,  # [num_rows, num_columns]
    totals,  # [3, blocks] sums of negatives' losses and, if G is written, G and G * scale * cosine
    row_codes,  # [column blocks, num_rows]
    column_codes,
    num_rows,
    num_columns,
    own_shift,
    scale,
    bias,
    tolerance,
    WRITES: tl.constexpr,  # whether G is written
    COUNTS: tl.constexpr,  # whether totals and codes are written
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    i, rows, j, columns = block_of_program(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    x = block_logits(
        media, text, rows, columns, num_rows, num_columns, scale, bias, WIDTH, BLOCK_WIDTH
    )
    x = negatives(x, rows, columns, num_rows, num_columns, own_shift)
    if COUNTS:
        write_nearness(row_codes, x, row_own, rows, num_rows, j, tolerance, 1)
        write_nearness(column_codes, x, column_own, columns, num_columns, i, tolerance, 0)
        losses = tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))
        tl.store(totals + tl.program_id(0), tl.sum(losses))
    if WRITES:
        # Exponentials of non-positive numbers do not overflow.
        e = tl.exp(-tl.abs(x))
        g = tl.where(x >= 0.0, 1.0, e) / (1.0 + e)
        if may_hold_own(rows, columns, own_shift):
            own = tl.load(row_own + rows, mask=rows < num_rows, other=0.0)
            is_own = inside(rows, columns, num_rows, num_columns)
            is_own = is_own & ((rows + own_shift)[:, None] == columns[None, :])
            g = tl.where(is_own, (-1.0 / (1.0 + tl.exp(own)))[:, None], g)
            x = tl.where(is_own, own[:, None], x)
        if COUNTS:
            offset = tl.num_programs(0) + tl.program_id(0)
            tl.store(totals + offset, tl.sum(g))
            cosines = tl.where(x == float("-inf"), 0.0, x - bias)
            tl.store(totals + tl.num_programs(0) + offset, tl.sum(g * cosines))
        write_block(gradient, g, rows, columns, num_rows, num_columns)
