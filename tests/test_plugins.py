"""The plugin door: discovery, quarantine, conflicts, names. Distributions are real, in tmp_path."""

import importlib.metadata
import textwrap
import types

import pytest
import torch

import sdeflow.plugins
from sdeflow import (
    SDE,
    VP,
    ArgumentError,
    Heun,
    PluginError,
    Preset,
    SdeflowError,
    Solver,
    UnknownNameError,
    catalogue,
    get,
    hookimpl,
)
from sdeflow.plugins import KINDS, Entry, Plugins, PluginWarning, plugins

BUNDLED = {
    "sde": "vp sub_vp ve cosine edm rectified_flow ou gbm",
    "solver": "euler_maruyama heun ddpm ddim dpmpp_1s dpmpp_2s dpmpp_2m torchdiffeq torchsde "
    "torchdiffeq_dopri5 torchdiffeq_rk4 torchsde_euler torchsde_srk",
    "grid": "uniform quadratic karras log_snr leading linspace trailing polyexponential arctan "
    "beta shift dynamic_shift align_your_steps gits",
    "preset": "ddpm_1000 ddim_50 edm_heun_18 dpmpp_2m_karras_20 unipc_10 flux_euler_28",
    "network": "unet mlp",
    "dataset": "digits moons folder imagenet celeba cifar10 mnist arrays waves webdataset "
    "huggingface",
    "command": "train sample compare demo",
}


def offering(kind, **factories):
    """A plugin object with one hook."""

    def hook():
        return factories

    plugin = types.SimpleNamespace()
    setattr(plugin, KINDS[kind], hookimpl(hook))
    return plugin


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(distribution, source, module): put a distribution with one plugin on the path."""

    def add(distribution, source, module):
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[sdeflow]\nextra = {module}\n")
        if source is not None:
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))

    monkeypatch.syspath_prepend(tmp_path)
    return add


GOOD = """
    from sdeflow import VP
    from sdeflow.plugins import hookimpl

    @hookimpl
    def sdeflow_sdes():
        return {"mine": VP}
"""


# ---- what is bundled


@pytest.mark.parametrize("kind", BUNDLED)
def test_the_catalogue_lists_what_is_bundled_and_from_where(kind):
    entries = catalogue(kind)
    for name in BUNDLED[kind].split():
        assert entries[name].distribution == "sdeflow" and entries[name].kind == kind
    for name, entry in entries.items():
        assert name == entry.name == name.lower() and name.isidentifier()
        assert len(entry.summary) > 10
    assert not plugins().broken


def test_the_summary_of_a_partial_factory_is_that_of_what_it_builds_and_its_settings():
    summary = catalogue("solver")["ddpm_large"].summary
    assert summary == f"{catalogue('solver')['ddpm'].summary} [variance='large']"
    assert not any("partial(func" in entry.summary for entry in catalogue("solver").values())


def test_every_sde_solver_and_preset_is_built_from_its_name_alone():
    for kind, kinds in (("sde", SDE), ("solver", Solver), ("preset", Preset)):
        for name in catalogue(kind):
            assert isinstance(get(kind, name), kinds)


def test_factories_get_the_options():
    assert get("sde", "vp", beta_max=10.0) == VP(beta_max=10.0)
    assert get("solver", "heun") == Heun()
    ts = get("grid", "karras", rho=3.0, to_zero=True)(VP(), 5)
    assert torch.equal(ts, get("grid", "karras")(VP(), 5, rho=3.0, to_zero=True))


def test_a_wrong_option_is_an_error_that_names_it():
    with pytest.raises(ArgumentError, match=r"sde 'vp' cannot be built from .*'beta_maxx'"):
        get("sde", "vp", beta_maxx=10.0)
    with pytest.raises(ArgumentError, match="method='dopri' is unknown; did you mean 'dopri5'"):
        get("solver", "torchdiffeq", method="dopri")


def test_unknown_names_and_kinds_come_with_close_matches():
    with pytest.raises(UnknownNameError, match="solver 'dpmp_2m' is unknown; did you mean 'dpmpp_"):
        get("solver", "dpmp_2m")
    with pytest.raises(ArgumentError, match="kind='solvers' is unknown; did you mean 'solver'"):
        catalogue("solvers")
    assert issubclass(UnknownNameError, LookupError) and issubclass(UnknownNameError, SdeflowError)


# ---- registering by hand


def test_a_plugin_object_is_registered_by_hand(monkeypatch):
    found = Plugins()
    found.register(offering("sde", mine=VP, other=VP), "notebook")
    assert [entry.name for entry in found.entries("sde")] == ["mine", "other"]
    entry = found.find("sde", "mine")
    assert entry == Entry("sde", "mine", VP, "this process")
    assert entry.summary == "Variance preserving, linear beta: dx = -beta/2 x dt + sqrt(beta) dw."
    assert found.entries("solver") == []
    monkeypatch.setattr(sdeflow.plugins, "plugins", lambda: found)
    assert get("sde", "mine", T=0.5) == VP(T=0.5)


def test_a_name_of_a_plugin_is_given_once():
    found = Plugins()
    found.register(offering("sde", mine=VP), "notebook")
    with pytest.raises(PluginError, match="already registered as 'notebook'; choose another"):
        found.register(offering("sde", other=VP), "notebook")
    assert found.find("sde", "mine").factory is VP


def test_a_misspelt_hook_is_an_error_and_leaves_nothing_behind():
    found, plugin = Plugins(), types.SimpleNamespace()
    plugin.sdeflow_sde = hookimpl(lambda: {"mine": VP})
    with pytest.raises(PluginError, match="'mine' cannot be registered: unknown hook 'sdeflow_sde"):
        found.register(plugin, "mine")
    found.register(offering("sde", mine=VP), "mine")
    assert found.find("sde", "mine").factory is VP


def test_a_plugin_without_a_marked_hook_is_an_error():
    unmarked = types.SimpleNamespace(sdeflow_sdes=lambda: {"mine": VP})
    for plugin in (unmarked, None, 3):
        with pytest.raises(
            PluginError, match="offers nothing: mark one of sdeflow_sdes,.*hookimpl"
        ):
            Plugins().register(plugin, "mine")


@pytest.mark.parametrize(
    "junk", [None, 3, [("mine", VP)], {3: VP}, {"": VP}, {"mine": 3}], ids=repr
)
def test_a_hook_that_returns_junk_is_set_aside(junk):
    found, plugin = Plugins(), types.SimpleNamespace()
    plugin.sdeflow_sdes = hookimpl(lambda: junk)
    plugin.sdeflow_solvers = hookimpl(lambda: {"mine": Heun})
    found.register(plugin, "junk")
    found.register(offering("sde", good=VP), "good")
    with pytest.warns(PluginWarning, match="sdeflow plugin junk is set aside"):
        assert [entry.name for entry in found.entries("sde")] == ["good"]
    assert [broken.plugin for broken in found.broken] == ["junk"]
    assert [entry.name for entry in found.entries("sde")] == ["good"]  # told once
    with pytest.raises(UnknownNameError, match="failed to load and may have provided it: junk"):
        found.find("solver", "mine")


# ---- distributions


def test_an_installed_distribution_is_found_and_named(install):
    install("Their-SDEs", GOOD, "their_sdes")
    found = Plugins().load()
    assert found.find("sde", "mine").distribution == "Their-SDEs"
    assert found.find("sde", "vp").distribution == "sdeflow"


def test_a_distribution_seen_twice_is_loaded_once(install, monkeypatch, tmp_path):
    install("Their-SDEs", GOOD, "their_sdes_again")
    monkeypatch.syspath_prepend(str(tmp_path) + "/.")
    owners = [d for d in importlib.metadata.distributions() if d.metadata["Name"] == "Their-SDEs"]
    assert len(owners) == 2
    assert Plugins().load().find("sde", "mine").distribution == "Their-SDEs"


@pytest.mark.parametrize(
    "source, reason",
    [
        (None, "ModuleNotFoundError: No module named 'broken_"),
        ("import missing_library", "ModuleNotFoundError: No module named 'missing_library'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = (", "SyntaxError: '\\(' was never closed"),
        (GOOD.replace("sdeflow_sdes", "sdeflow_sds"), "PluginError: .*unknown hook 'sdeflow_sds'"),
        (GOOD.replace("@hookimpl", ""), "PluginError: .*offers nothing"),
    ],
    ids=["no module", "missing import", "raises", "exits", "syntax", "misspelt", "unmarked"],
)
def test_a_broken_plugin_is_set_aside_and_blamed_only_for_unknown_names(
    install, request, source, reason
):
    install("Broken-Dist", source, "broken_" + request.node.callspec.id.replace(" ", "_"))
    with pytest.warns(PluginWarning, match=f"plugin Broken-Dist:extra is set aside: {reason}"):
        found = Plugins().load()
    assert found.find("sde", "vp").distribution == "sdeflow"
    with pytest.raises(
        UnknownNameError, match="sde 'mine' is unknown.*Broken-Dist:extra"
    ) as caught:
        found.find("sde", "mine")
    assert caught.value.__cause__ is found.broken[0].error


def test_two_owners_of_a_name_are_both_named_when_it_is_asked_for(install):
    install("First-Dist", GOOD, "first_dist")
    install("Second-Dist", GOOD.replace("{", "{'other': VP, "), "second_dist")
    found = Plugins().load()
    with pytest.raises(
        PluginError, match="sde 'mine' is offered by First-Dist and Second-Dist; un"
    ):
        found.find("sde", "mine")
    assert "mine" not in found.catalogue("sde")
    assert found.catalogue("sde")["other"].distribution == "Second-Dist"
    assert [entry.name for entry in found.entries("sde")].count("mine") == 2


def test_nobody_replaces_a_bundled_name_in_silence(install):
    install("Pirate", GOOD.replace("mine", "vp"), "pirate")
    with pytest.raises(PluginError, match="sde 'vp' is offered by Pirate and sdeflow"):
        Plugins().load().find("sde", "vp")
