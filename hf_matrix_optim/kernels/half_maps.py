"""The maps from lookahead to direction on a float16 stack: ``newton_schulz`` and ``decorrelate`` by Triton kernels.

Both read and give (b, rows, columns) as the matrices lie in memory, k the shorter side and d the longer; what the
plain functions would divide the large matrix by is kept in a factor beside it. Products are in float16 with sums in
float32.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_matrix_optim.kernels.launch import launch
from hf_matrix_optim.newton_schulz import Coefficients

TILE = 128
DEPTH = 64
LEAF = 32  # size up to which a diagonal block is inverted by substitution
IN_ONE_PROGRAM = 128  # size up to which two diagonal blocks are merged by one program
GAIN = 64.0
#: A Gram matrix in float16 squares the condition number, and the error grows with each step: restart after three.
STEPS_PER_GRAM = 3
#: Below this ratio of the sides products with the large matrix cost less than the k x k ones that replace them.
LEAST_RATIO = 1.5
#: Exponents: the largest magnitude of a lookahead is brought below 2^(TOP - 4) and may grow to 2^TOP.
DECORRELATE_TOP = 15


@dataclass(frozen=True)
class Sides:
    """Shape of one matrix as it lies in memory; ``along_columns`` if the k vectors are its columns."""

    rows: int
    columns: int
    along_columns: bool

    @property
    def k(self) -> int:
        return self.columns if self.along_columns else self.rows

    @property
    def d(self) -> int:
        return self.rows if self.along_columns else self.columns

    @property
    def padded(self) -> int:
        """Order of the k x k matrices in memory."""
        return -(-self.k // _tile_columns(self.k)) * _tile_columns(self.k)


@functools.cache
def _tile_columns(k: int) -> int:
    """256 or 128, whichever computes the lower triangle sooner: wide tiles run a fifth faster, but waste more."""
    wide, narrow = -(-k // 256), -(-k // 128)
    return 256 if 4 * wide * (wide + 1) / 2 < 1.2 * narrow * (narrow + 1) / 2 else 128


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def newton_schulz_top(rows: int, columns: int) -> int:
    """The largest exponent at which sqrt(trace) times an orthogonal matrix is finite in float16."""
    # In every table singular values stay below 1.99 from the first step on, and so do elements.
    return int(15.0 - 0.5 * math.log2(rows * columns))


def newton_schulz_bytes(sides: Sides) -> int:
    """Workspace of ``newton_schulz_half`` for one matrix."""
    return 2 * sides.rows * sides.columns + 8 * sides.padded**2 + 8


def decorrelate_bytes(sides: Sides) -> int:
    """Workspace of ``decorrelate_half`` for one matrix."""
    k, d, padded = sides.k, sides.d, sides.padded
    scratch = max((pairs * min(size, padded - size) * size for size, pairs in _merges(padded)), default=0)
    return 2 * k * d + 8 * padded**2 + 2 * scratch + 4 * padded + 4 * k * (1 - (-d // TILE))


def _merges(padded: int) -> list[tuple[int, int]]:
    """(size, pairs) of the merges that take more than one program a pair."""
    merges, size = [], 2 * IN_ONE_PROGRAM
    while size < padded:
        merges.append((size, -(-(padded - size) // (2 * size))))
        size *= 2
    return merges


def _product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    sides: Sides,
    *,
    gram: bool = False,
    alpha: float = 1.0,
    added: Tensor | None = None,
    beta: float = 0.0,
    gamma: float = 0.0,
    scales: Tensor | None = None,
) -> None:
    """out = alpha scales L R^T + beta added + gamma I, (b, padded, padded); L is the large matrix if ``gram``."""
    from hf_matrix_optim.kernels import symmetric_triton as kernels

    count, k, padded = left.size(0), sides.k, sides.padded
    depth = sides.d if gram else -(-k // DEPTH) * DEPTH
    columns = _tile_columns(k)
    blocks = padded // columns
    tiles = blocks * (blocks + 1) // 2 * (columns // TILE)
    programs = min(tiles * count, _processors(left.device) * (1 if columns == 256 else 2))
    even = not gram or (k % columns == 0 and depth % DEPTH == 0)
    tensors = (left, right, out, out if added is None else added, out if scales is None else scales)
    matrix = (sides.columns, k * sides.d) if gram else (padded, padded * padded)
    sizes = (depth, *matrix, padded, tiles, tiles * count)
    constants = {
        "ALONG_COLUMNS": gram and sides.along_columns,
        "HALF": out.dtype == torch.float16,
        "ADD": added is not None,
        "SCALED": scales is not None,
        "ROWS": TILE,
        "COLUMNS": columns,
        "DEPTH": DEPTH,
        "num_warps": 8 if columns == 256 else 4,
        "num_stages": 3,
    }
    if columns == 256 and even:
        launch(kernels.overlapped_product_kernel, (programs,), *tensors, alpha, beta, gamma, *sizes, **constants)
    else:
        launch(kernels.product_kernel, (programs,), *tensors, alpha, beta, gamma, k, *sizes, EVEN=even, **constants)


def newton_schulz_half(
    x: Tensor, sides: Sides, coefficients: Coefficients, spare: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Newton-Schulz in Gram space: O = P X with P a polynomial in A = X X^T, from products of k x k matrices alone.

    With Q = a I + b A + c A^2 a step is P <- Q P, A <- Q (Q A): everything is a polynomial in one symmetric matrix, so
    it commutes and half of each product is enough. After ``STEPS_PER_GRAM`` steps X <- P X, and the Gram matrix is
    taken anew: its rounding errors in small singular values grow with every step that is built on it. A matrix that is
    nearly square restarts after each step.

    Args:
        x: (b, rows, columns) float16 and finite, below 2^newton_schulz_top in magnitude; overwritten.
        sides: shape of one matrix.
        coefficients: (a, b, c) of each step.
        spare: of the shape of ``x``, overwritten; made here if it is not given.

    Returns:
        (b, rows, columns) float16, which is ``x`` or ``spare``, and (b,) float32 that it is to be multiplied by.

    Source: ``newton_schulz``. A is kept times 2^floor(log2 k), at most 2^13, so that it fills float16's range.
    """
    from hf_matrix_optim.kernels.symmetric_triton import scale_kernel, trace_kernel

    count, k, padded = x.size(0), sides.k, sides.padded
    y = torch.empty_like(x) if spare is None else spare
    scales, norms = torch.empty(2, count, dtype=torch.float32, device=x.device).unbind()
    small = torch.empty(4, count, padded, padded, dtype=torch.float16, device=x.device)
    gram = small[2:].view(torch.float32).view(count, padded, padded)  # read before its two buffers are needed
    unit = 2.0 ** min(k.bit_length() - 1, 13)

    per_gram = STEPS_PER_GRAM if sides.d >= LEAST_RATIO * k else 1
    for first in range(0, len(coefficients), per_gram):
        steps = coefficients[first : first + per_gram]
        free = list(small.unbind())
        a_matrix = free.pop(0)
        if first == 0:
            _product(x, x, gram, sides, gram=True)
            launch(trace_kernel, (count,), gram, scales, norms, unit, k, padded, BLOCK=1024)
            side = padded // 64
            launch(scale_kernel, (side * (side + 1) // 2, count), gram, scales, a_matrix, padded, BLOCK=64)
        else:
            _product(x, x, a_matrix, sides, gram=True, scales=scales)
        polynomial = q = free.pop(0)
        for i, (a, b, c) in enumerate(steps):
            if i > 0:
                q = free.pop(0)
            _product(a_matrix, a_matrix, q, sides, alpha=c / unit**2, added=a_matrix, beta=b / unit, gamma=a)
            if i > 0:
                before, polynomial = polynomial, free.pop(0)
                _product(q, before, polynomial, sides)
                free.append(before)
            if i < len(steps) - 1:
                half_step = free.pop(0)
                _product(q, a_matrix, half_step, sides)
                _product(q, half_step, a_matrix, sides)
                free.append(half_step)
            if i > 0:
                free.append(q)
        factor = polynomial[:, :k, :k]
        torch.bmm(x, factor, out=y) if sides.along_columns else torch.bmm(factor, x, out=y)
        x, y = y, x
    return x, norms


def decorrelate_half(x: Tensor, sides: Sides, passes: int, spare: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """MUD's map: the inverse of the triangle of the vectors' Gram matrix, applied to them.

    Args:
        x: (b, rows, columns) float16 and finite; overwritten.
        sides: shape of one matrix.
        passes: at least 1.
        spare: of the shape of ``x``, overwritten; made here if it is not given.

    Returns:
        (b, rows, columns) float16, which is ``x`` or ``spare``, and (b, k) float32, a factor for each vector.

    Source: ``decorrelate``. The triangle is inverted by products (kernels/triangular_triton.py), not solved with.
    """
    from hf_matrix_optim.kernels import triangular_triton as triangular

    count, k, d, padded = x.size(0), sides.k, sides.d, sides.padded
    width = TILE if sides.along_columns else 256
    parts = -(-d // width)
    y = torch.empty_like(x) if spare is None else spare
    gram = torch.empty(count, padded, padded, dtype=torch.float32, device=x.device)
    inverse, solve = torch.empty(2, count, padded, padded, dtype=torch.float16, device=x.device).unbind()
    norms = torch.empty(count, padded, dtype=torch.float32, device=x.device)
    squares = torch.empty(count, parts, k, dtype=torch.float32, device=x.device)
    lengths = torch.empty(count, k, dtype=torch.float32, device=x.device)
    even = k % TILE == 0 and d % width == 0
    for _ in range(passes):
        _product(x, x, gram, sides, gram=True)
        launch(triangular.norms_kernel, (-(-padded // 256), count), gram, norms, k, padded, BLOCK=256)
        launch(
            triangular.leaf_kernel, (padded // LEAF, count), gram, norms, inverse, solve, padded,
            GAIN=GAIN, LEAF=LEAF, WIDTH=TILE, num_warps=1,
        )  # fmt: skip
        size = LEAF
        while size <= IN_ONE_PROGRAM and 2 * size <= padded:
            launch(
                triangular.merge_kernel, (padded // (2 * size), count), gram, norms, inverse, solve, padded,
                GAIN=GAIN, SIZE=size, num_warps=4 if size < 128 else 8,
            )  # fmt: skip
            size *= 2
        for size, pairs in _merges(padded):
            height = min(size, padded - size)
            scratch = torch.empty(count, pairs, height, size, dtype=torch.float16, device=x.device)
            grid = ((size // TILE) ** 2, pairs, count)
            launch(
                triangular.left_factor_kernel, grid, gram, norms, inverse, scratch, size, height, padded, pairs,
                TILE=TILE, DEPTH=DEPTH, num_warps=8, num_stages=2,
            )  # fmt: skip
            launch(
                triangular.right_factor_kernel, grid, scratch, norms, inverse, solve, size, height, padded, pairs,
                GAIN=GAIN, TILE=TILE, DEPTH=DEPTH, num_warps=8,
            )  # fmt: skip
        launch(
            triangular.apply_kernel, (-(-k // TILE) * parts, count), solve, x, y, squares, k, d, padded,
            ALONG_COLUMNS=sides.along_columns, EVEN=even,
            VECTORS=TILE, WIDTH=width, DEPTH=DEPTH, num_warps=4 if width == TILE else 8, num_stages=3,
        )  # fmt: skip
        launch(triangular.inverse_lengths_kernel, (-(-k // 256), count), squares, lengths, k, parts, BLOCK=256)
        x, y = y, x
    return x, lengths
