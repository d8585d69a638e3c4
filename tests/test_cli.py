"""The command line, as a user meets it."""

import builtins
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from sdeflow import cli, hookimpl
from sdeflow.plugins import KINDS, Broken, Plugins, catalogue

TINY = """
data: moons
network: mlp
network_options: {width: 16, depth: 1}
steps: 6
batch_size: 16
log_every: 3
save_every: 6
device: cpu
"""


def run(*argv):
    """The exit status, also where the parser itself exits."""
    try:
        return cli.main([str(arg) for arg in argv])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture
def trained(tmp_path, config, capsys):
    assert run("train", tmp_path / "run", "--config", config) == 0
    capsys.readouterr()
    return tmp_path / "run"


# ---- list


def test_list_prints_every_name_with_its_distribution(capsys):
    assert run("list") == 0
    out = capsys.readouterr().out
    for kind in KINDS:
        for entry in catalogue(kind).values():
            (line,) = [ln for ln in out.splitlines() if ln.split()[:1] == [entry.name]]
            assert line.split()[1] == "sdeflow" and entry.summary and line.endswith(entry.summary)
    assert "  list " in out


def test_list_prints_presets_and_other_names(capsys):
    assert run("list") == 0
    out = capsys.readouterr().out
    assert "\npresets\n" in out and "edm_heun, karras, 18 steps, probability flow." in out
    lines = out.splitlines()
    (ddim,) = [k for k, line in enumerate(lines) if line.split()[:1] == ["ddim"]]
    assert lines[ddim + 1].split()[:2] == ["also:", "DDIMScheduler,"]
    assert "also: exponential, lu_lambdas" in out


def test_list_of_one_kind_with_options(capsys):
    assert run("list", "--kind", "sde", "--options", "true") == 0
    out = capsys.readouterr().out
    assert "beta_min=0.1, beta_max=20.0" in out and "ddim" not in out


def test_list_refuses_an_unknown_kind_in_one_line(capsys):
    assert run("list", "--kind", "solvers") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_list_tells_broken_and_conflicting_plugins(monkeypatch, capsys):
    found = Plugins().load()
    found.broken.append(Broken("acme:fast", ImportError("no module named acme")))

    class Rival:
        @hookimpl
        def sdeflow_solvers(self):
            return {"ddim": dict}

    found.register(Rival(), "rival", "rival-solvers")
    monkeypatch.setattr(cli, "plugins", lambda: found)
    assert run("list") == 0
    out = capsys.readouterr().out
    assert "broken plugin acme:fast: ImportError: no module named acme" in out
    assert "conflict: solver 'ddim' is offered by rival-solvers and sdeflow" in out


# ---- train and sample


def test_train_writes_a_config_that_trains_again(trained, tmp_path):
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert saved["network_options"] == {"width": 16, "depth": 1} and saved["steps"] == 6
    again = tmp_path / "again"
    assert run("train", again, "--config", trained / "config.yaml", "--steps", 3) == 0
    assert yaml.safe_load((again / "config.yaml").read_text()) == {**saved, "steps": 3}


def test_train_resumes_by_its_own_config(trained, capsys):
    files = ["--config", trained / "config.yaml", "--resume", "true"]
    assert run("train", trained, *files, "--steps", 9) == 0
    assert (trained / "checkpoints" / "step_00000009.json").exists()
    assert run("train", trained, "--config", trained / "config.yaml") == 2
    assert "holds checkpoints already" in capsys.readouterr().err


def test_options_of_plugins_are_given_one_by_one(tmp_path, config):
    options = ["--sde", "vp", "--sde_options.beta_max", "15", "--network_options.width", "8"]
    assert run("train", tmp_path / "run", "--config", config, *options) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["sde_options"] == {"beta_max": 15}
    assert saved["network_options"] == {"width": 8, "depth": 1}


def test_sample_writes_a_picture_and_the_samples(trained, capsys):
    assert run("sample", trained, "--n", 5, "--solver", "ddim", "--steps", 4, "--save", "npy") == 0
    assert "5 samples in 4 evaluations" in capsys.readouterr().out
    assert np.load(trained / "samples" / "ddim_4.npy").shape == (5, 2)
    with Image.open(trained / "samples" / "ddim_4.png") as image:
        assert image.size[0] > 100


def test_sample_takes_a_preset_instead_of_its_parts(trained, capsys):
    assert run("sample", trained, "--n", 5, "--preset", "dpm_solver_2_10", "--save", "npy") == 0
    assert "5 samples in 20 evaluations" in capsys.readouterr().out
    assert np.load(trained / "samples" / "dpm_solver_2_10.npy").shape == (5, 2)
    assert run("sample", trained, "--preset", "unipc_10", "--steps", 5) == 2
    assert "preset='unipc_10' sets the solver" in capsys.readouterr().err
    assert run("sample", trained, "--preset", "unipc_11") == 2
    assert "preset 'unipc_11' is unknown; did you mean 'unipc_10'" in capsys.readouterr().err


def test_sample_by_seeds_gives_each_sample_its_own(trained, tmp_path):
    out = tmp_path / "x.png"
    options = ["--seeds", "[7, 7, 8]", "--save", "npy", "--out", out, "--solver", "ddpm"]
    assert run("sample", trained, *options) == 0
    x = np.load(out.with_suffix(".npy"))
    assert (x[0] == x[1]).all() and (x[0] != x[2]).any()


def test_compare_writes_table_and_pictures(trained, capsys):
    options = ["--solvers", "[ddim, torchdiffeq_dopri5]", "--budgets", "[4, 8]", "--n", "50"]
    assert run("compare", trained, *options) == 0
    assert "sliced Wasserstein" in capsys.readouterr().out
    rows = (trained / "comparison.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("sampler,budget,evaluations,seconds,")
    assert (trained / "comparison.png").exists() and (trained / "distance.png").exists()


# ---- errors: one line, status 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "{}/x", "--sde", "vpp"], "sde 'vpp' is unknown; did you mean 'vp'"),
        (["train", "{}/x", "--sde_options.z", "1"], "sde 'cosine' has no option 'z'"),
        (["train", "{}/x", "--network_options.layers", "two"], "option layers='two'"),
        (["train", "{}/x", "--lr", "-1"], "lr=-1.0 must be"),
        (["train", "{}/x", "--data", "folder"], "path='' must be a folder"),
        (["sample", "{}/nothing"], "no config.yaml"),
        (["demo", "--run", "{}"], "holds files that no demo made"),
    ],
)
def test_an_error_is_one_line_and_status_2(tmp_path, capsys, argv, words):
    (tmp_path / "file").touch()
    assert run(*[arg.format(tmp_path) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdeflow: error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "x", "--stepps", "5"], "stepps"),
        (["train", "x", "--steps", "many"], "steps"),
        (["train"], "run"),
        (["trian"], "trian"),
    ],
)
def test_the_parser_refuses_by_name_with_status_2(capsys, argv, words):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_wrong_pairing_reaches_the_user_as_a_sentence(trained, capsys):
    assert run("sample", trained, "--solver", "ddpm", "--eta", "0") == 2
    error = capsys.readouterr().err
    assert error.startswith("sdeflow: error: ") and "DDPM" in error


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_commands", lambda found: {"list": interrupted})
    assert run("list") == 130
    assert "interrupted" in capsys.readouterr().err


def test_without_jsonargparse_one_sentence_tells_the_remedy(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "jsonargparse":
            raise ImportError("No module named 'jsonargparse'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run("list") == 2
    assert "pip install 'sdeflow[images]'" in capsys.readouterr().err


# ---- help


@pytest.mark.parametrize("command", ["train", "sample", "compare", "demo", "list"])
def test_help_describes_the_command_and_each_option(capsys, command):
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    function = cli._commands(cli._loaded())[command]
    assert function.__doc__.splitlines()[0] in out and "Args:" not in out
    usage, _, details = out.partition("options:")
    assert f"usage: sdeflow [options] {command}" in usage
    for option in re.findall(r"--[a-z_]+", usage):
        told = re.search(rf"\n  {option}[ ,][^\n]*\n? +[a-zA-Z]", details)
        assert told, f"{option} has no help"


def test_the_program_itself_runs():
    done = subprocess.run(
        [sys.executable, "-m", "sdeflow.cli", "list", "--kind", "network"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "unet" in done.stdout and not done.stderr


# ---- the demo


def test_the_quick_demo_leaves_everything_it_promises(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert run("demo", "--run", folder, "--quick", "true", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert "judged by a classifier of real ones" in out and "DPM++2M" in out
    for name in ("comparison.png", "comparison.csv", "distance.png", "loss.png", "digits.gif"):
        assert (folder / name).stat().st_size > 500, name
    solvers = "ddpm ddim dpmpp_2m euler_maruyama torchdiffeq torchsde".split()
    assert all((folder / "samples" / f"{solver}.png").exists() for solver in solvers)
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["images"] == 40 and quality["accuracy"] > 0.9
    with Image.open(folder / "digits.gif") as gif:
        assert gif.n_frames > 5
    assert run("demo", "--run", folder, "--quick", "true", "--threads", "1") == 0
