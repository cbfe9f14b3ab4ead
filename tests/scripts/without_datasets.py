"""Runs a recipe, ``RECIPE FLAGS...``, where the package ``datasets`` cannot be found."""

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


class WithoutDatasets(PathFinder):
    """The finder of the interpreter, blind for one package."""

    @classmethod
    def find_spec(cls, name: str, *arguments: Any, **options: Any) -> Any:
        return None if name.split(".")[0] == "datasets" else PathFinder.find_spec(name, *arguments, **options)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutDatasets
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

if __name__ == "__main__":
    import pretrain

    status = pretrain.main(sys.argv[1], importlib.import_module(sys.argv[1]).PRESETS, sys.argv[2:])
    assert "datasets" not in sys.modules
    sys.exit(status)
