"""What each prediction weighs in the state, read off from runs with one prediction a row."""

import torch

from sdeflow import VP, ReverseSDE, integrate
from sdeflow.grid import log_snr
from sdeflow.testing import MixtureData

DOUBLE = torch.float64


def line(*times):
    return torch.tensor(times, dtype=DOUBLE)


class OneHot:
    """A denoiser whose k-th prediction ("data", "noise" or "v") is one in row k."""

    def __init__(self, sde, prediction):
        self.sde, self.prediction, self.calls = sde, prediction, 0

    def denoise(self, x, t):
        one = torch.zeros_like(x)
        one[self.calls] = 1
        self.calls += 1
        a, s = self.sde.kernel(x, t)
        if self.prediction == "data":
            return one
        if self.prediction == "noise":
            return (x - s * one) / a
        return (a * x - s * torch.hypot(a, s) * one) / (a * a + s * s)

    def __call__(self, x, t):
        a, s = self.sde.kernel(x, t)
        return (a * self.denoise(x, t) - x) / s**2


def weights(solver, sde, ts, eta=0.0, prediction="data"):
    """What each value, oldest first, weighs in the last step of the loop along ts."""
    process = ReverseSDE(sde, OneHot(sde, getattr(solver, "prediction", prediction)), eta)
    x = torch.zeros(len(ts) - 1, 1, dtype=DOUBLE)
    states = [x, *(y for _, y in solver.solve(process, x, ts, lambda t, s: torch.zeros_like(x)))]
    (a_t, s_t), (a_s, s_s) = ((sde.alpha(u), sde.sigma(u)) for u in ts[-2:])
    kept = {
        "data": s_s / s_t * (a_t / a_s * s_s / s_t) ** (eta**2),
        "noise": a_s / a_t,
        "v": torch.hypot(a_s, s_s) / torch.hypot(a_t, s_t),
    }[process.score.prediction]
    return (states[-1] - kept * states[-2])[:, 0].tolist()


def run(solver, sde=None, eta=0.0, n=12, ts=None, score=None):
    sde = sde or VP()
    ts = log_snr(sde, n, t_max=0.9 * sde.T) if ts is None else ts
    process = ReverseSDE(sde, score or MixtureData.five(sde), eta)
    x = sde.prior(torch.linspace(-2, 2, 8, dtype=DOUBLE).reshape(4, 2), ts[0])
    return integrate(process, x, ts, solver, seed=3).x


def assert_same(a, b, rtol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))
