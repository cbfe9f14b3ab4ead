"""Triton kernels of MUD's step on a stack of equal matrices; ``mud_step`` launches them and says what each is for.

Names: b matrices, each (rows, columns) as it lies in memory; k is its shorter side, d its longer. ``along_columns`` is
True where the k vectors that MUD decorrelates are the columns (a tall weight). C is their Gram matrix, of which only
the lower triangle is written. Vectors are not normalised in memory: r = 1 / sqrt(diag C) is folded into the small
matrices, so the large one is read and written as little as possible.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _pointer(table, b, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(table + b).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _power_of_two_scale(bits):
    """Brings the float32 with these bits to [2^10, 2^11): 2^5 below float16's overflow, 2^24 above its normal numbers."""
    exponent = (bits >> 23) - 127
    return tl.exp2(tl.minimum(tl.maximum(10 - exponent, -100), 126).to(tl.float32))


@triton.jit
def momentum_kernel(
    grads, momenta, lookahead, largest_bits, scales, columns, stride, n, beta, sign,
    NESTEROV: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """M <- beta M + G; half-precision lookahead by the scale of the last step; largest magnitude, NaN as the largest."""
    b = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = (i // columns) * stride + i % columns
    grad = tl.load(_pointer(grads, b, GRAD) + at, mask=inside, other=0.0).to(tl.float32) * sign
    momentum_at = _pointer(momenta, b, tl.float32) + at
    momentum = beta * tl.load(momentum_at, mask=inside, other=0.0) + grad
    ahead = grad + beta * momentum if NESTEROV else momentum
    bits = tl.abs(ahead).to(tl.int32, bitcast=True)
    # An element that is not finite keeps its old momentum: the matrix is skipped, see repair_kernel.
    tl.store(momentum_at, momentum, mask=inside & (bits < 0x7F800000))
    tl.atomic_max(largest_bits + b, tl.max(bits, 0))
    scale = tl.load(tl.load(scales + b).to(tl.pointer_type(tl.float32)))
    tl.store(lookahead + b.to(tl.int64) * n + i, (ahead * scale).to(tl.float16), mask=inside)


@triton.jit
def repair_kernel(
    grads, momenta, lookahead, largest_bits, scales, columns, stride, n, beta, sign,
    NESTEROV: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Nothing where the last scale fitted; else the lookahead by the right one; 0 and the old momentum if not finite."""
    b = tl.program_id(1)
    bits = tl.load(largest_bits + b)
    scale = tl.load(tl.load(scales + b).to(tl.pointer_type(tl.float32)))
    scaled = bits.to(tl.float32, bitcast=True) * scale
    finite = bits < 0x7F800000
    if (finite and (scaled >= 4.0) and (scaled < 32768.0)) or (bits == 0):
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = (i // columns) * stride + i % columns
    grad = tl.load(_pointer(grads, b, GRAD) + at, mask=inside, other=0.0).to(tl.float32) * sign
    momentum_at = _pointer(momenta, b, tl.float32) + at
    momentum = tl.load(momentum_at, mask=inside, other=0.0)
    out = lookahead + b.to(tl.int64) * n + i
    if finite:
        ahead = grad + beta * momentum if NESTEROV else momentum
        tl.store(out, (ahead * _power_of_two_scale(bits)).to(tl.float16), mask=inside)
    else:
        before = tl.where(beta > 0, (momentum - grad) / beta, 0.0)
        written = tl.abs(grad + beta * momentum if NESTEROV else momentum).to(tl.int32, bitcast=True) < 0x7F800000
        # Where a huge gradient has swallowed the momentum there is nothing to bring back.
        before = tl.where(tl.abs(before) < tl.abs(grad) * 1e-6, 0.0, before)
        tl.store(momentum_at, before, mask=inside & written)
        tl.store(out, tl.zeros((BLOCK,), tl.float16), mask=inside)


@triton.jit
def gram_kernel(
    x, gram, k, d,
    ALONG_COLUMNS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Lower triangle of C = X X^T (X^T X along columns), float32, BLOCK x BLOCK a program."""
    b = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    while row * (row + 1) // 2 > tile:
        row -= 1
    while (row + 1) * (row + 2) // 2 <= tile:
        row += 1
    column = tile - row * (row + 1) // 2
    i = row * BLOCK + tl.arange(0, BLOCK)
    j = column * BLOCK + tl.arange(0, BLOCK)
    q = tl.arange(0, DEPTH)
    x += b * k * d
    if ALONG_COLUMNS:
        left = x + q[None, :] * k + i[:, None]
        right = x + q[:, None] * k + j[None, :]
        advance = DEPTH * k
    else:
        left = x + i[:, None] * d + q[None, :]
        right = x + j[None, :] * d + q[:, None]
        advance = DEPTH
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, d, DEPTH):
        if EVEN:
            total = tl.dot(tl.load(left), tl.load(right), total)
        else:
            a = tl.load(left, mask=(i[:, None] < k) & (start + q[None, :] < d), other=0.0)
            c = tl.load(right, mask=(j[None, :] < k) & (start + q[:, None] < d), other=0.0)
            total = tl.dot(a, c, total)
        left += advance
        right += advance
    out = gram + b * k * k + i[:, None] * k + j[None, :]
    tl.store(out, total, mask=(i[:, None] < k) & (j[None, :] < k))


@triton.jit
def _inverse_norms(gram, b, k, i):
    """r of the vectors i; 0 for a zero vector and beyond the edge."""
    square = tl.load(gram + b * k * k + i.to(tl.int64) * (k + 1), mask=i < k, other=0.0)
    return tl.where(square > 0, 1.0 / tl.sqrt(square), 0.0)


@triton.jit
def leaf_kernel(gram, inverses, k, blocks, PANEL: tl.constexpr, LEAF: tl.constexpr):
    """Inverse of each LEAF x LEAF diagonal block of T by forward substitution, into the PANEL x PANEL diagonal blocks."""
    b = tl.program_id(1).to(tl.int64)
    leaf = tl.program_id(0)
    i = tl.arange(0, LEAF)
    index = leaf * LEAF + i
    r = _inverse_norms(gram, b, k, index)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, LEAF):
        at = leaf * LEAF + row
        square = tl.load(gram + b * k * k + at.to(tl.int64) * (k + 1), mask=at < k, other=0.0)
        r_row = tl.where(square > 0, 1.0 / tl.sqrt(square), 0.0)
        inside = (index < k) & (i < row) & (at < k)
        line = tl.load(gram + b * k * k + at.to(tl.int64) * k + index, mask=inside, other=0.0) * r * r_row
        correction = tl.sum(line[:, None] * inverse, 0)
        inverse = tl.where(i[:, None] == row, inverse - correction[None, :], inverse)
    panel = (leaf * LEAF) // PANEL
    offset = (leaf * LEAF) % PANEL
    out = inverses + (b * blocks + panel) * PANEL * PANEL + (offset + i[:, None]) * PANEL + offset + i[None, :]
    tl.store(out, inverse)


@triton.jit
def _triangle(gram, b, k, i, j):
    """T[i, j] = C[i, j] r_i r_j for i below j."""
    inside = (i[:, None] < k) & (j[None, :] < k)
    t = tl.load(gram + b * k * k + i[:, None].to(tl.int64) * k + j[None, :], mask=inside, other=0.0)
    return t * _inverse_norms(gram, b, k, i)[:, None] * _inverse_norms(gram, b, k, j)[None, :]


@triton.jit
def merge_kernel(gram, inverses, k, blocks, PANEL: tl.constexpr, SIZE: tl.constexpr):
    """inv([A 0; T B]) from A^-1 and B^-1: writes the lower left SIZE x SIZE block -B^-1 T A^-1."""
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * 2 * SIZE
    offset = start % PANEL
    i = tl.arange(0, SIZE)
    inverses += (b * blocks + start // PANEL) * PANEL * PANEL
    a = tl.load(inverses + (offset + i[:, None]) * PANEL + offset + i[None, :])
    c = tl.load(inverses + (offset + SIZE + i[:, None]) * PANEL + offset + SIZE + i[None, :])
    t = _triangle(gram, b, k, start + SIZE + i, start + i)
    left = tl.dot(c.to(tl.float16), t.to(tl.float16))
    out = inverses + (offset + SIZE + i[:, None]) * PANEL + offset + i[None, :]
    tl.store(out, -tl.dot(left.to(tl.float16), a.to(tl.float16)))


@triton.jit
def panel_kernel(
    gram, inverses, panels, k, padded, blocks, GAIN: tl.constexpr, PANEL: tl.constexpr, WIDTH: tl.constexpr
):
    """Row block i of the solve as one product: [-W_i T_i, W_i diag(r)] with W_i the inverse of diagonal block i."""
    b = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    first = tl.program_id(0) * WIDTH
    if first >= (block + 1) * PANEL:
        return
    i = tl.arange(0, PANEL)
    j = first + tl.arange(0, WIDTH)
    out = panels + b * padded * padded + (block * PANEL + i[:, None]).to(tl.int64) * padded + j[None, :]
    inverses += (b * blocks + block) * PANEL * PANEL
    if first >= block * PANEL:
        w = tl.load(inverses + i[:, None] * PANEL + (j - block * PANEL)[None, :])
        gain = tl.minimum(_inverse_norms(gram, b, k, j) * GAIN, 60000.0)  # finite in float16, for any vector
        tl.store(out, (w * gain[None, :]).to(tl.float16))
    else:
        total = tl.zeros((PANEL, WIDTH), tl.float32)
        for start in range(0, PANEL, 64):
            q = start + tl.arange(0, 64)
            w = tl.load(inverses + i[:, None] * PANEL + q[None, :])
            t = _triangle(gram, b, k, block * PANEL + q, j)
            total = tl.dot(w.to(tl.float16), t.to(tl.float16), total)
        tl.store(out, (-total).to(tl.float16))


@triton.jit
def apply_kernel(
    panels, x, squares, k, d, padded, block,
    ALONG_COLUMNS: tl.constexpr, EVEN: tl.constexpr, PANEL: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Vectors of block ``block`` of X <- panel @ X in place, for WIDTH of their elements, and their squared norms."""
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)  # elements of the vectors
    v = tl.arange(0, PANEL)  # vectors of the block
    q = tl.arange(0, DEPTH)
    first = block * PANEL
    x += b * k * d
    panels += b * padded * padded + first.to(tl.int64) * padded
    if ALONG_COLUMNS:
        total = tl.zeros((WIDTH, PANEL), tl.float32)
        for start in range(0, first + PANEL, DEPTH):
            at = x + e[:, None].to(tl.int64) * k + start + q[None, :]
            if EVEN:
                old = tl.load(at)
            else:
                old = tl.load(at, mask=(e[:, None] < d) & (start + q[None, :] < k), other=0.0)
            total = tl.dot(old, tl.load(panels + v[None, :] * padded + start + q[:, None]), total)
        out = x + e[:, None].to(tl.int64) * k + first + v[None, :]
        tl.store(out, total.to(tl.float16), mask=(e[:, None] < d) & (first + v[None, :] < k))
        sums = tl.sum(total * total, 0)
    else:
        total = tl.zeros((PANEL, WIDTH), tl.float32)
        for start in range(0, first + PANEL, DEPTH):
            at = x + (start + q[:, None]).to(tl.int64) * d + e[None, :]
            if EVEN:
                old = tl.load(at)
            else:
                old = tl.load(at, mask=(e[None, :] < d) & (start + q[:, None] < k), other=0.0)
            total = tl.dot(tl.load(panels + v[:, None] * padded + start + q[None, :]), old, total)
        out = x + (first + v[:, None]).to(tl.int64) * d + e[None, :]
        tl.store(out, total.to(tl.float16), mask=(e[None, :] < d) & (first + v[:, None] < k))
        sums = tl.sum(total * total, 1)
    tl.atomic_add(squares + b * k + first + v, sums, mask=first + v < k)


@triton.jit
def update_kernel(
    weights, x, squares, largest_bits, scales, skipped, columns, stride, n, k, keep, rate,
    ALONG_COLUMNS: tl.constexpr, PARAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W <- keep W - rate Q with Q = X / |x|, unless the matrix is skipped, which is counted; scale for the next step."""
    b = tl.program_id(1)
    bits = tl.load(largest_bits + b)
    finite = bits < 0x7F800000
    if tl.program_id(0) == 0:
        if finite:
            scale_at = tl.load(scales + b).to(tl.pointer_type(tl.float32))
            tl.store(scale_at, tl.where(bits > 0, _power_of_two_scale(bits), tl.load(scale_at)))
        else:
            count = tl.load(skipped + b).to(tl.pointer_type(tl.int64))
            tl.store(count, tl.load(count) + 1)
    if not finite:
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = _pointer(weights, b, PARAM) + (i // columns) * stride + i % columns
    param = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    vector = i % columns if ALONG_COLUMNS else i // columns
    square = tl.load(squares + b * k + vector, mask=inside, other=1.0)
    q = tl.load(x + b.to(tl.int64) * n + i, mask=inside, other=0.0).to(tl.float32)
    q *= tl.where(square > 0, tl.rsqrt(square), 0.0)
    tl.store(at, keep * param - rate * q, mask=inside)
