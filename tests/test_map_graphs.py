"""Which maps are replayed, and from where, with graphs that do on a CPU what CUDA's do."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from hf_matrix_optim import Muon
from hf_matrix_optim.kernels import graph_capture, map_graphs
from hf_matrix_optim.kernels.half_maps import Sides
from hf_matrix_optim.kernels.map_graphs import MapGraphs
from hf_matrix_optim.kernels.stack_step import KernelRule

MUON = KernelRule(beta=0.9, nesterov=True, weight_decay=0.0, weight=1.0, coefficients=((3.0, -3.0, 1.0),))
MUD = KernelRule(beta=0.9, nesterov=True, weight_decay=0.0, weight=1.0, passes=1)
SMALL, LARGE = Sides(4, 8, False), Sides(16, 8, True)


class Graph:
    """Runs again what was captured in it; a map writes its input, times its passes and 2, into the spare stack."""

    def __init__(self):
        self.captured = []

    def pool(self):
        return id(self)

    def replay(self):
        for x, spare, factor in self.captured:
            spare.copy_(x * factor)


@pytest.fixture
def captures(monkeypatch):
    """(graph, pool) of each capture."""
    found = []

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        found.append((graph, pool))
        yield

    def whole_direction(x, sides, rule, spare):
        assert x.shape == spare.shape == (x.size(0), sides.rows, sides.columns)
        found[-1][0].captured.append((x, spare, 2.0 + rule.passes))
        return spare

    cuda = SimpleNamespace(CUDAGraph=Graph, graph=capture)
    monkeypatch.setattr(graph_capture, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(graph_capture, "_stream_on", lambda device: device)
    monkeypatch.setattr(map_graphs, "whole_direction", whole_direction)
    return found


def mapped(graphs, count, sides, rule, value):
    """What comes out for a stack of this value; None if it was to be launched."""
    place = graphs.input_of(count, sides, rule)
    if place is None:
        return None
    assert place.shape == (count, sides.rows, sides.columns)
    place.fill_(value)
    return graphs.replay(count, sides, rule).clone()


def test_a_map_is_launched_twice_and_then_replayed(captures):
    graphs = MapGraphs(torch.device("cpu"))
    assert [mapped(graphs, 3, SMALL, MUON, 1.0) for _ in range(2)] == [None, None]
    for value in (1.0, 5.0):
        assert torch.equal(mapped(graphs, 3, SMALL, MUON, value), torch.full((3, 4, 8), 2 * value).half())
    assert len(captures) == 1


def test_each_stack_and_rule_has_its_own_graph_over_one_workspace(captures):
    graphs = MapGraphs(torch.device("cpu"))
    kinds = [(3, SMALL, MUON, 2.0), (2, SMALL, MUON, 2.0), (3, SMALL, MUD, 3.0), (1, LARGE, MUON, 2.0)]
    for times in range(4):
        for count, sides, rule, factor in kinds:
            found = mapped(graphs, count, sides, rule, 1.0)
            assert (found is None) == (times < 2)
            assert found is None or found.unique().tolist() == [factor]
    assert len(captures) == len(kinds)
    assert [pool for _, pool in captures] == [None] + [id(captures[0][0])] * 3
    starts = {(x.data_ptr(), spare.data_ptr()) for graph, _ in captures for x, spare, _ in graph.captured}
    assert len(starts) == 1


def test_a_larger_stack_makes_the_graphs_anew(captures):
    graphs = MapGraphs(torch.device("cpu"))
    for _ in range(3):
        before = mapped(graphs, 3, SMALL, MUON, 1.0)
    for _ in range(3):
        assert mapped(graphs, 3, SMALL, MUON, 1.0).equal(before)
        larger = mapped(graphs, 9, LARGE, MUON, 1.0)
    assert larger.unique().tolist() == [2.0]
    assert mapped(graphs, 3, SMALL, MUON, 4.0).unique().tolist() == [8.0]
    # The first is captured before and after the workspace has grown, and never reads the old one.
    assert len(captures) == 3
    assert captures[-1][0].captured[0][0].data_ptr() == captures[-2][0].captured[0][0].data_ptr()


def test_an_optimizer_lets_its_graphs_go_when_no_group_asks_for_them():
    optimizer = Muon(
        [{"params": [torch.nn.Parameter(torch.ones(4, 4))], "cuda_graph": each} for each in (True, False)]
    )
    asking, other = optimizer.param_groups
    graphs = optimizer._map_graphs_for(asking)
    assert optimizer._map_graphs_for(asking) is graphs
    assert optimizer._map_graphs_for(other) is None
    assert optimizer._map_graphs_for(asking) is graphs
    asking["cuda_graph"] = False
    assert optimizer._map_graphs_for(asking) is None
    asking["cuda_graph"] = True
    assert optimizer._map_graphs_for(asking) is not graphs
