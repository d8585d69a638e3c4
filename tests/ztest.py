"""The two statistical tests in use, with their false-alarm rates."""

import math

import torch

LIMIT = 5.0
"""|z| beyond it is a failure: a false alarm once in 1.7 million tests."""


def z_of_mean(values, expected):
    """(mean - expected) in units of the standard error of the mean."""
    return float((values.mean() - expected) / (values.std() / math.sqrt(values.numel())))


def z_of_variance(values, expected):
    """The same for the variance, of values that are normal."""
    return float((values.var() / expected - 1) * math.sqrt((values.numel() - 1) / 2))


def z_of_correlation(a, b):
    """The correlation of two samples in units of its standard deviation under independence."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.numel()))


def ks_excess(u):
    """The Kolmogorov-Smirnov distance of u from the uniform law on [0, 1], over its bound.

    Above 1 is a failure: a false alarm once in a million tests (the bound of
    Dvoretzky, Kiefer, Wolfowitz and Massart).
    """
    n = u.numel()
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    u = u.double().flatten().sort().values
    distance = float(torch.maximum(grid[1:] - u, u - grid[:-1]).max())
    return distance / math.sqrt(math.log(2e6) / (2 * n))
