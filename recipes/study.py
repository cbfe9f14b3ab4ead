"""Compare optimizers on a recipe: all runs, one report.

    python recipes/study.py --recipe gpt2-small --optim adamw_torch_fused,muon,adamuon,mud --seeds 0,1,2 --sweep_lr
    python recipes/study.py --recipe esm2-8m --optim adamw_torch_fused,mud --lr mud=2e-3 --max_steps 500
    python recipes/study.py --recipe gpt2-tiny --optim adamw_torch_fused,mud,mud:passes=2 --seeds 0

Every run is the recipe's own command line in a process of its own; flags that are not of the study are the recipe's
(``--max_steps``, ``--schedule``, ``--report_to``, ...). Finished runs are not made again and broken ones are resumed,
so the same line goes on after any interruption, and a longer one adds to it. With ``--sweep_lr`` each optimizer first
gets its own learning rate: half, once and twice the start, or the rates given, then further until the best lies
between two worse ones. With ``--gpus 0,1,2,3`` four runs are made at a time, each on a GPU of its own.
The folder gets a folder for each run, ``report.md``, ``curves.png`` and ``metrics.json``.
"""

import argparse
import importlib
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compare import numbers
from flag_checks import exit_status, nearest
from recipe_arguments import check_command_line
from recipe_error import RecipeError
from run_folder import RUN_FILE, check_writable, read_run
from study_comparison import Sweep, compare
from study_metrics import Group, load_run
from study_report import REPORT_FILE, report, write_report
from study_runner import StudyRunner, parse_gpus

RECIPES = Path(__file__).parent
OPTIMIZERS = "adamw_torch_fused,muon,adamuon,mud"
STUDY_FILE = "study.json"
OWN_FLAGS = {"preset", "optim", "optim_args", "learning_rate", "seed", "output_dir", "run_name"}
OWN_FLAGS |= {"resume_from_checkpoint", "overwrite_output_dir", "dry_run", "stop_after"}
LENGTH_FLAGS = {"max_steps", "max_tokens", "num_train_epochs"}
REFUSED = 2  # exit status of a recipe that was asked for something it cannot do
SWEEP_FACTOR = 2.0
SWEEP_STEPS_OUT = 4  # times a sweep is widened in search of a worse end


@dataclass(frozen=True)
class Contender:
    """An optimizer with its options, as ``name`` or ``name:key=value+key=value``."""

    name: str
    optim_args: str | None

    @property
    def label(self) -> str:
        """The optimizer as `study_metrics.Run.optimizer` names it."""
        return f"{self.name} ({self.optim_args})" if self.optim_args else self.name

    @property
    def folder_name(self) -> str:
        return "-".join([self.name, *(self.optim_args or "").replace("=", "").split(",")]).rstrip("-")

    @classmethod
    def parse(cls, text: str) -> "Contender":
        name, _, options = text.strip().partition(":")
        return cls(name, options.replace("+", ",") or None)


@dataclass
class Study:
    """What is to be run, and where.

    Attributes:
        recipe: name of the recipe's file.
        preset: of the recipe.
        contenders: in the order of the tables.
        seeds: one run each.
        rates: learning rate of each contender, by label.
        folder: of the run folders and the report.
        flags: for the recipe's command line.
        launcher: what starts a recipe, such as ``torchrun --nproc_per_node 8``.
        runner: makes the runs.
    """

    recipe: str
    preset: str
    contenders: Sequence[Contender]
    seeds: Sequence[int]
    rates: dict[str, float]
    folder: Path
    flags: Sequence[str]
    launcher: Sequence[str]
    runner: StudyRunner = field(default_factory=StudyRunner)

    def command_line(self, contender: Contender, rate: float, seed: int, steps: int | None = None) -> list[str]:
        """Return the recipe's flags for a run, without those of its place."""
        argv = ["--preset", self.preset, "--optim", contender.name, "--learning_rate", repr(rate), "--seed", str(seed)]
        argv += ["--optim_args", contender.optim_args] if contender.optim_args else []
        return argv + ([*without(self.flags, LENGTH_FLAGS), "--max_steps", str(steps)] if steps else [*self.flags])

    def check_runs(self) -> None:
        """Check the command lines of all runs before the first is made.

        Raises:
            RecipeError: as the recipe would.
        """
        presets = importlib.import_module(self.recipe).PRESETS
        for contender, seed in self.order():
            check_command_line(self.recipe, presets, self.command_line(contender, self.rates[contender.label], seed))

    def run(self, contender: Contender, rate: float, seed: int, steps: int | None = None) -> Path:
        """Make a run, of another number of steps if it is given, unless it is finished; returns its folder.

        Raises:
            RecipeError: if the recipe refuses it or fails.
        """
        folder = self.folder / f"{contender.folder_name}-lr{rate:g}-seed{seed}{f'-{steps}steps' if steps else ''}"
        name = f"{self.recipe}-{self.preset}-{folder.name}"
        run = read_run(folder)
        if run is not None and "results" in run:
            print(f"[{name}] is finished", flush=True)
            return folder
        command = [*self.launcher, str(RECIPES / f"{self.recipe}.py")]
        command += ["--output_dir", str(folder), "--run_name", name, "--resume_from_checkpoint", "auto"]
        command += self.command_line(contender, rate, seed, steps)
        if status := self.runner.run(command, name, folder.with_name(f"{folder.name}.log")):
            raise RecipeError(f"{name} {'was refused' if status == REFUSED else f'ended with exit status {status}'}")
        return folder

    def final_loss(self, folder: Path) -> float:
        """Return a finished run's loss, infinite if it diverged."""
        run = load_run(folder)
        return Group(run.optimizer, (run,)).loss()

    def sweep(self, contender: Contender, steps: int | None, grid: Sequence[float]) -> Sweep:
        """Try learning rates at the first seed until the best lies between two worse ones, and take the best.

        Args:
            contender: whose.
            steps: of each run; those of all runs if None.
            grid: rates to begin with; half, once and twice the start if there are none.

        Raises:
            RecipeError: if a run fails.
        """
        start = self.rates[contender.label]
        losses: dict[float, float] = {}

        def try_rates(rates: Sequence[float]) -> None:
            rates = [float(f"{rate:.6g}") for rate in rates]
            folders = self.runner.each(lambda rate: self.run(contender, rate, self.seeds[0], steps), rates)
            losses.update(zip(rates, map(self.final_loss, folders), strict=True))

        try_rates(grid or [start, start / SWEEP_FACTOR, start * SWEEP_FACTOR])
        for _ in range(SWEEP_STEPS_OUT):
            tried = Sweep(contender.label, losses)
            if tried.is_bracketed or all(map(math.isinf, losses.values())):
                break
            low, high = min(losses), max(losses)
            try_rates([low / SWEEP_FACTOR if tried.best == low else high * SWEEP_FACTOR])
        found = Sweep(contender.label, dict(sorted(losses.items())), steps)
        if math.isinf(found.losses[found.best]):
            raise RecipeError(f"{contender.label}: all of the learning rates {', '.join(map(str, losses))} diverged")
        return found

    def order(self) -> Iterator[tuple[Contender, int]]:
        """Yield the runs seed by seed, every other seed backwards: what slows a machine down then meets all alike."""
        for index, seed in enumerate(self.seeds):
            yield from ((contender, seed) for contender in self.contenders[:: -1 if index % 2 else 1])


def flag_name(argument: str) -> str | None:
    """Return the name of a flag with underscores, None for a value."""
    return argument.partition("=")[0].removeprefix("--").replace("-", "_") if argument.startswith("--") else None


def without(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """Leave flags and their values out of a command line."""
    kept, is_left_out = [], False
    for argument in arguments:
        name = flag_name(argument)
        is_left_out = name in names if name is not None else is_left_out
        if not is_left_out:
            kept.append(argument)
    return kept


def split_recipe(name: str) -> tuple[str, str]:
    """Split ``gpt2-hf-small`` into the recipe's file and the preset.

    Raises:
        RecipeError: if there is no such recipe or it has no such preset.
    """
    parts = name.split("-")
    recipes = {file.stem for file in RECIPES.glob("*.py") if "\nPRESETS = " in file.read_text(encoding="utf-8")}
    for count in range(len(parts) - 1, 0, -1):
        recipe, preset = "-".join(parts[:count]), "-".join(parts[count:])
        if recipe in recipes:
            presets = importlib.import_module(recipe).PRESETS
            if preset not in presets:
                raise RecipeError(f"--recipe {name}: {recipe} has no preset {preset}; it has {', '.join(presets)}")
            return recipe, preset
    known = ", ".join(sorted(recipes))
    raise RecipeError(f"--recipe {name}: name a recipe and its preset, as in gpt2-tiny; the recipes are {known}")


def learning_rates(text: str | None, contenders: Sequence[Contender], default: float) -> dict[str, float]:
    """Parse ``name=rate,...``; others get the preset's own.

    Raises:
        RecipeError: for a name that is not among the optimizers, or a rate that is no positive number.
    """
    rates = {contender.label: default for contender in contenders}
    for part in text.split(",") if text else ():
        name, _, value = part.rpartition("=")
        label = Contender.parse(name).label
        if label not in rates:
            raise RecipeError(f"--lr {part}: --optim has {', '.join(rates)}; write name=rate")
        (rates[label],) = numbers(value, f"--lr {name}") or [default]
    return rates


def check_flags(flags: Sequence[str]) -> None:
    """Refuse flags of the recipe that the study sets itself.

    Raises:
        RecipeError: naming the flag.
    """
    for flag in flags:
        if flag_name(flag) in OWN_FLAGS:
            raise RecipeError(f"{flag.partition('=')[0]} is set by the study (see --help)")


def split_launcher(text: str) -> list[str]:
    """Split the command that starts a recipe; none is this Python.

    Raises:
        RecipeError: if there is no such program.
    """
    try:
        launcher = shlex.split(text) or [sys.executable]
    except ValueError as error:
        raise RecipeError(f"--launcher {text}: {error}") from error
    if shutil.which(launcher[0]) is None:
        raise RecipeError(f"--launcher {text}: there is no program {launcher[0]}; correct its name or give its path")
    return launcher


def claim_folder(study: Study) -> None:
    """Write what the study is into its folder, or check that it is the same.

    Raises:
        RecipeError: if the folder is another study's, or holds something else.
    """
    check_writable(study.folder)
    file = study.folder / STUDY_FILE
    settings = {"recipe": study.recipe, "preset": study.preset, "flags": list(study.flags)}
    if file.exists():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecipeError(f"{file} is not JSON: {error}") from error
        if saved == settings:
            return
        if any(study.folder.glob(f"*/{RUN_FILE}")):  # else the first run was refused, and nothing was made
            raise RecipeError(
                f"{study.folder} holds another study ({saved.get('recipe')}-{saved.get('preset')} "
                f"{shlex.join(saved.get('flags', []))}): give its flags, or another --output_dir"
            )
    elif study.folder.exists() and any(study.folder.iterdir()):
        raise RecipeError(f"{study.folder} holds files that no study wrote: give another --output_dir")
    study.folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Study]:
    """Read the command line.

    Raises:
        RecipeError: for anything that cannot be run.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", required=True, help="recipe and preset, such as gpt2-small or qwen2_5-tiny")
    parser.add_argument("--optim", default=OPTIMIZERS, help="comma-separated (default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="comma-separated (default: %(default)s)")
    parser.add_argument("--lr", help="learning rates, as adamuon=6e-4,mud=1e-3 (default: the preset's own)")
    parser.add_argument(
        "--sweep_lr",
        "--sweep-lr",
        nargs="?",
        const="",
        metavar="RATES",
        help="find each optimizer's own around them, or begin with the rates given here, comma-separated",
    )
    parser.add_argument("--sweep_steps", type=int, help="steps of a run of the sweep (default: those of all runs)")
    parser.add_argument("--baseline", help="optimizer to measure against (default: AdamW)")
    parser.add_argument("--targets", help="validation perplexities, comma-separated, for the table of seconds")
    parser.add_argument("--launcher", default="", help="starts a recipe, such as 'torchrun --nproc_per_node 8'")
    parser.add_argument("--gpus", help="comma-separated numbers: as many runs at a time, each on one of them alone")
    parser.add_argument("--output_dir", type=Path, help="default: out/study/RECIPE")
    arguments, flags = parser.parse_known_args(argv)
    check_flags(flags)
    recipe, preset = split_recipe(arguments.recipe)
    contenders = [Contender.parse(text) for text in arguments.optim.split(",")]
    if len(set(contenders)) < len(contenders):
        raise RecipeError(f"--optim {arguments.optim} names an optimizer twice")
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError as error:
        raise RecipeError(f"--seeds {arguments.seeds}: write whole numbers, as in 0,1,2") from error
    if arguments.sweep_steps is not None and arguments.sweep_steps < 1:
        raise RecipeError(f"--sweep_steps is {arguments.sweep_steps}; it must be at least 1")
    if len(set(seeds)) < len(seeds):
        raise RecipeError(f"--seeds {arguments.seeds} names a seed twice")
    default = importlib.import_module(recipe).PRESETS[preset].defaults["learning_rate"]
    study = Study(
        recipe,
        preset,
        contenders,
        seeds,
        learning_rates(arguments.lr, contenders, default),
        arguments.output_dir or Path("out/study") / arguments.recipe,
        flags,
        split_launcher(arguments.launcher),
        StudyRunner(parse_gpus(arguments.gpus)),
    )
    arguments.grid = numbers(arguments.sweep_lr or None, "--sweep_lr") or []
    study.check_runs()
    labels = [contender.label for contender in contenders]
    if arguments.baseline is not None and arguments.baseline not in labels:
        near = nearest(arguments.baseline, labels)
        raise RecipeError(f"--baseline {arguments.baseline}: --optim has {', '.join(labels)}{near}")
    return arguments, study


def conduct(
    study: Study, *, sweep_lr: bool, grid: Sequence[float], sweep_steps: int | None
) -> tuple[list[Path], list[Sweep], list[str]]:
    """Make all runs; returns the folders of those compared, the sweeps, and what failed."""
    failed: list[str] = []
    sweeps = []
    if sweep_lr:
        sweeps = study.runner.each(lambda contender: study.sweep(contender, sweep_steps, grid), study.contenders)
        study.rates |= {sweep.optimizer: sweep.best for sweep in sweeps}

    def run(order: tuple[Contender, int]) -> Path | None:
        contender, seed = order
        if any("was refused" in each for each in failed):
            return None
        try:
            return study.run(contender, study.rates[contender.label], seed)
        except RecipeError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed.append(str(error))
            return None

    folders = [folder for folder in study.runner.each(run, list(study.order())) if folder is not None]
    position = {contender.label: index for index, contender in enumerate(study.contenders)}
    folders.sort(key=lambda folder: position[load_run(folder).optimizer])
    return folders, sweeps, failed


def main(argv: Sequence[str] | None = None) -> int:
    failed: list[str] = []
    status = exit_status(lambda: failed.extend(run_study(argv)), "stopped; the same command goes on from here")
    if status == 0 and failed:
        print(f"error: not in the report: {'; '.join(failed)}", file=sys.stderr)
        return 1
    return status


def run_study(argv: Sequence[str] | None) -> list[str]:
    """Conduct the study of a command line and write its report; returns the runs that are not in it."""
    arguments, study = parse(argv)
    targets = numbers(arguments.targets, "--targets")
    claim_folder(study)
    folders, sweeps, failed = conduct(
        study, sweep_lr=arguments.sweep_lr is not None, grid=arguments.grid, sweep_steps=arguments.sweep_steps
    )
    if folders:
        runs = [load_run(folder) for folder in folders]
        comparison = compare(runs, baseline=arguments.baseline, targets=targets, sweeps=sweeps)
        write_report(comparison, study.folder)
        print(f"\n{report(comparison)}\n{study.folder / REPORT_FILE}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
