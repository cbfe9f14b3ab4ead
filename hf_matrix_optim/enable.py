"""Switches the optimizers on for every script of an environment, by a ``.pth`` file that a person asked for."""

import os
import subprocess
import sys
import sysconfig
import tempfile

from hf_matrix_optim.import_hook import SWITCH, WATCHED_MODULES

PTH_NAME = "hf_matrix_optim_enable.pth"
# Run at every start of an interpreter: so it imports nothing until transformers' Trainer is, and then no error leaves
# it. The package may have been uninstalled or broken since; it is not asked before it is needed.
PTH_CODE = f"""
import os, sys

class MatrixOptimFinder:
    failed = False

    def find_spec(self, name, path=None, target=None):
        import sys
        if name not in {WATCHED_MODULES!r} or self.failed or "hf_matrix_optim" in sys.modules:
            return None
        try:
            from hf_matrix_optim import import_hook
            return import_hook.find_spec(name, path, target)
        except Exception as error:
            self.failed = True
            if getattr(error, "name", None) != "hf_matrix_optim":
                try:
                    import logging
                    logging.getLogger("hf_matrix_optim").warning("hf_matrix_optim is broken and stays off: %r", error)
                except Exception:
                    pass
        return None

known = [type(finder).__name__ for finder in sys.meta_path]  # in a virtual environment .pth files are run twice
if os.environ.get("{SWITCH}", "").strip() != "0" and "MatrixOptimFinder" not in known:
    sys.meta_path.insert(0, MatrixOptimFinder())
"""
# site.py runs the lines of a .pth file that begin with import.
PTH_LINE = f"import sys; exec({PTH_CODE!r})\n"


class EnableError(Exception):
    """The environment cannot be changed; the message says why and what to do."""


def pth_path() -> str:
    """Where the ``.pth`` file of this environment is, or would be."""
    return os.path.join(sysconfig.get_paths()["purelib"], PTH_NAME)


def is_enabled() -> bool:
    """Whether ``enable`` has been called in this environment."""
    return os.path.exists(pth_path())


def enable() -> str:
    """Write the ``.pth`` file, and return what to tell the user.

    Raises:
        EnableError: if the package is not installed in this environment, or its site-packages cannot be written.
    """
    import_error = error_of_plain_import()
    if import_error:
        raise EnableError(
            f"hf_matrix_optim is not installed in this environment ({sys.prefix}): a plain {sys.executable} fails to "
            f"import it ({import_error}). Install it first, for instance with: python -m pip install hf-matrix-optim"
        )
    path = pth_path()
    already = _read(path) == PTH_LINE
    if not already:
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(PTH_LINE)
        except OSError as error:
            raise EnableError(_not_writable(path, error)) from error
    lines = [
        f"{'Already enabled' if already else 'Enabled'}: every Python of {sys.prefix} now accepts --optim "
        "muon, adamuon, adamuon_v1 and mud.",
        f"{'It is' if already else 'Written'}: {path}",
        f"Undo it with `python -m hf_matrix_optim disable`; {SWITCH}=0 in the environment switches it off for a run.",
    ]
    return "\n".join(lines)


def disable() -> str:
    """Remove the ``.pth`` file, and return what to tell the user.

    Raises:
        EnableError: if it cannot be removed.
    """
    path = pth_path()
    try:
        os.remove(path)
    except FileNotFoundError:
        return f"Not enabled in {sys.prefix}: there is no {path}"
    except OSError as error:
        raise EnableError(_not_writable(path, error)) from error
    return f"Disabled in {sys.prefix}. Removed: {path}"


def error_of_plain_import() -> str:
    """Why a plain interpreter of this environment cannot import the package; "" if it can.

    It starts in an empty folder and without ``PYTHONPATH``, so that only what is installed counts.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-c", "import hf_matrix_optim.import_hook"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
    return "" if result.returncode == 0 else (result.stderr.strip().splitlines() or ["no message"])[-1]


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return None


def _not_writable(path: str, error: OSError) -> str:
    return (
        f"cannot change {path} ({error.strerror}). Use a virtual environment of your own, or the launcher, which "
        "writes nothing: python -m hf_matrix_optim script.py ..."
    )
