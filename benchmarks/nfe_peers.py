"""Peers for `nfe_error.py`: diffusers' schedulers on given levels and on their own, and the
formulas of the official DPM-Solver.

Every run is told in y = x/alpha and rho = sigma/alpha. A scheduler is handed the levels of a grid
in its `sigmas`; what it computes from them is its own. Steps are theirs too, float32 inside.
"""

import math

import torch

OPEN = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
LOWER = {"final_sigmas_type": "sigma_min"}  # the last steps of runs shorter than 15 are lowered
FULL, LAST = {"last": "full"}, {"last": "lower"}
NOISE, THIRD, HEUN = {"algorithm_type": "dpmsolver"}, {"solver_order": 3}, {"solver_type": "heun"}
STAY, AS_IS = {"lower_order_final": False}, {"published": True}
KARRAS, LU = {"use_karras_sigmas": True}, {"use_lu_lambdas": True}

BH1 = {"solver_type": "bh1"}

# fmt: off
SAME = [
    # ours          options  diffusers, less Scheduler    options        whether it must end at 0
    ("ddim",          {},   "EulerDiscrete",      {},                    None),
    ("edm_heun",      {},   "HeunDiscrete",       {},                    True),
    ("dpmpp_2m",      {},   "DPMSolverMultistep", OPEN,                  False),
    ("dpmpp_2m",      {},   "DPMSolverMultistep", {},                    True),
    ("eab_data_2",    FULL, "DPMSolverMultistep", OPEN | HEUN,           False),
    ("dpmpp_3m",      {},   "DPMSolverMultistep", OPEN | THIRD,          False),
    ("dpmpp_3m",      AS_IS, "DPMSolverMultistep", OPEN | THIRD,         False),
    ("dpm_solver_2m", FULL, "DPMSolverMultistep", OPEN | HEUN | NOISE,   False),
    ("dpm_solver_3m", FULL, "DPMSolverMultistep", OPEN | THIRD | NOISE,  False),
    ("unipc_2",       FULL, "UniPCMultistep",     OPEN,                  False),
    ("unipc_2",       FULL, "UniPCMultistep",     OPEN | BH1,            False),
    ("unipc_2",       LAST, "UniPCMultistep",     {},                    True),
    ("unipc_3",       FULL, "UniPCMultistep",     OPEN | THIRD,          False),
    ("unipc_3",       LAST, "UniPCMultistep",     LOWER | THIRD,         False),
    ("eab_noise_2",   FULL, "DEISMultistep",      STAY,                  False),
    ("eab_noise_3",   FULL, "DEISMultistep",      STAY | THIRD,          False),
    ("lms",           FULL, "LMSDiscrete",        {},                    False),
    ("ipndm_4",       {},   "IPNDM",              {},                    False),
]
VP_DEFAULTS = [
    ("DPMSolverMultistep", {}), ("DPMSolverMultistep", KARRAS), ("DPMSolverMultistep", LU),
    ("DPMSolverMultistep", THIRD), ("UniPCMultistep", {}), ("UniPCMultistep", KARRAS),
    ("UniPCMultistep", THIRD), ("DEISMultistep", {}), ("DEISMultistep", KARRAS),
    ("DEISMultistep", THIRD), ("EulerDiscrete", {}), ("EulerDiscrete", KARRAS),
    ("HeunDiscrete", {}), ("HeunDiscrete", KARRAS), ("LMSDiscrete", {}),
]
EDM_DEFAULTS = [("EDMEuler", {}), ("EDMDPMSolverMultistep", {}), ("EDMDPMSolverMultistep", THIRD)]
# fmt: on


def make(name, options):
    """A scheduler of diffusers that is told D, but for those that are told something else."""
    import diffusers

    told = {} if name.startswith(("EDM", "IPNDM")) else {"prediction_type": "sample"}
    return getattr(diffusers, f"{name}Scheduler")(**told, **options)


def called(name, options):
    return ", ".join([name, *(f"{key}={value}" for key, value in options.items())])


def on_levels(scheduler, problem, y, levels):
    """(y at the last level, evaluations) of a scheduler run on the levels of a grid."""
    kind, sigmas = type(scheduler).__name__, torch.tensor(levels, dtype=torch.float32)
    scheduler.set_timesteps(len(levels) - 1)
    if kind == "HeunDiscreteScheduler":
        sigmas = torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]))
    if kind == "IPNDMScheduler":
        scheduler.alphas = 1 / (1 + sigmas.double() ** 2).sqrt()
        scheduler.betas = scheduler.alphas * sigmas
    scheduler.sigmas = sigmas
    scheduler.timesteps = torch.arange(len(sigmas) - 1).float()
    return run(scheduler, problem, y)


def run(scheduler, problem, y):
    """(y at the last level, evaluations) along the levels that the scheduler holds."""
    kind, levels = type(scheduler).__name__, scheduler.sigmas.double()
    scheduler.set_begin_index(0)
    # These keep the state as x = alpha y of a VP process, the others as y.
    scaled = not kind.startswith(("Euler", "Heun", "LMS", "EDM", "KDPM"))
    scales = 1 / (1 + levels**2).sqrt() if scaled else torch.ones_like(levels)
    x = scales[0] * y
    for k, t in enumerate(scheduler.timesteps):
        data = problem.at(x / scales[k], levels[k])
        output = data
        if kind == "IPNDMScheduler":  # it wants v
            a, s = scales[k], scales[k] * levels[k]
            output = (x - a * data) / s
            output = (output - s * x) / a
        if kind.startswith("EDM"):  # it wants the network inside EDM's preconditioning
            c = scheduler.config.sigma_data
            total = levels[k] ** 2 + c**2
            output = (data - c**2 / total * x) * total.sqrt() / (levels[k] * c)
            scheduler.scale_model_input(x, t)
        elif not scaled:
            scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x).prev_sample.double()
    return x / scales[-1], len(scheduler.timesteps)


def by_itself(scheduler, problem, budget, z):
    """A peer as it comes, within a budget: (y at its start, y at its end, start, end)."""
    kind = type(scheduler).__name__
    scheduler.set_timesteps((budget + 1) // 2 if kind.startswith("Heun") else budget)
    start, end = (float(scheduler.sigmas[k]) for k in (0, -1))
    y = z * (start if kind.startswith("EDM") else math.hypot(1, start))
    return y, run(scheduler, problem, y)[0], start, end


# ---- the official DPM-Solver, as its paper and its code have it


def official(problem, y, levels, order=2, data=True, lower_last=True):
    """DPM-Solver(++) multistep of order 1 to 3: the formulas of dpm_solver_pytorch, in float64.

    data: predict D (DPM-Solver++) or the noise (DPM-Solver). lower_last: their
    lower_order_final, which acts in runs shorter than 10. In x of a VP process.
    Source: Lu et al. (2022a, 2022b) and their code, solver_type "dpmsolver".
    """
    rho = torch.tensor(levels, dtype=torch.float64)
    a = 1 / (1 + rho**2).sqrt()
    s, lam = a * rho, -rho.log()
    x, past, n = a[0] * y, [], len(levels) - 1
    for k in range(n):
        d = problem.at(x / a[k], rho[k])
        past = [(lam[k], d if data else (x - a[k] * d) / s[k]), *past][:3]
        p = min(order, len(past), n - k) if lower_last and n < 10 else min(order, len(past))
        h = lam[k + 1] - lam[k]
        sign, scale = (-1, a[k + 1]) if data else (1, s[k + 1])
        x = (s[k + 1] / s[k] if data else a[k + 1] / a[k]) * x
        phi_1 = torch.expm1(sign * h)
        x = x - scale * phi_1 * past[0][1]
        if p == 2:
            r = (lam[k] - past[1][0]) / h
            x = x - scale * phi_1 / 2 * (past[0][1] - past[1][1]) / r
        if p == 3:
            r0, r1 = (lam[k] - past[1][0]) / h, (past[1][0] - past[2][0]) / h
            d0, d1 = (past[0][1] - past[1][1]) / r0, (past[1][1] - past[2][1]) / r1
            first, second = d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)
            phi_2 = phi_1 / h - sign
            phi_3 = phi_2 / h - 0.5
            x = x - scale * (sign * phi_2 * first + phi_3 * second)
    return x / a[-1], n
