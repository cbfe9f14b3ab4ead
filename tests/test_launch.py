"""Compiled kernels are looked up by all that Triton compiles for, and only what is not known is left to Triton."""

from typing import Any

import pytest
import torch

from hf_matrix_optim.kernels import launch as launching
from hf_matrix_optim.kernels.launch import launch


class Compiled:
    packed_metadata = ()

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """What ``triton.jit`` makes, of x, n, factor, SIZE and NAME."""

    arg_names = ("x", "n", "factor", "SIZE", "NAME")

    def __init__(self, compiles: bool = True) -> None:
        self.compiles = compiles
        self.by_triton: list[Any] = []
        self.by_key: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.by_triton.append((grid, arguments, constants))
            return Compiled(self.by_key) if self.compiles else None

        return run


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_compiled", {})


def test_the_second_launch_goes_to_the_compiled_kernel_with_all_arguments() -> None:
    kernel, x, y = Kernel(), torch.zeros(8), torch.ones(8)
    launch(kernel, (3,), x, 5, 0.5, NAME="a", SIZE=4, num_warps=2)
    assert kernel.by_triton == [((3,), (x, 5, 0.5), {"NAME": "a", "SIZE": 4, "num_warps": 2})]
    launch(kernel, (7, 2), y, 5, 0.25, NAME="a", SIZE=4, num_warps=2)
    assert len(kernel.by_triton) == 1
    ((grid, (tensor, *rest)),) = kernel.by_key
    assert grid == (7, 2, 1)
    assert tensor is y
    assert rest == [5, 0.25, 4, "a"]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(9)[1:]},  # not aligned to 16 bytes
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"n": 16},
        {"n": 1},
        {"SIZE": 8},
        {"num_warps": 4},
    ],
    ids=["alignment", "dtype", "multiple", "one", "constant", "option"],
)
def test_what_triton_compiles_anew_for_is_not_taken_for_known(other: dict[str, Any]) -> None:
    kernel = Kernel()
    given = {"x": torch.zeros(8), "n": 5, "SIZE": 4, "num_warps": 2}
    for _ in range(2):
        for each in (given, {**given, **other}):
            launch(kernel, (1,), each["x"], each["n"], 0.5, SIZE=each["SIZE"], NAME="", num_warps=each["num_warps"])
    assert len(kernel.by_triton) == len(kernel.by_key) == 2


def test_two_kernels_are_two_and_the_interpreter_has_nothing_compiled() -> None:
    kernels, x = [Kernel(), Kernel(), Kernel(compiles=False)], torch.zeros(8)
    for _ in range(3):
        for kernel in kernels:
            launch(kernel, (1,), x, 5, 0.5, SIZE=4, NAME="")
    assert [len(kernel.by_triton) for kernel in kernels] == [1, 1, 3]
    assert [len(kernel.by_key) for kernel in kernels] == [2, 2, 0]
