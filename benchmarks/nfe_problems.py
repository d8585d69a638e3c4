"""Problems with exact denoisers and exact probability flows, for `nfe_error.py`.

The flow depends on rho = sigma/alpha alone: for y = x/alpha, dy/drho = (y - D)/rho, whatever the
SDE. One reference therefore serves every SDE, grid and library that starts at the same y.
"""

import functools
import math
from dataclasses import dataclass

import torch
from scipy.integrate import solve_ivp


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Data N(0, diag(variance)), variance (d,)."""

    variance: torch.Tensor

    def at(self, y, rho):
        """D for y = x/alpha at level rho, a number or (B, 1)."""
        return self.variance / (self.variance + rho**2) * y

    def flow(self, y, start, ends):
        """{end: the state there} of the exact flow from y at level `start`."""
        total = self.variance + start**2
        return {end: y * ((self.variance + end**2) / total).sqrt() for end in ends}

    def draw(self, n, generator):
        z = torch.randn(n, len(self.variance), dtype=torch.float64, generator=generator)
        return z * self.variance.sqrt()


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data sum_m w_m N(mu_m, v I): means (M, d), v a number, weights (M,)."""

    means: torch.Tensor
    variance: float
    weights: torch.Tensor

    def _centre(self, y, rho):
        """The mean of the means, by responsibility."""
        total = self.variance + rho**2
        logits = (y @ self.means.T - self.means.square().sum(1) / 2) / total + self.weights.log()
        return torch.softmax(logits, 1) @ self.means

    def at(self, y, rho):
        """D for y = x/alpha at level rho, a number or (B, 1)."""
        centre = self._centre(y, rho)
        return centre + self.variance / (self.variance + rho**2) * (y - centre)

    def flow(self, y, start, ends):
        """{end: the state there} of the exact flow from y at level `start`: DOP853 to 1e-11."""

        def slope(rho, flat):  # (y - D)/rho, without the division
            state = torch.from_numpy(flat).view(y.shape)
            moved = rho / (self.variance + rho**2) * (state - self._centre(state, rho))
            return moved.numpy().ravel()

        ends = sorted(ends, reverse=True)
        path = solve_ivp(
            slope,
            (start, ends[-1]),
            y.numpy().ravel(),
            method="DOP853",
            t_eval=ends,
            rtol=1e-11,
            atol=1e-11,
        )
        return {e: torch.from_numpy(path.y[:, k]).view(y.shape) for k, e in enumerate(ends)}

    def draw(self, n, generator):
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[chosen] + math.sqrt(self.variance) * z


@dataclass(frozen=True, eq=False)
class Exact:
    """The denoiser of a problem under an SDE, as sdeflow calls it."""

    sde: object
    problem: object

    def denoise(self, x, t):
        a, s = self.sde.kernel(x, t)
        return self.problem.at(x / a, s / a)


@dataclass(frozen=True, eq=False)
class Guided(Mixture):
    """Classifier-free guidance of a weight towards the first components: D + w (D_first - D)."""

    weight: float = 7.5
    first: int = 1

    def _centre(self, y, rho):
        part = Mixture(self.means[: self.first], self.variance, self.weights[: self.first])
        everywhere, there = super()._centre(y, rho), part._centre(y, rho)
        return everywhere + self.weight * (there - everywhere)


@dataclass(frozen=True, eq=False)
class Learned:
    """A problem whose D is off by `size` in the units of EDM's network output.

    The error is a smooth random function of the scaled state and the level: a sum of 256 waves.
    """

    problem: Mixture
    size: float = 0.1
    std: float = 0.5

    def at(self, y, rho):
        d, generator = y.shape[1], torch.Generator().manual_seed(5)
        draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
        across, along, phase = draw(d, 256) * 3 / math.sqrt(d), draw(256), 2 * math.pi * draw(256)
        scale = 1 / (rho**2 + self.std**2) ** 0.5
        level = torch.as_tensor(rho, dtype=torch.float64).log()
        error = (
            torch.sin(scale * y @ across + level * along + phase) @ draw(256, d) / math.sqrt(128)
        )
        return self.problem.at(y, rho) + self.size * rho * self.std * scale * error


def spectrum():
    """64 independent normals of variance k^-1.5, 0.25 on average: roughly as images have it."""
    power = torch.arange(1, 65, dtype=torch.float64) ** -1.5
    return Spectrum(0.25 * power / power.mean())


def five():
    """Five components in the plane, on a spiral, with weights 1 to 5."""
    angle = torch.arange(5, dtype=torch.float64) * (2 * math.pi / 5)
    radius = torch.linspace(0.6, 1.4, 5, dtype=torch.float64)
    weights = torch.arange(1, 6, dtype=torch.float64)
    means = torch.stack((angle.cos(), angle.sin()), 1) * radius[:, None]
    return Mixture(means, 0.04, weights / weights.sum())


@functools.cache
def digits(clusters=48):
    """scikit-learn's 8x8 digits in [-1, 1]: k-means, each cluster a normal of the same variance."""
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    pixels = load_digits().data / 8 - 1
    found = KMeans(clusters, n_init=1, random_state=0).fit(pixels)
    inside = found.inertia_ / pixels.size
    counts = torch.bincount(torch.from_numpy(found.labels_).long(), minlength=clusters)
    means = torch.from_numpy(found.cluster_centers_).double()
    return Mixture(means, inside, counts.double() / len(pixels))


PROBLEMS = {"spectrum": spectrum, "five": five, "digits": digits}
