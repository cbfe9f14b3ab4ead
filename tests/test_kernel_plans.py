"""What the GPU fast paths decide on the host: tiles, merges, ranges of float16, workspace."""

import math

import pytest
import torch

from hf_matrix_optim.kernels.half_maps import (
    IN_ONE_PROGRAM,
    LEAF,
    TILE,
    Sides,
    _merges,
    newton_schulz_top,
)
from hf_matrix_optim.kernels.int8_plan import MOST_PLANS, ROWS, Int8Plan, Int8Plans
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


@pytest.fixture
def no_pinned_memory(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


def int8_momenta(blocks: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [torch.zeros(n, 256, dtype=torch.int8) for n in blocks], [torch.zeros(n) for n in blocks]


@pytest.mark.parametrize("blocks", [[16], [1], [16, 17, 31, 1, 33, 5], [200, 16, 16]])
def test_programs_reach_every_block_of_every_int8_momentum_once(no_pinned_memory, blocks):
    levels, scales = int8_momenta(blocks)
    plan = Int8Plan(levels, scales, 127)
    reached = []
    for program, owner in enumerate(plan.owners.tolist()):  # as the kernels read it
        level_at, scale_at, first_program, count, first_block = plan.table[:, owner].tolist()
        assert (level_at, scale_at, count) == (levels[owner].data_ptr(), scales[owner].data_ptr(), blocks[owner])
        rows = range((program - first_program) * ROWS, (program - first_program + 1) * ROWS)
        reached += [(first_block + row, owner, row) for row in rows if row < count]
    in_order = [(owner, row) for owner, count in enumerate(blocks) for row in range(count)]
    assert reached == [(position, *of) for position, of in enumerate(in_order)]
    assert plan.programs == len(plan.owners)
    views = plan.views(torch.arange(256.0 * sum(blocks)))
    assert [view.shape for view in views] == [tensor.shape for tensor in levels]
    assert torch.equal(torch.cat(views).flatten(), torch.arange(256.0 * sum(blocks)))


def test_an_int8_plan_is_kept_while_its_momenta_stay(no_pinned_memory):
    levels, scales = int8_momenta([16, 20])
    owners, plans = [object() for _ in range(MOST_PLANS + 5)], Int8Plans()
    first = plans.of(levels, scales, 127, owners[0])
    assert first is not None
    assert plans.of(levels, scales, 127, owners[0]) is first
    assert plans.of(levels[:1], scales[:1], 127, owners[0]) is not first
    moved = plans.of(levels, [scales[0].clone(), scales[1]], 127, owners[0])
    assert moved is not None
    assert moved.table[1, 0] != first.table[1, 0]
    for owner in owners:
        plans.of(levels, scales, 127, owner)
    assert len(plans.plans) == MOST_PLANS


def test_int8_momenta_that_do_not_lie_as_the_kernels_read_them_are_refused(no_pinned_memory):
    levels, scales = int8_momenta([16])
    plans = Int8Plans()
    assert plans.of([], [], 127, levels) is None
    assert plans.of([levels[0].mT], scales, 127, levels) is None
    unaligned = torch.zeros(16 * 256 + 1, dtype=torch.int8)[1:].view(16, 256)
    assert plans.of([unaligned], scales, 127, levels) is None
