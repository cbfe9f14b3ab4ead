"""Registers the optimizers with transformers as soon as it is imported, whenever that is.

A finder in front of ``sys.meta_path`` lets Python import three transformers modules as usual and then hands each to
``registration``. Importing this module costs next to nothing, and no error of ours leaves it: a failure is kept for
``doctor``, and the first one is logged.
"""

import os
import sys

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without the 2 ms that importing typing takes; hence the quotes below
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

SWITCH = "HF_MATRIX_OPTIM"
WATCHED_MODULES = ("transformers.training_args", "transformers.trainer_optimizer", "transformers.trainer")

#: Watched module -> what went wrong in it.
failures: dict[str, str] = {}


def is_switched_off() -> bool:
    """Whether ``HF_MATRIX_OPTIM=0`` is in the environment."""
    return os.environ.get(SWITCH, "").strip() == "0"


def is_installed() -> bool:
    """Whether the finder is in place in this interpreter."""
    return _finder in sys.meta_path


def install() -> None:
    """Put the finder in place, and register with the transformers modules that are imported already.

    Does nothing when it was called before or ``HF_MATRIX_OPTIM=0`` is set.
    """
    if is_switched_off() or is_installed():
        return
    sys.meta_path.insert(0, _finder)
    for name in WATCHED_MODULES:
        module = sys.modules.get(name)
        if module is None:
            continue
        if getattr(module.__spec__, "_initializing", False):
            _register_when_initialized(module)
        else:
            _register(module)


def find_spec(fullname: str, path: "Any" = None, target: "Any" = None) -> "Any":
    """As the finder: what the ``.pth`` file of ``enable`` calls when the finder was not in time for this import."""
    return _finder.find_spec(fullname, path, target)


class _Finder:
    """Finds the watched modules with the finders behind it, and wraps their loaders."""

    def find_spec(self, fullname: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if fullname not in WATCHED_MODULES:
            return None
        is_behind = False
        for finder in sys.meta_path:
            if finder is self:
                is_behind = True
                continue
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if is_behind and find_spec is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


_finder = _Finder()


class _Loader:
    """Runs a module with its own loader and registers with it afterwards; the module never sees this loader."""

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def create_module(self, spec: "Any") -> "ModuleType | None":
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> "Any":  # get_source, get_code and the like, for those who only ask for a spec
        if name == "_loader":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self._loader, name)


def _register_when_initialized(module: "ModuleType") -> None:
    """Register with a module that is being imported right now, further up the stack or in another thread.

    The import system sets ``spec._initializing`` to False as the last step of an import, and offers no other sign.
    """
    spec: Any = module.__spec__
    spec_class = type(spec)

    class WaitingSpec(spec_class):  # type: ignore[misc, valid-type]
        @property
        def _initializing(self) -> bool:
            return bool(self.__dict__.get("_initializing", False))

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__dict__["_initializing"] = value
            if not value:
                self.__class__ = spec_class
                if sys.modules.get(module.__name__) is module:  # it is gone if the import failed
                    _register(module)

    try:
        spec.__class__ = WaitingSpec
    except TypeError as error:  # a spec class of another importer, with a layout of its own
        _keep_failure(module.__name__, error)


def _register(module: "ModuleType") -> None:
    name = module.__name__
    try:
        from hf_matrix_optim import registration

        registration.register(module)
    except Exception as error:
        _keep_failure(name, error)
    else:
        failures.pop(name, None)


def _keep_failure(name: str, error: Exception) -> None:
    first = not failures
    failures[name] = f"{type(error).__name__}: {error}"
    if not first:
        return
    try:
        import logging

        logging.getLogger("transformers.hf_matrix_optim").warning(
            "hf_matrix_optim could not add its optimizers to %s (%s). `python -m hf_matrix_optim doctor` says more; "
            "%s=0 switches it off.",
            name,
            failures[name],
            SWITCH,
        )
    except Exception:  # a broken logging setup is not a reason to stop an import
        pass
