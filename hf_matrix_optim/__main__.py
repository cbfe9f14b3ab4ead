"""The command line: ``python -m hf_matrix_optim``."""

import argparse
import difflib
import os
import sys
from pathlib import Path

from hf_matrix_optim import import_hook
from hf_matrix_optim.enable import EnableError, disable, enable
from hf_matrix_optim.launcher import run_module, run_script
from hf_matrix_optim.options import OPTIMIZER_NAMES

PROGRAM = "python -m hf_matrix_optim"
SUBCOMMANDS = ("explain", "plots", "doctor", "enable", "disable")

USAGE = f"""\
usage: {PROGRAM} SCRIPT [ARGUMENTS...]
       {PROGRAM} -m MODULE [ARGUMENTS...]
       {PROGRAM} explain MODEL_OR_CONFIG [--optim NAME] [--optim_args ARGS]
       {PROGRAM} plots RUN_FOLDER_OR_STATE [--output FOLDER]
       {PROGRAM} doctor | enable | disable

Runs a training script unchanged, with --optim muon, adamuon, adamuon_v1 and mud in every Hugging Face Trainer.

  SCRIPT, -m MODULE   what python itself would run; also below torchrun -m and accelerate launch -m
  explain             which parameters of a model become matrices, and why; nothing is downloaded for a local
                      config.json or a model type
  plots               loss, learning rates and diagnostics of a run as PNGs, from its trainer_state.json
  doctor              versions, and whether --optim works here and why not
  enable              accept the names in every script of this environment, without the launcher
  disable             undo enable

examples:
  {PROGRAM} run_clm.py --model_name_or_path gpt2 --optim adamuon ...
  {PROGRAM} run_clm.py --optim muon --optim_args "ns_steps=6,nesterov=true" ...
  torchrun --nproc-per-node 2 -m hf_matrix_optim run_clm.py --optim mud ...
  accelerate launch -m hf_matrix_optim run_clm.py --optim muon ...
  {PROGRAM} explain gpt2 --optim mud
  {PROGRAM} ./explain.py      a script that is named as a subcommand, by its path

{import_hook.SWITCH}=0 in the environment switches the names off.
"""


def main() -> int:
    """Run what ``sys.argv`` asks for, and return the exit status."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    first, rest = arguments[0], arguments[1:]
    if first == "--version":
        from hf_matrix_optim import __version__

        print(f"hf_matrix_optim {__version__}")
        return 0
    if first in SUBCOMMANDS:
        return _subcommand(first, rest)
    if first == "-m":
        if not rest:
            return _fail("-m needs the name of a module")
        run_module(rest[0], rest[1:])
        return 0
    if first.startswith("-"):
        return _fail(f"there is no option {first}; the options of a script come after its name")
    if not os.path.exists(first):
        near = difflib.get_close_matches(first, SUBCOMMANDS, n=1)
        hint = f"; did you mean the subcommand {near[0]}?" if near else ""
        return _fail(f"there is no script {first!r} in {os.getcwd()}{hint}")
    run_script(first, rest)
    return 0


def _subcommand(name: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    match name:
        case "explain":
            parser.description = "Print which parameters of a model become matrices, as what, and why."
            parser.epilog = (
                f"examples:\n  {parser.prog} gpt2\n  {parser.prog} path/to/config.json --optim mud\n"
                f'  {parser.prog} Qwen/Qwen2.5-1.5B --optim adamuon --optim_args "qkv=whole,head=matrix"'
            )
            parser.add_argument(
                "model",
                metavar="MODEL_OR_CONFIG",
                help="a config.json, its folder, a model type (gpt2), or a Hub name",
            )
            parser.add_argument("--optim", choices=OPTIMIZER_NAMES, help="also print its state's memory and its step")
            parser.add_argument("--optim_args", "--optim-args", help='as for Trainer: "key=value,key=value"')
            parsed = parser.parse_args(arguments)
            from hf_matrix_optim.model_report import ModelSourceError, model_report

            try:
                print(model_report(parsed.model, parsed.optim, parsed.optim_args))
            except (ModelSourceError, ValueError) as error:
                return _fail(str(error))
        case "plots":
            parser.description = (
                "Draw loss and learning rates of a run over its steps, and its diagnostics (--optim_args "
                "diagnostics=50), as PNGs. Earlier ones are replaced, other files are not."
            )
            parser.epilog = f"examples:\n  {parser.prog} out/run\n  {parser.prog} trainer_state.json --output figures"
            parser.add_argument(
                "source",
                type=Path,
                metavar="RUN_FOLDER_OR_STATE",
                help="a trainer_state.json, or the folder of a run, of whose checkpoints the newest is read",
            )
            parser.add_argument(
                "--output", type=Path, metavar="FOLDER", help="where to write (default: plots in the run's folder)"
            )
            parsed = parser.parse_args(arguments)
            from hf_matrix_optim.training_plots import PlotError, draw_plots

            try:
                print("\n".join(map(str, draw_plots(parsed.source, parsed.output))))
            except PlotError as error:
                return _fail(str(error))
        case "doctor":
            parser.description = "Print versions, the device, and whether --optim works here and why not."
            parser.epilog = f"examples:\n  {parser.prog}"
            parser.parse_args(arguments)
            from hf_matrix_optim.doctor import doctor_report

            report, works = doctor_report()
            print(report)
            return 0 if works else 1
        case "enable" | "disable":
            parser.description = (
                "Accept --optim muon, adamuon, adamuon_v1 and mud in every script of this environment, by a .pth file "
                "in its site-packages."
                if name == "enable"
                else "Remove the .pth file that enable wrote."
            )
            parser.epilog = f"examples:\n  {parser.prog}\n  {import_hook.SWITCH}=0 python script.py    off for one run"
            parser.parse_args(arguments)
            try:
                print(enable() if name == "enable" else disable())
            except EnableError as error:
                return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    end = "" if message.endswith(("?", ".")) else "."
    print(f"{PROGRAM}: {message}{end} See {PROGRAM} --help", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
