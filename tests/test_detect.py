"""gaussian(sde): which SDEs are linear, how that is known, and what comes out."""

import math

import pytest
import torch
from drifts import col, draw, user
from problems import label
from sdeflow_plugins.solvers.dpmpp import DPMpp2M
from torch.nn import functional

from sdeflow import (
    OU,
    VP,
    ArgumentError,
    Denoiser,
    GaussianSDE,
    LinearSDE,
    LinearSystem,
    SdeflowError,
    ShapeError,
    denoising_loss,
    gaussian,
    probability_flow,
    sample,
)
from sdeflow.degree import Untraceable, degree
from sdeflow.grid import log_snr
from sdeflow.testing import GaussianData

DOUBLE = torch.float64
X, TIME = torch.randn(3, 4, dtype=DOUBLE), torch.tensor(0.3, dtype=DOUBLE)


def one(x, t):
    return torch.ones_like(x)


def off(a, b):
    """The largest difference, relative to the largest value."""
    a, b = (torch.as_tensor(v, dtype=DOUBLE) for v in (a, b))
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


# ---- a thousand random drifts


def error_of(case, made):
    """The largest relative error of the coefficients of what `gaussian` made."""
    truth, worst, d = case.truth, 0.0, case.shape[0]
    for t in torch.tensor([0.01, 0.29, 0.31, 0.7, 0.99], dtype=DOUBLE):
        g = torch.as_tensor(truth.g(t), dtype=DOUBLE)
        if isinstance(made, LinearSystem):
            x = torch.cat((torch.zeros(1, d, dtype=DOUBLE), torch.eye(d, dtype=DOUBLE)))
            f = made.drift(x, t)
            worst = max(
                worst, off(f[1:] - f[0], truth.F(t).mT), float((f[0] - truth.c(t)).abs().max())
            )
            spread = made.covariance_product(x, t, x)[1:]
            worst = max(worst, off(spread, torch.diag((g * g).expand(d))))
        else:
            f, g2 = made.rates(t)
            worst = max(worst, off(f, truth.f(t)), off(g2, g * g))
    return worst


def verdict(case):
    """ "" if `gaussian` is right about a case, else what is wrong."""
    try:
        made = gaussian(case.sde, case.shape)
    except SdeflowError as error:
        return "" if case.truth is None else f"{case.name}: refused, {error}"
    if case.truth is None:
        return f"{case.name}: accepted, {made.linearity}"
    if isinstance(made, GaussianSDE) == (case.truth.f is None):
        return f"{case.name}: a {type(made).__name__}"
    worst = error_of(case, made)
    return "" if worst <= 1e-12 else f"{case.name}: off by {worst:.1e}"


@pytest.mark.parametrize("block", range(10))
def test_no_verdict_on_a_thousand_random_drifts_is_wrong(block):
    wrong = [v for seed in range(100 * block, 100 * block + 100) if (v := verdict(draw(seed)))]
    assert not wrong, "\n".join(wrong)


def test_the_random_drifts_are_of_every_kind():
    cases = [draw(seed) for seed in range(1000)]
    linear = [case for case in cases if case.truth]
    assert 500 < len(linear) < 700
    kinds = {case.name.split(":")[0].split(" with")[0].split(" ")[0] for case in cases}
    assert kinds == {"scalar", "elementwise", "matrix", "offset", "drift", "diffusion", "late"}
    assert {len(case.shape) for case in linear} == {1, 2, 3}


def test_a_wrong_coefficient_would_be_seen():
    """The planted fault: the judge rejects rates that are off by 1e-11."""
    case = next(c for c in map(draw, range(100)) if c.truth and c.truth.f)
    made = gaussian(case.sde, case.shape)
    bad = case._replace(truth=case.truth._replace(f=lambda t: case.truth.f(t) * (1 + 1e-11)))
    assert error_of(case, made) <= 1e-12 < error_of(bad, made)


# ---- how it is known


def test_plain_torch_code_is_proved_by_tracing():
    made = gaussian(user(lambda x, t: -x * (1 + t), one))
    assert made.linearity.known == "traced"
    assert made.linearity.structure == made.linearity.noise == "scalar"


@pytest.mark.parametrize(
    "drift",
    [
        lambda x, t: -x * math.exp(-float(t)),
        lambda x, t: -x if t > 0.5 else -2 * x,
        lambda x, t: torch.from_numpy(-x.numpy()),
        lambda x, t: torch.relu(-x) - torch.relu(x),
        lambda x, t: -torch.tensor(x.tolist(), dtype=x.dtype),
    ],
    ids=["float(t)", "if t", "numpy", "relu", "lists"],
)
def test_code_that_cannot_be_traced_is_probed(drift):
    assert gaussian(user(drift, one)).linearity.known == "probed"


def test_a_declaration_is_believed():
    made = gaussian(user(lambda x, t: -x.clamp(-50, 50), one, linear=True))
    assert made.linearity.known == "declared"
    assert off(made.alpha(TIME), math.exp(-0.3)) < 1e-13


def test_a_declaration_against_plain_evidence_is_refused():
    with pytest.raises(ArgumentError, match="says linear = True, but at t=0.4 .* off by 0.0"):
        gaussian(user(lambda x, t: -torch.sin(x), one, linear=True))
    with pytest.raises(ArgumentError, match="the diffusion of User is off by"):
        gaussian(user(lambda x, t: -x, lambda x, t: x, linear=True))


def test_an_sde_with_a_kernel_is_returned_as_it_is():
    for sde in (VP(), gaussian(user(lambda x, t: -x, one))):
        assert gaussian(sde) is sde


# ---- the degree of a trace


def in_place(x, t):
    y = x.clone()
    y[:, 0] = 0
    return y.mul_(t)


def through_a_view(x, t):
    out = torch.zeros_like(x)
    row = out[:, 0]
    row.copy_(x[:, 0] ** 2)
    return out


def quartic(x, t):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return torch.autograd.grad((y**4).sum(), y)[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, t: t.sqrt() * torch.ones_like(x), 0),
        (lambda x, t: 2.0, 0),
        (in_place, 1),
        (lambda x, t: functional.conv1d(x[:, None], torch.ones(1, 1, 3).double()), 1),
        (lambda x, t: torch.fft.ifft(torch.fft.fft(x)).real, 1),
        (lambda x, t: torch.vmap(lambda v: v - v.mean())(x), 1),
        (lambda x, t: torch.linalg.solve(torch.eye(4).double() * (1 + t), x.mT).mT, 1),
        (lambda x, t: (x - 1) * x, 2),
        (through_a_view, 2),
        (quartic, 3),
        (lambda x, t: x / (1 + x * x), math.inf),
        (lambda x, t: torch.where(x > 1e9, 0, x), math.inf),
        (lambda x, t: x.long().double(), math.inf),
        (lambda x, t: torch.div(x, 2, rounding_mode="floor"), math.inf),
        (lambda x, t: x * torch.rand_like(x), math.inf),
    ],
)
def test_a_trace_knows_the_degree(function, expected):
    assert degree(function, X, TIME).degree == expected


def test_a_trace_names_the_operation_that_is_not_linear():
    assert degree(lambda x, t: 2 * torch.tanh(x) + x, X, TIME).because == "tanh"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: x if x.sum() > 0 else 2 * x,
        lambda x, t: x * float(t),
        lambda x, t: torch.from_numpy(x.numpy()),
        lambda x, t: torch.zeros(3, 4).copy_(x.detach()).numpy(),
        lambda x, t: undefined,  # noqa: F821
    ],
    ids=["branch", "number", "numpy", "numpy of a buffer", "bug"],
)
def test_reading_a_value_ends_a_trace(function):
    with pytest.raises(Untraceable):
        degree(function, X, TIME)


def test_writing_into_a_tensor_from_outside_ends_a_trace():
    kept = torch.zeros(3, 4, dtype=DOUBLE)
    with pytest.raises(Untraceable, match="outside the function"):
        degree(lambda x, t: kept.copy_(x), X, TIME)


# ---- refusals


@pytest.mark.parametrize(
    ("drift", "message"),
    [
        (lambda x, t: -x.clamp(-50, 50), r"not linear in x: at t=.*\|x\| up to.*clamp"),
        (lambda x, t: -torch.tanh(1e-3 * x) / 1e-3, "not linear in x: .*tanh"),
        (lambda x, t: -x + 1e-9 * x**3, "not linear in x: .*power 3"),
        (lambda x, t: torch.where(x > 1e9, 0 * x, x), r"off by a factor of"),
        (lambda x, t: -x + 1e-12 * x.abs() * 100, "not linear"),
        (lambda x, t: torch.where((x > 77.1) & (x < 77.2), 2 * x, x), r"\|x\| up to 77"),
        (lambda x, t: -x + 1e-300 * torch.exp(x), "not linear"),
        (lambda x, t: x * (x.norm(dim=-1, keepdim=True) > 1e6), "not linear"),
        (lambda x, t: -x.sqrt(), "is not finite at t="),
        (lambda x, t: -x * torch.rand(()), "another value when called again"),
        (lambda x, t: x.mean(0) - x, "depends on the other samples of the batch"),
        (lambda x, t: -x + 1e-9 * x.mean(), "depends on the other samples of the batch"),
        (lambda x, t: x / len(x), "depends on the size of the batch"),
        (lambda x, t: x * torch.arange(len(x))[:, None], "depends on the"),
        (lambda x, t: x.new_zeros(len(x), 99), "has shape .*; it must broadcast to"),
        (lambda x, t: undefined, "raises NameError"),  # noqa: F821
    ],
)
def test_drifts_that_are_not_linear_are_refused(drift, message):
    with pytest.raises(ArgumentError, match=message):
        gaussian(user(drift, one))


def test_a_nonlinearity_that_lasts_a_moment_is_found():
    def drift(x, t):
        return -x + x**3 * ((t > 0.7001) & (t < 0.7003))

    with pytest.raises(ArgumentError, match="not linear in x: at t=0.700"):
        gaussian(user(drift, one))


def test_a_nonlinearity_beyond_all_states_is_found():
    with pytest.raises(ArgumentError, match="not linear in x"):
        gaussian(user(lambda x, t: -x + 1e-100 * x**3, one))


@pytest.mark.parametrize(
    "diffusion",
    [lambda x, t: x, lambda x, t: 1 + 1e-9 * torch.tanh(x), lambda x, t: 1 + 1e-20 * x * x],
)
def test_noise_that_depends_on_the_state_is_refused(diffusion):
    with pytest.raises(ArgumentError, match="diffusion of User depends on x: at t=.* it changes"):
        gaussian(user(lambda x, t: -x, diffusion))


def test_no_noise_is_no_kernel():
    with pytest.raises(ArgumentError, match="is zero at all times"):
        gaussian(user(lambda x, t: -x, lambda x, t: torch.zeros_like(x)))


@pytest.mark.parametrize("sde", [None, VP, probability_flow(OU(), lambda x, t: -x)], ids=label)
def test_only_forward_sdes_are_examined(sde):
    with pytest.raises(ArgumentError, match="must be a forward SDE"):
        gaussian(sde)


def test_overflow_does_not_make_a_linear_drift_nonlinear():
    made = gaussian(user(lambda x, t: -(1e200 * x) * (1e-200 * (1 + 0 * float(t))), one))
    assert off(made.rates(TIME)[0], -1.0) < 1e-12
    made = gaussian(user(lambda x, t: -(1e290 * x) / 1e290 * math.exp(float(t)), one))
    assert made.linearity.known == "probed"


# ---- shapes and structures


def test_channels_keep_the_shape_that_broadcasts():
    rates = torch.tensor([1.0, 2, 3], dtype=DOUBLE).reshape(3, 1, 1)
    sde = user(lambda x, t: -rates * col(t, x) * x, one)
    made = gaussian(sde, (3, 8, 8))
    assert made.linearity.structure == "elementwise"
    assert made.alpha(TIME).shape == (3, 1, 1)
    assert made.perturb(torch.ones(2, 3, 5, 5), TIME, torch.ones(2, 3, 5, 5)).shape == (2, 3, 5, 5)
    assert off(made.alpha(TIME), torch.exp(-rates * 0.3**2 / 2)) < 1e-13
    with pytest.raises(ShapeError, match="give x, an example state"):
        gaussian(sde)


def test_an_example_state_is_as_good_as_its_shape():
    sde = user(lambda x, t: -x * torch.arange(1, 5), one)
    by_shape, by_state = gaussian(sde, (4,)), gaussian(sde, X)
    assert torch.equal(by_shape.alpha(TIME), by_state.alpha(TIME))
    for bad in (torch.zeros(3), (), (0,)):
        with pytest.raises(ShapeError, match=r"x.* must be"):
            gaussian(sde, bad)


def test_components_that_differ_ask_for_the_shape():
    for drift in (lambda x, t: x.roll(1, -1) - x, lambda x, t: 1 - x):
        with pytest.raises(ShapeError, match="runs for states of several shapes; give"):
            gaussian(user(drift, one))
        assert isinstance(gaussian(user(drift, one), (4,)), LinearSystem)


def test_a_matrix_finds_its_own_size():
    A = torch.tensor([[0.0, 1.0], [-1.0, -0.5]], dtype=DOUBLE)
    made = gaussian(user(lambda x, t: x @ A.T, one))
    assert isinstance(made, LinearSystem) and made.constant
    assert off(made.transition(0.7).matrix, torch.matrix_exp(0.7 * A)) < 1e-14


def test_a_matrix_along_axis_1_serves_every_place():
    A = torch.tensor([[-1.0, 1.0], [0.0, -0.5]], dtype=DOUBLE)
    made = gaussian(
        user(lambda x, t: torch.einsum("ij,bjhw->bihw", A, x) * (1 + t), one), (2, 3, 3)
    )
    assert not made.constant and made.linearity.known == "traced"
    assert off(made.transition(1.0).matrix, torch.matrix_exp(1.5 * A)) < 1e-13
    with pytest.raises(ArgumentError, match="write it for flat states"):
        gaussian(user(lambda x, t: x - x.mean((-1, -2), keepdim=True), one), (2, 3, 3))


def test_the_offset_of_a_bridge_becomes_a_linear_system():
    """dx = 2 (3 - x) dt + dw: the mean is 3 + (x_0 - 3) exp(-2t)."""
    made = gaussian(user(lambda x, t: 2 * (3 - x), one), (1,))
    assert made.linearity.offset
    x0 = torch.tensor([[5.0]], dtype=DOUBLE)
    assert off(made.mean(x0, 0.5), 3 + 2 * math.exp(-1.0)) < 1e-13


@pytest.mark.parametrize("offset", [1e6, 1e9])
def test_a_large_offset_does_not_drown_the_slope(offset):
    made = gaussian(user(lambda x, t: offset - 0.3 * x, one), (2,))
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=DOUBLE)
    assert off(made.F(TIME), -0.3 * torch.eye(2, dtype=DOUBLE)) < 1e-12
    assert off(made.drift(x, TIME)[1], offset) < 1e-15


@pytest.mark.parametrize(
    ("noise", "diffusion", "expected"),
    [
        ("scalar", lambda x, t: torch.ones_like(x), [[1.0, 1.0], [1.0, 1.0]]),
        ("matrix", lambda x, t: torch.ones(len(x), 2, 1).double(), [[1.0, 1.0], [1.0, 1.0]]),
    ],
)
def test_noise_shared_by_components_makes_a_linear_system(noise, diffusion, expected):
    made = gaussian(user(lambda x, t: -x, diffusion, noise=noise), (2,))
    eye = torch.eye(2, dtype=DOUBLE)
    assert off(made.covariance_product(eye, TIME, eye), expected) < 1e-15


def test_float32_modules_are_read_in_float32():
    layer = torch.nn.Linear(3, 3, bias=False)
    made = gaussian(user(lambda x, t: layer(x), one))
    assert made.linearity.known == "traced"
    assert off(made.F(TIME).detach(), layer.weight.detach()) < 1e-6


def test_T_and_t_min_are_those_of_the_sde():
    made = gaussian(user(lambda x, t: -x, one, T=7.0, t_min=0.25))
    assert (made.T, made.t_min) == (7.0, 0.25)


# ---- the result is a Gaussian SDE like any other


def test_vp_from_its_drift_and_diffusion_is_vp():
    vp = VP()
    made = gaussian(user(vp.drift, vp.diffusion))
    t = torch.linspace(1e-3, 1, 50, dtype=DOUBLE)
    assert off(made.alpha(t), vp.alpha(t)) < 1e-13
    assert off(made.sigma(t), vp.sigma(t)) < 1e-13


def test_solvers_grids_denoisers_and_losses_take_the_result():
    vp = VP()
    made = gaussian(user(vp.drift, vp.diffusion))
    mean, variance = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.1, 2.0]).double()
    x = [
        sample(
            probability_flow(sde, GaussianData(sde, mean, variance)),
            (4, 2),
            solver=DPMpp2M(),
            grid=log_snr(sde, 10),
            seed=0,
            dtype=DOUBLE,
        ).x
        for sde in (vp, made)
    ]
    assert off(x[1], x[0]) < 1e-9
    x0, noise = torch.randn(2, 8, 2)
    loss = denoising_loss(Denoiser(lambda x, t: 0 * x, made), x0, TIME.expand(8), noise)
    assert loss.isfinite().all()


def test_gradients_reach_the_parameters_of_the_drift():
    rate = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    made = gaussian(user(lambda x, t: -rate * x, one))
    assert isinstance(made, LinearSDE)
    (slope,) = torch.autograd.grad(made.alpha(TIME), rate)
    assert off(slope, -0.3 * math.exp(-0.21)) < 1e-12
