"""Score matching on every SDE: each loss has its minimum at the score, and faults move it."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from ztest import LIMIT, ks_excess, z_of_mean

from sdeflow import (
    CLD,
    OU,
    SDE,
    VP,
    ArgumentError,
    Denoiser,
    DenoisingScoreMatching,
    DoubleWell,
    EulerMaruyama,
    Heston,
    ImplicitScoreMatching,
    LinearSDE,
    LocalScoreMatching,
    Lorenz,
    PairingError,
    ShapeError,
    SlicedScoreMatching,
    StudentT,
    local_score,
    probability_flow,
    score_loss,
    score_matching,
)

WELL = DoubleWell(T=0.5)
LOSSES = [
    DenoisingScoreMatching(VP()),
    LocalScoreMatching(WELL),
    ImplicitScoreMatching(WELL, steps=20),
    SlicedScoreMatching(WELL, steps=20),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)


def equilibrium(n):
    """Draws from the stationary law of WELL, by its quantiles: their score is known, at every t."""
    x = torch.linspace(-3.5, 3.5, 7001, dtype=torch.float64)
    below = torch.exp(-WELL.potential(x) / WELL.temperature).cumsum(0)
    u = torch.rand(n, dtype=torch.float64) * below[-1]
    return x[torch.searchsorted(below, u).clamp_max(7000)][:, None]


def bump(x, t):
    """A change of the score that no symmetry makes harmless."""
    return torch.sin(2 * x) + 0.3 * x


def slope_at(loss, score, change=bump, step=1e-3):
    """d loss(score + c change)/dc at c = 0, for each sample; exact, the losses being quadratic."""

    def at(c):
        return loss(lambda x, t: score(x, t) + c * change(x, t))

    return (at(step) - at(-step)) / (2 * step)


# ---- the true score is the minimum


def pairs(n=20_000):
    """Stationary pairs a gap 0.1 apart, from many small steps of Heun's method."""
    loss = LocalScoreMatching(WELL, gap=0.1, substeps=20, solver="heun", every=20)
    x, s, y, t = loss.pairs(equilibrium(n), torch.Generator().manual_seed(5))
    return loss, [a[n : 2 * n] for a in (x, s, y, t)]  # one pair a path: independent


def test_no_change_of_the_true_score_lowers_the_local_loss():
    """A z-test of the slope over 20,000 independent pairs: false alarms once in 1.7 million.
    Planted faults: a target of half the size (twice the covariance), the target of the wrong end,
    the Euler kernel, and a score 10 % too large are rejected."""
    loss, ends = pairs()
    one = ends[3] - ends[1]
    assert torch.allclose(one, torch.full_like(one, 0.1))

    def z(target, score=WELL.score, change=bump):
        x, s, y, t = ends
        values = target(x, s, y, t)

        def squared(score):
            return (score(y, t) - values).square().mean(1)

        return z_of_mean(slope_at(squared, score, change).detach(), 0.0)

    def right(*ends):
        return local_score(WELL, *ends)

    assert abs(z(right)) < LIMIT
    assert abs(z(lambda *ends: right(*ends) / 2)) > LIMIT
    assert abs(z(lambda x, s, y, t: right(y, s, x, t))) > LIMIT
    assert abs(z(lambda *ends: local_score(WELL, *ends, "euler"))) > LIMIT
    assert z(right, lambda x, t: 1.1 * WELL.score(x, t), WELL.score) > LIMIT
    # The loss itself is that square, times g^2 and the gap.
    x, s, y, t = ends
    expected = 0.1 * (WELL.score(y, t) - right(*ends)).square().mean(1)
    torch.testing.assert_close(loss.of_pairs(WELL.score, *ends), expected)


@pytest.mark.parametrize("kind", [ImplicitScoreMatching, SlicedScoreMatching])
def test_no_change_of_the_true_score_lowers_the_implicit_losses(kind):
    """A z-test over 40,000 samples. Planted faults: the divergence left out, and twice itself."""
    x = equilibrium(80_000).reshape(-1, 2)
    t, loss = torch.rand(len(x), dtype=torch.float64), kind(WELL)

    def slopes(score):
        return slope_at(lambda s: loss.of_samples(s, x, t).detach(), score)

    assert abs(z_of_mean(slopes(WELL.score), 0.0)) < LIMIT
    square = slope_at(lambda s: s(x, t).square().mean(1) / 2, WELL.score)
    divergence = slopes(WELL.score) - square
    assert abs(z_of_mean(square, 0.0)) > LIMIT
    assert abs(z_of_mean(square + 2 * divergence, 0.0)) > LIMIT
    assert abs(z_of_mean(slopes(lambda x, t: 1.3 * WELL.score(x, t)), 0.0)) > LIMIT


def test_the_implicit_loss_of_a_linear_score_has_its_minimum_at_the_inverse_variance():
    """1/2 k^2 E|x|^2 - k d: exactly, on the sample itself."""
    x, t = torch.randn(50, 3, dtype=torch.float64) * 1.7, torch.zeros(50, dtype=torch.float64)
    for k in (0.5, 1 / float(x.square().mean())):
        found = (
            ImplicitScoreMatching(WELL).of_samples(lambda x, t, k=k: -k * x, x, t).mean().detach()
        )
        assert float(found) == pytest.approx(k * k / 2 * float(x.square().mean()) - k, rel=1e-12)


def test_slicing_averages_to_the_implicit_loss():
    """Over all eight vectors of signs exactly; and in one component without averaging."""
    x, t = torch.randn(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    A = torch.randn(3, 3, dtype=torch.float64)
    sliced, whole = SlicedScoreMatching(WELL), ImplicitScoreMatching(WELL)

    def score(x, t):
        return torch.tanh(x @ A.T) * x

    expected = whole.of_samples(score, x, t)
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        values = [
            (torch.autograd.grad((score(y, t) * v).sum(), y)[0] * v).sum() / 3
            for v in (torch.tensor([v]).double() for v in itertools.product((-1, 1), repeat=3))
        ]
    mean = torch.stack(values).mean() + score(x, t).square().mean() / 2
    torch.testing.assert_close(mean, expected[0])
    draws = (
        SlicedScoreMatching(WELL, projections=64)
        .of_samples(score, x.expand(400, 3), t.expand(400))
        .detach()
    )
    assert abs(z_of_mean(draws, float(expected.detach()))) < LIMIT
    assert draws.std() > 0
    one = x[:, :1]
    torch.testing.assert_close(
        sliced.of_samples(lambda x, t: torch.tanh(3 * x), one, t),
        whole.of_samples(lambda x, t: torch.tanh(3 * x), one, t),
    )


@dataclass(frozen=True)
class Slow(SDE):
    """dx = -x dt + sqrt(2) dw: OU by its drift and diffusion alone."""

    T: float = 1.0
    additive = True

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return torch.full_like(x, math.sqrt(2))


def gaussian_score(x, t):
    """Of Slow from N(1, 0.25)."""
    decay = torch.exp(-t)[:, None]
    return -(x - decay) / (1 - 0.75 * decay**2)


@pytest.mark.parametrize("method", ["denoising", "local", "implicit", "sliced"])
def test_every_method_has_its_minimum_at_the_score_of_a_gaussian(method):
    """A z-test over 60 batches of 200 paths each. Planted fault: a score 15 % too large."""
    sde = OU(1.0, math.sqrt(2), T=1.0) if method == "denoising" else Slow()
    settings = {} if method == "denoising" else {"solver": "heun"}
    more = {
        "local": {"substeps": 4, "every": 4},
        "implicit": {"steps": 12},
        "sliced": {"steps": 12},
    }
    settings |= more.get(method, {})
    loss, generator = score_loss(sde, method, **settings), torch.Generator()

    def slopes(gain):
        found = []
        for seed in range(60):
            x0 = 1 + 0.5 * torch.randn(200, 1, dtype=torch.float64)

            def value(score, x0=x0, seed=seed):
                return loss(score, x0, generator=generator.manual_seed(seed))

            found.append(slope_at(value, lambda x, t: gain * gaussian_score(x, t)))
        return torch.stack(found).detach()

    assert abs(z_of_mean(slopes(1.0), 0.0)) < LIMIT
    assert abs(z_of_mean(slopes(1.15), 0.0)) > LIMIT


def test_the_denoising_loss_of_a_system_has_its_minimum_at_its_score():
    """CLD on N(0, 0.5) data, whose score is -P^{-1} x in closed form: a z-test over 20 batches.
    Planted fault: a score a quarter too large."""
    sde, loss = CLD(), DenoisingScoreMatching(CLD())
    spread = torch.diag(torch.tensor([0.5, 0.0], dtype=torch.float64))

    def score(x, t):
        law = sde.kernel_at(t)
        cov = law.covariance + law.matrix @ spread @ law.matrix.mT
        return -torch.linalg.solve(cov, x[..., None])[..., 0]

    def slopes(gain, weighting):
        loss, found = DenoisingScoreMatching(sde, weighting=weighting), []
        for seed in range(20):
            g = torch.Generator().manual_seed(1000 + seed)
            x0 = torch.randn(300, 2, dtype=torch.float64, generator=g) * spread.diagonal().sqrt()

            def value(score, x0=x0, seed=seed):
                return loss(score, x0, generator=torch.Generator().manual_seed(seed))

            found.append(slope_at(value, lambda x, t: gain * score(x, t), score))
        return torch.stack(found)

    for weighting in ("noise", "likelihood"):
        assert abs(z_of_mean(slopes(1.0, weighting), 0.0)) < LIMIT
        assert abs(z_of_mean(slopes(1.25, weighting), 0.0)) > LIMIT
    with pytest.raises(ArgumentError, match="weighting='edm' is unknown"):
        DenoisingScoreMatching(sde, weighting="edm")
    with pytest.raises(ArgumentError, match="times='log_snr' is unknown"):
        DenoisingScoreMatching(sde, times="log_snr")
    assert "CLD" in repr(loss)


# ---- one call picks


def test_one_call_picks_by_what_the_sde_offers_and_says_which():
    assert repr(score_loss(VP())).startswith("DenoisingScoreMatching(sde=VP(")
    assert isinstance(score_loss(CLD()), DenoisingScoreMatching)
    found = score_loss(Slow())  # linear, though it does not say so
    assert isinstance(found, DenoisingScoreMatching) and isinstance(found.sde, LinearSDE)
    for sde in (WELL, StudentT(), Lorenz()):
        assert score_loss(sde) == LocalScoreMatching(sde)
    assert isinstance(score_loss(Heston()), SlicedScoreMatching)  # whose kernel is a rough one
    assert repr(score_loss(WELL, gap=0.05)) == (
        f"LocalScoreMatching(sde={WELL!r}, gap=0.05, kernel='corrected', "
        "solver='euler_maruyama', substeps=10, every=1, weighting='gap')"
    )
    for method, kind in [("sliced", SlicedScoreMatching), ("implicit", ImplicitScoreMatching)]:
        assert score_loss(VP(), method) == kind(VP())


def test_denoising_is_score_matching_of_the_same_denoiser():
    d, x0 = Denoiser(lambda x, t: torch.sin(x), VP(), "v"), torch.randn(8, 2)
    loss, g = DenoisingScoreMatching(VP(), "log_snr", "edm"), torch.Generator()
    found = loss(d, x0, generator=g.manual_seed(1))
    plain = score_matching(d, x0, times="log_snr", weighting="edm", generator=g.manual_seed(1))
    assert torch.equal(found, plain)
    as_score = loss(lambda x, t: d(x, t), x0, generator=g.manual_seed(1))
    torch.testing.assert_close(as_score, found, rtol=1e-4, atol=1e-5)


@every_loss
def test_a_loss_is_a_scalar_with_gradients_that_a_generator_repeats(loss):
    net, x0 = torch.nn.Linear(2, 2), torch.randn(8, 2)

    def value(seed):
        return loss(lambda x, t: net(x), x0, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    first = value(1)
    assert torch.equal(first, value(1)) and not torch.equal(first, value(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == () and first.dtype == torch.float32
    first.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    assert not torch.equal(loss(lambda x, t: net(x), x0), loss(lambda x, t: net(x), x0))
    torch.manual_seed(3)
    again = loss(lambda x, t: net(x), x0)
    torch.manual_seed(3)
    assert torch.equal(again, loss(lambda x, t: net(x), x0))


# ---- paths


def test_the_times_of_pairs_are_uniform_and_a_gap_apart():
    """A KS test, false alarms once in a million; its planted fault is the times from one gap on."""
    loss = LocalScoreMatching(WELL, gap=0.1, substeps=4, every=3)
    times = []
    for seed in range(400):
        g = torch.Generator().manual_seed(seed)
        x, s, y, t = loss.pairs(torch.zeros(2, 1), g)
        assert x.shape == y.shape == (len(t), 1) and ((t > 0) & (t <= WELL.T)).all()
        torch.testing.assert_close(t - s, torch.minimum(t, torch.full_like(t, 0.1)))
        assert (x[s == 0] == 0).all()
        times.append(t[::2])
    u = torch.cat(times)[torch.randperm(sum(map(len, times)))] / WELL.T
    assert ks_excess(u) < 1
    assert ks_excess(u[u > 0.2]) > 1


def test_pairs_lie_on_one_path():
    """Without noise the path is that of the drift, and x_t follows from x_s."""

    @dataclass(frozen=True)
    class Still(Slow):
        def diffusion(self, x, t):
            return torch.full_like(x, 1e-9)

    loss = LocalScoreMatching(Still(), gap=0.2, substeps=50, solver=EulerMaruyama())
    x, s, y, t = loss.pairs(torch.ones(3, 1, dtype=torch.float64))
    torch.testing.assert_close(x[:, 0], torch.exp(-s), rtol=3e-3, atol=0)
    torch.testing.assert_close(y, x * torch.exp(s - t)[:, None], rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", ["gap", "likelihood", lambda t: 2 * t], ids=["a", "b", "c"])
def test_weightings_weigh_g_times_the_error(weighting):
    sde, (x, y) = StudentT(), torch.randn(2, 5, 2, dtype=torch.float64)
    s, t = torch.rand(2, 5, dtype=torch.float64) * 0.1
    t = t + 0.1
    loss = LocalScoreMatching(sde, weighting=weighting)
    g = sde.diffusion(y, t)
    square = (g * (torch.sin(y) - local_score(sde, x, s, y, t))).square().mean(1)
    factor = {"gap": t - s, "likelihood": 1.0}.get(weighting, 2 * t)
    found = loss.of_pairs(lambda x, t: torch.sin(x), x, s, y, t)
    torch.testing.assert_close(found, factor * square)


# ---- errors


def test_wrong_arguments_are_refused_by_name():
    x0 = torch.zeros(4, 2)
    with pytest.raises(ArgumentError, match="method='slice' is unknown; did you mean 'sliced'"):
        score_loss(WELL, "slice")
    with pytest.raises(ArgumentError, match="LocalScoreMatching: setting='gab' is unknown.*'gap'"):
        score_loss(WELL, gab=0.1)
    with pytest.raises(ArgumentError, match=r"gap=0 must be > 0 and at most T=0.5"):
        LocalScoreMatching(WELL, gap=0)
    with pytest.raises(ArgumentError, match="kernel='ozaki' is unknown"):
        LocalScoreMatching(WELL, kernel="ozaki")
    with pytest.raises(ArgumentError, match="weighting='snr' is unknown"):
        LocalScoreMatching(WELL, weighting="snr")
    for setting in ("substeps", "every"):
        with pytest.raises(ArgumentError, match=f"{setting}=0 must be at least 1"):
            LocalScoreMatching(WELL, **{setting: 0})
    with pytest.raises(ArgumentError, match="steps=2.5 .* must be a whole number"):
        ImplicitScoreMatching(WELL, steps=2.5)
    with pytest.raises(ArgumentError, match="projections=0 must be at least 1"):
        SlicedScoreMatching(WELL, projections=0)
    with pytest.raises(ArgumentError, match="must be a forward SDE"):
        score_loss(probability_flow(WELL, WELL.score))
    with pytest.raises(PairingError, match=r"DoubleWell has no Gaussian kernel.*score_loss\(sde\)"):
        DenoisingScoreMatching(WELL)
    with pytest.raises(PairingError, match="the denoiser was made for VP.*the loss OU"):
        DenoisingScoreMatching(OU())(Denoiser(torch.sin, VP()), x0)
    for loss in LOSSES[1:]:
        with pytest.raises(ArgumentError, match="score=3 must be callable"):
            loss(3, x0)
        with pytest.raises(ShapeError, match=r"score\(x, t\) returned shape \(\d+,\)"):
            loss(lambda x, t: t, x0)
        with pytest.raises(ShapeError, match=r"x0 is \(0, 2\).*at least one sample"):
            loss(lambda x, t: x, x0[:0])
