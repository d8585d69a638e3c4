"""Every example runs as it stands and prints the right figures; so do the README's blocks."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*command, cwd, python=sys.executable):
    """What a python command prints; a warning is an error, as is a status other than 0."""
    done = subprocess.run(
        [python, "-W", "error", *map(str, command)],
        cwd=cwd,
        env=os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def blocks(file):
    """The python blocks of a Markdown file, in order."""
    text = file.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# ---- gaussian.py


def test_gaussian_measures_the_order_of_every_registered_solver(tmp_path):
    import sdeflow

    text = run(EXAMPLES / "gaussian.py", "--out", "solvers.png", cwd=tmp_path)
    measured = {"ode": {}, "sde": {}}  # name -> (order, the last error)
    for line in text.splitlines():
        if line.startswith(("Probability-flow ODE", "Reverse SDE")):
            kind = "ode" if line.startswith("Prob") else "sde"
        if row := re.match(r" +([\d.]+|-) +((?:\d+ \S+ +)+)(\w.*)", line):
            for name in row[3].split(" = "):
                measured[kind][name] = (row[1], float(row[2].split()[-1]))

    solvers = {name: sdeflow.get("solver", name) for name in sdeflow.catalogue("solver")}
    assert set(measured["ode"]) == {n for n, s in solvers.items() if s.order is not None}
    assert set(measured["sde"]) == {n for n, s in solvers.items() if s.weak_order is not None}
    for kind, name, order, error in [
        ("ode", "ddim", 1, 9e-3),
        ("ode", "dpmpp_2s", 2, 4e-4),
        ("ode", "dpmpp_2m", 2, 1e-4),
        ("ode", "heun", 2, 1e-4),
        ("ode", "torchdiffeq_heun3", 3, 4e-6),
        ("sde", "ddpm", 1, 5e-2),
        ("sde", "euler_maruyama", 1, 2e-2),
        ("sde", "dpmpp_2m", 2, 8e-4),
        ("sde", "torchsde_srk", 2, 1e-3),
    ]:
        slope, last = measured[kind][name]
        assert float(slope) == pytest.approx(order, abs=0.1), (kind, name)
        assert last == pytest.approx(error, rel=0.2), (kind, name)
    assert re.search(r"ddim = ddpm = dpmpp_1s$", text, re.MULTILINE)  # at eta = 1, found by figures
    assert (tmp_path / "solvers.png").read_bytes().startswith(b"\x89PNG")


# ---- own_sde.py


def test_own_sde_recovers_the_moments(tmp_path):
    text = run(EXAMPLES / "own_sde.py", cwd=tmp_path)
    gaussian, cir = text.split("\n\n")

    samples = re.findall(r"(\S+) +(\d+) evaluations +(\S+) (\S+)", gaussian)
    assert [(name, int(nfe)) for name, nfe, *_ in samples if "dopri" not in name] == [
        ("dpmpp_2m", 10),
        ("dpmpp_2m", 20),
        ("ddpm", 200),
        ("torchsde_srk", 100),
    ]
    for name, _, mean, std in samples:  # 20,000 samples: 0.003; the solvers' own errors up to 0.025
        assert (float(mean), float(std)) == pytest.approx((0.7, 0.4), abs=0.03), name

    rows = re.findall(r"  (\S+, [\w ]+?) +([\d.]+) +([\d.]+) +([\d.]+)", cir)
    moments = {what: tuple(map(float, values)) for what, *values in rows}
    start, end = moments["x_0, exactly"], moments["x_T, exactly"]
    assert start == pytest.approx((4.08, 2.02, 0.99), abs=0.01)
    assert end[0] < 0.6 * start[0]  # the two laws are far apart: to come back means something
    for what, exact in [
        ("x_T, run forward", end),
        ("x_0, reverse", start),
        ("x_0, probability_flow", start),
    ]:
        # Standard errors of 20,000 draws: 0.014 for x_0's mean, 0.016 its deviation, 0.05 the skew.
        assert moments[what][:2] == pytest.approx(exact[:2], abs=0.08), what
        assert moments[what][2] == pytest.approx(exact[2], abs=0.25), what


# ---- digits.py


def test_digits_learns_and_draws(tmp_path):
    from PIL import Image

    text = run(EXAMPLES / "digits.py", "--steps", "30", "--out", "digits.png", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
    assert losses[0] > 0.8 and losses[-1] < 0.65 * losses[0]
    assert "x=(64, 1, 8, 8)" in text and "nfe=20" in text and "fused=True" in text
    picture = Image.open(tmp_path / "digits.png")
    assert picture.size == (640, 640) and picture.mode == "L"
    low, high = picture.getextrema()
    assert low < 64 and high > 192  # neither blank nor grey


# ---- own_solver/


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The python of a fresh virtual environment with own_solver installed, and nothing else.

    Other distributions are found in the environment of this test run, so no index is asked.
    """
    folder = tmp_path_factory.mktemp("own_solver") / "venv"
    run("-m", "venv", "--without-pip", folder, cwd=ROOT)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run("-c", ask, cwd=ROOT, python=python).strip())
    parents = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    lines = [f"import site; site.addsitedir({parent!r})\n" for parent in parents]
    (site / "parent.pth").write_text("".join(lines))
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
        + ["--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
        + [EXAMPLES / "own_solver"],
        check=True,
        timeout=240,
    )
    assert (site / "sdeflow_adams" / "__init__.py").is_file()
    return python


def test_own_solver_is_found_by_name_and_samples(environment, tmp_path):
    (block,) = blocks(EXAMPLES / "own_solver" / "README.md")
    block += """
from sdeflow import catalogue, get
print(get("solver", "adams2"), catalogue("solver")["adams2"].distribution, run.fused)
"""
    first, second = run("-c", block, cwd=tmp_path, python=environment).splitlines()
    nfe, mean, std = map(float, re.findall(r"\d+[.]?\d*", first))
    assert (nfe, mean, std) == pytest.approx((20, 0.7, 0.4), abs=0.02)
    assert second == "Adams2() sdeflow-adams True"


def test_own_solver_is_listed_with_its_distribution(environment, tmp_path):
    text = run("-m", "sdeflow.cli", "list", "--kind", "solver", cwd=tmp_path, python=environment)
    assert re.search(r"^  adams2 +sdeflow-adams +Two-step Adams-Bashforth", text, re.MULTILINE)
    assert re.search(r"^  ddim +sdeflow +", text, re.MULTILINE)


def test_own_solver_passes_its_own_tests(environment):
    folder = EXAMPLES / "own_solver"
    text = run("-m", "pytest", "-p", "no:cacheprovider", cwd=folder, python=environment)
    assert "5 passed" in text


def test_own_solver_is_unknown_where_it_is_not_installed():
    import sdeflow

    with pytest.raises(sdeflow.UnknownNameError, match="adams2"):
        sdeflow.get("solver", "adams2")


# ---- README.md


def test_readme_blocks_run_as_printed(tmp_path):
    found = blocks(ROOT / "README.md")
    assert len(found) >= 3, "the library example, 'write your own SDE', 'write your own solver'"
    # One after another in one namespace: the first one with nothing before it.
    (tmp_path / "readme.py").write_text("\n".join(found), encoding="utf-8")
    run("readme.py", cwd=tmp_path)
