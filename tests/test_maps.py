"""The pure functions: Newton-Schulz, decorrelation, scales and matrix layouts."""

import pytest
import torch
from oracles import JORDAN, mud_map, newton_schulz_5

from hf_matrix_optim.decorrelate import decorrelate
from hf_matrix_optim.matrix_layout import MatrixLayout, from_matrices, split_parts, to_matrices
from hf_matrix_optim.newton_schulz import NS_COEFFICIENTS, coefficients_for, newton_schulz
from hf_matrix_optim.update_scale import update_scale

SHAPES = [(6, 10), (10, 6), (7, 7), (1, 9), (9, 1)]
MAPS = {"newton_schulz": newton_schulz, "decorrelate": decorrelate}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_the_oracle(shape):
    x = random(*shape)
    torch.testing.assert_close(newton_schulz(x), newton_schulz_5(x, JORDAN), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_decorrelate_is_the_oracle(shape, passes):
    x = random(*shape)
    torch.testing.assert_close(decorrelate(x, passes=passes), mud_map(x, passes), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_input_gives_the_transposed_result(name, shape):
    if shape[0] == shape[1]:
        shape = (7, 8)  # a square one is not turned: it is decorrelated along its rows, transposed or not
    x = random(*shape)
    torch.testing.assert_close(MAPS[name](x.mT), MAPS[name](x).mT, atol=0, rtol=0)


@pytest.mark.parametrize("name", MAPS)
def test_a_batch_is_a_loop(name):
    x = random(2, 3, 6, 10, dtype=torch.float32)
    loop = torch.stack([torch.stack([MAPS[name](matrix) for matrix in row]) for row in x])
    torch.testing.assert_close(MAPS[name](x), loop, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("factor", [2.0**-66, 1e-20, 1e20, 2.0**66])
def test_scale_free_in_float32(name, factor):
    x = random(6, 10, dtype=torch.float32)
    exact = torch.tensor(factor).log2().item() % 1 == 0
    tolerance = 0 if exact else 1e-5
    torch.testing.assert_close(MAPS[name](x * factor), MAPS[name](x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", MAPS)
def test_zero_stays_zero_and_input_is_not_written(name):
    assert torch.equal(MAPS[name](torch.zeros(4, 6)), torch.zeros(4, 6))
    x = random(4, 6)
    before = x.clone()
    MAPS[name](x)
    assert torch.equal(x, before)


def test_decorrelate_keeps_a_zero_row_out_and_gives_unit_rows():
    x = random(5, 9)
    x[2] = 0
    result = decorrelate(x)
    norms = torch.linalg.vector_norm(result, dim=-1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 1, 0, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(result[[0, 1, 3, 4]], mud_map(x[[0, 1, 3, 4]], 1), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", MAPS)
def test_rank_deficient_input_is_finite(name):
    low_rank = random(8, 2, dtype=torch.float32) @ random(2, 12, seed=1, dtype=torch.float32)
    duplicate = random(8, 12, dtype=torch.float32)
    duplicate[3] = duplicate[0]
    for x in (low_rank, duplicate, torch.ones(8, 12)):
        assert torch.isfinite(MAPS[name](x)).all()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("map_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_map_stays_close(name, map_dtype):
    exact = MAPS[name](random(48, 80))
    half = MAPS[name](random(48, 80, dtype=torch.float32), map_dtype=map_dtype).double()
    assert torch.nn.functional.cosine_similarity(exact.flatten(), half.flatten(), dim=0) > 0.998
    assert (half.norm() / exact.norm()).item() == pytest.approx(1, abs=0.03)


def test_more_passes_come_closer_to_orthonormal_rows():
    x = random(6, 40)
    errors = [torch.dist(q @ q.mT, torch.eye(6, dtype=q.dtype)) for q in (decorrelate(x, passes=p) for p in (1, 2, 3))]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # the paper proves quadratic local convergence
    torch.testing.assert_close(decorrelate(decorrelate(x, passes=8)), decorrelate(x, passes=8), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("name", "low", "high"), [("jordan", 0.65, 1.25), ("you", 0.85, 1.15)])
def test_singular_values_after_five_steps(name, low, high):
    values = torch.linspace(0.02, 1, 500, dtype=torch.float64)
    for a, b, c in coefficients_for(name, 5):
        values = a * values + b * values**3 + c * values**5
    assert low < values.min()
    assert values.max() < high


def test_polar_express_table_is_minimax_and_converges():
    """Before the safety factor each polynomial maps the interval left by those before it to one centred at 1."""
    low, high = 1e-3, 1.0
    for i, (a, b, c) in enumerate(NS_COEFFICIENTS["polar_express_safety_1.01"]):
        safety = 1.01 if i < 7 else 1.0
        a, b, c = a * safety, b * safety**3, c * safety**5
        x = torch.linspace(low, high, 200_001, dtype=torch.float64)
        y = a * x + b * x**3 + c * x**5
        low, high = y.min().item(), y.max().item()
        assert abs(low + high - 2) < 1e-6, (i, low, high)
    assert high - low < 1e-6


def test_coefficient_errors():
    with pytest.raises(ValueError, match="ns_coefficients='jordon' is not one of jordan"):
        coefficients_for("jordon", 5)
    with pytest.raises(ValueError, match="ns_steps=0 must be at least 1"):
        newton_schulz(torch.ones(2, 2), ns_steps=0)
    with pytest.raises(ValueError, match="ns_steps=2.5 must be an integer"):
        newton_schulz(torch.ones(2, 2), ns_steps=2.5)
    with pytest.raises(ValueError, match="exactly five steps, but ns_steps=6"):
        coefficients_for("you", 6)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        newton_schulz(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        decorrelate(torch.ones(3))
    with pytest.raises(ValueError, match="passes=0"):
        decorrelate(torch.ones(3, 3), passes=0)


def test_update_scales():
    assert update_scale(100, 400) == pytest.approx(0.2 * 20)
    assert update_scale(400, 100) == pytest.approx(0.2 * 20)
    assert update_scale(400, 100, update_rms=0.1) == pytest.approx(0.1 * 20)
    assert update_scale(400, 100, rule="jordan") == pytest.approx(2)
    assert update_scale(100, 400, rule="jordan") == 1
    with pytest.raises(ValueError, match="'spectral' is not one of match_rms_adamw, jordan"):
        update_scale(1, 1, rule="spectral")


@pytest.mark.parametrize(
    ("shape", "layout", "matrices"),
    [
        ((4, 6), MatrixLayout(), [(1, 4, 6)]),
        ((6, 4), MatrixLayout(output_axis=1), [(1, 4, 6)]),
        ((3, 4, 6), MatrixLayout(), [(3, 4, 6)]),
        ((3, 6, 4), MatrixLayout(output_axis=1), [(3, 4, 6)]),
        ((8, 3, 2, 2), MatrixLayout(flatten=True), [(1, 8, 12)]),
        ((8, 3, 2), MatrixLayout(flatten=True, split_sizes=(4, 4)), [(1, 4, 6)] * 2),
        ((7, 5), MatrixLayout(split_sizes=(4, 2, 1)), [(1, 4, 5), (1, 2, 5), (1, 1, 5)]),
        ((5, 7), MatrixLayout(output_axis=1, split_sizes=(4, 3)), [(1, 4, 5), (1, 3, 5)]),
        ((2, 5, 6), MatrixLayout(output_axis=1, split_sizes=(3, 3), interleaved=True), [(2, 3, 5)] * 2),
    ],
)
def test_layout_round_trip(shape, layout, matrices):
    x = random(*shape)
    layout.check(shape, "w")
    parts = split_parts(x, layout)
    read = [to_matrices(part, layout) for part in parts]
    assert [tuple(matrix.shape) for matrix in read] == matrices
    assert layout.matrix_count(shape) == sum(matrix.size(0) for matrix in read)
    assert sum(matrix.numel() for matrix in read) == x.numel()
    copy = torch.zeros_like(x)
    for part, matrix in zip(split_parts(copy, layout), read, strict=True):
        part.copy_(from_matrices(matrix, layout, part.shape))
    assert torch.equal(copy, x)


def test_interleaved_rows():
    x = torch.arange(12.0).reshape(6, 2)
    gate, up = split_parts(x, MatrixLayout(split_sizes=(3, 3), interleaved=True))
    assert torch.equal(gate, x[::2])
    assert torch.equal(up, x[1::2])


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((5,), MatrixLayout(), "FSDP2"),
        ((0, 4), MatrixLayout(), "no elements"),
        ((2, 3, 4, 5), MatrixLayout(), "flatten=True"),
        ((6, 4), MatrixLayout(split_sizes=(3, 2)), "add up to its fan_out=6"),
        ((6, 4), MatrixLayout(split_sizes=(4, 2), interleaved=True), "interleaved slices are equal"),
        ((6, 4, 3), MatrixLayout(output_axis=1, flatten=True), "output_axis=0"),
        ((6, 4), MatrixLayout(output_axis=2), "must be 0 or 1"),
    ],
)
def test_layout_errors_name_the_parameter(shape, layout, message):
    with pytest.raises(ValueError, match=message) as error:
        layout.check(shape, "'blocks.0.w'")
    assert "blocks.0.w" in str(error.value)
