"""What `import sdeflow` loads, and which way imports run."""

import ast
import runpy
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sdeflow

ROOT = Path(__file__).parent.parent
checker = runpy.run_path(str(ROOT / "tools" / "check_imports.py"))

NOT_LOADED = """
    sdeflow_plugins diffusers transformers torchsde torchdiffeq sklearn lightning lightning_fabric
    matplotlib PIL scipy jsonargparse tqdm safetensors torchvision yaml
""".split()


def loaded_by(code):
    """The top-level modules that a fresh interpreter holds after running the code."""
    report = "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = [sys.executable, "-W", "error", "-c", code + report]
    return set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())


def test_import_loads_no_plugin_and_no_heavy_library():
    """Beyond what torch loads by itself, and without a warning."""
    loaded = loaded_by("import sdeflow") - loaded_by("import torch")
    assert "sdeflow" in loaded and "pluggy" in loaded
    assert loaded.isdisjoint(NOT_LOADED)


def test_the_same_test_sees_plugins_once_they_are_asked_for():
    loaded = loaded_by("import sdeflow; sdeflow.catalogue('sde')") - loaded_by("import torch")
    assert "sdeflow_plugins" in loaded
    heavy = {"diffusers", "transformers", "sklearn", "lightning", "matplotlib", "torchsde"}
    assert loaded.isdisjoint(heavy)


def test_every_public_name_exists_once_and_is_documented():
    assert len(set(sdeflow.__all__)) == len(sdeflow.__all__)
    assert all(getattr(sdeflow, name).__doc__ for name in sdeflow.__all__)


def test_imports_run_one_way():
    assert checker["violations"](ROOT) == []
    graph = {module: row.split() for module, row in checker["ALLOWED"].items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_the_table_has_a_row_for_every_module_and_no_other():
    core = ROOT / "sdeflow"
    modules = {file.stem for file in core.glob("*.py")} - {"__init__"}
    modules |= {file.parent.name for file in core.glob("*/__init__.py")}
    assert modules == set(checker["ALLOWED"])


@pytest.mark.parametrize(
    "module, line, message",
    [
        ("sde", "from .solver import Solver", "sde may not import solver"),
        ("sde", "from . import grid", "sde may not import grid"),
        ("sde", "import sdeflow.grid", "sde may not import grid"),
        ("sde", "from sdeflow import grid", "sde may not import grid"),
        ("noise", "def late():\n    from .sample import integrate", "noise may not import sample"),
        ("cli", "from sdeflow_plugins import ddim", "cli may not import sdeflow_plugins"),
        ("cli", "import sdeflow_plugins.solvers.ddim", "cli may not import sdeflow_plugins"),
        ("sample", "def late():\n    import diffusers", "sample may not import diffusers"),
        ("backends", "import torchsde", "backends may not import torchsde when it is loaded"),
        ("brand_new", "import math", "a module without a row"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, module, line, message):
    shutil.copytree(ROOT / "sdeflow", tmp_path / "sdeflow")
    with (tmp_path / "sdeflow" / f"{module}.py").open("a") as file:
        file.write(f"\n{line}\n")
    assert [message in found for found in checker["violations"](tmp_path)] == [True]
    run = [sys.executable, str(ROOT / "tools" / "check_imports.py"), str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stdout


def test_a_cycle_in_the_table_would_be_found():
    graph = {module: row.split() for module, row in checker["ALLOWED"].items()}
    graph["errors"] = ["cli"]
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())


def test_imports_under_type_checking_are_not_loaded():
    source = "if TYPE_CHECKING:\n    import a\nimport b\ndef f():\n    import c\n"
    found = [(name, eager) for name, eager, _ in checker["imports"](ast.parse(source))]
    assert found == [("a", False), ("b", True), ("c", False)]
