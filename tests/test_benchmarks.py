"""The benchmarks whose figures do not depend on the machine run, and hold what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """What nfe_error.py --quick writes; it draws its figure, too."""
    folder = tmp_path_factory.mktemp("nfe_error")
    done = subprocess.run(
        [sys.executable, "-W", "error", BENCHMARKS / "nfe_error.py", "--quick"]
        + ["--out", "nfe_error.md", "--figure", "choosing.png"],
        cwd=folder,
        env=os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "choosing.png").read_bytes().startswith(b"\x89PNG")
    return (folder / "nfe_error.md").read_text()


def rows(tables, title):
    """The cells of the rows below a heading."""
    section = tables.split(f"## {title}\n")[1].split("\n## ")[0]
    return [re.split(r" \| ", line.strip("| ")) for line in section.splitlines() if "|" in line]


def test_the_same_method_on_the_same_grid_has_the_same_error_as_diffusers(tables):
    """But where a published coefficient is not ours: half of D'', and B = h in UniPC-2."""
    ours = rows(tables, "The same method on the same grid")[2:]
    assert len(ours) == 18
    for name, peer, ratio, *_ in ours:
        low, high = map(float, re.search(r"\((\S+) to (\S+)\)", ratio).groups())
        different = name in ("dpmpp_3m", "dpm_solver_3m, last=full") or "bh1" in peer
        assert different == (not 0.99 < low <= high < 1.01), (name, peer, ratio)


def test_the_default_is_ahead_of_every_peer_as_it_comes(tables):
    found = rows(tables, "The default and the peers, on the probability flow")
    cells = [row for row in found if len(row) == 9 and row[2] in ("5", "10")]
    assert len(cells) == 12
    for noise, problem, _, _, _, peer, ratio, *_ in cells:
        assert float(ratio) < 0.6, (noise, problem, peer)


def test_training_and_sampling_are_compared_on_the_same_network(tmp_path):
    """One step of each; denoising-diffusion-pytorch is left out, for it is not installed here."""
    options = ["--quick", "--rounds", "1", "--steps", "1", "--out", "train.md"]
    own = "ignore:__array__:DeprecationWarning"  # diffusers' scheduler warns under numpy 2
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", own, BENCHMARKS / "train.py", *options],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "train.md").read_text()
    trained = re.findall(r"^\| (\w+) \| (\S+) M \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    assert [row[0] for row in trained] == ["sdeflow", "diffusers"]
    assert len({row[1] for row in trained}) == 1 and float(trained[0][3]) == 1
    sampled = re.findall(r"^\| ([\w, ]+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    assert {name for name, *_ in sampled} >= {"the bare network", "sdeflow, dpmpp_2m"}
    assert all(0 < float(share) for _, _, share in sampled)
