"""How good are generated images, and solvers side by side."""

import pytest
import torch
from sdeflow_plugins.evaluate.compare import compare, table, tightened
from sdeflow_plugins.evaluate.distances import frechet_distance, gaussian_like, sliced_wasserstein
from sdeflow_plugins.evaluate.judge import train_judge
from sdeflow_plugins.evaluate.quality import assess
from sdeflow_plugins.generate.sampler import Sampler

from sdeflow import VP, Denoiser, ShapeError, get

# ---- how good are images?


@pytest.fixture(scope="module")
def judged():
    train, test = get("dataset", "digits"), get("dataset", "digits", split="test")
    return train_judge(train, epochs=8), train, test


def test_the_judge_knows_held_out_digits_and_is_repeatable(judged):
    judge, train, test = judged
    assert judge.accuracy(test) > 0.95
    again = train_judge(get("dataset", "digits", only=(0, 1)), epochs=1)
    other = train_judge(get("dataset", "digits", only=(0, 1)), epochs=1)
    assert torch.equal(again(test.x), other(test.x))


def test_quality_accepts_real_digits_and_rejects_a_gaussian_and_a_collapse(judged):
    judge, train, test = judged
    real = assess(judge, train.x, train, test)
    assert real.distance == real.distance_real and real.sure > 0.95 and real.rarest > 0.08
    gaussian = assess(judge, gaussian_like(train.x, 1000), train, test)
    assert not gaussian.passed and gaussian.distance > 3 * gaussian.distance_real
    collapsed = assess(judge, train.x[train.labels == 3], train, test)
    assert not collapsed.passed and collapsed.rarest == 0 and "missed" in str(collapsed)


def test_frechet_distance_of_gaussians_has_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50_000, 2, generator=generator, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T)).mT)
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert frechet_distance(z, z) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(z, scale * z + 1) == pytest.approx(2 + 1 + 4)
    with pytest.raises(ShapeError, match="N > 1"):
        frechet_distance(z[:1], z)


def test_sliced_wasserstein_distance_of_a_shift():
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x, x + torch.tensor([1.0, 0.0])) == pytest.approx(0.5**0.5, rel=0.1)


def test_a_gaussian_fit_has_the_mean_and_covariance_of_the_data():
    x = torch.tensor([[1.0, 0.0], [3.0, 1.0], [2.0, 5.0]])
    fit = gaussian_like(x, 200_000)
    torch.testing.assert_close(fit.mean(0), x.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(fit.T), torch.cov(x.T), atol=0.1, rtol=0)


# ---- solvers side by side


def ideal():
    """The exact denoiser of N(0, I/4) data under VP."""
    sde = VP()

    def data(x, t):
        a, s = sde.kernel(x, t)
        return a * 0.25 / (a**2 * 0.25 + s**2) * x

    return Denoiser(data, sde, "data")


def test_compare_counts_evaluations_and_starts_all_from_the_same_noise():
    samplers = {
        "ddim": Sampler("ddim"),
        "heun": Sampler("heun"),
        "ddpm": Sampler("ddpm"),
        "dopri5": Sampler("torchdiffeq"),
    }

    def spread(x):
        return abs(float(x.std()) - 0.5)

    results = list(compare(ideal(), (400, 2), samplers, [2, 40, 80], spread))
    made = {(c.sampler, c.budget): c.evaluations for c, _ in results}
    assert made["ddim", 40] == made["heun", 40] == made["ddpm", 40] == 40
    assert made["dopri5", 2] >= 12, "an adaptive solver chooses its own steps"
    samples = {(c.sampler, c.budget): x for c, x in results}
    both = torch.stack((samples["heun", 80].flatten(), samples["dopri5", 80].flatten()))
    assert torch.corrcoef(both)[0, 1] > 0.99
    cells = [c for c, _ in results]
    distances = {(c.sampler, c.budget): c.distance for c in cells}
    assert distances["ddim", 80] < 0.1 * distances["ddim", 2]
    assert "heun" in table(cells, "distance")


def test_adaptive_samplers_get_a_tighter_tolerance_in_each_column():
    loose, tight = (tightened(Sampler("torchdiffeq"), column).make_solver() for column in (0, 3))
    assert loose.rtol == loose.atol > 100 * tight.rtol
    assert tightened(Sampler("torchdiffeq", {"rtol": 1e-7}), 0).make_solver().rtol == 1e-7


def test_the_process_of_a_sampler_follows_from_its_solver():
    assert Sampler("ddim").process(ideal()).eta == 0
    assert Sampler("ddpm").process(ideal()).eta == 1
    assert Sampler("ddim", eta=0.5).process(ideal()).eta == 0.5
