"""Carries the hook into the child processes that ``multiprocessing`` starts below the launcher.

A forked child has it. A spawned one is a new interpreter that is given a line of code to run, and a fork server
imports what it is told to: both import this module, before the script, and so hand it on to their own children.
"""

import os
from multiprocessing import set_forkserver_preload, spawn

from hf_matrix_optim import import_hook

_python_command_line = spawn.get_command_line


def prepare_children() -> None:
    """Do it, for the children of this process; nothing happens when ``HF_MATRIX_OPTIM=0`` is set."""
    if import_hook.is_switched_off():
        return
    spawn.get_command_line = _command_line
    set_forkserver_preload([__name__, "__main__"])


def _command_line(**kwds: object) -> list[str]:
    command = _python_command_line(**kwds)
    if "-c" in command:  # not in a frozen program
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        code = command.index("-c") + 1
        first = f"import sys; sys.path.append({root!r}); import {__name__}; sys.path.pop(); "
        command[code] = first + command[code]
    return command


prepare_children()
