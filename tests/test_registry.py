"""Options, handlers and the tripwire, through transformers' own tables and Trainer."""

import inspect
import logging
import re
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

import hf_matrix_optim
from hf_matrix_optim import MUD, AdaMuon, Muon, PartitionOptions, create_optimizer, param_groups_for, registration
from hf_matrix_optim.options import (
    OPTIMIZER_NAMES,
    OPTIONS_CLASSES,
    AdaMuonOptions,
    AdaMuonV1Options,
    MUDOptions,
    MuonOptions,
    parse_options,
    split_optim_args,
)
from hf_matrix_optim.registry import OPTIMIZER_CLASSES, RoutedGroups
from hf_matrix_optim.tripwire import OptimizerTripwire

CLASSES = {"muon": Muon, "adamuon": AdaMuon, "adamuon_v1": AdaMuon, "mud": MUD}


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def arguments(optim: str = "muon", **kwargs: Any) -> TrainingArguments:
    defaults = {"output_dir": "unused", "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 2}
    return TrainingArguments(optim=optim, **{**defaults, "disable_tqdm": True, "logging_steps": 1, **kwargs})


def examples(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


# ---- options ----


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_defaults_of_the_options_are_those_of_the_constructor(name: str) -> None:
    signature = inspect.signature(OPTIMIZER_CLASSES[name].__init__).parameters
    routing = {field.name for field in fields(PartitionOptions)}
    not_the_optimizers = {"matrix_lr", "qk_clip", "diagnostics", "diagnostics_per_layer"}
    for field in fields(OPTIONS_CLASSES[name]):
        if field.name in routing:
            assert field.default == getattr(PartitionOptions(), field.name), field.name
        elif (name, field.name) == ("adamuon_v1", "beta2"):
            params = [nn.Parameter(torch.zeros(2, 2))]
            assert AdaMuon(params, variant="v1").param_groups[0]["beta2"] == field.default
        elif field.name not in not_the_optimizers:
            assert field.default == signature[field.name].default, field.name
    own = {field.name for field in fields(OPTIONS_CLASSES[name])}
    from_arguments = {"self", "params", "lr", "weight_decay", "betas", "adamw_eps", "variant", "maximize"}
    without = {"beta2"} if name == "adamuon" else set()  # v2 of the paper has one beta
    assert own - not_the_optimizers == routing | (signature.keys() - from_arguments - without)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("muon", None, MuonOptions()),
        ("muon", "", MuonOptions()),
        ("muon", "ns_steps=6, nesterov=False", MuonOptions(ns_steps=6, nesterov=False)),
        ("muon", "nesterov=no,matrix_lr=0.02,qkv=whole", MuonOptions(nesterov=False, matrix_lr=0.02, qkv="whole")),
        ("muon", "matrix_lr=None,adamw_fused=none", MuonOptions()),
        ("muon", "adamw_fused=1,include=mlp|attn", MuonOptions(adamw_fused=True, include="mlp|attn")),
        (
            "muon",
            "ns_coefficients=polar_express_safety_1.01",
            MuonOptions(ns_coefficients="polar_express_safety_1.01"),
        ),
        ("adamuon", "eps=1e-6,nesterov=true,momentum=0.9", AdaMuonOptions(eps=1e-6, nesterov=True, momentum=0.9)),
        ("adamuon_v1", "beta2=0.99,map_dtype=bfloat16", AdaMuonV1Options(beta2=0.99, map_dtype="bfloat16")),
        ("mud", "passes=2,update_scale=jordan", MUDOptions(passes=2, update_scale="jordan")),
        ("mud", "exclude=h.0,max_workspace_bytes=1024", MUDOptions(exclude="h.0", max_workspace_bytes=1024)),
    ],
)
def test_optim_args_are_typed(name: str, text: str | None, expected: object) -> None:
    options = parse_options(name, split_optim_args(text))
    assert options == expected
    for field in fields(expected):
        assert type(getattr(options, field.name)) is type(getattr(expected, field.name)), field.name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("muon", "ns_step=6", "no key 'ns_step'; did you mean 'ns_steps'?"),
        ("muon", "NESTEROV=true", "no key 'NESTEROV'; did you mean 'nesterov'?"),
        ("mud", "pases=2", "no key 'pases'; did you mean 'passes'?"),
        ("mud", "ns_steps=6", "'mud' has no key 'ns_steps': 'ns_steps' is an option of muon, adamuon, adamuon_v1 ("),
        ("muon", "pases=2", "optim='muon' has no key 'pases': 'passes' is an option of mud ("),
        ("adamuon", "beta2=0.99", "no key 'beta2': it is set by --adam_beta2"),
        ("muon", "lr=0.1", "no key 'lr': it is set by --learning_rate"),
        ("muon", "zzzz=1", "no key 'zzzz' (known: matrix_lr, qkv,"),
        ("muon", "ns_steps=six", "ns_steps='six' is not a whole number"),
        ("muon", "ns_steps=5.5", "ns_steps='5.5' is not a whole number"),
        ("muon", "momentum=high", "momentum='high' is not a number"),
        ("muon", "nesterov=maybe", "nesterov='maybe' is not true or false"),
        ("muon", "adamw_fused=maybe", "adamw_fused='maybe' is not true or false or none"),
        ("muon", "matrix_lr=", "matrix_lr='' is not a number or none"),
        ("muon", "include=", "include='' is not a text"),
        ("muon", "qkv=both", "qkv='both' is not one of split, whole"),
        ("muon", "ns_coefficients=jordn", "ns_coefficients='jordn' is not one of jordan, you, polar_express"),
        ("muon", "momentum", "'momentum' is not key=value"),
        ("muon", "a=b=c", "'a=b=c' is not key=value"),
        ("muon", "ns_steps=6,", "'' is not key=value"),
        ("muon", "=6", "'=6' is not key=value"),
        ("mun", "", "'mun' is not an optimizer of this package (muon, adamuon, adamuon_v1, mud); did you mean"),
    ],
)
def test_bad_optim_args_are_named(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_options(name, split_optim_args(text))


@pytest.mark.parametrize("optim", ["muon", "galore_adamw", "adamw_torch"])
@pytest.mark.parametrize("optim_args", ["momentum", "a=b=c"])
def test_malformed_optim_args_give_one_clear_error_with_every_optimizer(optim: str, optim_args: str) -> None:
    for name in ("transformers.trainer", "transformers.trainer_optimizer"):
        with pytest.raises(ValueError, match="is not key=value"):
            sys.modules[name]._parse_optim_args(optim_args)
    with pytest.raises(ValueError, match=f"'{optim_args}' is not key=value"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(optim, optim_args=optim_args), tiny_gpt2())


@pytest.mark.parametrize("optim_args", [None, "", "a=1", "a=1, b=true,c = x.y|z", "weight_decay=0.1,a=1,a=2"])
def test_good_optim_args_of_other_optimizers_are_read_as_before(optim_args: str | None) -> None:
    pairs = (pair.split("=") for pair in (optim_args or "").replace(" ", "").split(",") if optim_args)
    assert sys.modules["transformers.trainer"]._parse_optim_args(optim_args) == dict(pairs)


def test_optimizers_of_transformers_still_get_their_optim_args() -> None:
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments("sgd", optim_args="momentum=0.5"), tiny_gpt2())
    assert kwargs["momentum"] == 0.5


# ---- the handler ----


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_the_handler_returns_a_class_and_plain_values(name: str) -> None:
    args = arguments(
        name, learning_rate=3e-3, weight_decay=0.03, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7,
        optim_args="momentum=0.9,matrix_lr=0.01",
    )  # fmt: skip
    model = tiny_gpt2()
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    assert optimizer_class is CLASSES[name]
    groups = kwargs["params"]
    for group in [*groups, kwargs]:
        for key, value in group.items():
            if key not in ("params", "param_names"):
                assert isinstance(value, (bool, int, float, str, tuple, type(None))), key
    assert all(type(value) in (float, int) for value in kwargs["betas"])

    optimizer = optimizer_class(**kwargs)
    assert optimizer.defaults["lr"] == 3e-3
    assert optimizer.param_groups[0]["role"] == "adamw"
    for group in optimizer.param_groups:
        assert group["lr"] == (0.01 if group["role"] == "matrix" else 3e-3)
        assert (group["betas"], group["adamw_eps"], group["momentum"]) == ((0.8, 0.95), 1e-7, 0.9)
        assert group["algorithm"] == ("adamw" if group["role"] == "adamw" else name)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_weight_decay_is_on_the_parameters_that_trainer_decays(name: str) -> None:
    model = tiny_gpt2()
    trainer = Trainer(model, arguments(name, weight_decay=0.03))
    optimizer = trainer.create_optimizer()
    decayed = {
        parameter_name
        for group in optimizer.param_groups
        for parameter_name in group["param_names"]
        if group["weight_decay"] == 0.03
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.03}
    expected = set(trainer.get_decay_parameter_names(model)) & {name for name, _ in model.named_parameters()}
    assert decayed == expected
    assert any("ln_1.weight" in name for name, _ in model.named_parameters())
    assert not any("ln_1" in name for name in decayed)


def test_without_a_model_the_error_says_so() -> None:
    with pytest.raises(ValueError, match=re.escape("optim='mud' needs the model")):
        Trainer.get_optimizer_cls_and_kwargs(arguments("mud"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": -1.0}, "lr=-1.0 is not allowed"),
        ({"optim_args": "momentum=1"}, "momentum=1.0 is not allowed"),
        ({"optim_args": "ns_steps=0"}, "ns_steps=0"),
        ({"optim_args": "matrix_lr=-1"}, "matrix_lr=-1.0 is not allowed"),
        ({"optim_args": "matrix_lr=inf"}, "matrix_lr=inf is not allowed"),
        ({"optim_args": "ns_steps=7.5"}, "ns_steps='7.5' is not a whole number"),
        ({"optim_args": "include=nowhere"}, "nowhere"),
        ({"optim_args": "include=mlp", "optim_target_modules": ["attn"]}, "not both"),
        ({"optim_args": "exclude=weight"}, "nothing to orthogonalise"),
    ],
)
def test_bad_values_are_refused_by_name_when_the_optimizer_is_created(kwargs: dict[str, Any], message: str) -> None:
    trainer = Trainer(tiny_gpt2(), arguments("muon", **kwargs))
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.create_optimizer()


@pytest.mark.parametrize("target_modules", [["wte"], r".*wte.*", "all-linear"])
def test_optim_target_modules_is_include(target_modules: str | list[str]) -> None:
    model = tiny_gpt2()
    optimizer = Trainer(model, arguments("muon", optim_target_modules=target_modules)).create_optimizer()
    include = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    expected = param_groups_for(model, options=PartitionOptions(include=include))
    own = {name for group in optimizer.param_groups if group["role"] == "matrix" for name in group["param_names"]}
    assert own == {name for group in expected if group["role"] == "matrix" for name in group["param_names"]}
    assert ("transformer.wte.weight" in own) == (target_modules != "all-linear")


def test_the_partition_is_logged_at_info_as_transformers_logs() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.addFilter(lambda record: "hf_matrix_optim" in record.name)
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
    logging.getLogger("transformers").addHandler(handler)
    try:
        transformers_logging.set_verbosity_warning()
        Trainer.get_optimizer_cls_and_kwargs(arguments("muon"), tiny_gpt2())
        assert lines == []
        transformers_logging.set_verbosity_info()
        Trainer.get_optimizer_cls_and_kwargs(arguments("muon"), tiny_gpt2())
    finally:
        transformers_logging.set_verbosity_warning()
        logging.getLogger("transformers").removeHandler(handler)
    (line,) = lines
    assert line.startswith("INFO optim=muon: matrix optimizer: 4 parameters as 6 matrices, 768 ")
    assert "AdamW: 12 parameters" in line


def test_deepspeed_is_refused_with_the_remedy() -> None:
    args = arguments("mud")
    args.deepspeed = {"zero_optimization": {"stage": 2}}  # set late: only with deepspeed installed is it taken earlier
    with pytest.raises(NotImplementedError, match=r"'mud' does not run under DeepSpeed ZeRO.*use FSDP2.*plain DDP"):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_gpt2())


def test_fsdp1_is_refused_with_the_remedy(tmp_path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 4)), device_id=torch.device("cpu"))
        with pytest.raises(
            NotImplementedError, match=r"'muon' does not run under FSDP1.*use FSDP2 \(fsdp_version 2\)"
        ):
            Trainer.get_optimizer_cls_and_kwargs(arguments("muon"), model)
    finally:
        torch.distributed.destroy_process_group()


def test_create_optimizer_is_the_same_without_trainer() -> None:
    model = tiny_gpt2()
    optimizer = create_optimizer("adamuon_v1", model, lr=1e-3, options=AdaMuonV1Options(beta2=0.99, matrix_lr=0.1))
    assert optimizer.algorithm == "adamuon_v1"
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 0.1}
    model(**{key: value[None] for key, value in examples(1)[0].items()}).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="options of 'mud' must be MUDOptions, not MuonOptions"):
        create_optimizer("mud", model, lr=1e-3, options=MuonOptions())
    with pytest.raises(ValueError, match="'muom' is not an optimizer of this package .* did you mean 'muon'"):
        create_optimizer("muom", model, lr=1e-3)


# ---- the learning rate of the matrix groups ----


def test_the_matrix_learning_rate_is_scheduled_and_logged_beside_the_other() -> None:
    args = arguments("muon", learning_rate=1e-3, max_steps=3, optim_args="matrix_lr=0.02")
    trainer = Trainer(tiny_gpt2(), args, train_dataset=examples(24))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["learning_rate"] for entry in logged] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert [entry["matrix_learning_rate"] for entry in logged] == pytest.approx([0.02, 0.04 / 3, 0.02 / 3])


def test_one_learning_rate_is_logged_once() -> None:
    trainer = Trainer(tiny_gpt2(), arguments("muon"), train_dataset=examples())
    trainer.train()
    assert not any("matrix_learning_rate" in entry for entry in trainer.state.log_history)


# ---- the tripwire ----


class OverridingTrainer(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        return self.optimizer


def with_optimizers(args: TrainingArguments) -> Trainer:
    model = tiny_gpt2()
    return Trainer(
        model, args, train_dataset=examples(), optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None)
    )


def with_subclass(args: TrainingArguments) -> Trainer:
    return OverridingTrainer(tiny_gpt2(), args, train_dataset=examples())


def with_class_and_kwargs(args: TrainingArguments) -> Trainer:
    kwargs = (torch.optim.Adam, {"lr": 1e-3})
    return Trainer(tiny_gpt2(), args, train_dataset=examples(), optimizer_cls_and_kwargs=kwargs)


def with_another_of_ours(args: TrainingArguments) -> Trainer:
    model = tiny_gpt2()
    optimizer = AdaMuon(param_groups_for(model), variant="v1")
    return Trainer(model, args, train_dataset=examples(), optimizers=(optimizer, None))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (with_optimizers, "torch.optim.sgd.SGD"),
        (with_subclass, "torch.optim.adamw.AdamW"),
        (with_class_and_kwargs, "torch.optim.adam.Adam"),
        (with_another_of_ours, "hf_matrix_optim.adamuon.AdaMuon (adamuon_v1)"),
    ],
)
def test_the_tripwire_stops_a_run_that_would_ignore_optim(make: Any, found: str) -> None:
    trainer = make(arguments("adamuon"))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    message = f"optim='adamuon' was asked for, but the optimizer that would train is {found}. Trainer ignores --optim"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("optim", "optim_args", "said"),
    [
        ("adamw_torch", "qk_clip=100", "qk_clip is done with --optim muon, adamuon, adamuon_v1, mud"),
        ("sgd", "momentum=0.9, diagnostics=50", "nothing of it with optim='sgd'"),
        ("adamw_torch", "diagnostics_per_layer=true", "remove diagnostics_per_layer from optim_args"),
        ("sgd", "momentum=0.9,nesterov=true,my_qk_clip=1", None),
        ("adamw_torch", "qk_clip=None,diagnostics=0,diagnostics_per_layer=False", None),
        ("adamw_torch", None, None),
        ("mud", "diagnostics=50", None),
    ],
)
def test_what_other_optimizers_leave_out_is_warned_of(
    optim: str, optim_args: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(registration.logger, "warning", lambda text, *values: warnings.append(text % values))
    trainer = Trainer(tiny_gpt2(), arguments(optim, optim_args=optim_args), train_dataset=examples())
    trainer.train()
    assert trainer.state.global_step > 0
    about_arguments = [message for message in warnings if message.startswith("optim_args=")]
    assert [str(said) in message for message in about_arguments] == ([True] if said else [])


def test_the_tripwire_names_deepspeeds_optimizer_block() -> None:
    args = arguments("muon")
    args.deepspeed = {"optimizer": {"type": "AdamW"}}
    optimizer = Accelerator(cpu=True).prepare(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]))
    with pytest.raises(RuntimeError, match=r"would train is torch\.optim\.adamw\.AdamW\. The DeepSpeed configuration"):
        OptimizerTripwire().on_train_begin(args, TrainerState(), TrainerControl(), optimizer=optimizer)


@pytest.mark.parametrize("make", [with_optimizers, with_subclass, with_class_and_kwargs, with_another_of_ours])
def test_the_tripwire_leaves_other_runs_alone(make: Any) -> None:
    assert make(arguments("adamw_torch")).train().global_step == 2


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_the_tripwire_lets_the_optimizer_that_was_asked_for_train(name: str) -> None:
    trainer = Trainer(tiny_gpt2(), arguments(name), train_dataset=examples())
    assert sum(isinstance(callback, OptimizerTripwire) for callback in trainer.callback_handler.callbacks) == 1
    assert trainer.train().global_step == 2
    assert type(trainer.optimizer.optimizer) is CLASSES[name]
    model = tiny_gpt2()
    handed_over = create_optimizer(name, model, lr=1e-3)  # the one that optim names, made by the user
    trainer = Trainer(model, arguments(name), train_dataset=examples(), optimizers=(handed_over, None))
    assert trainer.train().global_step == 2


# ---- Trainer subclasses that move parameters to groups of their own ----


class MappedTrainer(Trainer):
    """As sentence-transformers' trainer with ``learning_rate_mapping``: regular expression -> learning rate."""

    learning_rate_mapping: dict[str, float]

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: nn.Module | None = None) -> Any:
        optimizer_class, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        decayed = self.get_decay_parameter_names(model)
        for pattern, lr in self.learning_rate_mapping.items():
            mapped = {name: p for name, p in model.named_parameters() if re.search(pattern, name)}
            for group in kwargs["params"]:
                group["params"] = [p for p in group["params"] if all(p is not other for other in mapped.values())]
            for weight_decay in (self.args.weight_decay, 0.0):
                moved = [p for name, p in mapped.items() if (name in decayed) == (weight_decay > 0)]
                if moved:
                    kwargs["params"].append({"params": moved, "lr": lr, "weight_decay": weight_decay})
        return optimizer_class, kwargs


@pytest.mark.parametrize(
    "mapping",
    [
        {"mlp": 0.5},
        {r"h\.0\.attn\.c_attn\.weight": 0.5},  # all parameters of its group: the group goes
        {"mlp": 0.5, "wte|wpe": 0.25},
        {"": 0.5},  # everything
        {"mlp": 0.5, "mlp.c_fc": 0.25},  # moved twice
    ],
)
def test_groups_keep_their_routing_when_a_subclass_moves_parameters(mapping: dict[str, float]) -> None:
    model = tiny_gpt2()
    names = {id(p): name for name, p in model.named_parameters()}
    plain = Trainer(model, arguments("muon", weight_decay=0.03)).create_optimizer()
    trainer = MappedTrainer(model, arguments("muon", weight_decay=0.03, max_steps=1), train_dataset=examples())
    trainer.learning_rate_mapping = mapping
    mapped = trainer.create_optimizer()

    def routing(optimizer: torch.optim.Optimizer) -> dict[str, tuple[Any, ...]]:
        keys = ("role", "algorithm", "weight_decay", "output_axis", "flatten", "split_sizes", "interleaved")
        return {
            names[id(p)]: tuple(group.get(key) for key in keys)
            for group in optimizer.param_groups
            for p in group["params"]
        }

    assert routing(mapped) == routing(plain)
    for group in mapped.param_groups:
        assert group["params"]
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
        for name in group["param_names"]:
            rates = [lr for pattern, lr in mapping.items() if re.search(pattern, name)]
            assert group["lr"] == (rates[-1] if rates else trainer.args.learning_rate)
    assert trainer.train().global_step == 1


def test_a_group_of_foreign_parameters_is_kept_as_it_is() -> None:
    groups = RoutedGroups(param_groups_for(tiny_gpt2()))
    foreign = {"params": [nn.Parameter(torch.zeros(3))], "lr": 1.0}
    groups.append(foreign)
    assert groups[-1] is foreign


def test_the_public_names_are_there() -> None:
    for name in hf_matrix_optim.__all__:
        assert getattr(hf_matrix_optim, name) is not None
