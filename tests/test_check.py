"""`sdeflow check`: reports, tables, exit statuses; and the tables in the documents."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from sdeflow import catalogue, cli
from sdeflow.testing import command
from sdeflow.testing.report import Check, Report

ROOT = Path(__file__).parent.parent
MINE = """
from sdeflow import GaussianSDE, StepSolver
from sdeflow_plugins.solvers.ddim import DDIM

class Mine(DDIM):
    pass

class Wrong(DDIM):
    order = 2

class Spread(DDIM):
    def __init__(self, width): pass

example = Mine()

def build():
    return example

class Exploding(GaussianSDE):
    T = 2.0
    def alpha(self, t): return 1 + 0 * t
    def sigma(self, t): return t
"""


def run(*argv):
    """The exit status, also where the parser itself exits."""
    try:
        return cli.main([str(arg) for arg in argv])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of one's own in it."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


POINTS = ("--only", "[points]")


def test_one_name_prints_every_check_and_passes(capsys):
    assert run("check", "ddim", *POINTS) == 0
    out = capsys.readouterr().out
    assert out.startswith("ddim: DDIM\n") and "  ok    one-point data" in out
    assert out.endswith("  passed\n")


def test_one_sde_is_checked_by_name(capsys):
    assert run("check", "vp") == 0
    out = capsys.readouterr().out
    assert "reversal, eta = 1" in out and out.endswith("  passed\n")


@pytest.mark.parametrize("what", ["Mine", "example", "build", "Exploding"])
def test_an_object_of_ones_own_is_found_from_here(here, what, capsys):
    assert run("check", f"{here}:{what}", *POINTS) == 0
    assert capsys.readouterr().out.endswith("  passed\n")


def test_a_failure_gives_status_one_and_is_named(here, capsys):
    assert run("check", f"{here}:Wrong", "--only", "[orders]") == 1
    out = capsys.readouterr().out
    assert "  FAIL  order " in out and out.endswith("  FAILED (1 of 4)\n")


def test_several_names_make_a_table_with_the_failures_below(here, capsys):
    assert run("check", "ddim", f"{here}:Wrong", "vp", "--only", "[orders]") == 1
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:3] == ["solver", "order", "measured"]
    assert rows[1][:4] == ["ddim", "1", "1.00", "1"] and "ok" in rows[1]
    assert rows[2][:3] == [f"{here}:Wrong", "2", "1.00"] and "FAILED" in rows[2]
    assert rows[3][:2] == ["SDE", "checks"] and rows[4][0] == "vp"
    assert re.search(rf"\n{here}:Wrong\n  FAIL  order: 1\.00 measured, 2 declared", out)
    assert re.search(r"\n2 of 3 passed in \d+ s\n$", out)


def test_jobs_work_side_by_side_with_the_same_outcome(capsys):
    assert run("check", "ddim", "dpmpp_2m", "--only", "[points]", "--jobs", 2) == 0
    out = capsys.readouterr().out
    assert re.search(r"ddim .* ok .*\n +dpmpp_2m .* ok ", out)


def test_json_and_markdown(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert run("check", "ddim", "adaptive", "--markdown", *POINTS, "--json", file) == 0
    out = capsys.readouterr().out
    assert out.startswith("| solver | order | measured |") and "| ddim | 1 | - | 1 |" in out
    ddim, adaptive = json.loads(file.read_text())
    assert ddim["ok"] and ddim["figures"]["exact on points"] and not ddim["failures"]
    assert adaptive["figures"]["evaluations"] is None  # NaN is not JSON


def test_all_takes_everything_of_a_kind(monkeypatch, capsys):
    seen = []

    def judged(thing, *only):
        seen.append(thing)
        return Report("", [Check("runs", True)])

    monkeypatch.setattr(command, "check_sde", judged)
    monkeypatch.setattr(command, "check_solver", judged)
    assert run("check", "--all", "--kind", "sde") == 0
    assert len(seen) == len(catalogue("sde"))
    assert run("check", "--all") == 0
    assert len(seen) == 2 * len(catalogue("sde")) + len(catalogue("solver"))
    assert capsys.readouterr().out.count("ok") == len(seen)


def test_an_object_that_breaks_when_it_is_checked_fails_alone(monkeypatch, capsys):
    def broken(thing):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(command, "check_sde", broken)
    assert run("check", "vp", "ddim", *POINTS) == 1
    out = capsys.readouterr().out
    assert "  FAIL  made: ZeroDivisionError: oh" in out and "1 of 2 passed" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "names: give names or --all"),
        (["ddim", "--all"], "names: give names or --all"),
        (["nosuch"], "'nosuch' is unknown, and no SDE either"),
        (["nosuch", "--kind", "sde"], "sde 'nosuch' is unknown"),
        (["ddim", "--kind", "grid"], "kind='grid' is unknown"),
        (["ddim", "--only", "[order]"], "did you mean 'orders'"),
        (["ddim", "--jobs", "0"], "jobs=0 must be at least 1"),
        (["no.such.module:X"], "the module 'no.such.module' cannot be imported from here"),
        (["math:nosuch"], "has no attribute 'nosuch'"),
        (["math:pi"], "it must be a solver or an SDE"),
        (["math:sqrt"], "cannot be made without arguments"),
        (["time:time"], "which is neither a Solver nor an SDE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "told",
)
def test_errors_are_one_line_and_status_two(argv, words, capsys):
    assert run("check", *argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("sdeflow: error: ") and error.count("\n") == 1


def test_a_class_that_needs_arguments_says_what_to_do(here, capsys):
    assert run("check", f"{here}:Spread") == 2
    assert "such as `example = Spread(...)`, module:example" in capsys.readouterr().err


# ---- the tables in the documents


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("solver_table", ROOT / "tools/solver_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_table_is_what_the_solvers_declare(tables):
    """Otherwise: python tools/solver_table.py --claims."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.between(text, tables.short_table(tables.claims())) == text


def test_the_table_of_certificates_has_every_solver_and_its_figures(tables):
    """Otherwise: python tools/solver_table.py NAME, for what is new."""
    text = (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")
    found, figures = tables.claims(), tables.committed(text)
    assert tables.between(text, tables.long_table(found, figures)) == text
    assert found.keys() == figures.keys()
    for name, (order, weak, *_, runs_on) in found.items():
        order = "-" if "noise of its own" in runs_on else order  # a weak order is measured for it
        for declared, measured in zip((order, weak), figures[name][:2], strict=True):
            if re.fullmatch(r"[1-9]\d*", declared):
                assert float(measured) > float(declared) - 0.06 * (1 + float(declared)), name
