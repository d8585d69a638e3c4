"""Presets, and the names by which other libraries call our solvers and grids."""

import sys
from pathlib import Path

import diffusers
import pytest
import torch
from sdeflow_plugins.presets import GRID_ALIASES, NAMES, PRESETS

import sdeflow.plugins
from sdeflow import (
    EDM,
    VE,
    VP,
    Denoiser,
    Preset,
    RectifiedFlow,
    catalogue,
    get,
    hookimpl,
    integrate,
)
from sdeflow.errors import ArgumentError, UnknownNameError
from sdeflow.plugins import Plugins, PluginWarning, plugins
from sdeflow.testing import GaussianData

DOUBLE = torch.float64
HOMES = {
    # what its paper runs it on; VP where nothing is said
    "edm_": EDM(),
    "score_sde_": VE(),
    "sd3_": RectifiedFlow(),
    "flux_": RectifiedFlow(),
}
OFF = {
    # name                        how far the variance may be from 1/4, relative
    "ddpm_1000": 0.01,
    "ddim_50": 0.12,
    "plms_50": 0.02,
    "score_sde_pc_1000": 0.02,
    "edm_heun_18": 0.15,
    "edm_churn_256": 0.05,
    "dpm_solver_2_10": 0.2,
    "dpm_solver_3_7": 0.05,
    "dpmpp_2m_20": 0.05,
    "dpmpp_2m_karras_20": 0.12,
    "dpmpp_2m_sde_karras_25": 0.12,
    "dpmpp_3m_sde_exponential_25": 0.05,
    "euler_ancestral_30": 0.35,
    "unipc_10": 0.05,
    "deis_10": 0.15,
    "ipndm_8": 0.1,
    "sa_solver_20": 0.1,
    "ays_10": 0.3,
    "sd3_euler_28": 0.2,
    "flux_euler_28": 0.3,
}


def home(name):
    return next((sde for start, sde in HOMES.items() if name.startswith(start)), VP())


class Counted:
    """An exact network of Gaussian data N(0, 1/4)."""

    def __init__(self, sde):
        self.data = GaussianData(sde, torch.zeros(1).double(), torch.full((1,), 0.25).double())
        self.calls = 0

    def __call__(self, x, t):
        self.calls += 1
        return self.data.denoise(x, t.double()[0])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_the_evaluations_it_declares_and_the_right_variance(name):
    """4,000 numbers of which the empirical variance of x_T is set right: what is off is the
    sampler, on the flow without sampling error, else within 5 standard errors (0.11)."""
    preset, sde = get("preset", name), home(name)
    net = Counted(sde)
    process = preset.process(sde, Denoiser(net, sde, "data"))
    ts = get("grid", preset.grid, **preset.grid_options)(sde, preset.steps)
    assert len(ts) == preset.steps + 1
    z = torch.randn(40, 100, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    (start,), (end,) = (net.data.law(t)[1] for t in ts[[0, -1]])
    x = start.sqrt() * (z - z.mean()) / z.std()
    solver = get("solver", preset.solver, **preset.solver_options)
    run = integrate(process, x, ts, solver, seed=1)
    assert run.nfe == net.calls == preset.evaluations
    noisy = process.eta > 0 or solver.stochastic
    assert abs(float(run.x.var() / end) - 1) < OFF[name] + (0.11 if noisy else 0)


@pytest.mark.parametrize("name", ["edm_heun_18", "sa_solver_20", "flux_euler_28"])
def test_a_preset_samples_by_itself(name):
    preset, sde = get("preset", name), home(name)
    denoiser = Denoiser(Counted(sde), sde, "data")
    run = preset.sample(sde, denoiser, (3, 5), seed=2, dtype=DOUBLE)
    again = preset.sample(sde, denoiser, (3, 5), seed=2, dtype=DOUBLE, keep=True)
    assert torch.equal(run.x, again.x) and run.nfe == preset.evaluations
    assert len(again.path) == preset.steps + 1


def test_the_tables_are_complete():
    assert OFF.keys() == PRESETS.keys() == catalogue("preset").keys()
    for entry in catalogue("preset").values():
        assert get("preset", entry.name).source and entry.summary.count(",") >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": 1.5}, r"eta=1.5 must be in \[0, 1\]"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"evaluations": 2.5}, "evaluations=2.5"),
    ],
    ids=str,
)
def test_a_wrong_preset_is_refused(change, message):
    fields = {"eta": 0.0, "solver": "ddim", "grid": "karras", "steps": 5, "evaluations": 5}
    with pytest.raises(ArgumentError, match=message):
        Preset(**fields | change)


def test_a_preset_of_an_unknown_solver_names_it():
    preset = Preset(0.0, "dimm", "karras", 5, 5)
    with pytest.raises(UnknownNameError, match="solver 'dimm' is unknown; did you mean 'ddim'"):
        preset.sample(VP(), lambda x, t: -x, (1, 2))


# ---- other names


@pytest.mark.parametrize("kind", ["solver", "grid"])
def test_every_alias_resolves_and_none_hides_a_name(kind):
    names, aliases = catalogue(kind), plugins().aliases(kind)
    assert len(aliases) >= 7
    for alias, name in aliases.items():
        assert alias not in names and name in names
        assert plugins().find(kind, alias).name == name
    assert get("solver", "euler_a") == get("solver", "ddim")
    assert get("solver", "KDPM2DiscreteScheduler") == get("solver", "dpm_solver_2")
    assert get("grid", "exponential") is get("grid", "log_snr")


def test_names_in_the_table_are_real():
    for row in NAMES:
        solver = get("solver", row.solver)
        if row.diffusers:
            assert isinstance(getattr(diffusers, f"{row.diffusers}Scheduler"), type)
        assert row.process in ("ode", "sde")
        order = solver.order if row.process == "ode" else solver.weak_order
        assert order is not None, f"{row.solver} does not run on the {row.process}"
    for name in GRID_ALIASES.values():
        assert name in catalogue("grid")


def test_an_unknown_name_suggests_other_names_too():
    with pytest.raises(UnknownNameError, match="did you mean .*'euler_a"):
        get("solver", "euler_an")
    with pytest.raises(UnknownNameError, match="did you mean .*'UniPCMultistepScheduler'"):
        get("solver", "UniPCMultistep")


def calling(**aliases):
    class Plugin:
        @hookimpl
        def sdeflow_aliases(self):
            return {"solver": aliases}

    return Plugin()


def test_two_plugins_that_use_one_name_for_two_things_are_told_and_the_first_counts():
    found = Plugins()
    found.register(get_core(), "core")
    found.register(calling(mine="heun"), "first", "First-Dist")
    found.register(calling(mine="srk"), "second", "Second-Dist")
    with pytest.warns(PluginWarning, match="calls solver '(heun|srk)' 'mine', which is already"):
        entry = found.find("solver", "mine")
    assert entry.name in ("heun", "srk")


def test_a_name_goes_before_an_alias_and_an_alias_of_nothing_is_unknown(monkeypatch):
    found = Plugins()
    found.register(get_core(), "core")
    found.register(calling(heun="srk", a="b", b="a", gone="no_such_solver"), "odd")
    assert found.find("solver", "heun").name == "heun"
    for alias in ("a", "b", "gone"):  # circles, too
        with pytest.raises(UnknownNameError, match=f"solver '{alias}' is unknown"):
            found.find("solver", alias)
    monkeypatch.setattr(sdeflow.plugins, "plugins", lambda: found)
    with pytest.raises(UnknownNameError):
        get("solver", "gone")


def test_a_broken_hook_of_aliases_is_set_aside():
    class Broken:
        @hookimpl
        def sdeflow_aliases(self):
            return None

    found = Plugins()
    found.register(get_core(), "core")
    found.register(Broken(), "broken")
    with pytest.warns(PluginWarning, match="plugin broken is set aside"):
        assert found.aliases("solver") == {}
    assert found.find("solver", "heun").name == "heun"


def get_core():
    from sdeflow_plugins import core

    return core


def test_the_committed_table_of_names_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import names_table

    assert names_table.FILE.read_text() == names_table.page()
    sys.modules.pop("names_table")
