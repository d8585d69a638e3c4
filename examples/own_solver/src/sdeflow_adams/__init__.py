"""The two-step Adams-Bashforth method in the noise prediction, as a plugin of sdeflow.

With rho = sigma/alpha and y = x/alpha the probability flow is dy/drho = eps, the noise in x. Two
evaluations fix a straight line through eps, which is integrated over the step:

    y_s = y_t + h (eps_t + h/(2 h_before) (eps_t - eps_before)),   h = rho_s - rho_t

Source: Zhang & Chen (2023, DEIS), rhoAB-DEIS of order 1; k-diffusion's LMS of order 2.
"""

from dataclasses import dataclass

from sdeflow import StepSolver, hookimpl


@dataclass(frozen=True)
class Adams2(StepSolver):
    """Two-step Adams-Bashforth in the noise prediction: order 2, one evaluation a step."""

    order = 2
    evaluations = 1
    point_exact = True
    needs = ("gaussian", "ode")

    def step(self, process, x, t, s, noise, memory):
        (a_t, sigma_t), (a_s, sigma_s) = (process.gaussian.kernel(x, u) for u in (t, s))
        eps = (x - a_t * process.denoise(x, t)) / sigma_t
        h = sigma_s / a_s - sigma_t / a_t
        slope = eps
        if memory is not None:
            before, h_before = memory
            slope = eps + h / (2 * h_before) * (eps - before)
        return (a_s / a_t) * x + a_s * h * slope, (eps, h)


@hookimpl
def sdeflow_solvers():
    return {"adams2": Adams2}
