"""Runs a script or module as ``python`` itself would, with the optimizers registered in it and its child processes."""

import builtins
import os
import runpy
import sys
import types
import zipfile
from importlib.machinery import SourceFileLoader, SourcelessFileLoader

from hf_matrix_optim.child_processes import prepare_children


def run_script(path: str, arguments: list[str]) -> None:
    """Run a file as ``python path arguments...`` would: same ``sys.argv``, ``sys.path[0]`` and ``__main__``.

    The module stays in ``sys.modules`` until the interpreter has ended, so that threads and exit functions of the
    script find their own ``__main__``; ``runpy.run_path`` would take it away.

    Args:
        path: a Python file, compiled or not, or a folder or zip file with a ``__main__.py``.
        arguments: become ``sys.argv[1:]``.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    prepare_children()
    sys.argv[:] = [path, *arguments]
    absolute = os.path.join(os.getcwd(), path)
    main = _new_main_module()
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        _replace_first_path(absolute)
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]  # as python does
        return
    _replace_first_path(os.path.dirname(os.path.realpath(path)))
    if path.endswith(".pyc"):
        compiled = SourcelessFileLoader("__main__", absolute)
        main.__loader__, code = compiled, compiled.get_code("__main__")
    else:
        source = SourceFileLoader("__main__", absolute)
        main.__loader__, code = source, source.source_to_code(source.get_data(absolute), absolute)
    main.__dict__.update(__file__=absolute, __cached__=None)
    exec(code, main.__dict__)  # type: ignore[arg-type]  # get_code returns None only for namespace packages


def run_module(name: str, arguments: list[str]) -> None:
    """Run a module as ``python -m name arguments...`` would; ``sys.path[0]`` stays the current folder."""
    prepare_children()
    sys.argv[:] = ["-m", *arguments]
    _new_main_module()
    runpy._run_module_as_main(name, alter_argv=True)  # type: ignore[attr-defined]  # as python does


def _new_main_module() -> types.ModuleType:
    """An empty ``__main__`` in place of the launcher's own."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    return main


def _replace_first_path(folder: str) -> None:
    """Put ``folder`` where ``python -m`` put the current one, unless python was told not to (``-P``, ``-I``)."""
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = folder
