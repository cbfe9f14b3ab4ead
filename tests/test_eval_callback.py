"""Benchmarks during training: they are logged, and the training does not notice."""

import datasets
import pytest
import torch
import transformers
from checkpoints import find_checkpoints, load_model, load_tokenizer
from eval_error import EvalError
from eval_fixtures import save_checkpoint, shared_data
from lm_eval_callback import LMEvalCallback
from loaded_lm import LoadedLM
from offline_data import DataFolder
from scoring import score
from suite import BENCHMARKS
from task_loading import load_benchmark

TASKS = ["piqa", "gsm8k"]
STEPS = 5


@pytest.fixture(scope="module")
def data():
    return shared_data()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), dropout=0.3)


class Recorder(transformers.TrainerCallback):
    """Keeps what a tracker of ``report_to`` is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def make_trainer(checkpoint, folder, recorder=None, **options):
    (found,) = find_checkpoints([str(checkpoint)])
    tokenizer = load_tokenizer(found)
    model = load_model(found, tokens=len(tokenizer), dtype="float32", device="cpu").train()
    ids = [[5 + (7 * row + column) % 200 for column in range(24)] for row in range(16)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=7,
        **options,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[recorder] if recorder else None
    )


def test_training_is_the_same_with_and_without_it(checkpoint, data, tmp_path):
    runs = []
    for evaluated in (False, True):
        recorder = Recorder()
        trainer = make_trainer(checkpoint, tmp_path / str(evaluated), recorder)
        modes = {name: module.training for name, module in trainer.model.named_modules()}
        config = trainer.model.generation_config
        if evaluated:
            trainer.add_callback(LMEvalCallback(trainer, TASKS, every_steps=2, data_dir=data, limit=1))
        trainer.train()
        assert {name: module.training for name, module in trainer.model.named_modules()} == modes
        assert trainer.model.generation_config is config
        runs.append((trainer, recorder.logs))
    (plain, plain_logs), (evaluated, logs) = runs
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, evaluated.model.state_dict()[name]), name
    assert torch.equal(torch.nn.Parameter(plain.model.lm_head.weight), evaluated.model.lm_head.weight)
    changing = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    kept = [
        [
            (step, {k: v for k, v in each.items() if k not in changing})
            for step, each in of
            if "eval_piqa_acc_norm" not in each
        ]
        for of in (plain_logs, logs)
    ]
    assert kept[0] == kept[1]  # every loss and gradient norm, none lost
    assert sum("loss" in each for _, each in kept[1]) == STEPS
    benchmarks = {step: each for step, each in logs if "eval_piqa_acc_norm" in each}
    assert sorted(benchmarks) == [2, 4, STEPS]
    for each in benchmarks.values():
        assert {"eval_piqa_acc_norm", "eval_gsm8k_exact_match"} <= set(each)
    history = [entry for entry in evaluated.state.log_history if "eval_piqa_acc_norm" in entry]
    assert [entry["step"] for entry in history] == [2, 4, STEPS]


def test_its_scores_are_those_of_the_model(checkpoint, data, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path)
    metrics = LMEvalCallback(trainer, ["hellaswag"], 1, data_dir=data).evaluate(trainer.model)
    (found,) = find_checkpoints([str(checkpoint)])
    tokenizer = load_tokenizer(found)
    model = load_model(found, tokens=len(tokenizer), dtype="float32", device="cpu")
    benchmark = BENCHMARKS["hellaswag"]
    wanted = score(LoadedLM(model, tokenizer, batch_size=8), benchmark, load_benchmark(benchmark, DataFolder(data)))
    assert metrics["eval_hellaswag_acc_norm"] == wanted.score
    assert metrics["eval_hellaswag_acc_norm_stderr"] == wanted.standard_error


def test_what_it_refuses_before_training(checkpoint, data, tmp_path):
    trainer = make_trainer(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="every_steps is 0"):
        LMEvalCallback(trainer, TASKS, 0, data_dir=data)
    with pytest.raises(EvalError, match="no benchmark 'pika'"):
        LMEvalCallback(trainer, ["pika"], 1, data_dir=data)
    with pytest.raises(EvalError, match="no train split"):
        LMEvalCallback(trainer, TASKS, 1, data_dir=tmp_path)
    with pytest.raises(EvalError, match="allow_code=True"):
        LMEvalCallback(trainer, ["mbpp"], 1, data_dir=data)
    trainer.processing_class = None
    with pytest.raises(EvalError, match="give tokenizer="):
        LMEvalCallback(trainer, TASKS, 1, data_dir=data)
    trainer.is_fsdp_enabled = True
    with pytest.raises(EvalError, match="evaluate saved checkpoints"):
        LMEvalCallback(trainer, TASKS, 1, data_dir=data)
