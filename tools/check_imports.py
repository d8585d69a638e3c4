"""The direction of imports: the core is a DAG, and never imports its plugins.

`python tools/check_imports.py [root]` prints what breaks the table below, and exits with 1 if
anything does. Imports inside functions count as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ALLOWED = {
    # module:      what it may import from the core
    "errors": "",
    "noise": "errors",
    "derivatives": "",
    "sde": "errors derivatives",
    "calculus": "errors derivatives sde",
    "quadrature": "errors",
    "linear": "errors quadrature sde",
    "transitions": "errors quadrature",
    "system": "errors quadrature sde transitions",
    "degree": "",
    "probe": "degree",
    "coefficients": "errors probe sde",
    "detect": "errors degree probe coefficients sde linear system",
    "processes": "errors sde system",
    "nonlinear": "errors sde",
    "grid": "errors sde",
    "brownian": "errors noise grid",
    "tree": "errors noise brownian",
    "reverse": "errors sde calculus",
    "denoiser": "errors sde reverse",
    "loss": "errors sde denoiser",
    "solver": "errors noise sde system grid reverse",
    "euler": "errors noise sde grid",
    "solvers": "errors derivatives noise sde calculus solver euler",
    "runge_kutta": "derivatives noise sde solver solvers",
    "backends": "errors derivatives noise sde solver",
    "embedded": "sde",
    "adaptive": "errors noise brownian tree sde embedded solver",
    "symbol": "",
    "tableau": "errors sde reverse denoiser solver symbol",
    "fused": "errors noise sde reverse denoiser tableau",
    "plugins": "errors",
    "compiled": "errors noise sde solver",
    "driver": "errors noise sde calculus grid reverse solver tableau fused compiled plugins",
    "sample": "errors noise sde system grid reverse solver plugins driver",
    "presets": "errors noise plugins reverse sample sde",
    "testing": "errors plugins derivatives calculus probe coefficients detect noise sde system "
    "processes nonlinear grid reverse denoiser solver solvers backends tableau sample",
    "local": "errors derivatives calculus sde system",
    "matching": "errors derivatives sde denoiser loss solver system detect local sample",
    "cli": "errors plugins testing",
    "__main__": "cli",
}
EAGER = {"torch", "pluggy"}
"""Third-party libraries that `import sdeflow` may load."""
LAZY = {"torchsde", "torchdiffeq", "tqdm", "jsonargparse"}
"""Those that the core may import inside functions."""
LATE = {"_torchsde", "_sde_adjoint"}
"""Files that are themselves imported inside functions."""


def imports(tree: ast.AST, eager: bool = True) -> Iterator[tuple[str, bool, int]]:
    """(module as written, whether it is loaded with the file, line) of each import.

    Relative ones begin with a dot; what stands under `if TYPE_CHECKING` is not loaded.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            if node.module is None or name == "sdeflow":  # from . import a, b
                joined = name if node.level else name + "."
                yield from ((joined + alias.name, eager, node.lineno) for alias in node.names)
            else:
                yield name, eager, node.lineno
        else:
            late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imports(node, eager and not late and not typing)


def violations(root: Path) -> list[str]:
    """One line for each import of the core in `root` that breaks the table."""
    found = []
    for file in sorted((root / "sdeflow").glob("**/*.py")):
        where = file.relative_to(root)
        nested = len(where.parts) > 2  # a package is one module: its files import each other freely
        module = where.parts[1] if nested else file.stem
        if module == "__init__":
            allowed = set(ALLOWED)
        elif module in ALLOWED:
            allowed = {module} if nested else set()
            allowed |= set(ALLOWED[module].split())
        else:
            found.append(f"{where}: a module without a row in the table of {Path(__file__).name}")
            continue
        for name, eager, line in imports(ast.parse(file.read_text(), str(file))):
            own = name.startswith(".") or name.split(".")[0] == "sdeflow"
            target = name.lstrip(".").removeprefix("sdeflow.").split(".")[0]
            if nested and name.startswith(".") and not name.startswith(".."):
                target = module
            if own and target not in allowed:
                found.append(f"{where}:{line}: {module} may not import {target}")
            elif not own and target not in sys.stdlib_module_names:
                libraries = EAGER | LAZY if not eager or file.stem in LATE else EAGER
                if target not in libraries:
                    late = " when it is loaded" if target in LAZY else ""
                    found.append(f"{where}:{line}: {module} may not import {target}{late}")
    return found


def main() -> int:
    """Check the table itself, then the files."""
    graph = {module: set(row.split()) for module, row in ALLOWED.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    found = violations(root)
    print("\n".join(found) or "imports run one way")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
