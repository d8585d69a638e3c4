"""check_sde: bundled SDEs keep their word, and planted faults are found by name."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from problems import label

from sdeflow import (
    CIR,
    EDM,
    GBM,
    OU,
    SDE,
    VE,
    VP,
    Cosine,
    GaussianSDE,
    Heston,
    LinearSDE,
    LinearSystem,
    SdeflowError,
    SubVP,
    catalogue,
    gaussian,
    get,
)
from sdeflow.testing import check_sde

DOUBLE = torch.float64


def failures(sde, x=None):
    return {check.name: check.detail for check in check_sde(sde, x).failures}


# ---- what is bundled


@pytest.mark.parametrize("name", sorted(catalogue("sde")))
def test_every_bundled_sde_passes(name):
    check_sde(get("sde", name)).raise_if_failed()


class Channels(GaussianSDE):
    """Three channels, each forgotten at a rate of its own."""

    rate = torch.tensor([0.5, 1.0, 4.0], dtype=DOUBLE).reshape(3, 1, 1)

    def alpha(self, t):
        return torch.exp(-t[..., None, None, None] * self.rate)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-2 * t[..., None, None, None] * self.rate))


class Rotation(LinearSystem):
    """A coupled system with an offset whose matrices change in time, as a class of its own."""

    def __init__(self):
        super().__init__(F=self.F, G=self.G, c=self.c, T=2.0)

    def F(self, t):
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=DOUBLE)
        return turn * (1 + t)[..., None, None] - torch.eye(2, dtype=DOUBLE)

    def G(self, t):
        return torch.tensor([[1.0], [0.5]], dtype=DOUBLE)

    def c(self, t):
        return torch.stack((t, 1 - t), -1)


class Shared(SDE):
    """Scalar noise that commutes, in the sense of Stratonovich."""

    noise: ClassVar = "scalar"
    calculus: ClassVar = "stratonovich"

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return 0.3 * x


GOOD = [
    VE(T=2.0),
    OU(0.3, 1.7, T=2.0),
    Cosine(s=0.02),
    EDM(T=5.0),
    Channels(),
    Rotation(),
    Shared(),
    LinearSDE(torch.neg, lambda t: (1 + t).sqrt()),
    LinearSystem(F=[[0.0, 1.0], [-1.0, -2.0]], G=[[0.0], [2.0]], c=[1.0, 0.0]),
]


@pytest.mark.parametrize("sde", GOOD, ids=lambda sde: type(sde).__name__)
def test_sdes_of_every_kind_pass(sde):
    check_sde(sde).raise_if_failed()


def test_what_gaussian_makes_passes():
    vp = VP()

    class Plain(SDE):
        def drift(self, x, t):
            return vp.drift(x, t)

        def diffusion(self, x, t):
            return vp.diffusion(x, t)

    check_sde(gaussian(Plain())).raise_if_failed()


# ---- planted faults in drift and diffusion beside alpha and sigma


@dataclass(frozen=True)
class Faulty(VP):
    """VP with its rates, by default right, multiplied and bent."""

    def rates(self, t):
        f, g2 = super().rates(t)
        return self.bend(f, g2, t)

    bend: object = field(default=lambda f, g2, t: (f, g2), repr=False)


def faulty(bend):
    return Faulty(bend=bend)


@pytest.mark.parametrize(
    ("bend", "name", "story"),
    [
        (lambda f, g2, t: (f, 2 * g2), "rates: g^2", "g^2 is 2 times .* factor of 2 too many"),
        (lambda f, g2, t: (f, g2 / 2), "diffusion", "g^2 is 0.5 times .* factor of 2 is missing"),
        (lambda f, g2, t: (2 * f, g2), "drift", "f is 2 times .* at t = 0.02312, and at all t"),
        (lambda f, g2, t: (-f, g2), "drift", "f is -1 times .*the sign is wrong"),
        (lambda f, g2, t: (f, g2**2), "diffusion", "a square root is missing"),
        (lambda f, g2, t: (f, g2.sqrt()), "diffusion", "a square root too many"),
        (lambda f, g2, t: (f * t, g2), "drift", "a factor of t too many"),
        (lambda f, g2, t: (f, g2 / t), "diffusion", "a factor of t is missing"),
        (lambda f, g2, t: (f, 4 * g2), "diffusion", "a factor of 2 too many in g"),
        (lambda f, g2, t: (f, g2 * (1 + 1e-5 * t)), "diffusion", "g^2 is 1 times"),
    ],
)
def test_a_wrong_rate_is_told_with_its_cause(bend, name, story):
    found = failures(faulty(bend))
    assert name in found
    head, _, rest = story.partition(" .*")
    assert head in found[name] and rest.removeprefix("*") in found[name].replace("\n", " ")


def test_the_faulty_class_without_a_fault_passes():
    assert not failures(Faulty())


def test_time_that_runs_the_wrong_way_is_told():
    class Backwards(VP):
        def rates(self, t):
            return super().rates(self.T - t)

    assert "T - t where t belongs" in failures(Backwards())["drift"]


@dataclass(frozen=True)
class ForgetsT(VE):
    """VE whose rates forget to divide by T: right at T = 1, and there alone."""

    def rates(self, t):
        f, g2 = super().rates(t)
        return f, self.T * g2


def test_a_factor_of_T_is_found_though_T_is_one():
    found = failures(ForgetsT())
    assert set(found) >= {"diffusion (T = 5)", "rates: g^2 (T = 5)"}
    assert all("(T = 5)" in name for name in found)
    assert "g^2 is 5 times that of alpha and sigma" in found["diffusion (T = 5)"]
    assert "a factor of T too many" in found["diffusion (T = 5)"]
    assert "a factor of T too many" in failures(ForgetsT(T=3.0))["diffusion"]


def test_a_doubled_diffusion_is_the_known_defect_of_a_peer():
    """A published library had the rate xi/(s^2 sigma) twice too large, so that g^2 = 2 beta."""

    class Peer(VP):
        def diffusion(self, x, t):
            return super().diffusion(x, t) * 2**0.5

    found = failures(Peer())
    assert "g^2 is 2 times" in found["diffusion"]
    assert "rates: g^2" not in found and "drift" not in found
    assert {"reversal, eta = 0", "reversal, eta = 1"} <= set(found)


# ---- planted faults elsewhere: (class, a check that must fail)


class NotOne(VP):
    def alpha(self, t):
        return 0.99 * super().alpha(t)


class NotZero(VP):
    def sigma(self, t):
        return super().sigma(t) + 0.01


class Variance(VP):
    def sigma(self, t):
        return super().sigma(t) ** 2  # the variance where the standard deviation belongs


class Rising(VP):
    def sigma(self, t):
        return 0.1 * t.sqrt() + 0 * t

    def alpha(self, t):
        return 1 + 3 * t

    rates = GaussianSDE.rates


class Inverse(VP):
    def time_of_log_snr(self, log_snr):
        return super().time_of_log_snr(log_snr) * (1 + 1e-4)


class Slopes(VP):
    def slopes(self, t):
        a, s = super().slopes(t)
        return a, s / 2


class PaperPosterior(VE):
    """DDIM's variance as printed, which is that of variance-preserving SDEs alone."""

    def posterior(self, x, x0, t, s, eta=1.0):
        (a_t, s_t), (a_s, s_s) = self.kernel(x, t), self.kernel(x, s)
        v = eta**2 * (s_s / s_t) ** 2 * (1 - (a_t / a_s) ** 2)
        eps = (x - a_t * x0) / s_t
        return a_s * x0 + (s_s**2 - v).sqrt() * eps, v**0.5


class Perturb(VP):
    def perturb(self, x0, t, noise):
        return super().perturb(x0, t, 2 * noise)


class Prior(VE):
    def prior(self, noise, t=None):
        return noise * self.sigma_max**2


class LogSNR(VP):
    def log_snr(self, t):
        return super().log_snr(t) / 2


class OneTime(VP):
    def alpha(self, t):
        return super().alpha(t).mean()


class NaNAtZero(VP):
    def rates(self, t):
        f, g2 = super().rates(t)
        return f * t / t, g2


class Promotes(OU):
    def drift(self, x, t):
        return -self.theta * x.double()


class Liar(GBM):
    additive: ClassVar = True


class HalfDivergence(GBM):
    def divergence(self, x, t):
        return self.volatility**2 * x


class Spread(GBM):
    def spread(self, x, t, z):
        return self.volatility * z


class Product(CIR):
    def covariance_product(self, x, t, v):
        return self.xi**2 * x.sqrt() * v


class Commutes(Heston):
    commutative: ClassVar = True


class Matrix(GBM):
    noise: ClassVar = "matrix"


class Elementwise(Heston):
    noise: ClassVar = "elementwise"


class BatchMean(GBM):
    def drift(self, x, t):
        return self.mu * x + 1e-6 * x.mean(0)


class Broadcasts(OU):
    def drift(self, x, t):
        return -self.theta * x * t.mean() / t.mean().clamp_min(1) ** 0 + 0 * x


class ShiftedStart(Rotation):
    def drift(self, x, t):
        return super().drift(x, t) + 0.1


class DoubledG(Rotation):
    def covariance_product(self, x, t, v):
        return 2 * super().covariance_product(x, t, v)


class WrongRoot(Rotation):
    def perturb(self, x0, t, noise):
        return super().perturb(x0, t, 0.9 * noise)


PLANTED = [
    (NotOne, "alpha(0) = 1"),
    (NotZero, "sigma(0) = 0"),
    (Variance, "rates: g^2"),
    (Rising, "log_snr falls"),
    (Inverse, "time_of_log_snr"),
    (Slopes, "slopes"),
    (Slopes, "reversal, eta = 0"),
    (PaperPosterior, "posterior, eta = 1"),
    (PaperPosterior, "posterior, eta = 0.5"),
    (Perturb, "perturb"),
    (Prior, "prior"),
    (LogSNR, "log_snr"),
    (OneTime, "alpha: t (B,)"),
    (NaNAtZero, "drift: finite"),
    (Promotes, "dtype"),
    (Liar, "additive"),
    (HalfDivergence, "divergence"),
    (Spread, "spread"),
    (Product, "covariance_product"),
    (Commutes, "commutative"),
    (Matrix, "noise"),
    (Elementwise, "noise"),
    (BatchMean, "drift: samples"),
    (Broadcasts, "drift: t (B,)"),
    (ShiftedStart, "moments: offset"),
    (DoubledG, "moments: covariance"),
    (WrongRoot, "perturb"),
]


@pytest.mark.parametrize(("fault", "name"), PLANTED, ids=lambda v: getattr(v, "__name__", v))
def test_a_planted_fault_is_found_by_name(fault, name):
    assert name in failures(fault(), (2,) if fault in (Matrix, Elementwise) else None)


def test_a_fault_in_one_channel_is_found():
    class OneChannel(Channels):
        def rates(self, t):
            f, g2 = super().rates(t)
            return f * torch.tensor([1.0, 1, 1.01], dtype=DOUBLE).reshape(3, 1, 1), g2

    assert "f is 1.01 times" in failures(OneChannel())["drift"]


# ---- the report


def test_the_report_is_a_table_and_an_error():
    good, bad = check_sde(VP()), check_sde(faulty(lambda f, g2, t: (f, 2 * g2)))
    assert good.ok and "passed" in str(good) and "FAIL" not in str(good)
    assert not bad.ok and "FAIL  diffusion" in str(bad)
    good.raise_if_failed()
    with pytest.raises(SdeflowError, match="g\\^2 is 2 times"):
        bad.raise_if_failed()


def test_an_exception_in_a_check_is_a_failure_that_names_it():
    class Broken(VP):
        def slopes(self, t):
            raise RuntimeError("no slopes today")

    assert "RuntimeError: no slopes today" in failures(Broken())["slopes"]


def test_a_state_may_be_given():
    assert "states (B, 2, 4)" in check_sde(VP(), (2, 4)).title
    assert "states (B, 5)" in check_sde(GBM(), torch.ones(3, 5)).title


@pytest.mark.parametrize("sde", [SubVP(), replace(SubVP(), T=2.0)], ids=label)
def test_what_cannot_be_told_at_another_T_is_summed_up(sde):
    names = [check.name for check in check_sde(sde).checks]
    assert "all of these (T = 5)" in names
    assert ("all of these (T = 1)" in names) == (sde.T != 1)
