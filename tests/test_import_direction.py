"""Imports point downwards only, and what must stay light or apart does; read from the source, lazy ones included."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_matrix_optim"

#: From the bottom up; a module may import from its own layer and from those above it in this list.
LAYERS = {
    "engines": {"flattening"},
    "math": {"newton_schulz", "decorrelate", "update_scale", "matrix_layout", "spectral_norm"},
    "partition": {
        "fused_layouts",
        "attention_projections",
        "attention_logit_bounds",
        "model_places",
        "parameter_routing",
        "partition",
    },
    "stacks": {"stacks"},
    "ranks": {
        "sharding",
        "sharding.shard_layout",
        "sharding.plan",
        "sharding.plan_table",
        "sharding.exchange",
        "sharding.round_step",
        "sharding.guard",
        "sharding.full_tensor",
        "sharding.largest",
    },
    "kernels": {
        "kernels",
        "kernels.elementwise_triton",
        "kernels.launch",
        "kernels.int8_triton",
        "kernels.int8_plan",
        "kernels.symmetric_triton",
        "kernels.triangular_triton",
        "kernels.half_maps",
        "kernels.stack_plan",
        "kernels.stack_step",
        "kernels.fast_path",
        "kernels.graph_capture",
        "kernels.map_graphs",
        "kernels.kernel_round",
    },
    "step": {
        "int8_momentum",
        "checkpoint_check",
        "group_check",
        "adamw_group",
        "group_state",
        "plain_step",
        "plain_round",
        "distributed_step",
        "matrix_state",
        "matrix_optimizer",
    },
    "diagnostics": {"stored_matrices", "optimizer_diagnostics", "diagnostics_summary"},
    "rules": {"muon", "adamuon", "mud"},
    "hook": {
        "options",
        "deepspeed_configuration",
        "attention_logits",
        "qk_clip",
        "qk_clip_callback",
        "registry",
        "registration",
        "tripwire",
        "diagnostics",
        "import_hook",
        "trainer",
    },
    "root": {""},
    "cli": {"child_processes", "launcher", "enable", "doctor", "model_report", "training_plots", "__main__"},
}


def module_name(path: Path) -> str:
    """Name below the package: "muon", "sharding.full_tensor", "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports; those under TYPE_CHECKING are types, not imports."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    below = {name.removeprefix("hf_matrix_optim").removeprefix(".") for name in imports(path) if is_ours(name)}
    return {name for name in below if name in MODULES and name != ""}


def is_ours(name: str) -> bool:
    return name == "hf_matrix_optim" or name.startswith("hf_matrix_optim.")


def layer(name: str) -> int:
    found = [index for index, members in enumerate(LAYERS.values()) if name in members]
    assert len(found) == 1, f"module {name!r} must be in exactly one layer of this test"
    return found[0]


def test_every_module_has_a_layer_and_imports_from_it_or_below():
    for name, path in MODULES.items():
        for imported in own_imports(path):
            assert layer(imported) <= layer(name), f"{name} imports {imported}, which is above it"


def test_there_is_no_circle():
    top_level = {
        name: {
            other for other in MODULES if other and f"hf_matrix_optim.{other}" in imports(path, top_level_only=True)
        }
        for name, path in MODULES.items()
    }
    TopologicalSorter(top_level).prepare()  # raises CycleError


def test_partition_knows_no_optimizer():
    for name in LAYERS["partition"]:
        assert {layer(imported) for imported in own_imports(MODULES[name])} <= {0, 1, 2}


def test_the_maths_needs_torch_alone():
    for name in LAYERS["math"]:
        for imported in imports(MODULES[name]):
            top = imported.split(".")[0]
            assert top in {"torch", "hf_matrix_optim"} or top in sys.stdlib_module_names, (name, imported)


def test_only_sharding_imports_torch_distributed():
    for name, path in MODULES.items():
        if not name.startswith("sharding"):
            assert not any(imported.startswith("torch.distributed") for imported in imports(path)), name


def test_what_every_interpreter_start_reads_needs_the_standard_library_alone():
    assert imports(MODULES["import_hook"], top_level_only=True) <= {"os", "sys"}
    assert imports(PACKAGE / "__init__.py", top_level_only=True) <= {
        "hf_matrix_optim",
        "hf_matrix_optim.import_hook",
    }


def test_the_package_knows_neither_recipes_nor_tests_and_eval_not_the_training_code():
    for path in PACKAGE.rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"recipes", "tests", "eval", "benchmarks"}, path
    for path in (ROOT / "eval").rglob("*.py"):
        assert not any(is_ours(name) or name.startswith("recipes") for name in imports(path)), path
