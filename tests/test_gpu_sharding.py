"""Matrices that GPUs share out, a process each; the cases are in ``gpu_sharing_cases.py``."""

import pytest
import torch
from gloo_ranks import run_cases
from gpu_sharing_cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_cases("gpu_sharing_cases", 2, tmp_path_factory.mktemp("gpus"), list(CASES), backend="nccl")


@pytest.mark.parametrize("name", CASES)
def test_on_two_gpus(outcomes, name):
    assert not outcomes[name], outcomes[name]
