"""The samplers of other libraries as f(denoise, x_T, ts) -> x, for `audit`.

No such library is imported here: its objects are handed in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..processes import EDM, VP, RectifiedFlow
from ..reverse import ReverseSDE
from ..sample import integrate
from ..sde import GaussianSDE
from ..solver import Solver
from .foreign import Denoise, Foreign, Run


def native(solver: Solver | str, eta: float = 0.0, sde: GaussianSDE | None = None) -> Foreign:
    """A solver of sdeflow, seen as a stranger: the same audit, the same noise."""
    sde = sde or VP()

    def run(denoise: Denoise, x: Tensor, ts: Tensor) -> Tensor:
        def score(x: Tensor, t: Tensor) -> Tensor:
            a, s = sde.kernel(x, t)
            return (a * denoise(x, t) - x) / s**2

        score.denoise = denoise  # type: ignore[attr-defined]
        process = ReverseSDE(sde, score, eta)
        return integrate(process, x, ts, solver, noise=lambda t, s: torch.randn_like(x)).x

    return Foreign(run, sde, f"{solver}, eta = {eta:g}")


def k_diffusion(sample: Callable[..., Any], **options: Any) -> Foreign:
    """A sampling function of k-diffusion, `sample(model, x, sigmas, ...)`, on EDM's process.

    Those that choose their own steps, `sample(model, x, sigma_min, sigma_max, n, ...)`, get the
    ends of the grid and, where they take it, the number of its steps as n.
    options: keyword arguments for the function, `eta=0.5` for example.
    """
    parameters = inspect.signature(sample).parameters

    def run(denoise: Denoise, x: Tensor, ts: Tensor) -> Tensor:
        if "sigma_min" not in parameters:
            return sample(denoise, x, ts, disable=True, **options)
        steps = {"n": len(ts) - 1} if "n" in parameters else {}
        ends = {"sigma_min": float(ts[-1]), "sigma_max": float(ts[0])}
        return sample(denoise, x, **ends, **steps, disable=True, **options)

    return Foreign(run, EDM(), _name(sample.__name__, options))


def azula_sampler(sampler: type[Any], sde: GaussianSDE | None = None, **options: Any) -> Foreign:
    """A sampler class of azula on a process of ours, VP() where nothing is said.

    Its `schedule` becomes (alpha, sigma) of the process and its `timesteps` the test's times.
    options: keyword arguments for the class, `order=3` for example.
    """
    process = sde or VP()

    def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
        return process.alpha(t), process.sigma(t)

    def run(denoise: Denoise, x: Tensor, ts: Tensor) -> Tensor:
        class Denoiser:
            def __init__(self) -> None:
                self.schedule = schedule

            def __call__(self, x: Tensor, t: Tensor, **_: Any) -> Any:
                return SimpleNamespace(mean=denoise(x, t))

        own_times = type(sampler.__name__, (sampler,), {"timesteps": property(lambda self: ts)})
        return own_times(Denoiser(), silent=True, steps=len(ts) - 1, **options)(x)

    return Foreign(run, process, _name(sampler.__name__, options))


# ---- diffusers


def diffusers_scheduler(scheduler: Any, *, refine: int = 1, name: str | None = None) -> Foreign:
    """A scheduler of diffusers, configured, as one run over the test's times.

    For each run a new one is made from its config, whose table of noise levels (`trained_betas`)
    holds exactly the test's times, so that no table limits the order; the levels are set in
    float64. The run ends *before* the scheduler's own last step, the jump to sigma = 0; where the
    grid itself ends at sigma = 0 it is made. Schedulers whose state is x/alpha (Euler, Heun ...)
    get and return it so. Clipping must be off (`clip_sample=False`) for the law to be read off.

    refine: levels of the table to one step; 2 where the scheduler evaluates between them (PNDM).
    """
    label = name or _name(type(scheduler).__name__, _not_default(scheduler))
    if hasattr(scheduler, "precondition_outputs"):
        return Foreign(_edm_run(scheduler), EDM(), label)
    if "FlowMatch" in type(scheduler).__name__:
        return Foreign(_flow_run(scheduler), RectifiedFlow(), label)
    if type(scheduler).__name__ == "IPNDMScheduler":
        return Foreign(_ipndm_run(scheduler), VP(), label)
    if "trained_betas" not in scheduler.config:
        raise ArgumentError(
            f"scheduler={type(scheduler).__name__} takes no trained_betas; wrap its loop in a "
            "function and use foreign(function, sde)"
        )
    return Foreign(_vp_run(scheduler, refine), VP(), label)


def _loop(scheduler: Any, model: Callable[[Tensor, Any], Tensor], x: Tensor, last: bool) -> Tensor:
    """The loop of every pipeline, without its last step unless `last`."""
    timesteps = scheduler.timesteps if last else scheduler.timesteps[:-1]
    for t in timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


def _vp_run(template: Any, refine: int) -> Run:
    sde = VP()

    def made(log_snr: Tensor) -> Any:
        """The scheduler with this table, from data to noise, at each `refine`-th entry."""
        abar = torch.sigmoid(log_snr)  # alpha^2, since alpha^2 + sigma^2 = 1
        betas = 1 - abar / torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))
        options: dict[str, Any] = {
            "num_train_timesteps": len(abar), "trained_betas": betas.tolist(),
        }  # fmt: skip
        if "timestep_spacing" in template.config:
            options["timestep_spacing"] = "trailing"
        scheduler = type(template).from_config(template.config, **options)
        for name, value in {
            "betas": betas,
            "alphas": 1 - betas,
            "alphas_cumprod": abar,
            "alpha_t": abar.sqrt(),
            "sigma_t": (1 - abar).sqrt(),
            "lambda_t": log_snr / 2,
        }.items():
            if hasattr(scheduler, name):
                setattr(scheduler, name, value)
        n = len(abar) // refine
        if "timestep_spacing" in options:
            scheduler.set_timesteps(n)
        else:
            scheduler.set_timesteps(timesteps=list(range(len(abar) - 1, -1, -refine)))
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = _exactly(scheduler.sigmas, (-log_snr / 2).exp())
        return scheduler

    def run(denoise: Denoise, x: Tensor, ts: Tensor) -> Tensor:
        to_zero = float(ts[-1]) == 0
        if to_zero and template.config.get("final_sigmas_type") == "sigma_min":
            raise ArgumentError(
                "ts ends at sigma = 0 and the scheduler, of final_sigmas_type='sigma_min', does "
                "not; end the grid above it"
            )
        levels = sde.log_snr(ts[:-1] if to_zero else ts).flip(0)
        # entry refine (i + 1) - 1 of the table is time i, counted from the data
        places = torch.arange(1, len(levels) + 1, dtype=torch.float64) * refine - 1
        table = _line(torch.arange(refine * len(levels), dtype=torch.float64), places, levels)
        scheduler = made(table)
        top = scheduler.timesteps[0]
        scaled = float(made(table).scale_model_input(torch.ones(1, 1), top)) < 0.999
        kind = template.config.get("prediction_type", "epsilon")

        def model(x: Tensor, t: Any) -> Tensor:
            time = sde.time_of_log_snr(_line(torch.as_tensor(float(t)), places, levels))
            return _predicted(kind, denoise(x, time), x, *sde.kernel(x, time))

        start, end = sde.alpha(ts[0]), sde.alpha(ts[-1])
        out = _loop(scheduler, model, x / start if scaled else x, to_zero)
        return out * end if scaled else out

    return run


def _edm_run(template: Any) -> Run:
    def run(denoise: Denoise, x: Tensor, ts: Tensor) -> Tensor:
        to_zero = float(ts[-1]) == 0
        sigmas = ts[:-1] if to_zero else ts
        ends = {"sigma_min": float(sigmas[-1]), "sigma_max": float(sigmas[0])}
        scheduler = type(template).from_config(template.config, **ends)
        scheduler.set_timesteps(len(sigmas))
        scheduler.sigmas = torch.cat((sigmas, sigmas.new_zeros(1)))
        scheduler.timesteps = scheduler.precondition_noise(sigmas)
        place = {float(t): s for t, s in zip(scheduler.timesteps, sigmas, strict=True)}
        one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

        def model(x: Tensor, t: Any) -> Tensor:
            s = place[float(t)]
            x = x / scheduler.precondition_inputs(one, s)
            skip, out = (scheduler.precondition_outputs(*v, s) for v in ((one, none), (none, one)))
            return (denoise(x, s) - skip * x) / out

        return _loop(scheduler, model, x, to_zero)

    return run


def _flow_run(template: Any) -> Run:
    def run(denoise: Denoise, x: Tensor, ts: Tensor) -> Tensor:
        to_zero = float(ts[-1]) == 0
        sigmas = (ts[:-1] if to_zero else ts).float()
        scheduler = type(template).from_config(template.config)
        scheduler.set_timesteps(len(sigmas))
        repeats = 2 if len(scheduler.timesteps) > len(sigmas) else 1  # Heun visits a time twice
        scheduler.sigmas = torch.cat(
            (sigmas[:1], sigmas[1:].repeat_interleave(repeats), sigmas.new_zeros(1))
        )
        scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
        for t in scheduler.timesteps if to_zero else scheduler.timesteps[:-1]:
            s = (t / scheduler.config.num_train_timesteps).double()
            velocity = (x - denoise(x, s)) / s
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        return x

    return run


def _ipndm_run(template: Any) -> Run:
    sde = VP()

    def run(denoise: Denoise, x: Tensor, ts: Tensor) -> Tensor:
        to_zero = float(ts[-1]) == 0
        times = ts[:-1] if to_zero else ts
        levels = [*sde.sigma(times).tolist(), 0.0]
        scheduler = type(template).from_config(template.config, trained_betas=levels)
        scheduler.set_timesteps(len(times))
        place = {float(t): times[i] for i, t in enumerate(scheduler.timesteps)}

        def model(x: Tensor, t: Any) -> Tensor:
            time = place[float(t)]
            return _predicted("v_prediction", denoise(x, time), x, *sde.kernel(x, time))

        return _loop(scheduler, model, x, to_zero)

    return run


def _predicted(kind: str, data: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of this prediction type returns where E[x_0 | x] = data."""
    noise = (x - alpha * data) / sigma
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise ArgumentError(
            f"prediction_type={kind!r} must be 'epsilon', 'sample' or 'v_prediction'"
        )
    return {"epsilon": noise, "sample": data, "v_prediction": alpha * noise - sigma * data}[kind]


def _line(at: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation, and extrapolation, of values at increasing places."""
    i = torch.searchsorted(places, at).clamp(1, len(places) - 1)
    weight = (at - places[i - 1]) / (places[i] - places[i - 1])
    return values[i - 1] + weight * (values[i] - values[i - 1])


def _exactly(rounded: Tensor, exact: Tensor) -> Tensor:
    """The float64 levels that float32 ones stand for; those that stand for none stay."""
    nearest = exact[(rounded.double()[:, None] - exact).abs().argmin(1)]
    return torch.where((rounded - nearest).abs() < 1e-5 * nearest, nearest, rounded.double())


def _not_default(scheduler: Any) -> dict[str, Any]:
    """The settings of a scheduler that are not its class's defaults."""
    defaults = {
        name: p.default
        for name, p in inspect.signature(type(scheduler).__init__).parameters.items()
    }
    return {
        name: value
        for name, value in scheduler.config.items()
        if name in defaults and value != defaults[name] and name != "self"
    }


def _name(name: str, options: dict[str, Any]) -> str:
    return name + "".join(f", {key}={value!r}" for key, value in options.items())
