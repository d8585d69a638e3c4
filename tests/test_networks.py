"""The network plugins: shapes, time, errors."""

import subprocess
import sys

import pytest
import torch

from sdeflow import ArgumentError, get


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12)])
def test_unet_returns_the_shape_of_x(shape):
    network = get("network", "unet", shape=shape, channels=(8, 16), attention=(1,))
    x = torch.randn(2, *shape)
    assert network(x, torch.tensor([0.1, 0.9])).shape == x.shape


def test_unet_sees_the_time_of_each_sample():
    torch.manual_seed(0)
    network = get("network", "unet", shape=(1, 8, 8), channels=(8, 16)).eval()
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    with torch.no_grad():
        early, late = network(x, torch.tensor([0.1, 0.9]))
        alone = network(x[:1], torch.tensor([0.1]))[0]
    assert not torch.allclose(early, late, atol=1e-3)
    torch.testing.assert_close(early, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 250.0])
def test_unet_scales_time_before_its_embedding(scale):
    torch.manual_seed(0)
    network = get("network", "unet", shape=(1, 8, 8), channels=(8,), time_scale=scale).eval()
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t), network.unet(x, scale * t).sample)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": (2,)}, "mlp"),
        ({"shape": (1, 9, 8)}, "divisible by 2"),
        ({"shape": (1, 8, 8), "channels": (30, 60)}, "multiples of 8"),
        ({"shape": (1, 8, 8), "channels": ()}, "multiples of 8"),
        ({"shape": (1, 8, 8), "attention": (2,)}, "levels 0 to 1"),
        ({"shape": (1, 8, 8), "dropout": 1.0}, "dropout"),
        ({"shape": (1, 8, 8), "layers": 0}, "layers=0"),
        ({"shape": (1, 8, 8), "chanels": (8,)}, "chanels"),
    ],
)
def test_unet_refuses_with_the_remedy(options, words):
    with pytest.raises(ArgumentError, match=words):
        get("network", "unet", **options)


@pytest.mark.parametrize("shape", [(2,), (5,), (2, 3)])
def test_mlp_takes_states_of_any_rank_and_sees_time(shape):
    torch.manual_seed(0)
    network = get("network", "mlp", shape=shape, width=16, depth=1)
    x = torch.randn(1, *shape).expand(4, *shape)
    out = network(x, torch.tensor([0.0, 0.3, 0.3, 1.0]))
    assert out.shape == x.shape
    torch.testing.assert_close(out[1], out[2])
    assert not torch.allclose(out[0], out[3], atol=1e-3)


def test_listing_the_plugins_imports_no_heavy_library():
    heavy = "diffusers lightning_fabric sklearn matplotlib PIL jsonargparse safetensors".split()
    code = (
        "import sys; from sdeflow.plugins import KINDS, catalogue; [catalogue(k) for k in KINDS];"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
