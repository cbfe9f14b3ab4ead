"""Norms of the diagnostics against singular values in float64."""

import pytest
import torch

from hf_matrix_optim.newton_schulz import newton_schulz
from hf_matrix_optim.spectral_norm import frobenius_and_spectral_norm, orthogonality_error, spectral_norm_bound


def matrices(kind: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, generator=generator)
    if kind == "random":
        return x
    if kind == "rank_1":
        return x[..., :1] @ torch.randn(shape[0], 1, shape[-1], generator=generator)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    count = u.size(-1)
    values = {
        "power_law": torch.arange(1, count + 1).float() ** -0.7,  # as trained weights and momenta
        "equal": torch.ones(count),
        "two": torch.cat([torch.tensor([1.0, 0.999]), torch.full((count - 2,), 0.5)]),
    }[kind]
    return u @ torch.diag(values) @ vh


@pytest.mark.parametrize("kind", ["random", "rank_1", "power_law", "equal", "two"])
@pytest.mark.parametrize("shape", [(6, 64, 256), (6, 256, 64), (3, 128, 128), (4, 2, 9)], ids=str)
def test_spectral_norm_is_a_lower_bound_within_two_percent(kind, shape):
    x = matrices(kind, *shape)
    exact = torch.linalg.matrix_norm(x.double(), 2)
    frobenius, spectral = frobenius_and_spectral_norm(x)
    torch.testing.assert_close(frobenius.double(), x.double().flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    assert (spectral <= exact * (1 + 1e-5)).all()
    assert (spectral >= exact * (0.98 if kind == "random" else 0.998)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale):
    x = matrices("power_law", 2, 12, 20)
    for plain, scaled in zip(frobenius_and_spectral_norm(x), frobenius_and_spectral_norm(x * scale), strict=True):
        torch.testing.assert_close(scaled / scale, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(spectral_norm_bound(x * scale) / scale, spectral_norm_bound(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(orthogonality_error(x * scale), orthogonality_error(x), rtol=1e-5, atol=0)


def test_zero_nan_and_one_row():
    zero = torch.zeros(2, 3, 5)
    assert not torch.cat([*frobenius_and_spectral_norm(zero), spectral_norm_bound(zero)]).any()
    assert orthogonality_error(zero).isnan().all()
    broken = torch.full((1, 3, 5), float("nan"))
    assert torch.cat([*frobenius_and_spectral_norm(broken), spectral_norm_bound(broken)]).isnan().all()
    row = matrices("random", 3, 1, 7)
    for found in (*frobenius_and_spectral_norm(row), spectral_norm_bound(row)):
        torch.testing.assert_close(found, row.flatten(1).norm(dim=1))
    assert (orthogonality_error(row) < 1e-6).all()


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    first = frobenius_and_spectral_norm(matrices("random", 2, 8, 9))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(first[1], frobenius_and_spectral_norm(matrices("random", 2, 8, 9))[1])


@pytest.mark.parametrize("kind", ["random", "rank_1", "power_law", "equal"])
@pytest.mark.parametrize("rows", [8, 64, 256])
def test_upper_bound_is_above_and_near(kind, rows):
    x = matrices(kind, 3, rows, 300)
    exact = torch.linalg.matrix_norm(x.double(), 2)
    bound = spectral_norm_bound(x).double()
    assert (bound >= exact * (1 - 1e-5)).all()
    assert (bound <= exact * rows ** (1 / 512) * (1 + 1e-5)).all()


def test_orthogonality_error_is_the_formula():
    x = matrices("power_law", 4, 12, 30)
    for found, matrix in zip(orthogonality_error(x), x.double(), strict=True):
        gram = 12 * matrix @ matrix.T / matrix.square().sum()
        expected = (gram - torch.eye(12, dtype=torch.float64)).norm() / 12**0.5
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(orthogonality_error(x.mT.contiguous()), orthogonality_error(x))
    assert (orthogonality_error(matrices("equal", 3, 16, 40)) < 1e-5).all()
    torch.testing.assert_close(orthogonality_error(matrices("rank_1", 2, 10, 20)), torch.full((2,), 3.0))
    # Newton-Schulz leaves singular values between about 0.7 and 1.2
    assert (orthogonality_error(newton_schulz(matrices("random", 3, 64, 256))) < 0.5).all()
