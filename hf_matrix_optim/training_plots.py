"""Pictures of a Trainer's logs: loss and learning rate, and one for each kind of diagnostics and of QK-Clip."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"
DIAGNOSTICS, QK_CLIP = "diagnostics/", "qk_clip/"
SOFTWARE = "hf_matrix_optim plots"  # in the PNGs, so that they are known as ours
ANOTHER_FILE = f"Give the {STATE_FILE} of another checkpoint, or run the command again if this one is being written"
#: Lines of a picture that a legend still tells apart.
LEGEND_LINES = 12
#: One figure a family: the keys in it (their parts before a group's or layer's name), and the label of its axis.
FAMILIES = {
    "update_rms": ("root mean square of the update over the learning rate", False),
    "relative_update": ("||dW|| / ||W||", True),
    "orthogonality_error": ("orthogonality error of the update", False),
    "momentum_stable_rank": ("stable rank of the momentum", True),
    "spectral_norm": ("spectral norm of the weights", True),
    "attention_logit_bound": ("bound of the attention logits", True),
    "grad_norm": ("norm of the gradients, after clipping", True),
    "skipped_matrices": ("matrices skipped so far", False),
    "optimizer_time_share": ("share of optimizer.step() in the step", False),
    "max_logit": ("largest attention logit since the log before, before clipping", True),
    "clipped_heads": ("times a head was clipped since the log before", False),
}

Line = tuple[list[float], list[float]]


class PlotError(Exception):
    """Why nothing can be drawn, with the remedy."""


def newest_state_file(source: Path) -> Path:
    """The ``trainer_state.json`` to draw: ``source`` itself, or in a folder the one with the most steps.

    Args:
        source: a file, a run's folder with checkpoints, or a checkpoint.

    Raises:
        PlotError: if there is none.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise PlotError(f"there is no file or folder {str(source)!r}")
    found = [path for path in (source / STATE_FILE, *source.glob(f"checkpoint-*/{STATE_FILE}")) if path.is_file()]
    if not found:
        raise PlotError(
            f"{str(source)!r} has no {STATE_FILE}, neither itself nor in a checkpoint: Trainer writes one with each "
            "checkpoint (--save_strategy steps) and with trainer.save_state()"
        )
    return max(found, key=_steps)


def _steps(path: Path) -> float:
    steps = read_state(path).get("global_step", 0)
    if isinstance(steps, (int, float)):
        return steps
    raise PlotError(f"{str(path)!r} has global_step={steps!r}, which is no number: {ANOTHER_FILE}")


def read_state(path: Path) -> dict[str, Any]:
    """Read a ``trainer_state.json``.

    Raises:
        PlotError: if it is none.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(entry, dict) for entry in state["log_history"]):
            return dict(state)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError):
        pass
    raise PlotError(
        f"{str(path)!r} is not a {STATE_FILE} of Trainer: it has no log_history that can be read. {ANOTHER_FILE}"
    )


def lines_of(log_history: list[dict[str, Any]]) -> dict[str, dict[str, Line]]:
    """The lines of each picture, by its name and by theirs; ``(steps, values)`` each.

    "loss" has ``loss`` and ``eval_loss``, "learning_rate" the rates, a family of diagnostics the values that were
    measured, over the step at which they were, and one of QK-Clip those of the log.
    """
    pictures: dict[str, dict[str, Line]] = defaultdict(lambda: defaultdict(lambda: ([], [])))
    for entry in log_history:
        for key, value in entry.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            step, name = entry.get("step"), key
            if key in ("loss", "eval_loss"):
                picture = "loss"
            elif key in ("learning_rate", "matrix_learning_rate"):
                picture = "learning_rate"
            elif key.startswith((DIAGNOSTICS, QK_CLIP)):
                name = key.partition("/")[2]
                picture = next((family for family in FAMILIES if name.startswith(family)), "")
                if key.startswith(DIAGNOSTICS):
                    step = entry.get(DIAGNOSTICS + "step", step)
            else:
                continue
            if picture and isinstance(step, (int, float)):
                pictures[picture][name][0].append(float(step))
                pictures[picture][name][1].append(float(value))
    return {picture: dict(lines) for picture, lines in pictures.items()}


def draw_plots(source: Path, output: Path | None = None) -> list[Path]:
    """Draw the logs of a run as PNGs: ``training.png`` and one for each family of diagnostics that it has.

    Args:
        source: see ``newest_state_file``.
        output: folder to write to, made if need be; None is ``plots`` in the run's folder, above its checkpoints.

    Returns:
        The files. Earlier ones of this function are replaced.

    Raises:
        PlotError: if there is nothing to draw, matplotlib is missing, a file of that name is not of this function, or
            the folder cannot be written to.
    """
    path = newest_state_file(source)
    pictures = lines_of(read_state(path)["log_history"])
    if not pictures:
        raise PlotError(f"{str(path)!r} has neither losses nor diagnostics to draw: train with --logging_steps 10")
    if output is None:
        run = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
        output = run / "plots"
    try:
        import matplotlib
    except ImportError:
        raise PlotError("plots are drawn by matplotlib: pip install 'hf-matrix-optim[plots]'") from None
    matplotlib.use("Agg")

    training: dict[str, dict[str, Line]] = {
        name: pictures.pop(name) for name in ("loss", "learning_rate") if name in pictures
    }
    panels: dict[str, dict[str, dict[str, Line]]] = {"training": training} if training else {}
    panels |= {name: {name: pictures[name]} for name in FAMILIES if name in pictures}
    files = [output / f"{name}.png" for name in panels]
    try:
        for file in files:
            if file.exists() and (file.is_dir() or SOFTWARE.encode() not in file.read_bytes()):
                raise PlotError(
                    f"{str(file)!r} was not drawn by this command and is not replaced: give another --output folder"
                )
        output.mkdir(parents=True, exist_ok=True)
        for file, panel in zip(files, panels.values(), strict=True):
            _draw(file, panel)
    except OSError as error:
        raise PlotError(
            f"plots cannot be written to {str(output)!r} ({error.strerror}): give another --output folder"
        ) from None
    return files


def _draw(file: Path, panels: dict[str, dict[str, Line]]) -> None:
    """Write one PNG with a panel for each picture, side by side."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(8 * len(panels), 4.8), layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        label, is_logarithmic = FAMILIES.get(title, (title.replace("_", " "), False))
        layers = {name for name in lines if "/" in name and not name.rpartition("/")[2].startswith("group_")}
        shades = plt.get_cmap("viridis")
        for position, name in enumerate(sorted(layers)):
            shade = shades(position / max(1, len(layers) - 1))
            label_of_line = name.partition("/")[2] if len(lines) <= LEGEND_LINES else None
            axis.plot(*lines[name], color=shade, linewidth=0.7, alpha=0.6, label=label_of_line)
        for name in sorted(set(lines) - layers):
            axis.plot(*lines[name], linewidth=1.8, marker="o", markersize=2, label=name.replace("/", ", "))
        values = [value for _, line in lines.values() for value in line]
        if is_logarithmic and values and min(values) > 0 and max(values) > 10 * min(values):
            axis.set_yscale("log")
        elif title in FAMILIES and values and min(values) >= 0:
            axis.set_ylim(bottom=0)
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        if layers and len(lines) > LEGEND_LINES:
            axis.set_title(f"thin: {len(layers)} layers, by name", fontsize=9)
        axis.legend(frameon=False, fontsize=9)
    partial = file.with_name(f".{file.name}.partial")
    try:
        figure.savefig(partial, dpi=120, format="png", metadata={"Software": SOFTWARE})
        os.replace(partial, file)
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)
