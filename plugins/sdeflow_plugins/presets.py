"""Samplers of the literature as presets, and what other libraries call our solvers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from sdeflow.plugins import hookimpl
from sdeflow.presets import Preset

ZERO = {"to_zero": True}  # a last step from t_min
ALL = {"t_min": 0.0}  # all steps alike
CHURN = {"churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}

# fmt: off
PRESETS: dict[str, Preset] = {
    # name                    eta  solver                   grid                steps  evaluations
    "ddpm_1000":       Preset(1.0, "ddpm",                  "leading",           1000, 1000,
                              source="Ho et al. (2020)"),
    "ddim_50":         Preset(0.0, "ddim",                  "leading",             50, 50,
                              source="Song et al. (2021, DDIM)"),
    "plms_50":         Preset(0.0, "ipndm_4",               "leading",             50, 50,
                              source="Liu et al. (2022), as in Stable Diffusion 1"),
    "score_sde_pc_1000": Preset(1.0, "predictor_corrector", "uniform",           1000, 2000,
                              source="Song et al. (2021, Score-SDE)"),
    "edm_heun_18":     Preset(0.0, "edm_heun",              "karras",              18, 35,
                              grid_options=ZERO, source="Karras et al. (2022), CIFAR-10"),
    "edm_churn_256":   Preset(0.0, "edm_heun",              "karras",             256, 511,
                              CHURN, ZERO, "Karras et al. (2022), ImageNet-64"),
    "dpm_solver_2_10": Preset(0.0, "dpm_solver_2",          "log_snr",             10, 20,
                              source="Lu et al. (2022a)"),
    "dpm_solver_3_7":  Preset(0.0, "dpm_solver_3",          "log_snr",              7, 21,
                              source="Lu et al. (2022a)"),
    "dpmpp_2m_20":     Preset(0.0, "dpmpp_2m",              "log_snr",             20, 20,
                              source="Lu et al. (2022b)"),
    "dpmpp_2m_karras_20": Preset(0.0, "dpmpp_2m",           "karras",              20, 20,
                              grid_options=ZERO, source="Crowson (2022), k-diffusion"),
    "dpmpp_2m_sde_karras_25": Preset(1.0, "dpmpp_2m",       "karras",              25, 25,
                              grid_options=ZERO, source="Crowson (2022), k-diffusion"),
    "dpmpp_3m_sde_exponential_25": Preset(1.0, "dpmpp_3m",  "log_snr",             25, 25,
                              grid_options=ZERO, source="Crowson (2023), k-diffusion"),
    "euler_ancestral_30": Preset(1.0, "ddim",               "karras",              30, 30,
                              grid_options=ZERO, source="Crowson (2022), k-diffusion"),
    "unipc_10":        Preset(0.0, "unipc_3",               "log_snr",             10, 10,
                              source="Zhao et al. (2023)"),
    "deis_10":         Preset(0.0, "deis_tab3",             "quadratic",           10, 10,
                              source="Zhang & Chen (2023)"),
    "ipndm_8":         Preset(0.0, "ipndm_3",               "quadratic",            8, 8,
                              source="Zhang & Chen (2023)"),
    "sa_solver_20":    Preset(1.0, "sa_solver",             "karras",              20, 20,
                              {"band": (0.05, 1.0)}, source="Xue et al. (2023), CIFAR-10"),
    "ays_10":          Preset(0.0, "dpmpp_2m",              "align_your_steps",    10, 10,
                              source="Sabour et al. (2024), Stable Diffusion 1.5"),
    "sd3_euler_28":    Preset(0.0, "ddim",                  "shift",               28, 28,
                              grid_options=ALL | {"factor": 3.0}, source="Esser et al. (2024)"),
    "flux_euler_28":   Preset(0.0, "ddim",                  "dynamic_shift",       28, 28,
                              grid_options=ALL | {"tokens": 4096}, source="FLUX.1 (2024)"),
}


class Names(NamedTuple):
    """What a solver of ours, on the ODE or the SDE, is called elsewhere; empty for nothing."""

    solver: str
    process: str
    k_diffusion: str
    diffusers: str
    label: str


NAMES = [Names(*row) for row in (
  # ours                     on     k-diffusion           diffusers: + Scheduler    label
  ("ddim",                   "ode", "euler",              "EulerDiscrete",          "Euler"),
  ("ddim",                   "ode", "",                   "DDIM",                   "DDIM"),
  ("ddim",                   "ode", "",                   "FlowMatchEulerDiscrete", ""),
  ("ddim",                   "ode", "",                   "EDMEuler",               ""),
  ("ddim",                   "sde", "euler_ancestral",    "EulerAncestralDiscrete", "Euler a"),
  ("ddpm",                   "sde", "",                   "DDPM",                   "DDPM"),
  ("edm_heun",               "ode", "",                   "HeunDiscrete",           ""),
  ("dpm_solver_2",           "ode", "dpm_2",              "KDPM2Discrete",          "DPM2"),
  ("dpm_solver_2_ancestral", "sde", "dpm_2_ancestral",    "KDPM2AncestralDiscrete", "DPM2 a"),
  ("dpmpp_2s_ancestral",     "sde", "dpmpp_2s_ancestral", "",                       "DPM++ 2S a"),
  ("dpmpp_2s",               "ode", "",                   "DPMSolverSinglestep",    ""),
  ("dpmpp_2s",               "sde", "dpmpp_sde",          "DPMSolverSDE",           "DPM++ SDE"),
  ("dpmpp_2m",               "ode", "dpmpp_2m",           "DPMSolverMultistep",     "DPM++ 2M"),
  ("dpmpp_2m",               "ode", "",                   "EDMDPMSolverMultistep",  ""),
  ("dpmpp_2m",               "sde", "dpmpp_2m_sde",       "",                       "DPM++ 2M SDE"),
  ("dpmpp_3m",               "sde", "dpmpp_3m_sde",       "",                       "DPM++ 3M SDE"),
  ("lms",                    "ode", "lms",                "LMSDiscrete",            "LMS"),
  ("unipc_2",                "ode", "",                   "UniPCMultistep",         ""),
  ("unipc_3",                "ode", "uni_pc",             "",                       "UniPC"),
  ("eab_noise_2",            "ode", "",                   "DEISMultistep",          ""),
  ("deis_tab2",              "ode", "deis",               "",                       "DEIS"),
  ("pndm",                   "ode", "",                   "PNDM",                   ""),
  ("ipndm_4",                "ode", "ipndm",              "IPNDM",                  "PLMS"),
  ("lms",                    "ode", "ipndm_v",            "",                       ""),
  ("heun",                   "ode", "",                   "FlowMatchHeunDiscrete",  ""),
  ("eab_data_2",             "ode", "res_multistep",      "",                       ""),
  ("sa_solver",              "sde", "",                   "SASolver",               "SA-Solver"),
  ("er_sde_3",               "sde", "er_sde",             "",                       "ER SDE"),
)]
GRID_ALIASES = {
    "exponential": "log_snr",
    "lu_lambdas": "log_snr",
    "ays": "align_your_steps",
    "simple": "trailing",
    "sgm_uniform": "trailing",
    "normal": "linspace",
    "ddim_uniform": "leading",
}
# fmt: on


def _aliases() -> dict[str, str]:
    found: dict[str, str] = {}
    for row in NAMES:
        label = row.label.lower().replace("++", "pp").replace("-", "_").replace(" ", "_")
        scheduler = f"{row.diffusers}Scheduler" if row.diffusers else ""
        for other in (row.k_diffusion, scheduler, label):
            if other and other != row.solver:
                found.setdefault(other, row.solver)
    return found


@hookimpl
def sdeflow_presets() -> dict[str, Callable[..., Any]]:
    return {name: _named(preset) for name, preset in PRESETS.items()}


def _named(preset: Preset) -> Callable[..., Preset]:
    build = functools.partial(lambda preset: preset, preset)
    kind = "reverse SDE" if preset.eta else "probability flow"
    build.__doc__ = f"{preset.solver}, {preset.grid}, {preset.steps} steps, {kind}. {preset.source}"
    return build


@hookimpl
def sdeflow_aliases() -> dict[str, dict[str, str]]:
    return {"solver": _aliases(), "grid": GRID_ALIASES}
