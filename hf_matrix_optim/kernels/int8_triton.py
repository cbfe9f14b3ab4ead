"""Triton kernels that bring momenta in int8 blocks to float32 and back, all of a table by one launch each way.

A program takes ROWS blocks of one momentum; ``owners`` says of which. Both are bit for bit the plain functions in
int8_momentum.py: launch them with ``enable_fp_fusion=False``.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from hf_matrix_optim.kernels.elementwise_triton import _pointer


@triton.jit
def _blocks_of(owners, table, count, ROWS: tl.constexpr):
    """Owner of this program, its blocks, (ROWS,) int64, which of them there are, and where they are among all."""
    owner = tl.load(owners + tl.program_id(0))
    first_program = tl.load(table + 2 * count + owner)
    blocks = tl.load(table + 3 * count + owner)
    first_block = tl.load(table + 4 * count + owner)
    row = (tl.program_id(0) - first_program) * ROWS + tl.arange(0, ROWS)
    return owner, row, row < blocks, first_block + row


@triton.jit
def dequantize_kernel(
    owners, table, values, count, inverse_square, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """x = level |level| / LEVELS^2 scale."""
    owner, row, inside, row_of_all = _blocks_of(owners, table, count, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    levels_at = _pointer(table, owner, tl.int8) + row[:, None] * BLOCK + column
    level = tl.load(levels_at, mask=inside[:, None], other=0).to(tl.float32)
    scale = tl.load(_pointer(table + count, owner, tl.float32) + row, mask=inside, other=0.0)
    value = level * tl.abs(level) * inverse_square * scale[:, None]
    tl.store(values + row_of_all[:, None] * BLOCK + column, value, mask=inside[:, None])


@triton.jit
def quantize_kernel(owners, table, values, count, LEVELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """scale = max |x|, 1 for zeros; level = round(LEVELS sign(x) sqrt(|x| / scale)), halves to even."""
    owner, row, inside, row_of_all = _blocks_of(owners, table, count, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    value = tl.load(values + row_of_all[:, None] * BLOCK + column, mask=inside[:, None], other=0.0)
    magnitude = tl.abs(value)
    scale = tl.max(magnitude, 1)
    tl.store(_pointer(table + count, owner, tl.float32) + row, scale, mask=inside)
    # Division and root flush subnormal numbers to zero: below 2^-62 both sides are multiplied by 2^64, which is exact.
    lift = tl.where(scale < 2.168404344971009e-19, 18446744073709551616.0, 1.0)
    divisor = tl.where(scale > 0, scale * lift, 1.0)
    magnitude, divisor = tl.broadcast(magnitude * lift[:, None], divisor[:, None])
    # Below 2^22, adding 1.5 * 2^23 leaves no bits after the point.
    level = (tl.sqrt_rn(tl.div_rn(magnitude, divisor)) * LEVELS + 12582912.0) - 12582912.0
    level = tl.where(value < 0, -level, level).to(tl.int8)
    tl.store(_pointer(table, owner, tl.int8) + row[:, None] * BLOCK + column, level, mask=inside[:, None])
