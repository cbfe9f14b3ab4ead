"""Two gloo processes: DDP through Trainer, FSDP2 by fully_shard, sharded checkpoints."""

from pathlib import Path

import pytest
import torch
from gloo_ranks import run_cases
from rank_cases import CASES, DDP_ARGUMENTS, DDP_MODEL
from tiny_models import tiny_model
from tiny_training import OPTIMIZER_NAMES, arguments, token_rows
from transformers import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcomes(folder) -> dict[str, str]:
    """What went wrong in each case, empty for those that passed; one start of the processes for all of them."""
    return run_cases("rank_cases", 2, folder, list(CASES))


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(outcomes, case):
    assert not outcomes[case], outcomes[case]


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_two_ranks_equal_one_process(outcomes, folder, name):
    assert not outcomes[f"ddp_{name}"], outcomes[f"ddp_{name}"]
    args = arguments(folder, optim=name, per_device_train_batch_size=8, **DDP_ARGUMENTS)
    trainer = Trainer(tiny_model(DDP_MODEL), args, train_dataset=token_rows(48))
    trainer.train()
    expected = torch.load(folder / f"ddp_{name}.pt", weights_only=True)
    start = tiny_model(DDP_MODEL).state_dict()
    for parameter_name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, expected[parameter_name], atol=1e-5, rtol=0)
        assert not torch.equal(value, start[parameter_name])


def test_harness_reports_a_failure_and_a_hang(tmp_path, monkeypatch):
    """A case that fails on one rank is named with its rank, one that waits for ever ends, and the others still run."""
    monkeypatch.setattr("gloo_ranks.TIMEOUT_SECONDS", 15)
    outcomes = run_cases("rank_faults", 2, tmp_path, ["passes", "hangs", "fails_on_rank_1"])
    assert outcomes["passes"] == ""
    assert "rank 1: Traceback" in outcomes["fails_on_rank_1"]
    assert "planted" in outcomes["fails_on_rank_1"]
    assert "no news for 15 seconds" in outcomes["hangs"]
