"""Every example runs as it stands and prints the right figures; so do the README's blocks."""

import os
import re
import shlex
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


def test_gaussian_measures_the_orders_that_its_solvers_declare(tmp_path):
    import sdeflow

    text = run(EXAMPLES / "gaussian.py", "--out", "solvers.png", cwd=tmp_path)
    measured = {"ode": {}, "sde": {}}  # name -> (order, the last error)
    for line in text.splitlines():
        if line.startswith(("Probability-flow ODE", "Reverse SDE")):
            kind = "ode" if line.startswith("Prob") else "sde"
        if row := re.match(r" +([\d.]+|-) +((?:\d+ \S+ +)+)(\w.*)", line):
            for name in row[3].split(" = "):
                measured[kind][name] = (row[1], float(row[2].split()[-1]))

    assert len(measured["ode"]) >= 10 and len(measured["sde"]) >= 7
    for kind, solvers in measured.items():
        for name, (slope, last) in solvers.items():
            solver = sdeflow.get("solver", name)
            if solver.adaptive:
                assert slope == "-" and last < 1e-6
                continue
            declared = solver.order if kind == "ode" else solver.weak_order
            # deis_tab3 begins at first order, which is not forgotten by 192 steps.
            assert float(slope) == pytest.approx(declared, abs=0.25), (kind, name)
    for kind, name, error in [
        ("ode", "ddim", 9e-3),
        ("ode", "edm_heun", 1e-3),
        ("ode", "dpmpp_2m", 1e-4),
        ("ode", "unipc_3", 2e-7),
        ("sde", "ddpm", 5e-2),
        ("sde", "euler_maruyama", 2e-2),
        ("sde", "dpmpp_2m", 8e-4),
        ("sde", "torchsde_srk", 1e-3),
    ]:
        assert measured[kind][name][1] == pytest.approx(error, rel=0.2), (kind, name)
    assert re.search(r"ddim = ddpm$", text, re.MULTILINE)  # at eta = 1, found by the figures
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


# ---- double_well.py


def test_double_well_learns_a_score_and_runs_back(tmp_path):
    """Sixty steps of training are too few; even so the particles return to the left well."""
    short = ["--steps", "60", "--particles", "4000", "--out", "wells.png"]
    text = run(EXAMPLES / "double_well.py", *short, cwd=tmp_path)
    assert "LocalScoreMatching(sde=DoubleWell(T=8.0), gap=0.1, kernel='corrected'" in text
    rows = dict(re.findall(r"^ +([a-zA-Z ]+?)((?: +\d\.\d{3})+)$", text, re.MULTILINE))
    distances = {name: [float(d) for d in row.split()] for name, row in rows.items()}
    assert set(distances) == {"forward again", "reverse SDE", "probability flow"}
    assert max(distances["forward again"]) < 0.06
    # With no score learnt beyond that of equilibrium, they would stay where they end: 0.6 away.
    assert distances["reverse SDE"][0] < 0.12 and distances["probability flow"][0] < 0.2
    assert (tmp_path / "wells.png").read_bytes().startswith(b"\x89PNG")


# ---- black_scholes.py


def test_black_scholes_prices_lie_within_their_error_bars(tmp_path):
    """Within five standard errors: a false alarm once in a million."""
    text = run(EXAMPLES / "black_scholes.py", "--paths", "20000", "--out", "bs.png", cwd=tmp_path)
    exact, value, bar = map(float, re.search(r"exactly (\S+); .* (\S+) \+- (\S+)", text).groups())
    assert exact == pytest.approx(0.28976, abs=1e-5) and abs(value - exact) < 5 * bar
    blocks = re.split(r"  (euler_maruyama|milstein)\n", text.split("Greeks")[0])
    strong = {}
    for name, block in zip(blocks[1::2], blocks[2::2], strict=True):
        rows = re.findall(r"^ +(\d+) +(\S+) \+- (\S+) +(\S+)$", block, re.MULTILINE)
        errors = {int(k): float(e) for k, e, _, _ in rows}
        assert 2.5 < errors[4] / errors[16] < 6, name  # weak order 1: 4
        strong[name] = {int(k): float(e) for k, _, _, e in rows}
    assert strong["euler_maruyama"][4] / strong["euler_maruyama"][64] == pytest.approx(4, rel=0.1)
    assert strong["milstein"][4] / strong["milstein"][64] > 10  # strong order 1: 16 in the limit
    delta, vega = map(float, re.search(r"delta (\S+) +vega (\S+)", text).groups())
    for name in ("common random numbers", "gradients through the run"):
        pair = re.search(name + r" +(\S+) \+- (\S+) +(\S+) \+- (\S+)", text).groups()
        d, d_bar, v, v_bar = map(float, pair)
        assert abs(d - delta) < 5 * d_bar and abs(v - vega) < 5 * v_bar and d_bar < 0.02
    heston = re.search(r"Heston +exactly (\S+); .* (\S+) \+- (\S+)", text).groups()
    exact, value, bar = map(float, heston)
    assert exact == pytest.approx(0.25045, abs=1e-5) and abs(value - exact) < 5 * bar
    assert (tmp_path / "bs.png").read_bytes().startswith(b"\x89PNG")


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


# ---- toys.py, conditional_digits.py, color_glyphs.py, waveforms.py, embeddings.py


def is_picture(path):
    """Whether a file is a picture with something in it."""
    from PIL import Image

    low, high = Image.open(path).convert("L").getextrema()
    return low < 100 and high > 200


def rows_of(text, names, n):
    """{name: its n numbers} of a printed table."""
    found = {}
    for name in names:
        row = re.search(rf"^ +{re.escape(name)}((?: +[-\d.]+){{{n}}})", text, re.MULTILINE)
        found[name] = [float(number) for number in row[1].split()]
    return found


def test_toys_has_a_density_that_is_one_in_all_and_high_at_held_out_points(tmp_path):
    text = run(EXAMPLES / "toys.py", "--quick", "--out", "toys.png", cwd=tmp_path)
    likelihood, best, mass = map(
        float, re.search(r"gaussians +(\S+), at best (\S+); mass in view (\S+)", text).groups()
    )
    # The normal law of the same variance gives -3.9; nothing gives more than the true one.
    assert -3.2 < likelihood < best == pytest.approx(-0.68, abs=0.01)
    assert mass == pytest.approx(1, abs=0.03)
    assert is_picture(tmp_path / "toys.png")


def test_conditional_digits_obey_more_and_vary_less_with_guidance(tmp_path):
    """Thirty steps are too few for good digits; even so a judge begins to see the right ones."""
    text = run(EXAMPLES / "conditional_digits.py", "--quick", "--out", "d.png", cwd=tmp_path)
    rows = rows_of(text, ["real", "w = 0", "w = 1", "w = 3"], 2)
    agreement, variety = zip(*rows.values(), strict=True)
    assert agreement[0] > 0.97 and variety[0] == 1
    assert agreement[1] < 0.3 < agreement[3]  # w = 0 knows nothing of the class
    assert agreement[1] < agreement[2] < agreement[3] and variety[3] < variety[1]
    assert is_picture(tmp_path / "d.png")


def test_color_glyphs_trains_from_the_folder_that_it_wrote(tmp_path):
    text = run(
        *(EXAMPLES / "color_glyphs.py", "--quick", "--run", "runs/glyphs", "--out", "glyphs.png"),
        cwd=tmp_path,
    )
    assert "trained to step 4" in text and is_picture(tmp_path / "glyphs.png")
    images = tmp_path / "runs" / "glyph_images"
    assert [f.name for f in sorted((images / "train").iterdir())] == list("ABEGKMRS")
    assert len(list(images.glob("train/*/*.png"))) == 72 and len(list(images.glob("test/*/*"))) == 8
    card = (tmp_path / "runs" / "glyphs" / "README.md").read_text()
    assert "sdeflow sample runs/glyphs" in card


def test_waveforms_makes_a_chirp_for_each_class(tmp_path):
    text = run(EXAMPLES / "waveforms.py", "--quick", "--out", "waves.png", cwd=tmp_path)
    rows = rows_of(text, ["real", "generated"], 2)
    assert rows["real"][0] == 1  # the measure knows which way the real ones go
    assert rows["real"][1] < 0.3 < rows["generated"][1]  # eight steps are far from enough
    assert is_picture(tmp_path / "waves.png")


def test_embeddings_are_judged_by_the_nearest_topic(tmp_path):
    text = run(EXAMPLES / "embeddings.py", "--quick", "--out", "e.png", cwd=tmp_path)
    real, made = (re.search(rf"{name} +(\S+) +(\S+) \+- (\S+)", text) for name in ("real", "ated"))
    assert (float(real[1]), float(real[2]), float(real[3])) == (1, 1, 0)
    assert 0 <= float(made[1]) <= 1 and 0.5 < float(made[2]) < 2
    assert is_picture(tmp_path / "e.png")


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
    assert "2 passed" in text


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


# ---- docs/training.md

TRAINING = ROOT / "docs" / "training.md"


def words_of(line):
    """The arguments of sdeflow on a line that calls it, by itself or through torchrun."""
    program, *words = shlex.split(line)
    if program == "sdeflow":
        return words
    from torch.distributed.run import get_args_parser

    started = get_args_parser().parse_args(words)
    assert (program, started.module, started.training_script) == ("torchrun", True, "sdeflow")
    return started.training_script_args


COMMANDS = [
    words_of(line)
    for line in re.findall(r"^    ((?:sdeflow|torchrun) .*)$", TRAINING.read_text(), re.MULTILINE)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with the recipe.yaml that some commands name."""
    from sdeflow_plugins.train.recipe import Recipe

    monkeypatch.chdir(tmp_path)
    Recipe().save(tmp_path / "recipe.yaml")
    Recipe().save(tmp_path / "try.yaml")
    return tmp_path


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[:2]) for words in COMMANDS])
def test_every_command_of_the_training_guide_is_understood(words, place, capsys):
    """Its options by the command line, what they name by the plugins."""
    import torch
    import yaml
    from sdeflow_plugins.build import option_names
    from sdeflow_plugins.train.recipe import Recipe

    from sdeflow.cli import main
    from sdeflow.plugins import plugins

    words = [word.replace("runs/try/config.yaml", "try.yaml") for word in words]
    with pytest.raises(SystemExit) as left:
        main([*words, "--print_config"])
    captured = capsys.readouterr()
    assert not left.value.code, captured.err
    if words[0] != "train" or "tiny" in words:
        return
    values = yaml.safe_load(captured.out)
    for beside in ("run", "resume", "allow_changes"):
        values.pop(beside, None)
    recipe = Recipe(**values)
    assert set(recipe.data_options) <= option_names(plugins().find("dataset", recipe.data).factory)
    side = recipe.data_options.get("size", 32)
    shape = {"digits": (1, 8, 8), "arrays": (64,)}.get(recipe.data, (3, side, side))
    with torch.device("meta"):
        network = recipe.make_network(shape, 10 if recipe.conditional else 0)
    assert network.classes == (10 if recipe.conditional else 0)


def test_the_commands_for_a_cpu_do_what_they_say(place, capsys):
    from sdeflow.cli import main

    small = [words for words in COMMANDS if "runs/try" in words]
    assert [words[0] for words in small] == ["train", "sample", "train", "train"]
    for words in small:
        assert main(words) == 0, (words, capsys.readouterr())
    run = place / "runs" / "try"
    assert {"config.yaml", "metrics.csv", "loss.png", "README.md"} <= {
        f.name for f in run.iterdir()
    }
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("40,")
    assert len(list((run / "samples").glob("dpmpp_2m_5*.png"))) == 1


def test_the_python_of_the_training_guide_is_a_plugin_and_a_loop(tmp_path):
    """The blocks as a module; and as a distribution, whose names the command line finds."""
    data, network, loop = blocks(TRAINING)
    (tmp_path / "whole.py").write_text(data + network + loop)
    text = run("whole.py", cwd=tmp_path)
    assert [line.split()[0] for line in text.splitlines()] == ["1", "2", "3", "4"]

    (entry_points,) = re.findall(r"^```toml\n(.*?)^```$", TRAINING.read_text(), re.M | re.S)
    group, line = entry_points.replace("project.entry-points.", "").replace('"', "").splitlines()
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "plugin.py").write_text(data + network)
    about = tmp_path / "mine-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(f"{group}\n{line}\n")
    (words,) = [words for words in COMMANDS if "tiny" in words]
    start = "import sys; sys.path.insert(0, '.'); from sdeflow.cli import main; main(sys.argv[1:])"
    run("-c", start, *words, "--steps", "3", "--batch_size", "8", cwd=tmp_path)
    config = (tmp_path / "runs" / "ramps" / "config.yaml").read_text()
    assert "network: tiny" in config and "width: 64" in config
