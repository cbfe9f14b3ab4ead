"""MUD's map: decorrelate the rows of a matrix by triangular solves instead of a polar factor."""

import torch
from torch import Tensor

from hf_matrix_optim.newton_schulz import unit_norm


def decorrelate(x: Tensor, *, passes: int = 1, map_dtype: torch.dtype | None = None) -> Tensor:
    """Make the rows of each matrix nearly orthonormal by triangular solves with its Gram matrix.

    ``passes`` times: rows of Q to norm 1; T = lower triangle of Q Q^T with unit diagonal; Q <- T^-1 Q. Then rows to
    norm 1. T + T^T - I is a Gram matrix, so T's symmetric part is at least I / 2 and the inverse of T has norm at
    most 2: the solve is stable for every input.

    Args:
        x: (..., fan_out, fan_in), floating; not modified. Works along the shorter side.
        passes: number of passes, at least 1.
        map_dtype: precision of the products; None is ``x.dtype``. The solve itself is in float32 at least.

    Returns:
        (..., fan_out, fan_in) in ``x.dtype``. Rows (columns if tall) have norm 1; a zero row stays zero. A row that
        depends on the rows above it keeps only rounding noise, normalised.

    Raises:
        ValueError: if ``x`` has fewer than two dimensions or ``passes < 1``.

    Source: MUD (arXiv 2603.17970), its one-pass update and p passes. Differs: the diagonal of T, which is 1 up to
    rounding, is set to 1, and a zero row is kept out of the solve; norms have no epsilon.
    """
    if x.ndim < 2:
        raise ValueError(f"decorrelate needs matrices, but x has shape {tuple(x.shape)}")
    if passes < 1:
        raise ValueError(f"passes={passes} must be at least 1")
    map_dtype = map_dtype or x.dtype
    solve_dtype = torch.promote_types(map_dtype, torch.float32)
    is_tall = x.size(-2) > x.size(-1)
    rows = x.mT if is_tall else x  # (..., k, d), k <= d
    rows = unit_norm(rows, dim=-1)
    for _ in range(passes):
        factor = rows.to(map_dtype)
        gram = (factor @ factor.mT).to(solve_dtype)
        # unitriangular=True reads the strict lower triangle and takes the diagonal as 1.
        rows = torch.linalg.solve_triangular(gram, rows.to(solve_dtype), upper=False, unitriangular=True)
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)  # at most 2 sqrt(k): no need to scale first
        rows = rows.div_(torch.where(norm > 0, norm, 1))
    rows = rows.to(x.dtype)
    return rows.mT if is_tall else rows
