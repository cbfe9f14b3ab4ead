"""Newton-Schulz iteration: the polar factor of a matrix by matrix products alone."""

import torch
from torch import Tensor

Coefficients = tuple[tuple[float, float, float], ...]


def _with_safety(factor: float, *table: tuple[float, float, float]) -> Coefficients:
    """p(x / factor) for each polynomial p(x) = a x + b x^3 + c x^5."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in table)


#: One step each; the last is repeated when more steps are asked for than a table has.
NS_COEFFICIENTS: dict[str, Coefficients] = {
    # K. Jordan, Muon (2024): steep at zero, singular values end in about [0.7, 1.2].
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # Y. Jiacheng (2025): five different steps, closer to 1 than Jordan's at the same cost.
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Polar Express (arXiv 2505.16932), the table for lower bound 1e-3; every polynomial p(x) but the last is used as
    # p(x / 1.01), the paper's safety factor against rounding.
    "polar_express_safety_1.01": (
        *_with_safety(
            1.01,
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        ),
        (1.875, -1.25, 0.375),
    ),
}


def coefficients_for(name: str, ns_steps: int) -> Coefficients:
    """The ``ns_steps`` triples (a, b, c) of a named table, in the order in which they are applied.

    Raises:
        ValueError: for an unknown name, for ``ns_steps`` that is no integer or below 1, and for ``you`` with other
            than its five steps.
    """
    if name not in NS_COEFFICIENTS:
        raise ValueError(f"ns_coefficients={name!r} is not one of {', '.join(NS_COEFFICIENTS)}")
    if not isinstance(ns_steps, int):
        raise ValueError(f"ns_steps={ns_steps!r} must be an integer")
    if ns_steps < 1:
        raise ValueError(f"ns_steps={ns_steps} must be at least 1")
    if name == "you" and ns_steps != 5:
        raise ValueError(f"ns_coefficients='you' is a table of exactly five steps, but ns_steps={ns_steps}")
    table = NS_COEFFICIENTS[name]
    return tuple(table[min(i, len(table) - 1)] for i in range(ns_steps))


def largest_magnitude(x: Tensor, *, dim: int | tuple[int, int]) -> Tensor:
    """Largest absolute value over ``dim``, which is kept with size 1; NaN where there is one."""
    return torch.maximum(x.amax(dim=dim, keepdim=True), -x.amin(dim=dim, keepdim=True))


def unit_norm(x: Tensor, *, dim: int | tuple[int, int]) -> Tensor:
    """``x`` divided by its Euclidean norm over ``dim``; zeros stay zero.

    The largest magnitude is divided out first, so that neither squares overflow nor small values vanish: the result
    for ``c * x`` is the result for ``x`` from 1e-20 to 1e+20 in float32.
    """
    largest = largest_magnitude(x, dim=dim)
    x = x / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x.div_(torch.where(norm > 0, norm, 1))


def newton_schulz(
    x: Tensor, *, ns_coefficients: str = "jordan", ns_steps: int = 5, map_dtype: torch.dtype | None = None
) -> Tensor:
    """Move the singular values of each matrix towards 1 and keep its singular vectors.

    ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, from ``X = x / ||x||_F``, along the shorter side.

    Args:
        x: (..., fan_out, fan_in), floating; not modified. A zero matrix gives zeros; a rank-deficient one keeps its
            null directions near zero.
        ns_coefficients: name of a table in ``NS_COEFFICIENTS``.
        ns_steps: number of iterations, at least 1.
        map_dtype: precision of the iteration; None is ``x.dtype``. The norm is always taken in ``x.dtype``.

    Returns:
        (..., fan_out, fan_in) in ``x.dtype``.

    Raises:
        ValueError: if ``x`` has fewer than two dimensions, or as ``coefficients_for``.

    Source: K. Jordan, Muon (2024). Differs: scaled by the largest magnitude before the norm, and normalised in
    ``x.dtype`` before the iteration's own precision.
    """
    if x.ndim < 2:
        raise ValueError(f"newton_schulz needs matrices, but x has shape {tuple(x.shape)}")
    coefficients = coefficients_for(ns_coefficients, ns_steps)
    is_tall = x.size(-2) > x.size(-1)
    wide = unit_norm(x.mT if is_tall else x, dim=(-2, -1)).to(map_dtype or x.dtype)
    stack = wide.reshape(-1, *wide.shape[-2:])  # (B, k, d), k <= d
    for a, b, c in coefficients:
        gram = stack @ stack.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    result = stack.reshape(wide.shape).to(x.dtype)
    return result.mT if is_tall else result


def newton_schulz_operations(fan_out: int, fan_in: int, ns_steps: int) -> float:
    """About how many floating-point operations an iteration takes whose symmetric products are halved."""
    k, d = sorted((fan_out, fan_in))
    return ns_steps * (3.0 * k * k * d + 1.0 * k**3)
