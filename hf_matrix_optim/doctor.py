"""What ``python -m hf_matrix_optim doctor`` prints: versions, and whether ``--optim`` works here and why not."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from typing import Any

from hf_matrix_optim.enable import error_of_plain_import, is_enabled, pth_path
from hf_matrix_optim.import_hook import SWITCH, is_switched_off
from hf_matrix_optim.options import OPTIMIZER_NAMES

PACKAGES = ("hf-matrix-optim", "torch", "transformers", "accelerate", "datasets", "peft", "trl", "triton")

# Run by a plain interpreter in an empty folder; prints one line of JSON.
PROBE = """
import json, sys
found = {"hook": False, "names": [], "failures": {}, "error": ""}
if len(sys.argv) > 1:
    import hf_matrix_optim
try:
    import transformers.trainer_optimizer
    from transformers.training_args import OptimizerNames
    found["names"] = [
        str(member.value) for member in OptimizerNames if getattr(member, "is_matrix_optimizer", False)
    ]
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
hook = sys.modules.get("hf_matrix_optim.import_hook")
if hook is not None:
    found["hook"] = True
    found["failures"] = hook.failures
print(json.dumps(found))
"""


def doctor_report() -> tuple[str, bool]:
    """Return the report, and whether ``--optim`` works below the launcher."""
    plain = _probe()
    below_launcher = plain if plain["names"] or is_switched_off() else _probe("with the hook")
    lines = ["Versions", f"  python           {platform.python_version()} ({sys.executable})"]
    lines += [f"  {name:<16} {_version(name)}" for name in PACKAGES]
    lines += ["", "Device", f"  {_device()}", "", "Is --optim muon, adamuon, adamuon_v1, mud accepted?"]
    lines += [f"  {line}" for line in _answers(plain, below_launcher)]
    return "\n".join(lines), bool(below_launcher["names"])


def _answers(plain: dict[str, Any], below_launcher: dict[str, Any]) -> list[str]:
    if plain["names"]:
        return [f"by a plain python script: yes ({', '.join(plain['names'])}); enabled by {pth_path()}"]
    lines = [f"by a plain python script: no. {_why_not(plain)}"]
    launcher = "below python -m hf_matrix_optim script.py, and after import hf_matrix_optim"
    if below_launcher["names"]:
        lines.append(f"{launcher}: yes ({', '.join(below_launcher['names'])})")
    else:
        lines.append(f"{launcher}: no. {_failure(below_launcher)}")
    return lines


def _why_not(plain: dict[str, Any]) -> str:
    if is_switched_off():
        return f"{SWITCH}=0 is set in the environment: unset it"
    if not is_enabled():
        return (
            "This environment is not enabled: run `python -m hf_matrix_optim enable`, start the script with "
            "`python -m hf_matrix_optim script.py`, or `import hf_matrix_optim` in it"
        )
    if not plain["hook"]:
        error = error_of_plain_import()
        reason = f"cannot be imported by a plain python: {error}" if error else "was not imported"
        return f"{pth_path()} is there, but hf_matrix_optim {reason}. Install the package again, or run disable"
    return _failure(plain)


def _failure(probe: dict[str, Any]) -> str:
    if probe["failures"]:
        return "; ".join(f"{module}: {message}" for module, message in probe["failures"].items())
    if is_switched_off():
        return f"{SWITCH}=0 is set in the environment: unset it"
    return probe["error"] or f"transformers has none of {', '.join(OPTIMIZER_NAMES)}, and no failure was kept"


def _probe(*arguments: str) -> dict[str, Any]:
    """What an interpreter of this environment finds; with an argument it imports the package first."""
    environment = dict(os.environ)
    if arguments:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-c", PROBE, *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
    found: dict[str, Any] = {"hook": False, "names": [], "failures": {}, "error": ""}
    try:
        found.update(json.loads(result.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        found["error"] = (result.stderr.strip().splitlines() or [f"python ended with {result.returncode}"])[-1]
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return "no GPU: steps run on the CPU; Triton is not needed"
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    from hf_matrix_optim.kernels.stack_plan import why_not

    reason = why_not(torch.device("cuda", 0))
    kernels = f"the kernels of the step stay off: {reason}" if reason else "the kernels of the step run"
    return f"{names}; CUDA {torch.version.cuda}; Triton {_version('triton')}; {kernels}"
