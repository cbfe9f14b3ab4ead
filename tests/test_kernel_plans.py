"""What the GPU fast paths decide on the host: tiles, merges, ranges of float16, workspace."""

import math

import pytest

from hf_matrix_optim.kernels.half_maps import (
    IN_ONE_PROGRAM,
    LEAF,
    TILE,
    Sides,
    _merges,
    newton_schulz_top,
)
from hf_matrix_optim.kernels.stack_step import KernelRule, workspace_bytes

LARGEST_FLOAT16 = 65504


@pytest.mark.parametrize("shape", [(64, 64), (768, 3072), (8960, 1536), (8192, 28672)])
def test_products_of_newton_schulz_are_finite_in_float16(shape):
    largest_element = 2.0 ** newton_schulz_top(*shape)
    norm = largest_element * math.sqrt(shape[0] * shape[1])  # no matrix with such elements has a larger one
    assert 1.99 * norm < LARGEST_FLOAT16 < 8 * 1.99 * norm


@pytest.mark.parametrize("k", [64, 65, 128, 320, 640, 768, 896, 1280, 1536, 1600, 4096])
def test_a_padded_order_is_whole_tiles_and_wastes_less_than_one(k):
    sides = Sides(k, 4 * k, False)
    assert sides.padded % TILE == 0
    assert k <= sides.padded < k + 256


@pytest.mark.parametrize("tiles", range(1, 33))
def test_merges_reach_every_block_below_the_diagonal(tiles):
    """The blocks that leaves and merges write are, together, the lower triangle, each once."""
    padded = tiles * TILE
    written = set()

    def write(first: int, size: int) -> None:
        for row in range(first + size, min(first + 2 * size, padded), LEAF):
            for column in range(first, first + size, LEAF):
                assert (row, column) not in written
                written.add((row, column))

    size = LEAF
    while size <= IN_ONE_PROGRAM and 2 * size <= padded:
        for pair in range(padded // (2 * size)):
            write(pair * 2 * size, size)
        size *= 2
    for size, pairs in _merges(padded):
        for pair in range(pairs):
            write(pair * 2 * size, size)
    assert written == {(row, column) for row in range(0, padded, LEAF) for column in range(0, row, LEAF)}


def test_workspace_grows_with_the_matrix_and_the_second_moment():
    muon = KernelRule(0.95, True, 0.1, 1.0)
    mud = KernelRule(0.95, True, 0.1, 1.0, passes=1)
    adamuon = KernelRule(0.95, True, 0.1, 1.0, beta2=0.95)
    small, large = Sides(512, 2048, False), Sides(1024, 4096, False)
    for rule in (muon, mud, adamuon):
        assert 2 * 2 * 512 * 2048 < workspace_bytes(small, rule) < workspace_bytes(large, rule)
    assert workspace_bytes(small, adamuon) > workspace_bytes(small, muon)
