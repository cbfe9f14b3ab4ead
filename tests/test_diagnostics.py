"""Diagnostics: values against float64 on the side, training unchanged, logs, samples, and what is refused."""

import logging
import math

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import OPTIMIZER_NAMES, arguments, optimizer_of, state_tensors, token_rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

import hf_matrix_optim
from hf_matrix_optim import MatrixTrainer, OptimizerDiagnostics, create_optimizer
from hf_matrix_optim.diagnostics import DiagnosticsCallback
from hf_matrix_optim.int8_momentum import in_float
from hf_matrix_optim.matrix_layout import MatrixLayout, split_parts, to_matrices
from hf_matrix_optim.options import OPTIONS_CLASSES, AdaMuonOptions, MuonOptions

LR, DECAY = 0.02, 0.1


def batch_loss(model: nn.Module, seed: int = 0) -> torch.Tensor:
    if "pixel_values" in getattr(model, "main_input_name", ""):
        pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        return model(pixel_values=pixels, labels=torch.tensor([0, 1, 2, 0])).loss
    rows = torch.stack([row["input_ids"] for row in token_rows(4, seed=seed)])
    return model(input_ids=rows, labels=rows).loss


def matrices_of(tensor: torch.Tensor, group: dict) -> list[torch.Tensor]:
    layout = MatrixLayout.from_group(group)
    return [m.double() for part in split_parts(tensor, layout) for m in to_matrices(part, layout)]


def measured(model: nn.Module, optimizer, *, step=True, **options) -> tuple[dict[str, float], dict[str, float]]:
    """The values of a step, and the same in float64 from copies of everything."""
    for seed in range(2):  # momentum of more than one gradient
        batch_loss(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch_loss(model, 2).backward()
    before = {p: p.detach().clone() for p in model.parameters()}
    diagnostics = OptimizerDiagnostics(model, optimizer, **options)
    diagnostics.before_step()
    if step:
        optimizer.step()
    diagnostics.after_step()
    return diagnostics.values(), expected_values(optimizer, before)


def expected_values(optimizer, before: dict[nn.Parameter, torch.Tensor]) -> dict[str, float]:
    """Line by line the definitions of ``OptimizerDiagnostics``, by singular values where there are such."""
    rows: list[tuple[int, dict[str, float]]] = []
    values: dict[str, float] = {}
    squares: dict[str, list[torch.Tensor]] = {"matrix": [], "adamw": []}
    for number, group in enumerate(optimizer.param_groups):
        gradients = torch.cat([p.grad.double().flatten() for p in group["params"]])
        squares[group["role"]].append(gradients.square().sum())
        if group["role"] == "adamw":
            continue
        for p in group["params"]:
            momenta = matrices_of(in_float(optimizer.state[p]), group)
            for old, new, momentum in zip(
                matrices_of(before[p], group), matrices_of(p.detach(), group), momenta, strict=True
            ):
                update = ((1 - group["lr"] * group["weight_decay"]) * old - new) / group["lr"]
                u = update if update.size(0) <= update.size(1) else update.T
                k = u.size(0)
                error = k * u @ u.T / u.square().sum() - torch.eye(k, dtype=torch.float64)
                row = {
                    "update_rms": update.square().mean().sqrt(),
                    "relative_update": (new - old).norm() / old.norm(),
                    "orthogonality_error": error.norm() / math.sqrt(k),
                    "momentum_stable_rank": momentum.square().sum() / torch.linalg.matrix_norm(momentum, 2) ** 2,
                    "spectral_norm_max": torch.linalg.matrix_norm(new, 2),
                }
                rows.append((number, {key: float(value) for key, value in row.items()}))
    groups = sorted({number for number, _ in rows})
    for suffix, members in [("", groups), *((f"/group_{g}", [g]) for g in groups if len(groups) > 1)]:
        chosen = [row for number, row in rows if number in members]
        for key in chosen[0]:
            column = [row[key] for row in chosen]
            values[key + suffix] = max(column) if key.endswith("_max") else sum(column) / len(column)
    for role, found in squares.items():
        values[f"grad_norm_{role}"] = float(torch.stack(found).sum().sqrt())
    adamw = [p for group in optimizer.param_groups if group["role"] == "adamw" for p in group["params"]]
    changes, weights = (
        torch.cat([f(p).double().flatten() for p in adamw]).norm()
        for f in (lambda p: p.detach().double() - before[p].double(), lambda p: before[p])
    )
    values["relative_update_adamw"] = float(changes / weights)
    return values | {"matrices": len(rows)}


def assert_values(found: dict[str, float], expected: dict[str, float], rel: float = 2e-4) -> None:
    for key, value in expected.items():
        # These rest on an estimate of the spectral norm: not above it, and at most 2 % below.
        if key.startswith("spectral_norm"):
            assert 0.98 * value < found[f"diagnostics/{key}"] < (1 + 1e-5) * value, key
        elif key.startswith("momentum_stable_rank"):
            assert (1 - 1e-5) * value < found[f"diagnostics/{key}"] < 1.04 * value, key
        else:
            assert found[f"diagnostics/{key}"] == pytest.approx(value, rel=rel), key


# ---- values ----


@pytest.mark.parametrize(
    ("name", "model_name"),
    [
        *((name, "gpt2") for name in OPTIMIZER_NAMES),
        ("muon", "qwen3_moe"),
        ("mud", "gpt_oss"),
        ("adamuon", "resnet"),
        ("muon", "t5"),
    ],
)
def test_values_equal_float64_on_the_side(name, model_name):
    model = tiny_model(model_name)
    optimizer = create_optimizer(name, model, lr=LR, weight_decay=DECAY, options=OPTIONS_CLASSES[name](matrix_lr=0.01))
    found, expected = measured(model, optimizer)
    assert_values(found, expected)
    assert found["diagnostics/skipped_matrices"] == 0
    assert "diagnostics/optimizer_time_share" not in found  # begin_step() was not called


@pytest.mark.parametrize("stack_bytes", [1, 5 * 32 * 32 * 4, 2**30])
def test_groups_that_share_a_stack_keep_their_rates(stack_bytes, monkeypatch):
    """Matrices of one shape, measured one by one, some at a time over the groups' border, and all at once."""
    monkeypatch.setattr("hf_matrix_optim.optimizer_diagnostics.CPU_STACK_BYTES", stack_bytes)
    model = tiny_model("llama", num_hidden_layers=4)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if "q_proj" in name], "lr": 0.01, "weight_decay": 0.3},
        {"params": [p for name, p in named.items() if "o_proj" in name], "lr": 0.05, "weight_decay": 0.0},
        {"params": [p for name, p in named.items() if "q_proj" not in name and "o_proj" not in name], "role": "adamw"},
    ]
    found, expected = measured(model, hf_matrix_optim.Muon(groups, lr=1e-3))
    assert {"relative_update/group_0", "relative_update/group_1"} <= expected.keys()
    assert_values(found, expected)


def test_values_with_momentum_in_int8():
    model = tiny_model("gpt2", n_embd=64)
    optimizer = create_optimizer(
        "muon", model, lr=LR, weight_decay=DECAY, options=MuonOptions(matrix_lr=0.01, momentum_dtype="int8")
    )
    assert_values(*measured(model, optimizer))
    assert torch.int8 in {state["momentum_buffer"].dtype for state in optimizer.state.values() if "skipped" in state}


def test_update_rms_and_decay_are_those_of_the_rule():
    """AdaMuon's update has a root mean square of 0.2 exactly, whatever the weight decay."""
    model = tiny_model("llama")
    found, _ = measured(model, create_optimizer("adamuon", model, lr=LR, weight_decay=0.5))
    assert found["diagnostics/update_rms"] == pytest.approx(0.2, rel=1e-4)


def test_values_of_float64_and_bfloat16_weights():
    double = tiny_model("llama").double()
    found, expected = measured(double, create_optimizer("mud", double, lr=LR))
    assert_values(found, expected, rel=1e-9)
    half = tiny_model("llama").bfloat16()
    found, expected = measured(half, create_optimizer("mud", half, lr=1e-5, weight_decay=0.0))
    assert_values(found, expected)
    assert found["diagnostics/update_rms"] < 0.19  # of an update of 0.2, part is rounded away


def test_one_value_for_each_layer():
    model = tiny_model("gpt2")
    found, _ = measured(model, create_optimizer("muon", model, lr=LR), per_layer=True)
    layers = {key: value for key, value in found.items() if key.startswith("diagnostics/update_rms/transformer")}
    parts = [f"diagnostics/update_rms/transformer.h.0.attn.c_attn.weight.part_{i}" for i in range(3)]
    assert len(layers) == 12
    assert set(parts) <= layers.keys()
    assert found["diagnostics/update_rms"] == pytest.approx(sum(layers.values()) / 12)
    bounds = [found[f"diagnostics/attention_logit_bound/transformer.h.{i}.attn"] for i in range(2)]
    assert found["diagnostics/attention_logit_bound_max"] == max(bounds)


def test_a_step_that_was_not_taken_is_no_update():
    """As by a GradScaler that saw an overflow: weight decay is not taken for an update."""
    model = tiny_model("llama")
    found, _ = measured(model, create_optimizer("muon", model, lr=LR), step=False)
    assert found["diagnostics/update_rms"] == found["diagnostics/relative_update"] == 0
    assert "diagnostics/orthogonality_error" not in found


def test_skipped_matrices_are_counted_and_stay():
    model = tiny_model("llama")
    optimizer = create_optimizer("muon", model, lr=LR)
    diagnostics = OptimizerDiagnostics(model, optimizer, per_layer=True)
    weight = model.model.layers[0].self_attn.q_proj.weight
    for _ in range(2):
        batch_loss(model).backward()
        weight.grad[0, 0] = float("nan")
        diagnostics.before_step()
        optimizer.step()
        diagnostics.after_step()
    found = diagnostics.values()
    assert found["diagnostics/skipped_matrices"] == 2
    assert math.isnan(found["diagnostics/grad_norm_matrix"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert found[f"diagnostics/update_rms/{name}"] == 0
    assert f"diagnostics/orthogonality_error/{name}" not in found
    assert math.isfinite(found["diagnostics/orthogonality_error"])


def test_what_is_not_defined_is_left_out():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4))
    nn.init.zeros_(model[1].weight)
    groups = [{"params": [model[i].weight for i in range(2)]}, {"params": [model[2].bias], "role": "adamw"}]
    optimizer = hf_matrix_optim.Muon(groups, lr=0.0)
    diagnostics = OptimizerDiagnostics(model, optimizer, per_layer=True)
    model[0].weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    model[1].weight.grad = torch.zeros(8, 8)
    diagnostics.before_step()
    optimizer.step()
    diagnostics.after_step()
    found = diagnostics.values()
    assert "diagnostics/update_rms" not in found  # the learning rate is 0, as in the first step of a warm-up
    assert found["diagnostics/relative_update"] == 0
    assert "diagnostics/relative_update/group_0.param_1" not in found  # of zero weights
    assert "diagnostics/momentum_stable_rank/group_0.param_1" not in found
    assert "diagnostics/grad_norm_adamw" in found  # 0 without a gradient
    assert found["diagnostics/grad_norm_adamw"] == 0


def test_matrices_without_a_gradient_are_left_out():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = hf_matrix_optim.MUD([model[0].weight, model[1].weight], lr=LR)
    diagnostics = OptimizerDiagnostics(model, optimizer, per_layer=True)
    model[0].weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    diagnostics.before_step()
    optimizer.step()
    diagnostics.after_step()
    found = diagnostics.values()
    assert "diagnostics/update_rms/group_0.param_1" not in found
    assert found["diagnostics/update_rms"] == found["diagnostics/update_rms/group_0.param_0"] > 0.1


def test_tensor_learning_rates():
    values = []
    for lr in (LR, torch.tensor(LR)):
        model = tiny_model("llama")
        values.append(measured(model, create_optimizer("mud", model, lr=lr))[0])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_sample_is_measured_where_not_all_fit(caplog):
    model = tiny_model("qwen2")
    largest = 32 * 48 * 4
    for budget, most in ((1, 1), (2 * 5 * largest, 9)):
        options = MuonOptions(max_workspace_bytes=budget)
        optimizer = create_optimizer("muon", model, lr=LR, options=options)
        logger = logging.getLogger("transformers.hf_matrix_optim")
        logger.addHandler(caplog.handler)
        logger.setLevel(logging.INFO)
        try:
            found, _ = measured(model, optimizer, per_layer=True)
        finally:
            logger.removeHandler(caplog.handler)
            logger.setLevel(logging.NOTSET)
        count = found["diagnostics/matrices"]
        assert 1 <= count <= most
        assert f"diagnostics measure {count} of 14 matrices" in caplog.text
        assert sum(key.startswith("diagnostics/update_rms/model") for key in found) == count
    kinds = {key.rpartition("_proj")[0].rpartition(".")[2] for key in found if "/update_rms/model" in key}
    assert len(kinds) >= 4  # seven kinds a layer: the sample does not hit their period


def test_adamw_rows_are_sampled_evenly():
    model = nn.Sequential(nn.Embedding(50_000, 32), nn.Linear(32, 16))
    optimizer = create_optimizer("muon", model, lr=LR, weight_decay=0.0, options=MuonOptions(include="1.weight"))
    model[0].weight.grad = torch.randn(50_000, 32, generator=torch.Generator().manual_seed(0))
    diagnostics = OptimizerDiagnostics(model, optimizer)
    before = model[0].weight.detach().clone()
    diagnostics.before_step()
    kept = sum(tensor.numel() for tensors in diagnostics._adamw_before.values() for tensor in tensors)
    assert kept <= 2**18 + 16
    optimizer.step()
    diagnostics.after_step()
    change = (model[0].weight.detach() - before).norm() / before.norm()
    assert diagnostics.values()["diagnostics/relative_update_adamw"] == pytest.approx(float(change), rel=0.02)


# ---- training with diagnostics on and off ----


def trained(tmp_path, *, trainer_class=Trainer, model="gpt2", callbacks=(), **values) -> Trainer:
    own = {key: values.pop(key) for key in ("optimizer_options", "diagnostics_steps") if key in values}
    trainer = trainer_class(
        tiny_model(model), arguments(tmp_path, **values), train_dataset=token_rows(), callbacks=[*callbacks], **own
    )
    trainer.train()
    return trainer


def diagnosed(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "diagnostics/step" in entry]


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_training_is_bit_for_bit_the_same(name, tmp_path):
    """With dropout, so that a single number drawn from the global generator would show."""
    off = trained(tmp_path, optim=name, optim_args="kernels=auto")
    state = torch.get_rng_state()
    on = trained(tmp_path, optim=name, optim_args="diagnostics=1,diagnostics_per_layer=true")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(diagnosed(on)) == 6
    assert not diagnosed(off)
    first, second = (state_tensors(trainer.model, optimizer_of(trainer)) for trainer in (off, on))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
    for one, other in zip(off.state.log_history[:-1], on.state.log_history[:-1], strict=True):
        assert {key: value for key, value in other.items() if not key.startswith("diagnostics/")} == one


# ---- logs ----


class Reporter(TrainerCallback):
    """Sees what the callbacks of ``report_to`` see."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("trainer_class", [Trainer, MatrixTrainer])
def test_values_go_to_reporters_and_into_the_history(tmp_path, trainer_class):
    reporter = Reporter()
    values = {"optim": "muon", "optim_args": "diagnostics=2", "logging_steps": 2, "weight_decay": DECAY}
    trainer = trained(tmp_path, trainer_class=trainer_class, callbacks=[reporter], **values)
    assert [entry["diagnostics/step"] for entry in diagnosed(trainer)] == [2, 4, 6]
    assert [entry["step"] for entry in diagnosed(trainer)] == [2, 4, 6]
    for seen, entry in zip(reporter.seen[:3], diagnosed(trainer), strict=True):
        own = {key: value for key, value in entry.items() if key.startswith("diagnostics/")}
        assert own.items() <= seen.items()
        assert 0 < own["diagnostics/optimizer_time_share"] < 1
        assert 0.1 < own["diagnostics/update_rms"] < 0.25
    assert sum(isinstance(found, DiagnosticsCallback) for found in trainer.callback_handler.callbacks) == 1


def test_reporting_integrations_come_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda report_to: [Reporter])
    for trainer_class in (Trainer, MatrixTrainer):
        trainer = trainer_class(tiny_model("gpt2"), arguments(tmp_path, optim="muon", report_to=["mlflow"]))
        classes = [type(found) for found in trainer.callback_handler.callbacks]
        assert classes.index(DiagnosticsCallback) < classes.index(Reporter)


def test_the_newest_of_several_steps_is_logged(tmp_path):
    trainer = trained(tmp_path, optim="mud", optim_args="diagnostics=2", logging_steps=5, max_steps=8)
    entries = diagnosed(trainer)
    assert [(entry["step"], entry["diagnostics/step"]) for entry in entries] == [(5, 4), (8, 8)]
    assert "train_runtime" in entries[-1]  # nothing else is logged after step 8


def test_steps_that_are_seldom_logged_are_warned_of(tmp_path, caplog):
    logger = logging.getLogger("transformers.hf_matrix_optim")
    logger.addHandler(caplog.handler)
    try:
        trained(tmp_path, optim="mud", optim_args="diagnostics=2", logging_steps=5, max_steps=1)
    finally:
        logger.removeHandler(caplog.handler)
    assert "diagnostics=2 measures more often than logging_steps=5 logs" in caplog.text
    assert "--logging_steps 2" in caplog.text


def test_evaluation_logs_do_not_take_the_values(tmp_path):
    values = {"optim": "muon", "optim_args": "diagnostics=3", "logging_steps": 6, "eval_strategy": "steps"}
    trainer = Trainer(
        tiny_model("gpt2"),
        arguments(tmp_path, eval_steps=3, **values),
        train_dataset=token_rows(),
        eval_dataset=token_rows(4),
    )
    trainer.train()
    assert [entry["diagnostics/step"] for entry in diagnosed(trainer)] == [6]
    assert all("eval_loss" not in entry for entry in diagnosed(trainer))


def test_learning_rate_is_that_of_the_step(tmp_path):
    """A rate that the scheduler had moved already would make AdaMuon's 0.2 something else, and 0 in the last step."""
    trainer = trained(tmp_path, optim="adamuon", optim_args="diagnostics=1", model="llama", learning_rate=0.01)
    assert len(diagnosed(trainer)) == 6
    for entry in diagnosed(trainer):
        assert entry["diagnostics/update_rms"] == pytest.approx(0.2, rel=1e-4)


# ---- who may ask, and how ----


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer_options": MuonOptions(diagnostics=3)},
        {"optim": "muon", "diagnostics_steps": 3},
        {"optimizer_options": AdaMuonOptions(), "diagnostics_steps": 3},
    ],
    ids=["dataclass", "steps", "both"],
)
def test_matrix_trainer_takes_it_too(tmp_path, values):
    trainer = trained(tmp_path, trainer_class=MatrixTrainer, **values)
    assert [entry["diagnostics/step"] for entry in diagnosed(trainer)] == [3, 6]


def test_matrix_trainer_measures_an_optimizer_that_it_was_given(tmp_path):
    model = tiny_model("gpt2")
    optimizer = create_optimizer("mud", model, lr=LR)
    trainer = MatrixTrainer(
        model,
        arguments(tmp_path),
        train_dataset=token_rows(),
        optimizers=(optimizer, None),
        diagnostics_steps=6,
    )
    trainer.train()
    assert [entry["diagnostics/step"] for entry in diagnosed(trainer)] == [6]


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("diagnostics=-1", r"diagnostics=-1 must be a whole number of optimizer steps: 50 measures every 50th"),
        ("diagnostics=often", "diagnostics='often' is not a whole number"),
        ("diagnostics_per_layer=true", "diagnostics_per_layer=True needs diagnostics"),
        ("diagnostic=5", "did you mean 'diagnostics'"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, optim_args, message):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, optim="muon", optim_args=optim_args)


def test_a_run_without_logs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="logging_strategy='no' switches them off"):
        trained(tmp_path, optim="muon", optim_args="diagnostics=2", logging_strategy="no")


def test_an_optimizer_without_trainer_is_refused():
    with pytest.raises(ValueError, match=r"OptimizerDiagnostics.*MatrixTrainer\(diagnostics_steps"):
        create_optimizer("muon", tiny_model("gpt2"), lr=LR, options=MuonOptions(diagnostics=50))
    with pytest.raises(TypeError, match="not SGD"):
        OptimizerDiagnostics(nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters()))


@pytest.mark.parametrize("steps", [0, -5, 2.0, True])
def test_matrix_trainer_refuses_steps_that_are_none(tmp_path, steps):
    with pytest.raises(ValueError, match="diagnostics_steps=.* must be a whole number of optimizer steps, at least 1"):
        MatrixTrainer(tiny_model("gpt2"), arguments(tmp_path, optim="muon"), diagnostics_steps=steps)


def test_matrix_trainer_refuses_two_answers_and_other_optimizers(tmp_path):
    with pytest.raises(ValueError, match="diagnostics_steps=3 and the option diagnostics=2"):
        trained(
            tmp_path,
            trainer_class=MatrixTrainer,
            optim="muon",
            optim_args="diagnostics=2",
            diagnostics_steps=3,
        )
    with pytest.raises(ValueError, match="diagnostics_steps=3 needs an optimizer of this package"):
        trained(tmp_path, trainer_class=MatrixTrainer, diagnostics_steps=3)


def test_order_of_calls():
    model = tiny_model("llama")
    diagnostics = OptimizerDiagnostics(model, create_optimizer("muon", model, lr=LR))
    with pytest.raises(RuntimeError, match="without before_step"):
        diagnostics.after_step()
    with pytest.raises(RuntimeError, match="no step has been measured"):
        diagnostics.values()


class Operations(TorchDispatchMode):
    """Counts what would be launched on a GPU, and views, which cost the host alone."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = self.views = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [returned.alias_info for returned in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            self.views += 1
        else:
            self.launched += 1
        return func(*args, **(kwargs or {}))


def operations_of_measuring(name: str, **configuration) -> Operations:
    model = tiny_model(name, **configuration)
    optimizer = create_optimizer("muon", model, lr=LR)
    diagnostics = OptimizerDiagnostics(model, optimizer, per_layer=True)
    for _ in range(2):  # what is kept after the first time is not counted
        batch_loss(model).backward()
        operations = Operations()
        with operations:
            diagnostics.before_step()
        optimizer.step()
        with operations:
            diagnostics.after_step()
        optimizer.zero_grad()
    assert diagnostics.values()["diagnostics/attention_logit_bound_max"] > 0
    return operations


@pytest.mark.parametrize(("name", "layers"), [("gpt2", "n_layer"), ("qwen2", "num_hidden_layers")])
def test_layers_add_views_and_no_launches(name, layers):
    """On a GPU measuring small matrices is as slow as its launches are many."""
    few, many = (operations_of_measuring(name, **{layers: count}) for count in (6, 12))
    assert many.launched - few.launched <= 6
    assert many.views - few.views <= 6 * 40


def test_modules_that_were_exchanged_are_looked_up_anew():
    """As when an adapter is put around a projection between two measured steps."""
    model = tiny_model("llama")
    optimizer = create_optimizer("muon", model, lr=LR)
    diagnostics = OptimizerDiagnostics(model, optimizer, per_layer=True)

    def bounds() -> dict[str, float]:
        diagnostics.before_step()
        optimizer.step()
        diagnostics.after_step()
        prefix = "diagnostics/attention_logit_bound/model.layers."
        return {key.removeprefix(prefix): v for key, v in diagnostics.values().items() if key.startswith(prefix)}

    first = bounds()
    assert first.keys() == {"0.self_attn", "1.self_attn"}
    attention = model.model.layers[1].self_attn
    larger = nn.Linear(32, 32, bias=False)
    larger.weight = nn.Parameter(attention.q_proj.weight.detach() * 3)
    attention.q_proj = larger
    second = bounds()
    assert second["0.self_attn"] == first["0.self_attn"]
    assert second["1.self_attn"] == pytest.approx(3 * first["1.self_attn"])
    attention.k_proj = nn.Sequential(attention.k_proj)
    attention.k_proj.out_features = 16
    assert bounds().keys() == {"0.self_attn"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_measuring_waits_for_no_gpu(name):
    model = tiny_model(name).cuda()
    optimizer = create_optimizer("muon", model, lr=LR)
    diagnostics = OptimizerDiagnostics(model, optimizer, per_layer=True)
    tokens = torch.stack([row["input_ids"] for row in token_rows(4)]).cuda()
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            diagnostics.begin_step()
            diagnostics.before_step()
            optimizer.step()
            diagnostics.after_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
    found = diagnostics.values()
    assert 0.1 < found["diagnostics/update_rms"] < 0.25
    assert 0 < found["diagnostics/optimizer_time_share"] <= 1


def test_groups_of_adamw_alone_and_empty_ones():
    layer = nn.Linear(4, 4)
    layer(torch.ones(1, 4)).sum().backward()
    for groups, expected in (
        ([{"params": list(layer.parameters()), "role": "adamw"}], 0),
        ([{"params": [layer.weight]}, {"params": []}, {"params": [], "role": "adamw"}], 1),
    ):
        optimizer = hf_matrix_optim.Muon(groups, lr=LR)
        diagnostics = OptimizerDiagnostics(layer, optimizer)
        diagnostics.before_step()
        optimizer.step()
        diagnostics.after_step()
        found = diagnostics.values()
        assert found["diagnostics/matrices"] == expected
        assert found["diagnostics/skipped_matrices"] == 0
        assert ("diagnostics/update_rms" in found) == bool(expected)


def test_a_run_in_which_nothing_is_measured_is_warned_of(tmp_path, caplog):
    logger = logging.getLogger("transformers.hf_matrix_optim")
    logger.addHandler(caplog.handler)
    try:
        trained(tmp_path, optim="mud", optim_args="diagnostics=2", logging_steps=1, max_steps=2)
        assert "measures no step" not in caplog.text
        trained(tmp_path, optim="mud", optim_args="diagnostics=50", logging_steps=1, max_steps=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert "diagnostics=50 measures no step of this run, which goes from step 0 to 2" in caplog.text


def test_a_callback_of_ones_own(tmp_path):
    for steps in (0, -2, True, 2.5):
        with pytest.raises(ValueError, match=f"steps={steps!r} must be a whole number of optimizer steps"):
            DiagnosticsCallback(steps)
    trainer = Trainer(
        tiny_model("gpt2"), arguments(tmp_path), train_dataset=token_rows(), callbacks=[DiagnosticsCallback(1)]
    )
    with pytest.raises(ValueError, match=r"DiagnosticsCallback\(1\) needs an optimizer of this package, not AdamW"):
        trainer.train()
