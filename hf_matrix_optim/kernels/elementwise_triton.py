"""Triton kernels that read and write parameters and their state once: momentum and lookahead, second moment, update.

Matrices lie where they are; a table holds their addresses, so one launch steps a stack of b matrices of one shape. The
lookahead of a stack is gathered as float16 (b, rows, columns), by a power of two per matrix that is kept from step to
step: it depends on the largest magnitude, which is known only when the pass is over.
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
def _in_memory(i, columns, stride, PACKED: tl.constexpr):
    """Offset of element i of a matrix whose rows are ``stride`` apart."""
    if PACKED:
        return i
    else:
        return (i // columns) * stride + i % columns


@triton.jit
def _power_of_two_scale(bits, TOP: tl.constexpr):
    """Brings the float32 with these bits to [2^(TOP - 5), 2^(TOP - 4)); less if it is below 2^(TOP - 131)."""
    exponent = (bits >> 23) - 127
    return tl.exp2(tl.minimum(tl.maximum(TOP - 5 - exponent, -126), 126).to(tl.float32))


@triton.jit
def _half(ahead, scale, SIGN: tl.constexpr):
    if SIGN:
        return tl.where(ahead > 0, 1.0, tl.where(ahead < 0, -1.0, 0.0)).to(tl.float16)
    else:
        return (ahead * scale).to(tl.float16)


@triton.jit
def momentum_kernel(
    grads, momenta, lookahead, largest_bits, scales, columns, stride, n, beta, weight,
    NESTEROV: tl.constexpr, SIGN: tl.constexpr, PACKED: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """M <- beta M + w G; half-precision lookahead by the scale of the last step; largest magnitude, NaN as the largest."""
    b = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = _in_memory(i, columns, stride, PACKED)
    grad = tl.load(_pointer(grads, b, GRAD) + at, mask=inside, other=0.0).to(tl.float32) * weight
    momentum_at = _pointer(momenta, b, MOMENTUM) + at
    momentum = beta * tl.load(momentum_at, mask=inside, other=0.0).to(tl.float32) + grad
    ahead = grad + beta * momentum if NESTEROV else momentum
    bits = tl.abs(ahead).to(tl.int32, bitcast=True)
    # An element that is not finite keeps its old momentum: the matrix is skipped, see repair_kernel.
    tl.store(momentum_at, momentum, mask=inside & (bits < 0x7F800000))
    tl.atomic_max(largest_bits + b, tl.max(bits, 0))
    scale = tl.load(tl.load(scales + b).to(tl.pointer_type(tl.float32)))
    tl.store(lookahead + b.to(tl.int64) * n + i, _half(ahead, scale, SIGN), mask=inside)


@triton.jit
def repair_kernel(
    grads, momenta, lookahead, largest_bits, scales, columns, stride, n, beta, weight,
    NESTEROV: tl.constexpr, SIGN: tl.constexpr, PACKED: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Nothing where the last scale fitted; else the lookahead by the right one; 0 if not finite.

    The old momentum of a matrix that is skipped comes back by arithmetic, (M - w G) / beta, so up to its rounding.
    """
    b = tl.program_id(1)
    bits = tl.load(largest_bits + b)
    scale = tl.load(tl.load(scales + b).to(tl.pointer_type(tl.float32)))
    scaled = bits.to(tl.float32, bitcast=True) * scale
    finite = bits < 0x7F800000
    exponent = (scaled.to(tl.int32, bitcast=True) >> 23) - 127
    fits = SIGN or ((exponent >= TOP - 13) and (exponent < TOP))
    if (finite and fits) or (bits == 0):
        return
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < n
        at = _in_memory(i, columns, stride, PACKED)
        grad = tl.load(_pointer(grads, b, GRAD) + at, mask=inside, other=0.0).to(tl.float32) * weight
        momentum_at = _pointer(momenta, b, MOMENTUM) + at
        momentum = tl.load(momentum_at, mask=inside, other=0.0).to(tl.float32)
        out = lookahead + b.to(tl.int64) * n + i
        if finite:
            ahead = grad + beta * momentum if NESTEROV else momentum
            tl.store(out, _half(ahead, _power_of_two_scale(bits, TOP), SIGN), mask=inside)
        else:
            before = tl.where(beta > 0, (momentum - grad) / beta, 0.0)
            written = tl.abs(grad + beta * momentum).to(tl.int32, bitcast=True) < 0x7F800000
            # Where a huge gradient has swallowed the momentum there is nothing to bring back.
            swallowed: tl.constexpr = 1e-6 if MOMENTUM == tl.float32 else 1e-2
            before = tl.where(tl.abs(before) < tl.abs(grad) * swallowed, 0.0, before)
            tl.store(momentum_at, before, mask=inside & written)
            tl.store(out, tl.zeros((BLOCK,), tl.float16), mask=inside)


@triton.jit
def second_moment_kernel(
    second_moments, directions, norms, largest_bits, squares, scalars, columns, stride, n, beta2, eps,
    PACKED: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """V <- beta2 V + (1 - beta2) O O; D = O / (sqrt(V) / sqrt(1 - beta2^t) + eps) over O; sums of D D, a block each."""
    b = tl.program_id(1)
    if tl.load(largest_bits + b) >= 0x7F800000:
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = _pointer(second_moments, b, tl.float32) + _in_memory(i, columns, stride, PACKED)
    direction_at = directions + b.to(tl.int64) * n + i
    orthogonal = tl.load(direction_at, mask=inside, other=0.0).to(tl.float32) * tl.load(norms + b)
    second = beta2 * tl.load(at, mask=inside, other=0.0) + (1 - beta2) * orthogonal * orthogonal
    tl.store(at, second, mask=inside)
    correction = tl.load(scalars + 1 + b) if EACH else tl.load(scalars + 1)
    deviation = tl.sqrt_rn(second) * correction + eps
    adapted = tl.where(deviation > 0, orthogonal / deviation, 0.0)
    tl.store(direction_at, adapted.to(tl.float16), mask=inside)
    tl.store(squares + b * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(inside, adapted * adapted, 0.0), 0))


@triton.jit
def inverse_rms_kernel(squares, inverse_rms, blocks, n, eps, BLOCK: tl.constexpr):
    """1 / (RMS + eps) of each matrix from sums of squares, (b, blocks); 0 for a zero matrix. The order is fixed."""
    b = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(squares + b * blocks + i, mask=i < blocks, other=0.0)
    rms = tl.sqrt_rn(tl.sum(total, 0) / n) + eps
    tl.store(inverse_rms + b, tl.where(rms > 0, 1.0 / rms, 0.0))


@triton.jit
def update_kernel(
    weights, directions, factors, largest_bits, scales, skipped, scalars, columns, stride, n, k, scale, weight_decay,
    PER_VECTOR: tl.constexpr, ALONG_COLUMNS: tl.constexpr, PACKED: tl.constexpr, TOP: tl.constexpr,
    PARAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W <- (1 - lr weight_decay) W - lr scale factor D, unless the matrix is skipped, which is counted.

    ``factors`` are (b,), or (b, k) where each vector has its own. Also keeps the lookahead's scale for the next step.
    """
    b = tl.program_id(1)
    bits = tl.load(largest_bits + b)
    finite = bits < 0x7F800000
    if tl.program_id(0) == 0:
        if finite:
            scale_at = tl.load(scales + b).to(tl.pointer_type(tl.float32))
            tl.store(scale_at, tl.where(bits > 0, _power_of_two_scale(bits, TOP), tl.load(scale_at)))
        else:
            count = tl.load(skipped + b).to(tl.pointer_type(tl.int64))
            tl.store(count, tl.load(count) + 1)
    if not finite:
        return
    lr = tl.load(scalars)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = _pointer(weights, b, PARAM) + _in_memory(i, columns, stride, PACKED)
    param = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if PER_VECTOR:
        vector = i % columns if ALONG_COLUMNS else i // columns
        factor = tl.load(factors + b * k + vector, mask=inside, other=0.0)
    else:
        factor = tl.load(factors + b)
    direction = tl.load(directions + b.to(tl.int64) * n + i, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(at, (1 - lr * weight_decay) * param - lr * scale * direction, mask=inside)
