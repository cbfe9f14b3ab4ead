"""``python -m hf_matrix_optim plots``: which file is read, what is drawn, and what is refused."""

import json
import math
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tiny_training import arguments, token_rows
from transformers import Trainer

from hf_matrix_optim import __main__ as command_line
from hf_matrix_optim.training_plots import FAMILIES, PlotError, draw_plots, lines_of, newest_state_file

pytest.importorskip("matplotlib")


def history(steps: int) -> list[dict]:
    entries: list[dict] = [
        {"step": step, "loss": 5.0 - step / 10, "learning_rate": 0.1, "matrix_learning_rate": 0.2}
        for step in range(1, steps + 1)
    ]
    entries[-1] |= {
        "diagnostics/step": steps - 1,
        "diagnostics/update_rms": 0.2,
        "diagnostics/update_rms/group_2": 0.1,
    }
    return [*entries, {"step": steps, "eval_loss": 4.0, "note": "text"}, {"step": steps, "train_runtime": 1.0}]


def write_state(path: Path, steps: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"global_step": steps, "log_history": history(steps)}))
    return path


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["hf_matrix_optim", "plots", *arguments])
    status = command_line.main()
    return status, *capsys.readouterr()


def test_a_real_run(tmp_path, monkeypatch, capsys):
    """All families are drawn, with a key of each of them in the logs."""
    args = arguments(
        tmp_path,
        optim="muon",
        optim_args="diagnostics=2,diagnostics_per_layer=true,qk_clip=1e9",
        save_strategy="steps",
        save_steps=3,
    )
    trainer = Trainer(tiny_model("gpt2"), args, train_dataset=token_rows())
    trainer.train()
    capsys.readouterr()
    status, output, _ = run(monkeypatch, capsys, str(tmp_path))
    assert status == 0
    names = {Path(line).name for line in output.splitlines()}
    assert names == {"training.png", *(f"{family}.png" for family in FAMILIES)}
    for name in names:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    drawn = [line for lines in lines_of(trainer.state.log_history).values() for line in lines]
    keys = {
        key.removeprefix("diagnostics/").removeprefix("qk_clip/")
        for entry in trainer.state.log_history
        for key in entry
    }
    keys -= {"epoch", "grad_norm", "matrices", "step", "total_flos"} | {k for k in keys if k.startswith("train_")}
    assert sorted(set(drawn)) == sorted(keys)
    assert run(monkeypatch, capsys, str(tmp_path))[0] == 0  # its own pictures are replaced


def test_lines_are_over_the_steps_that_were_measured():
    lines = lines_of(history(4))
    assert lines["loss"] == {"loss": ([1, 2, 3, 4], [4.9, 4.8, 4.7, 4.6]), "eval_loss": ([4], [4.0])}
    assert set(lines["learning_rate"]) == {"learning_rate", "matrix_learning_rate"}
    assert lines["update_rms"] == {"update_rms": ([3], [0.2]), "update_rms/group_2": ([3], [0.1])}


def test_the_newest_checkpoint_is_read(tmp_path):
    for steps in (20, 100, 60):
        write_state(tmp_path / f"checkpoint-{steps}" / "trainer_state.json", steps)
    newest = tmp_path / "checkpoint-100" / "trainer_state.json"
    assert newest_state_file(tmp_path) == newest
    assert newest_state_file(tmp_path / "checkpoint-20").parent.name == "checkpoint-20"
    whole = write_state(tmp_path / "trainer_state.json", 120)
    assert newest_state_file(tmp_path) == whole
    assert draw_plots(newest)[0].parent == tmp_path / "plots"  # of the run, not of a checkpoint that may be deleted


def test_output_folder(tmp_path, monkeypatch, capsys):
    state = write_state(tmp_path / "run" / "trainer_state.json", 5)
    status, output, _ = run(monkeypatch, capsys, str(state), "--output", str(tmp_path / "a" / "b"))
    assert status == 0
    assert output.splitlines() == [str(tmp_path / "a" / "b" / name) for name in ("training.png", "update_rms.png")]
    assert not (tmp_path / "run" / "plots").exists()


def test_values_that_are_not_finite_are_drawn_around(tmp_path):
    entries = history(4)
    entries[1]["loss"] = math.nan
    entries[3]["diagnostics/update_rms"] = math.inf
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"global_step": 4, "log_history": entries}))
    assert len(draw_plots(path)) == 2


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    other = tmp_path / "other.json"
    other.write_text('{"weights": []}')
    nothing = tmp_path / "nothing.json"
    nothing.write_text('{"log_history": []}')
    unnumbered = tmp_path / "unnumbered"
    unnumbered.mkdir()
    (unnumbered / "trainer_state.json").write_text('{"log_history": [], "global_step": null}')
    for source, message in (
        (tmp_path / "missing", "there is no file or folder"),
        (empty, "has no trainer_state.json"),
        (broken, "is not a trainer_state.json"),
        (other, "is not a trainer_state.json"),
        (nothing, "has neither losses nor diagnostics to draw"),
        (unnumbered, "global_step=None, which is no number: Give the trainer_state.json of another checkpoint"),
    ):
        status, output, error = run(monkeypatch, capsys, str(source))
        assert (status, output) == (2, "")
        assert message in error
        assert str(source) in error
    state = write_state(tmp_path / "run" / "trainer_state.json", 5)
    foreign = tmp_path / "run" / "plots" / "update_rms.png"
    foreign.parent.mkdir()
    foreign.write_bytes(b"\x89PNG of somebody else")
    with pytest.raises(PlotError, match="was not drawn by this command and is not replaced"):
        draw_plots(state)
    assert foreign.read_bytes() == b"\x89PNG of somebody else"
    assert not (tmp_path / "run" / "plots" / "training.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'hf-matrix-optim\[plots\]'"):
        draw_plots(write_state(tmp_path / "trainer_state.json", 5))


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    state = write_state(tmp_path / "run" / "trainer_state.json", 5)
    (tmp_path / "folder" / "training.png").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    for output, message in (("file", "cannot be written to"), ("folder", "was not drawn by this command")):
        status, _, error = run(monkeypatch, capsys, str(state), "--output", str(tmp_path / output))
        assert status == 2
        assert message in error
        assert "give another --output folder" in error
    assert (tmp_path / "file").read_text() == "mine"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_matrix_optim.training_plots.os.replace", full)
    status, _, error = run(monkeypatch, capsys, str(state), "--output", str(tmp_path / "full"))
    assert status == 2
    assert "No space left on device" in error
    assert not list((tmp_path / "full").iterdir())


def test_steps_that_are_no_numbers_are_left_out():
    entries = [{"step": "x", "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 2, "qk_clip/max_logit": 9.0}]
    assert lines_of(entries) == {"loss": {"loss": ([2.0], [0.5])}, "max_logit": {"max_logit": ([2.0], [9.0])}}
