"""Fresh interpreters for tests: of this environment, or of a scratch one that sees the same packages."""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "scripts"


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with the switch and the Python path as a user would have them."""
    dropped = ("HF_MATRIX_OPTIM", "PYTHONPATH", "PYTHONSAFEPATH", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def run_python(
    *arguments: str | os.PathLike[str],
    cwd: Path,
    executable: str | os.PathLike[str] = sys.executable,
    **changes: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``python arguments...`` in ``cwd`` with ``changes`` to the environment, and wait for it."""
    return subprocess.run(
        [executable, *arguments],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
    )


def output_of(*arguments: str | os.PathLike[str], **kwargs) -> str:
    """Standard output of ``run_python``, which must succeed."""
    result = run_python(*arguments, **kwargs)
    assert result.returncode == 0, f"{arguments}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def scratch_environment(folder: Path, package_root: Path = ROOT, *, with_packages: bool = True) -> Path:
    """Make a virtual environment with the package in ``package_root``, and with the packages of this one or none.

    Returns:
        Its python.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = Path(
        output_of(
            "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder, executable=python
        ).strip()
    )
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and with_packages]
    (purelib / "a_packages.pth").write_text("\n".join([str(package_root), *packages]) + "\n")
    return python
