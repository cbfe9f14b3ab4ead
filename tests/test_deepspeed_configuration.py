"""The configuration of DeepSpeed's own Muon; what DeepSpeed makes of it, where DeepSpeed is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn

from hf_matrix_optim import deepspeed_config

AUTO: dict[str, Any] = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto"}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)


def test_the_configuration_is_plain_json() -> None:
    found = deepspeed_config(
        "muon", lr=1e-3, weight_decay=0.01, betas=(0.8, 0.9), eps=1e-6, momentum=0.9, matrix_lr=0.02, zero_stage=3
    )
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "optimizer": {
            "type": "Muon",
            "params": {
                "lr": 1e-3,
                "weight_decay": 0.01,
                "betas": [0.8, 0.9],
                "eps": 1e-6,
                "momentum": 0.9,
                "muon_lr": 0.02,
            },
        },
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "reduce_scatter": False},
    }


def test_what_is_not_given_is_left_to_the_rest_of_the_configuration() -> None:
    found = deepspeed_config("muon", **AUTO)
    assert found.keys() == {"optimizer", "gradient_clipping"}
    assert found["optimizer"]["params"] == {**AUTO, "momentum": 0.95}
    assert deepspeed_config("muon", lr=1, zero_stage=2)["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("name", ["adamuon", "adamuon_v1", "mud"])
def test_what_deepspeed_does_not_have_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no {name!r}, only a Muon: .*optim={name!r} under FSDP2 .* or plain DDP"):
        deepspeed_config(name, lr=1e-3)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'moun' is not an optimizer of this package .* did you mean 'muon'"):
        deepspeed_config("moun", lr=1e-3)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("lr", -1e-3, "a number, at least 0 and finite"),
        ("lr", float("inf"), "a number, at least 0 and finite"),
        ("lr", float("nan"), "a number, at least 0 and finite"),
        ("lr", "1e-3", "a number, at least 0 and finite"),
        ("lr", None, "a number, at least 0 and finite"),
        ("weight_decay", -0.1, "a number, at least 0 and finite"),
        ("eps", True, "a number, at least 0 and finite"),
        ("matrix_lr", "auto", "a number, at least 0 and finite"),
        ("momentum", 1.0, "a number, at least 0 and below 1"),
        ("momentum", "auto", "a number, at least 0 and below 1"),
        ("betas", (0.9,), "two numbers, each at least 0 and below 1"),
        ("betas", 0.9, "two numbers, each at least 0 and below 1"),
        ("zero_stage", 0, "1, 2, 3 or None"),
        ("zero_stage", 4, "1, 2, 3 or None"),
    ],
)
def test_a_value_out_of_range_is_named(key: str, value: Any, allowed: str) -> None:
    arguments: dict[str, Any] = {"lr": 1e-3, key: value}
    with pytest.raises(ValueError) as caught:
        deepspeed_config("muon", **arguments)
    assert str(caught.value) == f"{key}={value!r} is not allowed: it must be {allowed}"


def test_betas_are_checked_one_by_one() -> None:
    with pytest.raises(ValueError, match=r"betas=1\.5 is not allowed: it must be a number, at least 0 and below 1"):
        deepspeed_config("muon", lr=1e-3, betas=(0.9, 1.5))


@pytest.mark.parametrize(("version", "is_refused"), [("0.19.7", True), ("0.19.8+local", False), ("0.20.0rc1", False)])
def test_a_deepspeed_whose_muon_is_another_is_refused(monkeypatch, version: str, is_refused: bool) -> None:
    monkeypatch.setattr(metadata, "version", {"deepspeed": version}.__getitem__)
    if not is_refused:
        assert deepspeed_config("muon", lr=1e-3)
        return
    with pytest.raises(ImportError, match=r"DeepSpeed 0\.19\.7 .*version 0\.19\.8 or later"):
        deepspeed_config("muon", lr=1e-3)


# ---- DeepSpeed itself ----


class ReadKeys(dict[str, Any]):
    """A dict that remembers which of its keys were read."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


@needs_deepspeed
def test_deepspeed_reads_every_key_of_the_block() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    block = deepspeed_config("muon", lr=1e-3, weight_decay=0.01, matrix_lr=0.02, momentum=0.9)["optimizer"]
    parameters = ReadKeys(block["params"])
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    matrix.use_muon, vector.use_muon = True, False
    muon, adam = DeepSpeedEngine._muon_param_groups([matrix, vector], parameters)
    assert parameters.read == set(parameters)
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.02, 0.9, 0.01)
    assert (adam["lr"], adam["betas"], adam["eps"], adam["weight_decay"]) == (1e-3, [0.9, 0.999], 1e-8, 0.01)


RUN = """
import json, sys
import deepspeed, torch
from torch import nn
from hf_matrix_optim import Muon, deepspeed_config, param_groups_for

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.embed, self.tall = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 16)
        self.lm_head = nn.Linear(16, 9)

    def forward(self, tokens):
        return self.lm_head(self.tall(self.wte(tokens) + self.embed(tokens)))

deepspeed.init_distributed("gloo")
torch.manual_seed(0)
found = {}
for stage in (1, 2, 3):
    def configuration(**values):
        return {"train_micro_batch_size_per_gpu": 2, **values}

    model = Model()
    own = deepspeed_config("muon", lr=0.5, weight_decay=0, matrix_lr=0.25, zero_stage=stage)
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, config=configuration(**own), model_parameters=model.parameters()
    )

    def weights():
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            return {name: p.detach().clone() for name, p in model.named_parameters()}

    before = weights()
    engine.backward(engine(torch.arange(8).view(2, 4)).square().mean())
    engine.step()
    moved = {name: new - before[name] for name, new in weights().items()}
    try:
        ours = Model()
        other_engine, *_ = deepspeed.initialize(
            model=ours,
            optimizer=Muon(param_groups_for(ours)),
            config=configuration(zero_allow_untested_optimizer=True, zero_optimization={"stage": stage}),
        )
        other_engine.backward(other_engine(torch.arange(8).view(2, 4)).square().mean())
        other_engine.step()
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    found[stage] = {
        "refusal": refusal,
        "class": type(optimizer.optimizer).__name__,
        "clip": engine.gradient_clipping(),
        "matrices": sorted(name for name, p in model.named_parameters() if p.use_muon),
        "spectrum": torch.linalg.svdvals(moved["tall.weight"]).tolist(),
        "adam": moved["tall.bias"].abs().mean().item(),
    }
json.dump(found, open(sys.argv[1], "w"))
"""


@needs_deepspeed
def test_deepspeeds_engine_steps_by_the_configuration_and_refuses_our_optimizer(tmp_path) -> None:
    """At ZeRO 1, 2 and 3: its choice of matrices and the size of its update are what the docstring says."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment |= {"DS_ACCELERATOR": "cpu", "TORCH_COMPILE_DISABLE": "1"}
    script, output = tmp_path / "run.py", tmp_path / "found.json"
    script.write_text(RUN)
    done = subprocess.run(
        [sys.executable, str(script), str(output)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for stage, found in json.loads(output.read_text()).items():
        assert found["class"] == "MuonWithAuxAdam", stage
        assert found["clip"] == 0
        assert found["matrices"] == ["tall.weight", "wte.weight"]
        # lr sqrt(fan_out / fan_in) = 0.25 * 2; five Newton-Schulz steps bring singular values into (0.5, 1.3).
        assert all(0.5 * 0.5 < value < 0.5 * 1.3 for value in found["spectrum"]), found["spectrum"]
        assert found["adam"] == pytest.approx(0.5, rel=1e-3)
        assert "has become flat" in found["refusal"]
        assert "deepspeed_config" in found["refusal"]
