"""Triton kernels for one pass of MUD over a stack: the inverse of the triangle T by products alone, and its product.

T is the lower triangle of the vectors' normalised Gram matrix, T[i, j] = C[i, j] r_i r_j with r = 1 / sqrt(diag C) and
unit diagonal. T + T^T = G + I for a Gram matrix G >= 0, so every diagonal block of T has an inverse of norm at most 2
and the recursion inv([A 0; B D]) = [A^-1 0; -D^-1 B A^-1  D^-1] needs no solver. It is kept twice: ``inverse``, and
``solve`` = inverse diag(r), which is applied to vectors that nothing has normalised. Both are (padded, padded), float16.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def norms_kernel(gram, norms, k, padded, BLOCK: tl.constexpr):
    """r = 1 / sqrt(diag C); 0 for a zero vector and beyond k."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    square = tl.load(gram + b * padded * padded + i.to(tl.int64) * (padded + 1), mask=i < k, other=0.0)
    tl.store(norms + b * padded + i, tl.where(square > 0, 1.0 / tl.sqrt_rn(square), 0.0), mask=i < padded)


@triton.jit
def _gain(norms, b, padded, j, GAIN: tl.constexpr):
    """r_j as it enters ``solve``, finite in float16 for any vector; GAIN keeps long ones out of subnormal numbers."""
    return tl.minimum(tl.load(norms + b * padded + j) * GAIN, 30000.0)


@triton.jit
def _triangle(gram, norms, b, padded, i, j):
    """T[i, j] for i below j; what lies beyond k is 0, because the norms are."""
    t = tl.load(gram + b * padded * padded + i[:, None] * padded + j[None, :])
    r_i = tl.load(norms + b * padded + i)
    r_j = tl.load(norms + b * padded + j)
    return tl.where((r_i[:, None] > 0) & (r_j[None, :] > 0), t * r_i[:, None] * r_j[None, :], 0.0)


@triton.jit
def leaf_kernel(
    gram, norms, inverse, solve, padded, GAIN: tl.constexpr, LEAF: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Inverse of each LEAF x LEAF diagonal block by forward substitution; zeros in the rest of its WIDTH columns."""
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * LEAF
    i = tl.arange(0, LEAF)
    r = tl.load(norms + b * padded + first + i)
    found = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, LEAF):
        r_row = tl.load(norms + b * padded + first + row)
        line = tl.load(gram + b * padded * padded + (first + row) * padded + first + i)
        line = tl.where((i < row) & (r > 0) & (r_row > 0), line * r * r_row, 0.0)
        correction = tl.sum(line[:, None] * found, 0)
        found = tl.where(i[:, None] == row, found - correction[None, :], found)
    panel = first // WIDTH * WIDTH
    at = b * padded * padded + (first + i[:, None]) * padded + panel + tl.arange(0, WIDTH)[None, :]
    tl.store(inverse + at, tl.zeros((LEAF, WIDTH), tl.float16))
    tl.store(solve + at, tl.zeros((LEAF, WIDTH), tl.float16))
    tl.debug_barrier()
    at = b * padded * padded + (first + i[:, None]) * padded + first + i[None, :]
    tl.store(inverse + at, found.to(tl.float16))
    tl.store(solve + at, (found * _gain(norms, b, padded, first + i, GAIN)[None, :]).to(tl.float16))


@triton.jit
def merge_kernel(gram, norms, inverse, solve, padded, GAIN: tl.constexpr, SIZE: tl.constexpr):
    """The SIZE x SIZE block -D^-1 B A^-1 of each pair of diagonal blocks, for sizes that one program can hold."""
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * 2 * SIZE
    i = start + tl.arange(0, SIZE)
    j = i + SIZE
    at = b * padded * padded
    a = tl.load(inverse + at + i[:, None] * padded + i[None, :])
    d = tl.load(inverse + at + j[:, None] * padded + j[None, :])
    t = _triangle(gram, norms, b, padded, j, i)
    left = tl.dot(d, t.to(tl.float16))
    block = -tl.dot(left.to(tl.float16), a)
    at += j[:, None] * padded + i[None, :]
    tl.store(inverse + at, block.to(tl.float16))
    tl.store(solve + at, (block * _gain(norms, b, padded, i, GAIN)[None, :]).to(tl.float16))


@triton.jit
def left_factor_kernel(
    gram, norms, inverse, scratch, size, height, padded, pairs, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """D^-1 B of each pair of blocks of ``size``, (height, size) float16 into ``scratch``; the last pair may be cut."""
    b = tl.program_id(2).to(tl.int64)
    pair = tl.program_id(1)
    across = size // TILE
    first = pair * 2 * size
    row = first + size + tl.program_id(0) // across * TILE
    if row >= padded:
        return
    column = first + tl.program_id(0) % across * TILE
    i = row + tl.arange(0, TILE)
    j = column + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(first + size, row + TILE, DEPTH):
        q = start + tl.arange(0, DEPTH)
        d = tl.load(inverse + b * padded * padded + i[:, None] * padded + q[None, :])
        total = tl.dot(d, _triangle(gram, norms, b, padded, q, j).to(tl.float16), total)
    out = scratch + (b * pairs + pair) * height * size + (i - first - size)[:, None] * size + (j - first)[None, :]
    tl.store(out, total.to(tl.float16))


@triton.jit
def right_factor_kernel(
    scratch, norms, inverse, solve, size, height, padded, pairs, GAIN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """-(D^-1 B) A^-1 of each pair of blocks of ``size``, from ``left_factor_kernel``'s scratch."""
    b = tl.program_id(2).to(tl.int64)
    pair = tl.program_id(1)
    across = size // TILE
    first = pair * 2 * size
    row = first + size + tl.program_id(0) // across * TILE
    if row >= padded:
        return
    column = first + tl.program_id(0) % across * TILE
    i = row + tl.arange(0, TILE)
    j = column + tl.arange(0, TILE)
    scratch += (b * pairs + pair) * height * size
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(column, first + size, DEPTH):
        q = start + tl.arange(0, DEPTH)
        y = tl.load(scratch + (i - first - size)[:, None] * size + (q - first)[None, :])
        a = tl.load(inverse + b * padded * padded + q[:, None] * padded + j[None, :])
        total = tl.dot(y, a, total)
    at = b * padded * padded + i[:, None] * padded + j[None, :]
    tl.store(inverse + at, (-total).to(tl.float16))
    tl.store(solve + at, (-total * _gain(norms, b, padded, j, GAIN)[None, :]).to(tl.float16))


@triton.jit
def apply_kernel(
    solve, x, out, squares, k, d, padded,
    ALONG_COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = solve X for VECTORS of its vectors and WIDTH of their elements; squared norms a WIDTH, (b, d / WIDTH, k)."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.cdiv(k, VECTORS)
    widths = tl.cdiv(d, WIDTH)
    row = rows - 1 - tl.program_id(0) % rows  # neighbours share X; the longest products come first
    part = tl.program_id(0) // rows
    v = row * VECTORS + tl.arange(0, VECTORS)
    e = part * WIDTH + tl.arange(0, WIDTH)
    q = tl.arange(0, DEPTH)
    depth = tl.minimum((row + 1) * VECTORS, padded)
    x += b * k * d
    out += b * k * d
    solve += b * padded * padded
    if ALONG_COLUMNS:
        total = tl.zeros((WIDTH, VECTORS), tl.float32)
        x_at = x + e[:, None] * k + q[None, :]
        solve_at = solve + v[None, :] * padded + q[:, None]
        for start in range(0, depth, DEPTH):
            if EVEN:
                total = tl.dot(tl.load(x_at), tl.load(solve_at), total)
            else:
                inside = (e < d)[:, None] & (start + q < k)[None, :]
                total = tl.dot(tl.load(x_at, mask=inside, other=0.0), tl.load(solve_at), total)
            x_at += DEPTH
            solve_at += DEPTH
        tl.store(out + e[:, None] * k + v[None, :], total.to(tl.float16), mask=(e < d)[:, None] & (v < k)[None, :])
        sums = tl.sum(total * total, 0)
    else:
        total = tl.zeros((VECTORS, WIDTH), tl.float32)
        x_at = x + q[:, None] * d + e[None, :]
        solve_at = solve + v[:, None] * padded + q[None, :]
        for start in range(0, depth, DEPTH):
            if EVEN:
                total = tl.dot(tl.load(solve_at), tl.load(x_at), total)
            else:
                inside = (e < d)[None, :] & (start + q < k)[:, None]
                total = tl.dot(tl.load(solve_at), tl.load(x_at, mask=inside, other=0.0), total)
            x_at += DEPTH * d
            solve_at += DEPTH
        tl.store(out + v[:, None] * d + e[None, :], total.to(tl.float16), mask=(v < k)[:, None] & (e < d)[None, :])
        sums = tl.sum(total * total, 1)
    tl.store(squares + (b * widths + part) * k + v, sums, mask=v < k)


@triton.jit
def inverse_lengths_kernel(squares, lengths, k, parts, BLOCK: tl.constexpr):
    """1 / norm of each vector from its parts' squared norms, summed in a fixed order; 0 for a zero vector."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        total += tl.load(squares + (b * parts + part) * k + i, mask=i < k, other=0.0)
    tl.store(lengths + b * k + i, tl.where(total > 0, 1.0 / tl.sqrt_rn(total), 0.0), mask=i < k)
