"""What the drivers refuse: before the first evaluation where it can be seen, at its step else."""

import math

import pytest
import torch
from problems import label
from sdeflow_plugins.solvers.ddim import DDIM
from sdeflow_plugins.solvers.ddpm import DDPM
from sdeflow_plugins.solvers.dpmpp import DPMpp2M, DPMpp2S

from sdeflow import (
    GBM,
    OU,
    VE,
    VP,
    ArgumentError,
    Denoiser,
    EulerMaruyama,
    GridError,
    Heun,
    NonFiniteError,
    PairingError,
    PluginError,
    RectifiedFlow,
    ReverseSDE,
    SdeflowError,
    ShapeError,
    TorchDiffEq,
    TorchSDE,
    UnknownNameError,
    integrate,
    probability_flow,
    reverse,
    sample,
    trajectory,
)
from sdeflow.grid import log_snr, uniform

TS = torch.tensor([0.8, 0.7, 0.5, 0.4, 0.2], dtype=torch.float64)
STEPPING = (EulerMaruyama(), Heun(), DDIM(), DDPM(), DPMpp2S(), DPMpp2M())


def never(x, t):
    raise AssertionError("the score was evaluated")


def start(shape=(4, 3)):
    return torch.randn(shape)


# ---- non-finite values


def breaking(value, sample=2):
    """A network whose answer for one sample is `value` at the times 0.5 and 0.45 of TS."""

    def net(x, t):
        out = torch.tanh(x)
        if 0.41 < float(t.flatten()[0]) < 0.55:
            out[sample] = value
        return out

    return net


@pytest.mark.parametrize("solver", STEPPING, ids=label)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"keep": True}, {"grad": True}], ids=label)
def test_a_fault_of_the_score_is_named_with_its_step_and_time(solver, value, options):
    """From 0.5 to 0.4; a step from 0.7 that looks ahead to 0.5 meets it already."""
    process = reverse(VP(), Denoiser(breaking(value), VP(), "v"))
    ahead = isinstance(solver, Heun)
    where = "step 2 of 4, from t=0.7 to 0.5" if ahead else "step 3 of 4, from t=0.5 to 0.4"
    with pytest.raises(NonFiniteError, match=f"{where} .*{type(solver).__name__}.*check the score"):
        integrate(process, start(), TS, solver, seed=1, **options)


@pytest.mark.parametrize("solver", STEPPING, ids=label)
def test_a_trajectory_never_yields_a_faulty_state(solver):
    process = reverse(VP(), Denoiser(breaking(math.nan), VP(), "v"))
    seen = []
    with pytest.raises(NonFiniteError, match="of 4, from t="):
        for t, x in trajectory(process, start(), TS, solver, seed=1):
            assert x.isfinite().all()
            seen.append(float(t))
    assert seen == ([0.7] if isinstance(solver, Heun) else [0.7, 0.5])


def test_a_fault_is_found_though_the_last_step_forgets_the_state():
    """The step to sigma = 0 returns D, which here is finite again."""

    def net(x, t):
        return torch.full_like(x, math.nan) if 0.4 < float(t[0]) < 0.6 else torch.ones_like(x)

    process = reverse(VP(), Denoiser(net, VP(), "data"))
    ts = torch.tensor([0.8, 0.5, 0.3, 0.0], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="step 2 of 3, from t=0.5 to 0.3"):
        list(trajectory(process, start(), ts, DDIM(), seed=1))
    with pytest.raises(NonFiniteError, match="step 2 of 3, from t=0.5 to 0.3"):
        integrate(process, start(), ts, DDIM(), seed=1)


@pytest.mark.parametrize("solver", [DDIM(), EulerMaruyama(), TorchSDE()], ids=label)
def test_a_fault_of_the_noise_is_found_too(solver):
    with pytest.raises(NonFiniteError, match="the state became NaN or infinite"):
        integrate(
            reverse(VP(), lambda x, t: -x), start(), TS, solver, noise=lambda t, s: start() / 0
        )


def test_an_explosion_is_named_where_it_overflows():
    process = probability_flow(VE(), lambda x, t: -1e20 * x)
    with pytest.raises(NonFiniteError, match=r"at step \d of 8"):
        integrate(process, start(), log_snr(VE(), 8), EulerMaruyama())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [DDIM(), TorchSDE(), TorchDiffEq()], ids=label)
def test_a_faulty_start_is_refused(value, solver):
    x = start()
    x[1, 2] = value
    process = ReverseSDE(VP(), never, 0.0 if isinstance(solver, TorchDiffEq) else 1.0)
    with pytest.raises(NonFiniteError, match="x, the state to start from, holds NaN or infinite"):
        integrate(process, x, TS, solver)


# ---- arguments of integrate and trajectory

NOISY, FLOW = reverse(VP(), never), probability_flow(VP(), never)
UP = TS.flip(0)
WRONG = {
    # case: process, x, ts, solver, options, error, message
    "down on a forward SDE": (
        (OU(), start(), TS, EulerMaruyama(), {}),
        (PairingError, r"ts decreases, and OU is a forward SDE: .*reverse\(sde, score\)"),
    ),
    "up on a reverse SDE": (
        (NOISY, start(), UP, DDIM(), {}),
        (PairingError, r"ts increases, and a reverse SDE .*probability_flow"),
    ),
    "a reverse of a reverse of time, from torchsde": (
        (NOISY, start(), UP, TorchSDE(), {}),
        (PairingError, "ts increases"),
    ),
    "beyond T": (
        (NOISY, start(), [1.5, 0.5], DDIM(), {}),
        (GridError, r"ts reaches 1.5, beyond the last time T = 1.0"),
    ),
    "forward beyond T": (
        (GBM(), start(), [0.0, 1.2], EulerMaruyama(), {}),
        (GridError, r"ts reaches 1.2, beyond the last time T = 1.0"),
    ),
    "negative time": ((NOISY, start(), [0.5, -0.1], DDIM(), {}), (GridError, r"ts\[1\]=-0.1")),
    "NaN time": ((NOISY, start(), [0.5, math.nan], DDIM(), {}), (GridError, r"ts\[1\]=nan")),
    "repeated time": (
        (NOISY, start(), [0.5, 0.3, 0.3], DDIM(), {}),
        (GridError, r"strictly monotone; ts\[1\]=0.3 is followed by ts\[2\]=0.3"),
    ),
    "zigzag": ((FLOW, start(), [0.5, 0.1, 0.3], DDIM(), {}), (GridError, "strictly monotone")),
    "one time": ((NOISY, start(), [0.5], DDIM(), {}), (GridError, "at least two times")),
    "a grid of rank 2": ((NOISY, start(), TS[None], DDIM(), {}), (GridError, r"\(1, 5\)")),
    "seed and noise": (
        (NOISY, start(), TS, DDIM(), {"seed": 1, "noise": lambda t, s: 0}),
        (ArgumentError, "seed and noise are two sources of the same thing"),
    ),
    "negative seed": ((NOISY, start(), TS, DDIM(), {"seed": -1}), (ArgumentError, "seed=-1")),
    "seed of a fraction": ((NOISY, start(), TS, DDIM(), {"seed": 1.5}), (ArgumentError, "1.5")),
    "seed True": ((NOISY, start(), TS, DDIM(), {"seed": True}), (ArgumentError, "seed=True")),
    "too few seeds": (
        (NOISY, start(), TS, DDIM(), {"seed": [1, 2]}),
        (ArgumentError, "seed has 2 entries for a batch of 4"),
    ),
    "a list": ((NOISY, [1.0], TS, DDIM(), {}), (ShapeError, "x is list; it must be a floating")),
    "None": ((NOISY, None, TS, DDIM(), {}), (ShapeError, "x is NoneType")),
    "integers": (
        (NOISY, torch.ones(4, 3, dtype=torch.int64), TS, DDIM(), {}),
        (ShapeError, r"x is \(4, 3\) torch.int64; it must be a floating-point tensor"),
    ),
    "complex numbers": (
        (NOISY, torch.ones(4, 3, dtype=torch.complex64), TS, DDIM(), {}),
        (ShapeError, "complex64"),
    ),
    "no batch": ((NOISY, torch.tensor(1.0), TS, DDIM(), {}), (ShapeError, r"shape \(B, \*\)")),
    "a class for a solver": (
        (NOISY, start(), TS, DDIM, {}),
        (ArgumentError, r"must be a Solver, such as DDIM\(\), or a name"),
    ),
    "None for a solver": ((NOISY, start(), TS, None, {}), (ArgumentError, "solver=None")),
    "an unknown name": (
        (NOISY, start(), TS, "ddmi", {}),
        (UnknownNameError, r"solver 'ddmi' is unknown; did you mean .*'ddim'"),
    ),
    "an infinite coefficient in a plain loop": (
        (
            probability_flow(RectifiedFlow(), Denoiser(never, RectifiedFlow(), "noise")),
            start(),
            uniform(RectifiedFlow(), 5),
            DDIM(),
            {},
        ),
        (GridError, "infinite coefficient"),
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused_before_the_first_evaluation(arguments, expected):
    process, x, ts, solver, options = arguments
    error, message = expected
    with pytest.raises(error, match=message) as caught:
        integrate(process, x, ts, solver, **options)
    assert isinstance(caught.value, SdeflowError)
    with pytest.raises(error, match=message):
        next(trajectory(process, x, ts, solver, **options))


# ---- arguments of sample


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, False, None, "ten", math.nan])
def test_steps_must_be_a_whole_number_above_zero(steps):
    with pytest.raises(ArgumentError, match=r"^steps=.* such as 20"):
        sample(NOISY, (2, 3), solver="ddim", steps=steps)


def test_one_step_is_enough_and_numpy_integers_count():
    np = pytest.importorskip("numpy")
    process = reverse(VP(), Denoiser(lambda x, t: x, VP(), "v"))
    assert sample(process, (2, 3), solver="ddim", steps=1, seed=1).nfe == 1
    assert sample(process, (2, 3), solver="ddim", steps=np.int64(3), seed=np.int64(1)).nfe == 3


@pytest.mark.parametrize(
    "shape", [16, (), (2.5,), (True, 3), (-1, 3), "23", (2, None), None], ids=label
)
def test_a_wrong_shape_is_refused_by_name(shape):
    with pytest.raises(ShapeError, match=r"shape=.* must be a tuple \(B, \*\) of whole numbers"):
        sample(NOISY, shape, solver="ddim", steps=2)


@pytest.mark.parametrize("shape", [[2, 3], torch.Size((2, 3)), (2, 3)], ids=label)
def test_any_sequence_is_a_shape(shape):
    process = reverse(VP(), lambda x, t: -x)
    assert sample(process, shape, solver="ddim", steps=2, seed=1).x.shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "dpmpp"}, UnknownNameError, "did you mean 'dpmpp_1s'"),
        ({"solver": "euler_maruyam"}, UnknownNameError, "'euler_maruyama'"),
        ({"solver": ""}, UnknownNameError, "solver '' is unknown; there are: .*ddim"),
        ({"grid": "karas"}, UnknownNameError, "grid 'karas' is unknown; did you mean 'karras'"),
        ({"grid": UP}, GridError, r"times must decrease, from noise to data"),
        ({"grid": lambda sde, n: [0.5]}, GridError, "at least two times"),
        ({"grid": None}, GridError, "ts"),
        ({"dtype": torch.int32}, ShapeError, "dtype|floating"),
        ({"seed": -3}, ArgumentError, "seed=-3"),
        ({"solver": "ddpm", "process": FLOW}, PairingError, r"eta = 1; .*DDIM\(\)"),
        ({"solver": "torchdiffeq"}, PairingError, "probability_flow"),
        ({"process": never}, PairingError, "must be a reverse process"),
        ({"process": reverse(GBM(), never), "grid": "uniform"}, PairingError, "no Gaussian kernel"),
    ],
    ids=label,
)
def test_sample_names_the_argument_and_the_remedy(options, error, message):
    arguments = {"process": NOISY, "shape": (2, 3), "solver": "ddim", "steps": 4} | options
    with pytest.raises(error, match=message) as caught:
        sample(**arguments)
    assert isinstance(caught.value, SdeflowError)


def test_unknown_names_are_lookup_errors_and_plugin_errors():
    with pytest.raises(LookupError) as caught:
        sample(NOISY, (2, 3), solver="nothing_like_it")
    assert isinstance(caught.value, PluginError)


@pytest.mark.parametrize("shape", [(4, 2), (1, 3), (4, 3, 1), ()], ids=label)
@pytest.mark.parametrize("solver", [DDIM(), DPMpp2S(), EulerMaruyama(), TorchSDE()], ids=label)
def test_injected_noise_of_the_wrong_shape_is_refused(solver, shape):
    process = reverse(VP(), Denoiser(lambda x, t: x, VP(), "v"))
    for fake in (torch.ones(shape), 0.0, None):
        with pytest.raises(ShapeError, match=r"noise\(t, s\) returned .*\(4, 3\)"):
            integrate(process, start(), TS, solver, noise=lambda t, s, z=fake: z)


def test_injected_noise_is_taken_in_any_dtype():
    process, x = reverse(VP(), Denoiser(lambda x, t: x, VP(), "v")), start()
    z = start().double()
    for solver in (DDIM(), EulerMaruyama(), TorchSDE()):
        for grad in (False, True):
            solution = integrate(process, x, TS, solver, noise=lambda t, s: z, grad=grad)
            assert solution.x.dtype == torch.float32
