"""The import hook: whenever it comes, once or twice, and that it never stops an import or an interpreter."""

import copy
import enum
import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
from interpreters import ROOT, output_of, run_python, scratch_environment
from transformers.utils.generic import ExplicitEnum

from hf_matrix_optim import registration
from hf_matrix_optim.options import OPTIMIZER_NAMES

# What a script finds once the hook and transformers' Trainer are imported, in whatever order.
STATE = """
import json, sys
import transformers.trainer
from transformers import HfArgumentParser, TrainingArguments
from hf_matrix_optim import import_hook
from hf_matrix_optim.options import split_optim_args
modules = [sys.modules[name] for name in import_hook.WATCHED_MODULES]
names = modules[0].OptimizerNames
parser = HfArgumentParser(TrainingArguments)
action = next(action for action in parser._actions if action.dest == "optim")
print(json.dumps({
    "choices": [name for name in action.choices if name in ("muon", "adamuon", "adamuon_v1", "mud")],
    "parsed": str(parser.parse_args(["--optim", "adamuon_v1"]).optim),
    "help": all(name in parser.format_help() for name in ("muon", "adamuon", "adamuon_v1", "mud")),
    "members": len(names), "values": len(set(names)),
    "handled": sorted(str.__str__(key) for key in modules[1]._OPTIMIZER_HANDLERS if "mu" in key),
    "callbacks": [callback.__name__ for callback in modules[2].DEFAULT_CALLBACKS],
    "parse": modules[1]._parse_optim_args is split_optim_args and modules[2]._parse_optim_args is split_optim_args,
    "loaders": sorted({type(module.__spec__.loader).__name__ for module in modules}),
    "same_loader": all(module.__loader__ is module.__spec__.loader for module in modules),
    "specs": sorted({type(module.__spec__).__name__ for module in modules}),
    "finders": sum("hf_matrix_optim" in type(finder).__module__ for finder in sys.meta_path),
    "failures": import_hook.failures,
    "extra": globals().get("extra"),
}))
"""

BEFORE = """
import sys
import hf_matrix_optim
extra = [name for name in ("torch", "transformers", "importlib.abc", "typing") if name in sys.modules]
"""

AFTER = """
import importlib
import transformers.trainer
import hf_matrix_optim
hf_matrix_optim.import_hook.install()
importlib.reload(transformers.training_args)  # a new, empty enum: registered with again, through the finder
"""

# A torch back-end that imports this package: torch loads it while transformers.training_args imports torch.
PARTIAL = """
import sys
from transformers import TrainingArguments
import partial_backend
extra = partial_backend.seen
"""
PARTIAL_BACKEND = """
import sys
seen = []
def load():
    import hf_matrix_optim
    module = sys.modules.get("transformers.training_args")
    seen.append(module is not None and module.__spec__._initializing and not hasattr(module, "OptimizerNames"))
"""


@pytest.fixture(scope="module")
def partial_backend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backend")
    (folder / "partial_backend.py").write_text(PARTIAL_BACKEND)
    info = folder / "partial_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: partial-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\npartial = partial_backend:load\n")
    return folder


@pytest.mark.parametrize("order", ["before", "after", "partial"])
def test_names_are_registered_in_every_import_order(order: str, partial_backend: Path, tmp_path: Path) -> None:
    first = {"before": BEFORE, "after": AFTER, "partial": PARTIAL}[order]
    path = {"PYTHONPATH": str(partial_backend)} if order == "partial" else {}
    found = json.loads(output_of("-c", first + STATE, cwd=tmp_path, **path).splitlines()[-1])

    assert found["choices"] == list(OPTIMIZER_NAMES)
    assert found["parsed"] == "adamuon_v1"
    assert found["help"]
    assert found["members"] == found["values"] == len(original_names()) + 4
    assert found["handled"] == sorted(OPTIMIZER_NAMES)
    assert found["callbacks"] == ["DefaultFlowCallback", "OptimizerTripwire", "QKClipCallback", "DiagnosticsCallback"]
    assert found["parse"]
    assert found["loaders"] == ["SourceFileLoader"]
    assert found["same_loader"]
    assert found["specs"] == ["ModuleSpec"]
    assert found["finders"] == 1
    assert found["failures"] == {}
    # before: neither torch nor transformers, nor what is slow to import; partial: it was partial.
    assert found["extra"] == {"before": [], "after": None, "partial": [True]}[order]


def original_names() -> list[str]:
    from transformers.training_args import OptimizerNames

    return [name.value for name in OptimizerNames if not getattr(name, "is_matrix_optimizer", False)]


def test_an_import_that_fails_is_left_to_fail(tmp_path: Path) -> None:
    """The hook comes while a watched module is being imported, which then raises: nothing is registered with it."""
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '5.23.0'\n")
    (package / "training_args.py").write_text("import hf_matrix_optim\nraise OSError('no disk')\n")
    code = """
import sys
try:
    import transformers.training_args
except OSError as error:
    from hf_matrix_optim import import_hook
    loaded = [name in sys.modules for name in ("transformers.training_args", "hf_matrix_optim.registration")]
    print(error, import_hook.failures, loaded)
"""
    assert output_of("-c", code, cwd=tmp_path).strip() == "no disk {} [False, False]"


# ---- the enum ----


class Grown(ExplicitEnum):
    SGD = "sgd"


class Born(ExplicitEnum):
    SGD = "sgd"
    MUON = "muon"


@pytest.fixture(scope="module")
def grown() -> type[Grown]:
    registration._add_member(Grown, "MUON", "muon")
    return Grown


def observables(names: type[enum.Enum]) -> dict[str, object]:
    """Everything a caller can see of an enum and its member "muon", the class's own name taken out."""
    member = names("muon")
    table = {names.SGD: 1, member: 2}
    state = pickle.loads(pickle.dumps(vars(names)["_member_map_"]["SGD"]))
    return {
        "list": [str.__str__(each) for each in names],
        "reversed": [each.value for each in reversed(names)],
        "members": [(key, value.value) for key, value in names.__members__.items()],
        "len": len(names),
        "dir": [each for each in dir(names) if not each.startswith("__")],
        "by value, name, attribute": [names("muon") is member, names["MUON"] is member, names.MUON is member],
        "from string subclass": names(str.__new__(type("S", (str,), {}), "muon")) is member,
        "contains": [member in names, names.SGD in names],
        "contains plain values": [contains(names, value) for value in ("muon", "sgd", "adamw")],
        "name and value": [member.name, member.value, type(member.value).__name__],
        "texts": [repr(member), str(member), f"{member}", f"{member:>8}", "".join(["", member]), json.dumps(member)],
        "equality": [member == "muon", member == "sgd", member != names.SGD, member is names.MUON],
        "as key": [table["muon"], table["sgd"], {"muon": 3}[member], hash(member) == hash("muon")],
        "sort order": getattr(member, "_sort_order_", len(names) - 1),  # 3.10 has none
        "objclass": member.__objclass__ is names,
        "class": [type(member) is names, isinstance(member, str), isinstance(member, enum.Enum)],
        "sgd pickled": state is names.SGD,
        "in match": matched(names, member),
    }


def contains(names: type[enum.Enum], value: str) -> bool | None:
    """``value in names``; None where this Python does not allow the question (before 3.12)."""
    try:
        return value in names
    except TypeError:
        return None


def matched(names: type[enum.Enum], member: enum.Enum) -> str:
    match member:
        case names.SGD:
            return "sgd"
        case names.MUON:
            return "muon"
    return "nothing"


def test_an_added_member_is_as_one_that_was_there_from_the_start(grown: type[Grown]) -> None:
    seen, expected = observables(grown), observables(Born)
    for key, value in expected.items():
        own = json.loads(json.dumps(seen[key]).replace("Grown", "Born"))
        assert own == json.loads(json.dumps(value)), key


def test_a_wrong_name_lists_the_added_ones(grown: type[Grown]) -> None:
    with pytest.raises(ValueError, match="mun is not a valid Grown, please select one of .*'sgd', 'muon'"):
        grown("mun")


def test_an_added_member_cannot_be_replaced(grown: type[Grown]) -> None:
    with pytest.raises(AttributeError):
        grown.MUON = "other"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_added_member_is_pickled_as_a_plain_string(grown: type[Grown], protocol: int) -> None:
    data = pickle.dumps({"optim": grown.MUON}, protocol)
    assert b"Grown" not in data
    assert type(pickle.loads(data)["optim"]) is str
    assert pickle.loads(data) == {"optim": "muon"}


def test_a_copied_member_is_still_the_name(grown: type[Grown]) -> None:
    assert copy.deepcopy({"optim": grown.MUON}) == {"optim": "muon"}
    assert copy.copy(grown.MUON) == "muon"


# ---- transformers gets a "muon" of its own ----


def test_names_that_transformers_has_stay_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Upstream(ExplicitEnum):
        SGD = "sgd"
        MUON = "muon"
        MUD = "something_else"

    monkeypatch.setattr(registration, "accepted_names", {})
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    registration.logger.addHandler(handler)
    upstream = Upstream("muon")
    registration.add_optimizer_names(Upstream)
    registration.add_optimizer_names(Upstream)
    registration.logger.removeHandler(handler)

    assert Upstream("muon") is upstream
    assert not hasattr(upstream, "is_matrix_optimizer")
    assert Upstream.MUD.value == "something_else"
    assert [name.value for name in Upstream] == [
        "sgd",
        "muon",
        "something_else",
        "matrix_muon",
        "adamuon",
        "adamuon_v1",
        "matrix_mud",
    ]
    assert registration.accepted_names == {
        "matrix_muon": "muon",
        "adamuon": "adamuon",
        "adamuon_v1": "adamuon_v1",
        "matrix_mud": "mud",
    }
    assert len(warnings) == 1
    assert "--optim muon is transformers'" in warnings[0]
    assert "--optim matrix_muon, matrix_mud" in warnings[0]

    handlers = {upstream: "upstream's"}
    registration.add_handlers(handlers)
    assert handlers["muon"] == "upstream's"
    assert set(handlers) == {"muon", "matrix_muon", "adamuon", "adamuon_v1", "matrix_mud"}


# ---- without the package, or with a broken one ----


def test_training_args_bin_loads_where_the_package_is_absent(tmp_path: Path) -> None:
    save = """
import torch, hf_matrix_optim
from transformers import TrainingArguments
torch.save(TrainingArguments("out", optim="adamuon", use_cpu=True), "training_args.bin")
"""
    load = """
import sys
sys.modules["hf_matrix_optim"] = None  # importing it raises ModuleNotFoundError
import torch
args = torch.load("training_args.bin", weights_only=False)
print(type(args.optim).__name__, args.optim, args.to_dict()["optim"], "adamuon" in args.to_json_string())
"""
    output_of("-c", save, cwd=tmp_path)
    assert b"hf_matrix_optim" not in (tmp_path / "training_args.bin").read_bytes()
    assert output_of("-c", load, cwd=tmp_path).split() == ["str", "adamuon", "adamuon", "True"]


@pytest.fixture(scope="module")
def broken_environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An environment that was enabled with a good copy of the package: its python, and the copy to break."""
    folder = tmp_path_factory.mktemp("broken")
    package = folder / "root" / "hf_matrix_optim"
    shutil.copytree(ROOT / "hf_matrix_optim", package, ignore=shutil.ignore_patterns("__pycache__"))
    python = scratch_environment(folder / "venv", folder / "root")
    output_of("-m", "hf_matrix_optim", "enable", cwd=folder, executable=python)
    return python, package


# Only the import system matters here, so a stand-in saves the seconds that transformers takes to import.
STAND_IN = {
    "__init__.py": "__version__ = '5.23.0'",
    "training_args.py": "import enum\nclass OptimizerNames(str, enum.Enum):\n    SGD = 'sgd'",
    "trainer_optimizer.py": "_OPTIMIZER_HANDLERS = {}",
}
TRAINING_ARGUMENTS = """
import transformers.training_args, transformers.trainer_optimizer
print("muon" in transformers.training_args.OptimizerNames._value2member_map_)
"""


def break_nothing(package: Path) -> None:
    pass


def break_syntax(package: Path) -> None:
    (package / "import_hook.py").write_text("def install(:\n")


def break_dependency(package: Path) -> None:
    (package / "__init__.py").write_text("import a_package_that_is_not_installed\n")


def break_registration(package: Path) -> None:
    (package / "registration.py").write_text("raise RuntimeError('the disk is on fire')\n")


def uninstall(package: Path) -> None:
    shutil.rmtree(package)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing, ""),
        (break_syntax, "hf_matrix_optim is broken and stays off: SyntaxError"),
        (break_dependency, "hf_matrix_optim is broken and stays off: ModuleNotFoundError"),
        (break_registration, "could not add its optimizers to transformers.training_args (RuntimeError: the disk is"),
        (uninstall, ""),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_or_removed_package_stops_nothing(broken_environment, tmp_path: Path, damage, message: str) -> None:
    python, package = broken_environment
    kept = tmp_path / "kept"
    shutil.copytree(package, kept)
    (tmp_path / "transformers").mkdir()
    for name, text in STAND_IN.items():
        (tmp_path / "transformers" / name).write_text(text)
    try:
        damage(package)
        start = run_python("-c", "print(1)", cwd=tmp_path, executable=python)
        assert (start.returncode, start.stdout, start.stderr) == (0, "1\n", "")
        result = run_python("-c", TRAINING_ARGUMENTS, cwd=tmp_path, executable=python)
        assert result.returncode == 0
        assert result.stdout.split() == [str(damage is break_nothing)]
        warnings = [line for line in result.stderr.splitlines() if "hf_matrix_optim" in line]
        assert len(warnings) == (1 if message else 0), result.stderr
        assert message in result.stderr
    finally:
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(kept, package)
