"""The README's code runs, its tables name what there is, and its layout is the package's."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from hf_matrix_optim.options import OPTIMIZER_NAMES, OPTIONS_CLASSES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Contents of the fenced blocks of a language; "" is a fence without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [content for found, content in fences if found == language]


def table_rows(header: str) -> list[list[str]]:
    """Cells of the rows of the table whose header line begins with ``header``."""
    lines = README.split(header, 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_python_code_runs(code, tmp_path):
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_every_optimizer_and_every_option_is_in_its_table():
    assert [row[0].strip("`") for row in table_rows("| `--optim` |")] == list(OPTIMIZER_NAMES)
    listed = {name for row in table_rows("| key |") for name in re.findall(r"`(\w+)`", row[0])}
    known = {field.name for options in OPTIONS_CLASSES.values() for field in fields(options)}
    assert listed == known


def test_recipe_commands_are_understood(tmp_path):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python recipes/")]
    assert len(commands) >= 2
    tiny = next(command for command in commands if "--preset tiny" in command)
    words = tiny.split("#")[0].split()[1:]
    words[words.index("--output_dir") + 1] = str(tmp_path / "out")
    result = subprocess.run(
        [sys.executable, *words, "--dry_run", "--use_cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "adamuon" in result.stdout
    assert not (tmp_path / "out" / "run.json").exists()


def test_the_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_the_layout_names_every_module_and_no_other():
    layout = next(block for block in blocks("") if "hf_matrix_optim/" in block)
    listed = set(re.findall(r"\b(\w+\.py)\b", layout.split("recipes/")[0]))
    package = ROOT / "hf_matrix_optim"
    there = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert listed == there
    assert "sharding/" in layout
    assert "kernels/" in layout


def test_files_that_it_links_to_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_transformers_takes_the_value_of_fsdp():
    import transformers

    (value,) = set(re.findall(r"--fsdp (\w+)", README + (ROOT / "recipes" / "README.md").read_text()))
    arguments = transformers.TrainingArguments.__new__(transformers.TrainingArguments)
    for field in fields(transformers.TrainingArguments):
        vars(arguments)[field.name] = None
    arguments.fsdp, arguments.fsdp_config = value, {"version": 2}
    if not hasattr(arguments, "_process_fsdp_args"):
        pytest.skip(f"transformers {transformers.__version__} has no _process_fsdp_args: no trying it in one process")
    arguments._process_fsdp_args()
    assert arguments.fsdp
