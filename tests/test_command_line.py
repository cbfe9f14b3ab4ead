"""``python -m hf_matrix_optim``: the launcher against plain python, explain, doctor, enable and disable."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from interpreters import ROOT, SCRIPTS, output_of, run_python, scratch_environment
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

from hf_matrix_optim import __main__ as command_line
from hf_matrix_optim import create_optimizer
from hf_matrix_optim.enable import PTH_NAME
from hf_matrix_optim.model_report import ModelSourceError, model_report
from hf_matrix_optim.options import OPTIMIZER_NAMES, parse_options, split_optim_args

LAUNCHER = ("-m", "hf_matrix_optim")


# ---- the launcher ----


def same_below_the_launcher(*arguments: str, cwd: Path, flags: tuple[str, ...] = (), **changes: str) -> list[str]:
    """Run ``python arguments`` plainly and below the launcher; both must print and end alike."""
    plain = run_python(*flags, *arguments, cwd=cwd, **changes)
    launched = run_python(*flags, *LAUNCHER, *arguments, cwd=cwd, **changes)
    assert launched.stdout == plain.stdout
    assert launched.returncode == plain.returncode
    assert plain.stdout, plain.stderr
    last = [result.stderr.strip().splitlines()[-1:] for result in (plain, launched)]
    assert last[0] == last[1]
    return plain.stdout.splitlines()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the probe as a script, in a package, as a folder with __main__ and as a zip file."""
    probe = (SCRIPTS / "main_module_probe.py").read_text()
    for path in ("probe.py", "explain.py", "package/__init__.py", "package/module.py", "package/__main__.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("" if path.endswith("__init__.py") else probe)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(probe)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", probe)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "link.py").symlink_to(tmp_path / "probe.py")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("probe.py", "a", "--optim", "muon", "-m", "--help"),
        ("./probe.py",),
        ("linked/link.py",),
        ("./explain.py", "gpt2"),
        ("probe.py", "--exit", "3"),
        ("probe.py", "--raise"),
        ("folder", "a"),
        ("folder/", "--exit", "4"),
        ("archive.zip", "a"),
        ("-m", "package.module", "a", "--help"),
        ("-m", "package", "a"),
        ("-m", "package.module", "--raise"),
    ],
    ids=" ".join,
)
def test_a_script_sees_what_it_sees_below_plain_python(project: Path, arguments: tuple[str, ...]) -> None:
    lines = same_below_the_launcher(*arguments, cwd=project)
    assert json.loads(lines[0])["pickled"]
    assert json.loads(lines[-1]) == {"at exit": ["kept until the end", True]}


@pytest.mark.parametrize("flags", [("-P",), ("-O",)], ids=str)
def test_flags_of_python_reach_the_script(project: Path, flags: tuple[str, ...]) -> None:
    if flags == ("-P",) and sys.version_info < (3, 11):
        flags = ("-O",)
    lines = same_below_the_launcher("probe.py", cwd=project, flags=flags, PYTHONPATH=str(ROOT))
    assert json.loads(lines[0])["argv"] == ["probe.py"]


def test_compiled_code_runs_as_a_script(project: Path) -> None:
    output_of("-c", "import py_compile; py_compile.compile('probe.py', 'compiled.pyc')", cwd=project)
    lines = same_below_the_launcher("compiled.pyc", "a", cwd=project)
    assert json.loads(lines[0])["loader"][0] == "SourcelessFileLoader"


def test_child_processes_have_the_hook_and_the_same_main_module(tmp_path: Path) -> None:
    plain, launched = (
        json.loads(output_of(*start, SCRIPTS / "spawning.py", "a", cwd=tmp_path)) for start in ((), LAUNCHER)
    )
    for method, seen in launched.items():
        for child in (seen, seen["child"]):
            assert child.pop("hooked"), method
    for seen in plain.values():
        for child in (seen, seen["child"]):
            assert not child.pop("hooked")
    assert launched == plain
    assert plain["spawn"]["main"] == ["__mp_main__", "spawning.py"]


def test_child_processes_are_left_alone_when_switched_off(tmp_path: Path) -> None:
    seen = json.loads(output_of(*LAUNCHER, SCRIPTS / "spawning.py", cwd=tmp_path, HF_MATRIX_OPTIM="0"))
    # A forked child has the launcher's modules; the others are new interpreters.
    assert [seen[method]["hooked"] for method in ("spawn", "forkserver")] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.py", "a"), "there is no script 'missing.py' in {folder}. See"),
        (("explian", "gpt2"), "there is no script 'explian' in {folder}; did you mean the subcommand explain? See"),
        (("-m",), "-m needs the name of a module. See"),
        (("--optim", "muon"), "there is no option --optim; the options of a script come after its name. See"),
        ((), "usage: python -m hf_matrix_optim SCRIPT [ARGUMENTS...]"),
    ],
)
def test_bad_calls_give_one_line_or_the_usage(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run_python(*LAUNCHER, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message.format(folder=tmp_path) in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == (1 if arguments else len(command_line.USAGE.splitlines()))


def test_a_missing_module_is_reported_as_python_does(tmp_path: Path) -> None:
    plain = run_python("-m", "no_such_module", cwd=tmp_path)
    launched = run_python(*LAUNCHER, "-m", "no_such_module", cwd=tmp_path)
    assert (launched.returncode, launched.stderr) == (plain.returncode, plain.stderr)


@pytest.mark.parametrize("subcommand", [None, *command_line.SUBCOMMANDS])
def test_help_has_examples(
    subcommand: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf_matrix_optim", *filter(None, [subcommand]), "--help"])
    if subcommand is None:
        assert command_line.main() == 0
    else:
        with pytest.raises(SystemExit, match="0"):
            command_line.main()
    text = capsys.readouterr().out
    assert "usage: python -m hf_matrix_optim" in text
    assert "examples:\n  python -m hf_matrix_optim" in text


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_matrix_optim import __version__

    monkeypatch.setattr(sys, "argv", ["hf_matrix_optim", "--version"])
    assert command_line.main() == 0
    assert capsys.readouterr().out == f"hf_matrix_optim {__version__}\n"


# ---- explain ----


def explain(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["hf_matrix_optim", "explain", *arguments])
    return command_line.main()


@pytest.mark.parametrize("as_file", [True, False])
def test_explain_reads_a_local_configuration(
    as_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    source = str(tmp_path / "config.json") if as_file else str(tmp_path)
    assert explain(source, monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"LlamaForCausalLM ({source})\n\n| parameter |")
    assert "| `model.layers.*.mlp.down_proj.weight` (2) | 16 x 24 | matrix |" in text
    assert "| `lm_head.weight` | 64 x 16 | adamw |" in text
    assert "Step of" not in text


@pytest.mark.parametrize(
    ("model_type", "model_class"),
    [("gpt2", "GPT2LMHeadModel"), ("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration"), ("vit", "ViT")],
)
def test_explain_knows_model_types(model_type: str, model_class: str) -> None:
    assert model_report(model_type).startswith(model_class)


def test_explain_follows_the_options() -> None:
    assert "fused qkv" in model_report("gpt2", "muon")
    whole = model_report("gpt2", "muon", "qkv=whole,exclude=mlp")
    assert "fused qkv" not in whole
    assert "| `transformer.h.*.mlp.c_fc.weight` (12) | 768 x 3072 | adamw |" in whole


@pytest.mark.parametrize("momentum_dtype", ["auto", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_explain_counts_the_bytes_that_the_optimizer_keeps(
    name: str, dtype: torch.dtype, momentum_dtype: str, tmp_path: Path
) -> None:
    config = GPT2Config(
        vocab_size=2**12, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, dtype=dtype
    )
    config.save_pretrained(tmp_path)
    model = GPT2LMHeadModel(config).to(dtype)
    optim_args = f"momentum_dtype={momentum_dtype}"
    options = parse_options(name, split_optim_args(optim_args))
    optimizer = create_optimizer(name, model, lr=1e-3, options=options)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key not in ("step", "skipped")  # a counter for each parameter and matrix
    )
    report = model_report(str(tmp_path), name, optim_args)
    assert f"Together {kept / 2**20:,.1f} MiB" in report
    adamw_bytes = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    assert f"AdamW alone would keep {adamw_bytes / 2**20:,.1f} MiB" in report


@pytest.mark.parametrize(
    ("name", "optim_args", "lines"),
    [
        ("muon", None, ["O = newton_schulz(G + 0.95 M), 5 steps, jordan", "lr (0.2 sqrt(max(fan_out, fan_in)) O"]),
        ("muon", "nesterov=no,update_scale=jordan", ["O = newton_schulz(M)", "lr (sqrt(max(1, fan_out / fan_in)) O"]),
        ("adamuon", None, ["O = newton_schulz(sign(M))", "V = 0.95 V + 0.05 O * O", "W = W - lr (0.2 D / RMS(D)"]),
        ("adamuon_v1", "momentum=0.9", ["M = 0.9 M + 0.1 G", "V = 0.999 V + 0.001 O * O", "sqrt(V / (1 - 0.999^t))"]),
        ("mud", "passes=2,matrix_lr=0.02", ["with lr = 0.02", "O = decorrelate(G + 0.95 M), passes=2"]),
    ],
)  # fmt: skip
def test_explain_writes_the_step_with_its_options(name: str, optim_args: str | None, lines: list[str]) -> None:
    report = model_report("gpt2", name, optim_args)
    for line in lines:
        assert line in report


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./missing.json", "there is no file or folder ./missing.json"),
        ("{folder}", "has no config.json"),
        ("{folder}/broken.json", "is not a model configuration of transformers"),
        ("{folder}/unknown.json", "is not a model configuration of transformers"),
        ("esm", "no model can be built from the configuration of esm"),
        ("no-one/no-model", "'no-one/no-model' is no local file or folder, no model type of transformers"),
    ],
)
def test_explain_says_what_is_wrong_with_a_source(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "unknown.json").write_text('{"model_type": "a_model_that_does_not_exist"}')
    assert explain(source.format(folder=tmp_path), monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("python -m hf_matrix_optim: ")
    assert captured.out == ""


def test_explain_refuses_bad_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("gpt2", "--optim", "mud", "--optim_args", "pases=2", monkeypatch=monkeypatch) == 2
    assert "did you mean 'passes'?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        explain("gpt2", "--optim", "mun", monkeypatch=monkeypatch)
    assert "invalid choice: 'mun'" in capsys.readouterr().err


def test_explain_allocates_nothing(tmp_path: Path) -> None:
    """A model of 7 terabytes."""
    BertConfig(vocab_size=10**9, hidden_size=1024, num_attention_heads=2, num_hidden_layers=1).save_pretrained(
        tmp_path
    )
    assert "1,024,000,000,000" in model_report(str(tmp_path))
    with pytest.raises(ModelSourceError, match="there is no file"):
        model_report(str(tmp_path / "other.json"))


# ---- enable, disable, doctor ----

# Stands in for transformers in environments where seconds of imports would tell nothing more.
STAND_IN = {
    "__init__.py": "__version__ = '{version}'",
    "training_args.py": "import enum\nclass OptimizerNames(str, enum.Enum):\n    SGD = 'sgd'",
    "trainer_optimizer.py": "from .training_args import OptimizerNames\n_OPTIMIZER_HANDLERS = {{}}",
}


@pytest.fixture
def scratch(tmp_path: Path) -> tuple[Path, Path]:
    """A virtual environment with a copy of the package and a stand-in for transformers; its python and purelib."""
    shutil.copytree(
        ROOT / "hf_matrix_optim", tmp_path / "root" / "hf_matrix_optim", ignore=shutil.ignore_patterns("__pycache__")
    )
    python = scratch_environment(tmp_path / "venv", tmp_path / "root", with_packages=False)
    purelib = Path(
        output_of(
            "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path, executable=python
        ).strip()
    )
    install_stand_in(purelib, "5.23.0")
    return python, purelib


def install_stand_in(purelib: Path, version: str) -> None:
    (purelib / "transformers").mkdir(exist_ok=True)
    for name, text in STAND_IN.items():
        (purelib / "transformers" / name).write_text(text.format(version=version))


def doctor(python: Path, cwd: Path, **changes: str) -> list[str]:
    result = run_python(*LAUNCHER, "doctor", cwd=cwd, executable=python, **changes)
    lines = [line.strip() for line in result.stdout.splitlines()]
    answers = [line for line in lines if line.startswith(("by a plain python", "below python -m hf_matrix_optim"))]
    assert result.returncode == (0 if any(": yes (" in line for line in answers) else 1), result.stderr
    return lines


def test_enable_and_disable_are_idempotent_and_doctor_follows(scratch: tuple[Path, Path], tmp_path: Path) -> None:
    python, purelib = scratch
    names = "import transformers.training_args as t; print([member.value for member in t.OptimizerNames])"

    def values(**changes: str) -> str:
        return output_of("-c", names, cwd=tmp_path, executable=python, **changes).strip()

    def run(subcommand: str) -> str:
        return output_of(*LAUNCHER, subcommand, cwd=tmp_path, executable=python)

    accepted = "(muon, adamuon, adamuon_v1, mud)"
    lines = doctor(python, tmp_path)
    assert any(line.startswith("python ") and str(python) in line for line in lines)
    assert any(line.startswith("by a plain python script: no. This environment is not enabled: run") for line in lines)
    assert f"below python -m hf_matrix_optim script.py, and after import hf_matrix_optim: yes {accepted}" in lines
    assert values() == "['sgd']"
    assert "Not enabled" in run("disable")

    assert run("enable").splitlines()[1] == f"Written: {purelib / PTH_NAME}"
    first = (purelib / PTH_NAME).read_text()
    assert run("enable").startswith("Already enabled")
    assert (purelib / PTH_NAME).read_text() == first
    assert values() == "['sgd', 'muon', 'adamuon', 'adamuon_v1', 'mud']"
    assert values(HF_MATRIX_OPTIM="0") == "['sgd']"
    assert f"by a plain python script: yes {accepted}; enabled by {purelib / PTH_NAME}" in doctor(python, tmp_path)
    off = doctor(python, tmp_path, HF_MATRIX_OPTIM="0")
    assert "by a plain python script: no. HF_MATRIX_OPTIM=0 is set in the environment: unset it" in off

    (purelib / PTH_NAME).write_text("import sys  # of an older version\n")
    assert run("enable").startswith("Enabled")
    assert (purelib / PTH_NAME).read_text() == first

    assert f"Removed: {purelib / PTH_NAME}" in run("disable")
    assert not (purelib / PTH_NAME).exists()
    assert values() == "['sgd']"
    assert "Not enabled" in run("disable")


def test_doctor_names_a_transformers_that_is_too_old(scratch: tuple[Path, Path], tmp_path: Path) -> None:
    python, purelib = scratch
    output_of(*LAUNCHER, "enable", cwd=tmp_path, executable=python)
    install_stand_in(purelib, "4.57.1")
    reason = "transformers 4.57.1 has no table of optimizers to add to: version 5.2 or later is needed"
    assert any(
        line.startswith("by a plain python script: no.") and reason in line for line in doctor(python, tmp_path)
    )


def test_doctor_names_a_package_that_plain_python_cannot_import(scratch: tuple[Path, Path], tmp_path: Path) -> None:
    python, purelib = scratch
    output_of(*LAUNCHER, "enable", cwd=tmp_path, executable=python)
    (purelib / "a_packages.pth").unlink()  # the package is now found only from its own folder
    lines = doctor(python, tmp_path / "root")
    assert any("hf_matrix_optim cannot be imported by a plain python: ModuleNotFoundError" in line for line in lines)


def test_doctor_names_a_missing_transformers(scratch: tuple[Path, Path], tmp_path: Path) -> None:
    python, purelib = scratch
    shutil.rmtree(purelib / "transformers")
    assert any("No module named 'transformers'" in line for line in doctor(python, tmp_path))


def test_enable_refuses_where_the_package_is_not_installed(scratch: tuple[Path, Path], tmp_path: Path) -> None:
    python, purelib = scratch
    (purelib / "a_packages.pth").unlink()
    result = run_python(*LAUNCHER, "enable", cwd=tmp_path / "root", executable=python)
    assert result.returncode == 2
    assert "hf_matrix_optim is not installed in this environment" in result.stderr
    assert not (purelib / PTH_NAME).exists()


def test_enable_and_disable_say_where_they_cannot_write(scratch: tuple[Path, Path], tmp_path: Path) -> None:
    python, purelib = scratch
    (purelib / PTH_NAME).mkdir()  # not even the superuser can write or remove this as a file
    for subcommand in ("enable", "disable"):
        result = run_python(*LAUNCHER, subcommand, cwd=tmp_path, executable=python)
        assert result.returncode == 2
        assert f"cannot change {purelib / PTH_NAME} (Is a directory)" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_an_enabled_interpreter_starts_without_any_other_import(scratch: tuple[Path, Path], tmp_path: Path) -> None:
    python, _ = scratch
    code = "import sys; print(sorted(sys.modules))"
    before = output_of("-c", code, cwd=tmp_path, executable=python)
    output_of(*LAUNCHER, "enable", cwd=tmp_path, executable=python)
    assert output_of("-c", code, cwd=tmp_path, executable=python) == before
    finders = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('MatrixOptimFinder'))"
    assert output_of("-c", finders, cwd=tmp_path, executable=python) == "1\n"
