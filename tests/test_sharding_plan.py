"""Layouts and plans of shared matrices, without any process group."""

import math

import pytest
import torch

from hf_matrix_optim import distributed_step
from hf_matrix_optim.matrix_layout import MatrixLayout, split_parts, to_matrices
from hf_matrix_optim.sharding.exchange import Exchange
from hf_matrix_optim.sharding.plan import MatrixJob, owners_of, rounds_of, sharing_pays
from hf_matrix_optim.sharding.plan_table import MatrixRow, table_of
from hf_matrix_optim.sharding.shard_layout import ALONE, Ranks, ShardLayout, pieces_of, views_of

LAYOUTS = [
    (MatrixLayout(), (7, 5)),
    (MatrixLayout(), (1, 5)),
    (MatrixLayout(output_axis=1), (6, 10)),
    (MatrixLayout(split_sizes=(6, 3, 3)), (12, 7)),
    (MatrixLayout(split_sizes=(4, 4, 4), interleaved=True), (12, 7)),
    (MatrixLayout(split_sizes=(2, 8)), (3, 10, 4)),
    (MatrixLayout(output_axis=1, split_sizes=(3, 1)), (3, 10, 4)),
    (MatrixLayout(flatten=True), (6, 3, 2, 2)),
    (MatrixLayout(flatten=True), (5, 4, 3)),
]


def ranks(size, place=0):
    return Ranks(tuple(range(size)), place)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_shards_put_together_are_the_matrices(layout, shape, size):
    """What the ranks hold of each piece, side by side, is that matrix of the whole parameter."""
    tensor = torch.arange(math.prod(shape)).view(shape)
    expected = [matrix for part in split_parts(tensor, layout) for matrix in to_matrices(part, layout)]
    one = MatrixLayout(layout.output_axis, layout.flatten)
    for axis in range(len(shape)):
        chunks = tensor.tensor_split([min(-(-shape[axis] // size) * i, shape[axis]) for i in range(1, size)], dim=axis)
        cut = [ShardLayout(shape, axis, ranks(size, place), ALONE) for place in range(size)]
        assert list(cut[0].extents) == [chunk.shape[axis] for chunk in chunks]
        pieces = pieces_of(layout, cut[0])
        if cut[0].has_whole_matrices(layout):
            continue
        if layout.flatten and axis > 1:
            assert pieces == []
            continue
        views = [views_of(chunk, layout, cut[place]) for place, chunk in enumerate(chunks)]
        assert len(pieces) == len(expected) == layout.matrix_count(shape)
        for i, (piece, matrix) in enumerate(zip(pieces, expected, strict=True)):
            shards = [to_matrices(views[place][i], one)[0] for place in range(size)]
            assert piece.fans == tuple(matrix.shape)
            assert [shard.shape[piece.axis] for shard in shards] == list(piece.extents)
            assert torch.equal(torch.cat(shards, dim=piece.axis), matrix)


def jobs(*fans):
    return [MatrixJob(i, 0, each, 0, (), ("float32", "float32")) for i, each in enumerate(fans)]


def test_owners_have_equal_work():
    qwen = [(8960, 1536), (8960, 1536), (1536, 8960), (1536, 1536), (1536, 1536), (256, 1536), (256, 1536)] * 28
    for size, least in ((2, 0.999), (4, 0.99), (8, 0.97)):
        owner = owners_of(jobs(*qwen), size)
        load = [0.0] * size
        for job, rank in zip(jobs(*qwen), owner, strict=True):
            load[rank] += job.operations
        assert sum(load) / size / max(load) > least
    assert owners_of(jobs((4, 4), (8, 8), (4, 4)), 2) == [1, 0, 1]
    assert owners_of(jobs((4, 4), (4, 4), (4, 4)), 3) == [0, 1, 2]


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_rounds_hold_every_matrix_once_in_the_order_of_owners(shards, replicas):
    every = jobs(*[(6, 4), (4, 6), (6, 4), (5, 5), (6, 4), (6, 4), (6, 4)])
    rounds = rounds_of(every, shards, replicas, lambda job: max(1, 2 * 24 // job.elements))
    assert sorted(job.parameter for plan in rounds for job in plan.jobs) == list(range(7))
    for plan in rounds:
        assert len({job.fans for job in plan.jobs}) == 1
        assert sum(map(sum, plan.counts)) == len(plan.jobs)
        assert max(map(max, plan.counts)) <= 2
        owned = []
        for replica in range(replicas):
            for shard in range(shards):
                exchange = Exchange(plan, ranks(shards, shard), ranks(replicas, replica))
                assert exchange.count == plan.counts[replica][shard]
                owned += range(len(plan.jobs))[exchange.owned]
        assert owned == list(range(len(plan.jobs)))
    assert rounds_of(every, 2, 1, lambda job: 1)[0].counts == ((1, 1),)
    even = rounds_of(jobs(*[(6, 4)] * 14), 2, 1, lambda job: 3)
    assert [plan.counts for plan in even] == [((2, 2),), ((2, 2),), ((3, 3),)]


def test_sharing_pays_where_the_map_costs_twice_the_message():
    elements = 1000
    assert sharing_pays(4.02 * 8 * 4e14 / 2.25e11 * elements, 8 * elements, in_one_host=True) is True
    assert sharing_pays(3.98 * 8 * 4e14 / 2.25e11 * elements, 8 * elements, in_one_host=True) is False
    assert sharing_pays(4.02 * 8 * 4e14 / 2.25e11 * elements, 8 * elements, in_one_host=False) is False


def test_ddp_on_gpus_shares_what_pays(monkeypatch):
    """On GPUs a matrix is shared by what mapping it costs; on CPUs always."""
    params = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in ((256, 256), (2048, 2048)) * 2]
    group = {"params": params, "algorithm": "mud", "max_workspace_bytes": 2**30}
    monkeypatch.setattr(distributed_step, "ranks_of_ddp", lambda params: [ranks(2)] * len(params))
    monkeypatch.setattr(distributed_step, "are_equal", lambda *_: True)
    monkeypatch.setattr(distributed_step, "check_same", lambda *_: None)
    shared = {}
    for cost in (1.0, 3e6, 1e12):
        plan = distributed_step.plan_group(
            group,
            MatrixLayout(),
            [torch.float32] * 4,
            may_be_ddp=True,
            by_kernels=False,
            operations=lambda fan_out, fan_in, cost=cost: cost * fan_out,
        )
        shared[cost] = [] if plan is None else sorted(plan.members)
    assert shared == {1.0: [], 3e6: [0, 2], 1e12: [0, 1, 2, 3]}


def test_a_plan_is_told_as_a_table_with_its_load():
    rows = [
        MatrixRow("a", (4, 8), 0, "shard 0", 128, 3.0, ((0, 1), (0,))),
        MatrixRow("b[1]", (8, 2), 1, "shard 1", 64, 1.0, ((0, 1), (0,))),
        MatrixRow("c", (2, 2), None, "replica 1", 16, 5.0, ((0, 1), (0, 2))),
    ]
    assert table_of(rows).splitlines() == [
        "| matrix | shape | cut along | mapped by | bytes | share of the operations |",
        "| --- | --- | --- | --- | ---: | ---: |",
        "| a | 4 x 8 | rows | shard 0 | 128 | 75.00% |",
        "| b[1] | 8 x 2 | columns | shard 1 | 64 | 25.00% |",
        "| c | 2 x 2 |  | replica 1 | 16 | 100.00% |",
        "",
        "2 ranks share these out; the largest load is 1.500 times the mean.",
        "",
        "4 ranks share these out; the largest load is 4.000 times the mean.",
    ]
