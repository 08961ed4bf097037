"""Triton functions shared by the kernels of both losses; logits are never written to memory.

Each program computes one block of a tile from the features, and writes its partial results to its
own slot. `fold` adds them in a fixed order, so that results do not depend on which program finishes
first. Logits and sums are float32; float32 features are multiplied in full precision.

Each row and column of a block has a nearness code. It is -1 if another counterpart is nearer than
its own, otherwise the number of counterparts that tie with its own.

Imported only if the kernels are used; see backend.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_of_program(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Returns (row block, its rows, column block, its columns) of this program.

    Programs are ordered in groups of 8 row blocks, which share the features in the L2 cache.
    """
    program = tl.program_id(0)
    num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    per_group = 8 * tl.cdiv(num_columns, BLOCK_COLUMNS)
    first = program // per_group * 8
    height = tl.minimum(num_row_blocks - first, 8)
    within = program % per_group
    i, j = first + within % height, within // height
    rows = i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = j * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return i, rows, j, columns


@triton.jit
def block_logits(
    media,
    text,
    rows,
    columns,
    num_rows,
    num_columns,
    scale,
    bias,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Computes the logits of a block, [rows, columns].

    Beyond the tile's edges, its last row or column is repeated.
    """
    k = tl.arange(0, BLOCK_WIDTH)
    row = tl.minimum(rows, num_rows - 1).to(tl.int64)
    column = tl.minimum(columns, num_columns - 1).to(tl.int64)
    media += row[:, None] * WIDTH + k[None, :]
    text += column[None, :] * WIDTH + k[:, None]
    products = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        if WIDTH % BLOCK_WIDTH == 0:
            left, right = tl.load(media), tl.load(text)
        else:
            left = tl.load(media, mask=(k < WIDTH - start)[None, :], other=0.0)
            right = tl.load(text, mask=(k < WIDTH - start)[:, None], other=0.0)
        products = tl.dot(left, right, products, input_precision="ieee")
        media += BLOCK_WIDTH
        text += BLOCK_WIDTH
    return products * scale + bias


@triton.jit
def may_hold_own(rows, columns, own_shift):
    """Returns whether the block may contain own pairs, where row + own_shift = column."""
    first, stop = tl.min(rows, 0) + own_shift, tl.max(rows, 0) + own_shift
    return (first <= tl.max(columns, 0)) & (stop >= tl.min(columns, 0))


@triton.jit
def inside(rows, columns, num_rows, num_columns):
    """Returns whether each entry of the block lies in the tile, [rows, columns]."""
    return (rows < num_rows)[:, None] & (columns < num_columns)[None, :]


@triton.jit
def negatives(logits, rows, columns, num_rows, num_columns, own_shift):
    """Sets logits to minus infinity for own pairs and beyond the tile's edges."""
    is_cut = (tl.max(rows, 0) >= num_rows) | (tl.max(columns, 0) >= num_columns)
    if is_cut | may_hold_own(rows, columns, own_shift):
        is_other = (rows + own_shift)[:, None] != columns[None, :]
        is_negative = inside(rows, columns, num_rows, num_columns) & is_other
        logits = tl.where(is_negative, logits, float("-inf"))
    return logits


@triton.jit
def write_nearness(codes, logits, own, indices, num_indices, block, tolerance, AXIS: tl.constexpr):
    """Writes the block's nearness code of each row or column; returns the largest logits."""
    near = tl.load(own + indices, mask=indices < num_indices, other=float("inf"))
    largest = tl.max(logits, AXIS)
    code = tl.where(largest > near + tolerance, -1, 0)
    may_tie = (largest >= near - tolerance) & (largest <= near + tolerance)
    if tl.max(may_tie.to(tl.int32), 0) > 0:
        is_as_near = logits >= tl.expand_dims(near - tolerance, AXIS)
        code = tl.where(may_tie, tl.sum(is_as_near.to(tl.int32), AXIS), code)
    offset = block.to(tl.int64) * num_indices + indices
    tl.store(codes + offset, code, mask=indices < num_indices)
    return largest


@triton.jit
def write_block(gradient, values, rows, columns, num_rows, num_columns):
    """Writes the values of a block, [rows, columns], to a tile in its dtype."""
    offset = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    mask = inside(rows, columns, num_rows, num_columns)
    tl.store(gradient + offset, values.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def _fold_axis(
    sums,
    codes,
    totals,
    is_beaten,
    num_ties,
    shift,
    block,
    num_blocks,
    num_indices,
    HAS_SUMS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    indices = block * BLOCK + tl.arange(0, BLOCK)
    mask = indices < num_indices
    total = tl.zeros((BLOCK,), tl.float64)
    beaten = tl.zeros((BLOCK,), tl.int32)
    ties = tl.zeros((BLOCK,), tl.int32)
    after_sums = tl.cast(num_blocks, tl.int64) * num_indices
    for number in range(num_blocks):
        offset = tl.cast(number, tl.int64) * num_indices + indices
        code = tl.load(codes + offset, mask=mask, other=0)
        beaten = tl.where(code < 0, 1, beaten)
        ties += tl.maximum(code, 0)
        if HAS_SUMS:
            addend = tl.load(sums + offset, mask=mask, other=0.0).to(tl.float64)
            if not IS_PLAIN:
                largest = tl.load(sums + after_sums + offset, mask=mask, other=0.0).to(tl.float64)
                addend *= tl.exp(largest - tl.load(shift))
            total += addend
    beaten = tl.maximum(beaten, tl.load(is_beaten + indices, mask=mask, other=0).to(tl.int32))
    tl.store(is_beaten + indices, beaten.to(tl.uint8), mask=mask)
    tl.store(num_ties + indices, tl.load(num_ties + indices, mask=mask) + ties, mask=mask)
    if HAS_SUMS:
        tl.store(totals + indices, tl.load(totals + indices, mask=mask) + total, mask=mask)


KEPT = ["totals", "beaten", "ties"]


@triton.jit(
    do_not_specialize_on_alignment=[f"{side}_{kept}" for side in ("row", "column") for kept in KEPT]
)
def fold(
    row_sums,
    row_codes,  # [column blocks, num_rows]
    row_totals,  # [num_rows] float64 sum of exp(l - shift) so far
    row_beaten,  # [num_rows] uint8
    row_ties,  # [num_rows] int32
    column_sums,
    column_codes,
    column_totals,
    column_beaten,
    column_ties,
    shift,  # [1] float64
    num_rows,
    num_columns,
    num_row_blocks,
    num_column_blocks,
    HAS_SUMS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    num_programs = tl.cdiv(num_rows, BLOCK)
    if block < num_programs:
        _fold_axis(
            row_sums,
            row_codes,
            row_totals,
            row_beaten,
            row_ties,
            shift,
            block,
            num_column_blocks,
            num_rows,
            HAS_SUMS,
            IS_PLAIN,
            BLOCK,
        )
    else:
        _fold_axis(
            column_sums,
            column_codes,
            column_totals,
            column_beaten,
            column_ties,
            shift,
            block - num_programs,
            num_row_blocks,
            num_columns,
            HAS_SUMS,
            IS_PLAIN,
            BLOCK,
        )
