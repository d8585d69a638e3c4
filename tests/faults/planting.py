"""How a fault is planted, and a method that several are planted in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sdeflow_plugins.solvers.dpmpp import (
    exponential_euler,
    half_log_snr_step,
)

FAULTS: dict[Any, tuple[str, str]] = {}
"""solver -> the group of checks that runs it, and the check that must fail."""


def planted(group, check, *args, **options):
    """Registers a fault."""

    def register(cls):
        cls = dataclass(frozen=True)(cls)
        FAULTS[cls(*args, **options)] = (group, check)
        return cls

    return register


def two_m(process, x, data, t, s, noise, memory):
    """DPM-Solver++ 2M with D given."""
    (past, left), h = memory, half_log_snr_step(process, x, t, s)
    extrapolated = data
    if past is not None:
        before, h_before = past
        extrapolated = data + torch.where(h.isfinite(), h / (2 * h_before), 0.0) * (data - before)
    mean, std = exponential_euler(process, x, extrapolated, t, s)
    return (mean if process.deterministic else mean + std * noise(t, s)), ((data, h), left - 1)
