"""Measure fine-tuning with matrix optimizers on the bundled novels: routes of LoRA, and a change of optimizer.

    python recipes/finetune_study.py [--study lora,full] [--output_dir out/finetune_study] [--table TABLE.md]

Qwen2.5 form ``tiny`` is pretrained on four of the novels with AdamW and with Muon, then fine-tuned on the fifth.

- ``lora``: AdamW's models, adapters of two ranks, each optimizer with each route (the option ``lora``).
- ``full``: both, all weights, each optimizer.

Each is tried with one seed at a learning rate and its neighbours, a factor of 2 apart, until the best has worse ones
on both sides, and repeated with the other seeds at the best. A finished run in ``--output_dir`` is not made again.
"""

import argparse
import datetime
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import finetune
import qwen2_5
from demo import MODELS, OPTIMIZERS
from flag_checks import nearest
from pretrain import pretrain
from recipe_arguments import parse_arguments
from recipe_error import RecipeError
from run_folder import check_writable, commit, read_run
from study_report import table

NOVELS = qwen2_5.DATA / "novels" / "train"
NEW_NOVEL = NOVELS / "the_sign_of_four.txt"
ADAMW = "adamw_torch_fused"
PRETRAINED = (ADAMW, "muon")
TUNED = (ADAMW, "muon", "adamuon", "mud")
PRETRAINING_STEPS, STEPS = 400, 150
SEEDS = (0, 1, 2)
MOST_RATES = 8
RANKS = (8, 32)
LORA_LEARNING_RATE = 8e-3
FULL_LEARNING_RATE = 4e-3
FIXED = (
    *("--train_data", str(NEW_NOVEL), "--validation_fraction", "0.2", "--block_size", "128"),
    *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "32", "--max_steps", str(STEPS)),
    *("--eval_strategy", "no", "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"),
)


@dataclass(frozen=True)
class Arm:
    """One row of a table: what is tuned from what, and how.

    Attributes:
        before: optimizer of pretraining.
        optim: of fine-tuning.
        rank: of the adapters, 0 for all weights.
        route: the option ``lora``; "" for AdamW, which has no routes, and without adapters.
    """

    before: str
    optim: str
    rank: int = 0
    route: str = ""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return "-".join(filter(None, (self.before, f"rank{self.rank}", self.optim, self.route)))

    @property
    def flags(self) -> list[str]:
        """Its part of the command line."""
        options = ["--optim_args", f"lora={self.route}"] if self.route else []
        return ["--optim", self.optim, "--lora_rank", str(self.rank), *options]


def arms_of(study: str) -> list[Arm]:
    """Return the rows of a study; the route ``adamw`` of every optimizer is AdamW."""
    if study == "full":
        return [Arm(before, optim) for before in PRETRAINED for optim in TUNED]
    routes = [(ADAMW, ""), *((optim, route) for optim in TUNED[1:] for route in ("both", "b_only"))]
    return [Arm(ADAMW, optim, rank, route) for rank in RANKS for optim, route in routes]


def pretrained(folder: Path, optim: str, seed: int) -> Path:
    """Pretrain a model, or find it."""
    place = folder / "pretrained" / f"{optim}-{seed}"
    run = read_run(place)
    if run is None or "results" not in run:
        others = [str(file) for file in sorted(NOVELS.iterdir()) if file != NEW_NOVEL]
        rate = next(model for model in MODELS if model.recipe == "qwen2_5").learning_rates[optim]
        argv = ["--preset", "tiny", "--optim", optim, "--learning_rate", str(rate), "--seed", str(seed)]
        argv += [
            "--max_steps",
            str(PRETRAINING_STEPS),
            "--eval_steps",
            str(PRETRAINING_STEPS),
            "--train_data",
            *others,
        ]
        argv += ["--save_strategy", "no", "--output_dir", str(place), "--overwrite_output_dir"]
        pretrain("qwen2_5", *parse_arguments("qwen2_5", qwen2_5.PRESETS, argv))
    return place


def tuned(folder: Path, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    """Fine-tune once, or find what an earlier call did; returns the contents of ``run.json``."""
    place = folder / arm.name / f"{rate:g}-{seed}"
    run = read_run(place)
    if run is None or "results" not in run:
        model = pretrained(folder, arm.before, seed)
        argv = ["--model", str(model), *FIXED, *arm.flags, "--learning_rate", str(rate), "--seed", str(seed)]
        argv += ["--output_dir", str(place), "--overwrite_output_dir"]
        run = finetune.finetune(*finetune.parse(argv))
    return run


def loss_of(run: Mapping[str, Any]) -> float:
    """Return the validation loss after a run, infinite if it diverged."""
    loss = run["results"]["eval_loss"]
    return float("inf") if loss is None else float(loss)


@dataclass(frozen=True)
class Measured:
    """The runs of an arm: those of the first seed by learning rate, and one a seed at the best."""

    arm: Arm
    sweep: dict[float, float]
    best: float
    runs: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        """Validation losses at the best learning rate, one a seed."""
        return [loss_of(run) for run in self.runs]

    @property
    def is_bracketed(self) -> bool:
        """Whether rates on both sides of the best were tried."""
        return min(self.sweep) < self.best < max(self.sweep)


def measure(folder: Path, arm: Arm, start: float) -> Measured:
    """Sweep the learning rate of an arm from ``start`` on, and repeat the best with the other seeds."""
    rates = [start, start / 2, start * 2]
    sweep: dict[float, float] = {}
    while rates and len(sweep) < MOST_RATES:
        sweep |= {rate: loss_of(tuned(folder, arm, rate, SEEDS[0])) for rate in rates}
        best = min(sweep, key=sweep.__getitem__)
        rates = [rate for rate in (best / 2, best * 2) if rate not in sweep]
    return Measured(arm, dict(sorted(sweep.items())), best, [tuned(folder, arm, best, seed) for seed in SEEDS])


def measure_study(folder: Path, study: str) -> list[Measured]:
    """Measure all rows of a study; the sweep of the larger rank starts at the best rate of the smaller."""
    measured: list[Measured] = []
    for arm in arms_of(study):
        default = LORA_LEARNING_RATE if arm.rank else FULL_LEARNING_RATE
        smaller = (one.best for one in measured if replace(one.arm, rank=arm.rank) == arm)
        measured.append(measure(folder, arm, next(smaller, default)))
    return measured


def spread(losses: Sequence[float]) -> str:
    """Format mean and standard deviation."""
    return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"


def losses_table(study: str, measured: Sequence[Measured]) -> str:
    """Format a study's results; differences are to AdamW's of the same model and rank, seed by seed."""
    header = ["pretrained with", "tuned with"] if study == "full" else ["rank", "optimizer", "`lora`"]
    header += ["learning rate", "validation loss", "less AdamW's, a seed", "bracketed"]
    rows = []
    for one in measured:
        arm = one.arm
        adamw = next(m for m in measured if (m.arm.before, m.arm.rank, m.arm.optim) == (arm.before, arm.rank, ADAMW))
        names = [OPTIMIZERS[arm.before], OPTIMIZERS[arm.optim]]
        if study == "lora":
            names = [str(arm.rank), OPTIMIZERS[arm.optim], arm.route and f"`{arm.route}`"]
        less = ", ".join(f"{mine - its:+.3f}" for mine, its in zip(one.losses, adamw.losses, strict=True))
        less = "" if one is adamw else less
        rows.append([*names, f"{one.best:g}", spread(one.losses), less, "yes" if one.is_bracketed else "no"])
    return table(header, rows)


def sweep_table(measured: Sequence[Measured]) -> str:
    """Format the sweeps of the first seed, a row for each arm."""
    rates = sorted({rate for one in measured for rate in one.sweep})
    cells = [[f"{one.sweep[rate]:.3f}" if rate in one.sweep else "" for rate in rates] for one in measured]
    return table(
        ["run", *(f"{rate:g}" for rate in rates)],
        [[f"`{one.arm.name}`", *row] for one, row in zip(measured, cells, strict=True)],
    )


def page_of(studies: Mapping[str, Sequence[Measured]]) -> str:
    """Write the page: the tables of both studies, then how they were made."""
    first = next(iter(studies.values()))[0].runs[0]
    versions, hardware, parts = first["versions"], first["hardware"], first["data"]
    before = {m.arm.before: [run["before"]["eval_loss"] for run in m.runs] for s in studies.values() for m in s}
    titles = {
        "lora": "LoRA: which factors are matrices",
        "full": "All weights: pretrained with one, tuned with another",
    }
    sections = "\n".join(
        f"## {titles[study]}\n\n{losses_table(study, measured)}\n\nSweeps, validation loss of seed {SEEDS[0]}:\n\n"
        f"{sweep_table(measured)}\n"
        for study, measured in studies.items()
    )
    starts = "; ".join(f"{OPTIMIZERS[optim]}'s models {spread(losses)}" for optim, losses in before.items())
    return f"""# Fine-tuning: measured

Qwen2.5 form `tiny` (1.25 M parameters), pretrained for {PRETRAINING_STEPS} steps of 1,024 tokens on four of the
bundled novels at the demo's learning rates, then fine-tuned for {STEPS} steps of 512 tokens on the fifth,
`{NEW_NOVEL.name}` ({parts["train"]["tokens"]:,} tokens; validation on {parts["validation"]["tokens"]:,} held out).
Validation loss in nats a token; mean and standard deviation over {len(SEEDS)} seeds, each with its own pretrained
model, adapter and order; the learning rate is the best of a sweep with the first seed alone, and `inf` is a run that
diverged.
Before fine-tuning: {starts}.

{sections}
{datetime.date.today().isoformat()}, seeds {", ".join(map(str, SEEDS))}, {hardware["cpu"]},
{hardware["torch_threads"]} threads, Python {versions["python"]}, torch {versions["torch"]},
transformers {versions["transformers"]}, peft {versions["peft"]}, commit {commit() or "none"}.
Made by `python recipes/finetune_study.py`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="lora,full", help="comma-separated: lora, full")
    parser.add_argument("--output_dir", type=Path, default=Path("out/finetune_study"))
    parser.add_argument("--table", type=Path, help="Markdown file to write; printed in any case")
    arguments = parser.parse_args(argv)
    try:
        names = arguments.study.split(",")
        for name in names:
            if name not in ("lora", "full"):
                raise RecipeError(f"--study {name}: it is of lora, full{nearest(name, ('lora', 'full'))}")
        check_writable(arguments.output_dir)
        if arguments.table is not None:
            check_writable(arguments.table.parent, "--table in")
        studies = {name: measure_study(arguments.output_dir, name) for name in names}
    except RecipeError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    page = page_of(studies)
    print(page)
    if arguments.table is not None:
        arguments.table.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
