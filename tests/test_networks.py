"""The networks: the contract F(x, t, label), on tiny ones; the table of presets, its big ones on
the meta device, where tensors have shapes and no contents."""

import copy
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sdeflow_plugins.build import build
from sdeflow_plugins.networks.conditioning import Sinusoids, unfold_time
from sdeflow_plugins.networks.presets import NETWORK_PRESETS

from sdeflow import ArgumentError, ShapeError, catalogue, get

K = 3
TINY = {
    # id:           network    shape        options
    "unet": ("unet", (1, 8, 8), {"channels": (8, 16)}),
    "unet attention": (
        "unet",
        (3, 4, 8),
        {"channels": (8, 16), "attention": (1,), "scale_shift": True, "head": 8, "layers": 2},
    ),
    "dit": ("dit", (1, 8, 8), {"width": 16, "depth": 2, "heads": 2}),
    "dit oblong": ("dit", (3, 4, 6), {"patch": 1, "width": 8, "depth": 1, "heads": 1}),
    "unet_1d": ("unet_1d", (2, 32), {"channels": (8, 16)}),
    "unet_1d attention": (
        "unet_1d",
        (1, 64),
        {"channels": (8, 8, 16), "stride": 4, "layers": 2, "attention": (1, 2), "head": 8},
    ),
    "unet_1d stride 3": ("unet_1d", (1, 54), {"channels": (8, 8, 8, 8), "stride": 3, "kernel": 1}),
    "mlp": ("mlp", (2,), {"width": 16, "depth": 2}),
    "mlp of rank 2": ("mlp", (2, 3), {"width": 8, "depth": 1}),
}
SMALL = [name for name, preset in NETWORK_PRESETS.items() if preset.parameters < 5e6]


def trained(network):
    """The network with its weights moved, as training does: what begins as zero is zero no more."""
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return network.eval()


def call(name, classes=K, **more):
    """(a tiny network, x, t, label): a batch of four, its labels 0, 1, 2 and none."""
    plugin, shape, options = TINY[name]
    network = trained(get("network", plugin, shape=shape, classes=classes, **options | more))
    x, t = torch.randn(4, *shape), torch.tensor([0.001, 0.3, 0.7, 1.0])
    return network, x, t, torch.tensor([0, 1, 2, K])


tiny = pytest.mark.parametrize("name", TINY)


def test_every_bundled_network_is_held_to_the_contract_here():
    bundled = {n for n, e in catalogue("network").items() if e.distribution == "sdeflow"}
    assert bundled == {row[0] for row in TINY.values()} | set(NETWORK_PRESETS)


# ---- F(x, t, label)


@tiny
@pytest.mark.parametrize("classes", [0, K])
def test_the_output_has_the_shape_of_x_and_the_network_tells_its_classes(name, classes):
    network, x, t, _ = call(name, classes)
    assert network.classes == classes
    out = network(x, t)
    assert out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all()
    torch.testing.assert_close(network(x, torch.tensor(0.3)), network(x, torch.full((4,), 0.3)))


@tiny
def test_no_label_is_the_null_label(name):
    network, x, t, _ = call(name)
    assert torch.equal(network(x, t), network(x, t, torch.full((4,), K)))


@tiny
def test_each_class_has_an_output_of_its_own(name):
    network, x, _, label = call(name)
    same = x[:1].expand_as(x)
    rows = network(same, torch.full((4,), 0.3), label).flatten(1)
    assert torch.pdist(rows).min() > 1e-4


@tiny
def test_each_time_has_an_output_of_its_own(name):
    network, x, t, _ = call(name)
    rows = network(x[:1].expand_as(x), t).flatten(1)
    assert torch.pdist(rows).min() > 1e-4


@tiny
def test_a_sample_depends_on_its_own_row_alone(name):
    network, x, t, label = call(name)
    rows = network(x, t, label)
    for i in range(4):
        alone = network(x[i : i + 1], t[i : i + 1], label[i : i + 1])
        torch.testing.assert_close(alone[0], rows[i], atol=1e-5, rtol=1e-4)


@tiny
@pytest.mark.parametrize("classes", [0, K])
def test_a_gradient_reaches_every_weight(name, classes):
    """So that distributed training waits for none in vain."""
    network, x, t, label = call(name, classes)
    network(x, t, label if classes else None).square().sum().backward()
    assert [n for n, w in network.named_parameters() if w.grad is None or not w.grad.any()] == []


@tiny
@pytest.mark.parametrize("training", [False, True])
def test_the_network_draws_no_random_numbers(name, training):
    """Labels are dropped by the loop, from its own stream; there is no dropout unless asked for."""
    network, x, t, label = call(name)
    network.train(training)
    before = torch.get_rng_state()
    first = network(x, t, label)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(network(x, t, label), first)


@pytest.mark.parametrize("name", ["unet", "unet_1d"])
def test_dropout_acts_in_training_alone(name):
    network, x, t, _ = call(name, dropout=0.5)
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


# ---- precision, memory format, copies, compilation


@tiny
def test_float64_agrees_with_float32_and_bf16_autocast_nearly(name):
    network, x, t, label = call(name)
    out = network(x, t, label)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, t, label)
    assert (rough - out).norm() < 0.03 * out.norm()
    exact = copy.deepcopy(network).double()(x.double(), t.double(), label)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), out, atol=1e-3, rtol=1e-3)


@tiny
def test_float64_is_smooth_in_t(name):
    """Times are not rounded to float32 on the way: central differences at two steps agree."""
    network, x, _, label = call(name, time_scale=10.0)
    network, x, t = network.double(), x.double(), torch.full((4,), 0.4).double()

    def slope(h):
        return (network(x, t + h, label) - network(x, t - h, label)) / (2 * h)

    torch.testing.assert_close(slope(1e-6), slope(1e-5), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in TINY if len(TINY[n][1]) == 3])
def test_channels_last_changes_rounding_alone(name):
    network, x, t, label = call(name)
    out = network(x, t, label)
    last = network.to(memory_format=torch.channels_last)
    other = last(x.contiguous(memory_format=torch.channels_last), t, label)
    torch.testing.assert_close(other, out, atol=1e-5, rtol=1e-4)


@tiny
def test_a_copy_and_the_saved_weights_are_the_network(name):
    network, x, t, label = call(name)
    plugin, shape, options = TINY[name]
    fresh = get("network", plugin, shape=shape, classes=K, **options).eval()
    fresh.load_state_dict(network.state_dict())
    for other in (copy.deepcopy(network), fresh):
        assert torch.equal(other(x, t, label), network(x, t, label)) and other.classes == K


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own
def test_compiled_the_network_is_the_same_in_one_graph():
    network, x, t, label = call("mlp")
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(compiled(x, t, label), network(x, t, label), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_dynamo_captures_the_network_in_one_graph(name):
    network, x, t, label = call(name)
    captured = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(captured(x, t, label), network(x, t, label))


@tiny
def test_a_call_waits_for_no_device(name):
    """On the meta device a tensor has no contents: whatever looked into one would fail."""
    network, x, t, label = call(name)
    out = network.to("meta")(x.to("meta"), t.to("meta"), label.to("meta"))
    assert out.shape == x.shape and out.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        out.max().item()  # the planted fault


# ---- time


def test_time_is_itself_up_to_1_and_counts_by_its_logarithm_beyond():
    t = torch.tensor([-1.5, -1.0, -0.2, 0.0, 0.5, 1.0, 2.0, 80.0]).double()
    expected = [-(1 + torch.tensor(1.5).double().log()), -1, -0.2, 0, 0.5, 1]
    expected += [1 + torch.tensor(s).double().log() for s in (2.0, 80.0)]
    expected = torch.tensor([10 * float(u) for u in expected]).double()
    torch.testing.assert_close(unfold_time(t, 10.0), expected)
    t.requires_grad_()
    unfold_time(t, 1.0).sum().backward()
    torch.testing.assert_close(t.grad, 1 / t.detach().abs().clamp_min(1))


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.1, 0.5, 1.0, 5.0, 40.0, 80.0])
def test_noise_levels_2_per_cent_apart_look_alike_and_a_factor_2_apart_do_not(sigma):
    """The sinusoids of EDM's times, sigma itself: near levels near, far ones far."""
    features = Sinusoids(128)(unfold_time(sigma * torch.tensor([1.0, 1.02, 2.0]), 100.0))
    near, far = (features[0] - features[1]).norm(), (features[0] - features[2]).norm()
    assert near < 0.5 * far and far > 0.5


def test_the_sinusoids_are_those_of_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.0, 1.0, 37.5, 999.0])
    theirs = embeddings.Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(Sinusoids(16)(t), theirs(t), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 250.0])
def test_unet_scales_time_before_its_embedding(scale):
    network = get("network", "unet", shape=(1, 8, 8), channels=(8,), time_scale=scale).eval()
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t), network.unet(x, scale * t).sample)


# ---- learning


@pytest.mark.parametrize("name", ["unet", "dit", "unet_1d", "mlp"])
def test_a_network_learns_what_depends_on_x_on_t_and_on_the_label(name):
    """All three at once: without any one of them a third of the target's variance is left."""
    plugin, shape, options = TINY[name]
    network = get("network", plugin, shape=shape, classes=K, **options)
    x, t, label = torch.randn(16, *shape), torch.rand(16).round(), torch.arange(16) % (K + 1)
    rows = (16,) + (1,) * len(shape)
    target = x + 2 * (t - 0.5).reshape(rows) + 0.9 * (label - 1.5).reshape(rows)
    adam = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(80):
        adam.zero_grad()
        loss = (network(x, t, label) - target).square().mean()
        loss.backward()
        adam.step()
    assert loss < 0.15 * target.var()


# ---- one network at a time


def test_untrained_the_networks_with_gates_are_zero():
    for name in ("dit", "unet_1d"):
        plugin, shape, options = TINY[name]
        network = get("network", plugin, shape=shape, **options)
        assert not network(torch.randn(2, *shape), torch.rand(2)).any(), name


def test_dit_patches_and_images_are_inverses_and_tokens_know_their_place():
    network = get("network", "dit", shape=(3, 4, 6), patch=2, width=8, depth=1, heads=1)
    x = torch.randn(2, 3, 4, 6)
    tokens = network._to_tokens(x)
    assert torch.equal(network._to_image(tokens), x)
    assert torch.equal(tokens[0, 1], x[0, :, :2, 2:4].flatten())
    assert torch.pdist(network.positions).min() > 0.1


@pytest.mark.parametrize(
    ("name", "shape"), [("unet", (1, 16, 4)), ("unet_1d", (2, 48)), ("unet_1d attention", (1, 16))]
)
def test_a_convolutional_network_takes_other_sizes(name, shape):
    network, _, t, _ = call(name)
    x = torch.randn(4, *shape)
    assert network(x, t).shape == x.shape


# ---- presets


@pytest.mark.parametrize("name", NETWORK_PRESETS)
def test_a_preset_has_the_parameters_of_its_row(name):
    preset = NETWORK_PRESETS[name]
    with torch.device("meta"):
        network = get("network", name, shape=preset.shape)
        assert sum(weight.numel() for weight in network.parameters()) == preset.parameters
        x = torch.empty(2, *preset.shape)
        assert network(x, torch.empty(2)).shape == x.shape


@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_runs(name):
    preset = NETWORK_PRESETS[name]
    network = trained(get("network", name, shape=preset.shape, classes=K))
    x = torch.randn(2, *preset.shape)
    with torch.no_grad():
        out = network(x, torch.rand(2), torch.tensor([0, K]))
    assert out.shape == x.shape and out.isfinite().all() and out.any()


@pytest.mark.parametrize(
    ("name", "published", "paper"),
    [
        ("unet_32", 35.7e6, "Ho et al. (2020), section 4: 35.7 M"),
        ("unet_64", 120e6, "Nichol & Dhariwal (2021), ImageNet-64: 120 M"),
        ("dit_s", 33e6, "Peebles & Xie (2023), table 4: 33 M"),
        ("dit_b", 130e6, "130 M"),
        ("dit_l", 458e6, "458 M"),
        ("dit_xl", 675e6, "675 M"),
    ],
)
def test_a_presets_size_is_its_papers(name, published, paper):
    """Within 2 per cent: classes and a learned variance come and go."""
    assert abs(NETWORK_PRESETS[name].parameters / published - 1) < 0.02, paper


def test_options_override_a_preset_and_are_checked_like_any():
    options = {"channels": [8, 16], "dropout": "0.25"}
    network = build("network", "unet_8", options, shape=(1, 8, 8), classes=2)
    assert network.classes == 2 and network.unet.config.block_out_channels == (8, 16)
    assert network.unet.config.dropout == 0.25
    for wrong in ({"chanels": [8]}, {"layers": "many"}, {"shape": [1, 8, 8]}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            build("network", "unet_8", wrong, shape=(1, 8, 8))


def test_the_page_of_presets_is_the_table():
    """Otherwise: python tools/network_table.py."""
    file = Path(__file__).parents[1] / "tools" / "network_table.py"
    spec = importlib.util.spec_from_file_location("network_table", file)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.FILE.read_text(encoding="utf-8") == tool.page()


# ---- refusals


@pytest.mark.parametrize(
    ("plugin", "options", "words"),
    [
        ("unet", {"shape": (2,)}, "mlp"),
        ("unet", {"shape": ()}, "mlp"),
        ("unet", {"shape": (1, 9, 8)}, "divisible by 2"),
        ("unet", {"shape": (1, 0, 8)}, "divisible by 2"),
        ("unet", {"shape": (1, 8, 8), "channels": (30, 60)}, "multiples of 8"),
        ("unet", {"shape": (1, 8, 8), "channels": ()}, "multiples of 8"),
        ("unet", {"shape": (1, 8, 8), "channels": (3, 6), "groups": 3}, "even"),
        ("unet", {"shape": (1, 8, 8), "channels": (32, 40)}, "multiples of head=16"),
        ("unet", {"shape": (1, 8, 8), "attention": (2,)}, "levels 0 to 1"),
        ("unet", {"shape": (1, 8, 8), "dropout": 1.0}, "dropout"),
        ("unet", {"shape": (1, 8, 8), "layers": 0}, "layers=0"),
        ("unet", {"shape": (1, 8, 8), "chanels": (8,)}, "chanels"),
        ("unet", {"shape": (1, 8, 8), "classes": -1}, "classes=-1"),
        ("dit", {"shape": (1, 64)}, "unet_1d"),
        ("dit", {"shape": (1, 8, 9)}, "divisible by patch=2"),
        ("dit", {"shape": (1, 8, 8), "heads": 5}, "divisible by heads=5"),
        ("dit", {"shape": (1, 8, 8), "width": 6, "heads": 1}, "by 4"),
        ("dit", {"shape": (1, 8, 8), "depth": 0}, "depth=0"),
        ("dit", {"shape": (1, 8, 8), "classes": 2.5}, "classes=2.5"),
        ("unet_1d", {"shape": (1, 8, 8)}, "unet"),
        ("unet_1d", {"shape": ()}, "unet"),
        ("unet_1d", {"shape": (1, 30)}, "divisible by 4"),
        ("unet_1d", {"shape": (1, 32), "stride": 1}, "stride=1"),
        ("unet_1d", {"shape": (1, 32), "kernel": 4}, "kernel=4"),
        ("unet_1d", {"shape": (1, 32), "attention": (3,)}, "levels 0 to 2"),
        ("unet_1d", {"shape": (1, 32), "classes": True}, "classes=True"),
        ("mlp", {"shape": (0,)}, "shape=0"),
        ("mlp", {"shape": (2,), "depth": 0}, "depth=0"),
        ("mlp", {"shape": (2,), "classes": -2}, "classes=-2"),
    ],
)
def test_building_refuses_with_the_remedy(plugin, options, words):
    with pytest.raises(ArgumentError, match=words):
        get("network", plugin, **options)


@tiny
def test_calling_refuses_states_times_and_labels_that_do_not_fit(name):
    network, x, t, label = call(name)
    for wrong in (x[0], x[..., :-1], x[:, :, None], torch.cat((x, x), 1)):
        with pytest.raises(ShapeError, match="shape"):
            network(wrong, t)
    for wrong in (t[:3], t[:, None]):
        with pytest.raises(ShapeError, match=r"one time a sample, \(4,\)"):
            network(x, wrong)
    for wrong in (label[:3], label[:, None], label.int(), label.float(), label > 1, 1):
        with pytest.raises(ShapeError, match=r"torch\.long tensor of shape \(4,\)"):
            network(x, t, wrong)
    for wrong in (label - 1, label + 1):
        with pytest.raises(ArgumentError, match="of 3 classes it must hold 0 to 2, or 3 for no"):
            network(x, t, wrong)


@tiny
def test_an_unconditional_network_refuses_a_label(name):
    network, x, t, label = call(name, classes=0)
    with pytest.raises(ArgumentError, match="unconditional network.*classes=K"):
        network(x, t, label)


def test_listing_the_plugins_imports_no_heavy_library():
    heavy = "diffusers lightning_fabric sklearn matplotlib PIL jsonargparse safetensors".split()
    code = (
        "import sys; from sdeflow.plugins import KINDS, catalogue; [catalogue(k) for k in KINDS];"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
