"""Triton kernels for symmetric matrices of a stack: products at half the tiles, and the scaling of a Gram matrix.

A symmetric matrix is (padded, padded) in memory, its order k rounded up to whole tiles; tiles of the lower triangle are
computed, and mirrored where the whole matrix is read later.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _tile_of(t, HIGH: tl.constexpr):
    """Row and column of tile t of a lower triangle of square blocks, each HIGH tiles high; and the row of its block."""
    block_row = ((tl.sqrt(8.0 * (t // HIGH) + 1.0) - 0.999) * 0.5).to(tl.int32)
    block_column = t // HIGH - block_row * (block_row + 1) // 2
    return block_row * HIGH + t % HIGH, block_column, block_row


@triton.jit
def _write(
    out, added, value, matrix, i, j, padded, mirror, beta, gamma, ADD: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    at = i[:, None] * padded + j[None, :]
    out += matrix
    if ADD:
        value += beta * tl.load(added + matrix + at).to(tl.float32)
        value += tl.where(i[:, None] == j[None, :], gamma, 0.0)
    if HALF:
        half = value.to(tl.float16)
        tl.store(out + at, half)
        if mirror:
            tl.store(out + j[:, None] * padded + i[None, :], tl.trans(half))
    else:
        tl.store(out + at, value)


@triton.jit
def product_kernel(
    left, right, out, added, scales, alpha, beta, gamma, k, depth, stride, matrix, padded, tiles, total,
    ALONG_COLUMNS: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = alpha L R^T + beta added + gamma I, known to be symmetric; times scales[b] if SCALED.

    L and R are (k, depth) with rows ``stride`` apart, or (depth, k) ALONG_COLUMNS; one is ``matrix`` elements. HALF
    writes the whole of it in float16, else its lower triangle in float32.
    """
    high: tl.constexpr = COLUMNS // ROWS
    ii = tl.arange(0, ROWS)
    jj = tl.arange(0, COLUMNS)
    q = tl.arange(0, DEPTH)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        b = (tile // tiles).to(tl.int64)
        row, column, block_row = _tile_of(tile % tiles, high)
        i = row * ROWS + ii
        j = column * COLUMNS + jj
        if ALONG_COLUMNS:
            left_at = left + b * matrix + q[None, :] * stride + i[:, None]
            right_at = right + b * matrix + q[:, None] * stride + j[None, :]
            along = DEPTH * stride
        else:
            left_at = left + b * matrix + i[:, None] * stride + q[None, :]
            right_at = right + b * matrix + j[None, :] * stride + q[:, None]
            along = DEPTH
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, depth, DEPTH):
            if EVEN:
                sums = tl.dot(tl.load(left_at), tl.load(right_at), sums)
            else:
                deep = start + q < depth
                l_part = tl.load(left_at, mask=(i < k)[:, None] & deep[None, :], other=0.0)
                r_part = tl.load(right_at, mask=(j < k)[None, :] & deep[:, None], other=0.0)
                sums = tl.dot(l_part, r_part, sums)
            left_at += along
            right_at += along
        value = sums * (alpha * tl.load(scales + b) if SCALED else alpha)
        _write(out, added, value, b * padded * padded, i, j, padded, block_row != column, beta, gamma, ADD, HALF)


@triton.jit
def overlapped_product_kernel(
    left, right, out, added, scales, alpha, beta, gamma, depth, stride, matrix, padded, tiles, total,
    ALONG_COLUMNS: tl.constexpr, HALF: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``product_kernel`` for whole tiles, a fifth faster where ROWS x COLUMNS is 128 x 256.

    One loop over (tile, depth): the loads of a tile run while the one before is written. It lives on the edge of the
    register file: little more kept over the loop, or an offset in 64 bits for each element, makes it spill.
    """
    high: tl.constexpr = COLUMNS // ROWS
    ii = tl.arange(0, ROWS)
    jj = tl.arange(0, COLUMNS)
    q = tl.arange(0, DEPTH)
    steps = depth // DEPTH
    mine = (total - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    tile = tl.program_id(0) - tl.num_programs(0)
    step = -1
    if ALONG_COLUMNS:
        left_at = left + q[None, :] * stride + ii[:, None]
        right_at = right + q[:, None] * stride + jj[None, :]
        across = 1
        along = DEPTH * stride
    else:
        left_at = left + ii[:, None] * stride + q[None, :]
        right_at = right + jj[None, :] * stride + q[:, None]
        across = stride
        along = DEPTH
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    start = tl.full((), 0, tl.int64)
    row = 0
    column = 0
    block_row = 0
    for _ in range(0, mine * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            start = (tile // tiles).to(tl.int64) * matrix
            row, column, block_row = _tile_of(tile % tiles, high)
        l_part = tl.load(left_at + (start + row * ROWS * across + step * along))
        r_part = tl.load(right_at + (start + column * COLUMNS * across + step * along))
        sums = tl.dot(l_part, r_part, sums)
        if step == steps - 1:
            b = (tile // tiles).to(tl.int64)
            value = sums * (alpha * tl.load(scales + b) if SCALED else alpha)
            i = row * ROWS + ii
            at = b * padded * padded
            if HALF:
                j = column * COLUMNS + jj
                _write(out, added, value, at, i, j, padded, block_row != column, beta, gamma, ADD, True)
            else:  # in two halves, which fit into shared memory beside the loads that are under way
                first, second = tl.split(tl.permute(tl.reshape(value, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
                j = column * COLUMNS + tl.arange(0, COLUMNS // 2)
                _write(out, added, first, at, i, j, padded, False, beta, gamma, ADD, False)
                _write(out, added, second, at, i, j + COLUMNS // 2, padded, False, beta, gamma, ADD, False)
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def trace_kernel(gram, scales, inverse_norms, unit, k, padded, BLOCK: tl.constexpr):
    """With t = trace(C): scales = unit / t, and inverse_norms = 1 / sqrt(t); 0 for a zero matrix."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, k, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(gram + b * padded * padded + i.to(tl.int64) * (padded + 1), mask=i < k, other=0.0)
    trace = tl.sum(total, 0)
    tl.store(scales + b, tl.where(trace > 0, unit / trace, 0.0))
    tl.store(inverse_norms + b, tl.where(trace > 0, 1.0 / tl.sqrt_rn(trace), 0.0))


@triton.jit
def scale_kernel(gram, scales, out, padded, BLOCK: tl.constexpr):
    """out = scales[b] C, both triangles in float16, from the lower one in float32."""
    b = tl.program_id(1).to(tl.int64)
    row, column, _ = _tile_of(tl.program_id(0), 1)
    i = row * BLOCK + tl.arange(0, BLOCK)
    j = column * BLOCK + tl.arange(0, BLOCK)
    at = b * padded * padded + i[:, None] * padded + j[None, :]
    half = (tl.load(gram + at) * tl.load(scales + b)).to(tl.float16)
    tl.store(out + at, half)
    if row != column:
        tl.store(out + b * padded * padded + j[:, None] * padded + i[None, :], tl.trans(half))
