"""Guidance, on a Gaussian mixture whose class scores are known: the tilted density to 1e-10."""

import math

import pytest
import torch
from sdeflow_plugins.guidance import Within, cfg, classifier_guided, compose, guide, labelled

from sdeflow import EDM, VE, VP, Denoiser, RectifiedFlow, SubVP, get
from sdeflow.denoiser import PREDICTIONS
from sdeflow.errors import ArgumentError, GridError, PairingError, ShapeError
from sdeflow.reverse import probability_flow, reverse
from sdeflow.sample import sample
from sdeflow.testing.problems import GaussianData, MixtureData

SDES = [VP(), SubVP(), VE(), EDM(), RectifiedFlow()]
CLASS = torch.tensor([0, 0, 1, 2, 2])  # of each of the five components
K = 3
TOLERANCE = 1e-10


def named(values):
    return pytest.mark.parametrize("sde", values, ids=lambda sde: type(sde).__name__)


sdes, predictions = named(SDES), pytest.mark.parametrize("prediction", PREDICTIONS)


class Exact:
    """The network F(x, t, label) of a mixture with labelled components, in any parametrisation.

    It counts its calls and the rows of all of them.
    """

    classes = K

    def __init__(self, sde, prediction="data", variance=0.25):
        self.sde, self.mixture = sde, MixtureData.five(sde)
        self.variance = variance
        self.read = Denoiser(self, sde, prediction)
        self.calls = self.rows = 0

    def logits(self, x, t, label):
        """log of weight times density of every component at time t; -inf outside the class."""
        a, s = self.sde.kernel(x, t)
        a, s = (v.unsqueeze(-1) if v.ndim else v for v in (a, s))
        total = a * a * self.variance + s * s
        offset = x.unsqueeze(1) - a * self.mixture.means
        density = -(offset**2 / (2 * total)).sum(-1) - total.log().reshape(-1, 1)
        outside = (label[:, None] != CLASS) & (label[:, None] != K)
        return (density + self.mixture.weights.log()).masked_fill(outside, -math.inf)

    def log_density(self, x, t, label):
        """log p_t(x | label), up to a constant; label K is no class."""
        inside = (label[:, None] == CLASS) | (label[:, None] == K)
        share = (self.mixture.weights * inside).sum(1)
        return self.logits(x, t, label).logsumexp(1) - share.log()

    def data(self, x, t, label):
        a, s = (v.unsqueeze(-1) if v.ndim else v for v in self.sde.kernel(x, t))
        offset = x.unsqueeze(1) - a * self.mixture.means
        each = self.mixture.means + a * self.variance / (a * a * self.variance + s * s) * offset
        return (self.logits(x, t, label).softmax(1).unsqueeze(-1) * each).sum(1)

    def __call__(self, x, t, label=None):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        label = torch.full((len(x),), K) if label is None else label
        if self.read.prediction == "edm":  # the network sees c_in x and log(sigma/alpha)/4
            t = self.sde.time_of_log_snr(-8 * t)
            x = x / self.read.row(t).c_in.unsqueeze(-1)
        a, s = self.sde.kernel(x, t)
        data = self.data(x, t, label)
        row = self.read.row(t)
        p, q = (v.unsqueeze(-1) if v.ndim else v for v in (row.p, row.q))
        return p * data + q * (x - a * data) / s


def states(sde, n=24):
    """(x, t, label, w): times of sigma/alpha from 0.2 to 5, every class, weights from -1 to 4."""
    generator = torch.Generator().manual_seed(5)
    level = torch.logspace(math.log10(0.2), math.log10(5), n, dtype=torch.float64)
    t = sde.time_of_log_snr(-2 * level.log())
    x0 = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    x = sde.perturb(x0, t, torch.randn(n, 2, dtype=torch.float64, generator=generator))
    return x, t, torch.arange(n) % K, torch.linspace(-1, 4, n, dtype=torch.float64)


def slope(log_density, x):
    y = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(log_density(y).sum(), y)
    return found


def tilted(net, x, t, label, w):
    """grad log [p(x) (p(x|y)/p(x))^w], by autograd of the densities."""
    free = torch.full_like(label, K)
    return slope(
        lambda y: (1 - w) * net.log_density(y, t, free) + w * net.log_density(y, t, label), x
    )


def error(found, expected):
    return float(((found - expected).abs() / (1 + expected.abs())).max().detach())


# ---- the exact check


@sdes
@predictions
def test_cfg_gives_the_score_of_the_tilted_density(sde, prediction):
    net = Exact(sde, prediction)
    x, t, label, w = states(sde)
    for weight in (w, 0.0, 1.0, 2.5, -0.5):
        score = cfg(net.read, label, weight)
        assert error(score(x, t), tilted(net, x, t, label, weight)) < TOLERANCE
        assert type(score) is Denoiser and score.prediction == prediction
    one = cfg(net.read, 1, 3.0)
    expected = tilted(net, x[:4], t[9], torch.ones(4, dtype=torch.long), 3.0)
    assert error(one(x[:4], t[9]), expected) < TOLERANCE  # one class, and one time, for all


@sdes
def test_cfg_of_a_score_is_that_of_its_denoiser(sde):
    net = Exact(sde)
    x, t, label, w = states(sde)

    def score(x, t, label):
        return Denoiser(lambda x, t: net(x, t, label), sde, "data")(x, t)

    guided = cfg(score, label, w, null=K)
    assert error(guided(x, t), tilted(net, x, t, label, w)) < TOLERANCE


@sdes
def test_classifier_guidance_with_the_exact_classifier_is_cfg(sde):
    net = Exact(sde, "v")
    x, t, label, w = states(sde)

    def classifier(x, t):
        log_p = net.logits(x, t, torch.full((len(x),), K)).log_softmax(1)
        return torch.stack([log_p[:, k == CLASS].logsumexp(1) for k in range(K)], 1)

    for weight in (w, 2.5):
        guided = classifier_guided(net.read, classifier, label, weight)
        assert error(guided(x, t), cfg(net.read, label, weight)(x, t)) < TOLERANCE
    swapped = classifier_guided(net.read, classifier, (label + 1) % K, w)
    assert error(swapped(x, t), cfg(net.read, label, w)(x, t)) > 0.01


@sdes
def test_a_classifier_of_clean_data_is_asked_through_the_denoiser(sde):
    """On Gaussian data D is affine, with slope c, so grad log p(y | D(x)) = c W (onehot - p)."""
    x, t, label, w = states(sde)
    data = GaussianData(sde, torch.tensor([0.3, -0.2]).double(), torch.tensor([0.5, 1.5]).double())
    matrix = torch.randn(2, K, dtype=torch.float64)
    guided = classifier_guided(data, lambda x0: x0 @ matrix, label, w, of="denoised")
    a, s = sde.kernel(x, t)
    d = data.denoise(x, t)
    residual = torch.nn.functional.one_hot(label, K) - (d @ matrix).softmax(1)
    gain = a * data.variance / (a * a * data.variance + s * s)
    expected = d + w[:, None] * s**2 / a * gain * (residual @ matrix.T)
    assert error(guided.denoise(x, t), expected) < TOLERANCE


@sdes
@predictions
def test_autoguidance_gives_the_score_of_the_ratio_of_densities(sde, prediction):
    good, weak = Exact(sde, prediction), Exact(sde, prediction, variance=0.6)
    x, t, label, w = states(sde)
    expected = slope(
        lambda y: (1 - w) * weak.log_density(y, t, label) + w * good.log_density(y, t, label), x
    )
    guided = guide(labelled(good.read, label), labelled(weak.read, label), w)
    assert type(guided) is Denoiser and error(guided(x, t), expected) < TOLERANCE
    other = labelled(Exact(sde, "noise", variance=0.6).read, label)
    mixed = guide(labelled(good.read, label), other, w)  # of another parametrisation
    assert error(mixed(x, t), expected) < TOLERANCE
    wrong = guide(labelled(weak.read, label), labelled(good.read, label), w)
    assert error(wrong(x, t), expected) > 0.01


@sdes
def test_two_scores_are_guided_as_their_denoisers_are(sde):
    net = Exact(sde, "noise")
    x, t, label, w = states(sde)
    given, free = labelled(net.read, label), labelled(net.read, K)
    for good, weak in ((given, free), (lambda x, t: given(x, t), lambda x, t: free(x, t))):
        assert error(guide(good, weak, w)(x, t), tilted(net, x, t, label, w)) < TOLERANCE


@sdes
def test_compose_adds_the_pull_of_every_condition(sde):
    net = Exact(sde, "velocity")
    x, t, label, w = states(sde)
    other, v = (label + 1) % K, -0.5
    free = torch.full_like(label, K)

    def log_density(y):
        none = net.log_density(y, t, free)
        first, second = net.log_density(y, t, label), net.log_density(y, t, other)
        return none + w * (first - none) + v * (second - none)

    score = compose(net.read, [label, other], [w, v])
    assert error(score(x, t), slope(log_density, x)) < TOLERANCE
    alone = compose(net.read, [label], [w])
    assert error(alone(x, t), cfg(net.read, label, w)(x, t)) < TOLERANCE


# ---- planted faults: each must be rejected by the exact check


@pytest.mark.parametrize(
    "fault",
    [
        lambda net, label, w: cfg(net.read, label, w, convention="ho"),
        lambda net, label, w: cfg(net.read, label, w - 1),
        lambda net, label, w: cfg(net.read, label, w, null=0),
        lambda net, label, w: cfg(net.read, torch.full_like(label, K), w, null=label),
        lambda net, label, w: cfg(net.read, label.flip(0), w),
        lambda net, label, w: cfg(net.read, label, w.flip(0)),
        lambda net, label, w: Within(cfg(net.read, label, w), labelled(net.read, label), 0.5, 2.0),
    ],
    ids=["ho for scale", "w - 1", "null 0", "swapped", "labels", "weights", "interval"],
)
def test_a_planted_fault_is_rejected(fault):
    net = Exact(VP(), "v")
    x, t, label, w = states(VP())
    assert error(fault(net, label, w)(x, t), tilted(net, x, t, label, w)) > 0.01


def test_the_two_conventions_differ_by_one():
    net = Exact(VP())
    x, t, label, w = states(VP())
    for weight in (w, 0.0, 1.5):
        ours, theirs = (
            cfg(net.read, label, weight + 1),
            cfg(net.read, label, weight, convention="ho"),
        )
        assert torch.equal(ours(x, t), theirs(x, t))
    weak = labelled(net.read, K)
    pair = guide(labelled(net.read, label), weak, w, convention="ho")
    assert error(pair(x, t), tilted(net, x, t, label, 1 + w)) < TOLERANCE


# ---- solvers


SOLVERS = [
    # solver, eta, whether it runs from a tableau
    ("ddim", 0.0, True),
    ("dpmpp_2m", 0.0, True),
    ("unipc_v_3", 0.0, True),
    ("edm_heun", 0.0, True),
    ("ddpm", 1.0, True),
    ("dpmpp_3m", 1.0, True),
    ("predictor_corrector", 0.0, False),
    ("torchdiffeq_rk4", 0.0, False),
    ("torchsde_srk", 1.0, False),
    ("adaptive", 1.0, False),
]


def two_calls(net, label, w):
    """Guidance as it is written: a call for the class, a call for none; and by D, not by F."""

    def denoise(x, t):
        free, given = labelled(net.read, K), labelled(net.read, label)
        weight = w[:, None] if isinstance(w, torch.Tensor) else w
        return free.denoise(x, t) + weight * (given.denoise(x, t) - free.denoise(x, t))

    return Denoiser(denoise, net.sde, "data")


@pytest.mark.parametrize(("solver", "eta", "fused"), SOLVERS, ids=[row[0] for row in SOLVERS])
@pytest.mark.parametrize("prediction", ["v", "edm"])
def test_a_guided_run_is_that_of_two_calls(solver, eta, fused, prediction):
    sde = VP()
    net = Exact(sde, prediction)
    _, _, label, w = states(sde, 6)
    ts = get("grid", "log_snr")(sde, 6, t_min=0.05, t_max=0.95)
    if solver == "adaptive":
        solver = get("solver", solver, rtol=0.1, atol=0.1)
    settings = dict(solver=solver, grid=ts, seed=[3, 1, 4, 1, 5, 9], dtype=torch.float64)

    def run(score):
        return sample(reverse(sde, score, eta), (6, 2), **settings)

    net.calls = net.rows = 0
    batched = run(cfg(net.read, label, w))
    # A guided evaluation is one call of the network, of twice the batch, and counts once.
    assert net.calls == batched.nfe and net.rows == 12 * batched.nfe
    assert batched.fused == fused
    expected = run(two_calls(net, label, w)).x
    # (The steps of the corrector, and of the adaptive one, divide by norms, and magnify rounding.)
    divides = solver == "predictor_corrector" or not isinstance(solver, str)
    assert error(batched.x, expected) < (1e-10 if divides else 1e-12)
    assert error(run(cfg(net.read, label, w + 1)).x, expected) > 1e-3


@named([VE(), EDM(), RectifiedFlow()])
def test_guided_samples_lie_in_their_class(sde):
    """99 % of samples guided by 4 have the nearest component in their class."""
    net = Exact(sde, "data")
    label = torch.arange(300) % K
    for eta in (0.0, 1.0):
        guided = cfg(net.read, label, 4.0)
        x = sample(reverse(sde, guided, eta), (300, 2), steps=30, seed=0, dtype=torch.float64).x
        nearest = CLASS[torch.cdist(x, net.mixture.means).argmin(1)]
        assert (nearest == label).double().mean() > 0.99
        wrong = cfg(net.read, label.flip(0), 4.0)
        x = sample(reverse(sde, wrong, eta), (300, 2), steps=30, seed=0, dtype=torch.float64).x
        nearest = CLASS[torch.cdist(x, net.mixture.means).argmin(1)]
        assert (nearest == label).double().mean() < 0.5


def test_a_weight_of_one_or_none_is_one_batch():
    net = Exact(VP())
    x, t, label, _ = states(VP())
    for weight, expected in ((1.0, label), (1, label), (0.0, torch.full_like(label, K))):
        net.rows = 0
        found = cfg(net.read, label, weight).denoise(x, t)
        assert net.rows == len(x)
        assert torch.equal(found, labelled(net.read, expected).denoise(x, t))


def test_gradients_flow_through_classifier_guidance():
    net = Exact(VP(), "v")
    x, t, label, _ = states(VP(), 6)
    guided = classifier_guided(net.read, lambda x0: x0 @ torch.eye(2, K).double(), label, 2.0)
    guided = classifier_guided(
        net.read, lambda x0: (x0**2) @ torch.ones(2, K).double(), label, 2.0, of="denoised"
    )
    assert torch.autograd.gradcheck(lambda y: guided.denoise(y, t), (x.clone().requires_grad_(),))
    with torch.no_grad():
        assert not guided.denoise(x, t).requires_grad


# ---- the interval


@sdes
def test_within_an_interval_the_guided_model_is_asked_and_outside_it_the_conditional(sde):
    net = Exact(sde, "v")
    x, t, label, w = states(sde)
    given, guided = labelled(net.read, label), cfg(net.read, label, w)
    level = sde.sigma(t) / sde.alpha(t)
    inside = (level > 0.5) & (level <= 2)
    assert 3 < inside.sum() < 21
    part = Within(guided, given, 0.5, 2.0)
    weight = torch.where(inside, w, 1.0)
    assert error(part(x, t), tilted(net, x, t, label, weight)) < TOLERANCE
    inverted = Within(given, guided, 0.5, 2.0)
    assert error(inverted(x, t), tilted(net, x, t, label, weight)) > 0.01
    for k in range(0, 24, 5):  # a time for all, on the host: one model is asked
        net.rows = 0
        expected = guided if inside[k] else given
        found = part.denoise(x, t[k])
        assert net.rows == (48 if inside[k] else 24)
        assert torch.equal(found, expected.denoise(x, t[k]))


@pytest.mark.parametrize("prediction", ["v", "edm"])
def test_a_run_within_an_interval_takes_the_fused_road_and_fewer_rows(prediction):
    sde = VP()
    net = Exact(sde, prediction)
    label = torch.arange(4) % K
    part = Within(cfg(net.read, label, 3.0), labelled(net.read, label), 0.3, 3.0)
    net.calls = net.rows = 0
    run = sample(probability_flow(sde, part), (4, 2), steps=20, seed=0, dtype=torch.float64)
    due = int(part.active(run.ts[:-1]).sum())
    assert run.fused and run.nfe == net.calls == 20 and 0 < due < 20
    assert net.rows == 4 * 20 + 4 * due
    plain = sample(  # `adaptive` hands each sample a time of its own
        probability_flow(sde, part),
        (4, 2),
        solver=get("solver", "adaptive", rtol=1e-5, atol=1e-5),
        steps=20,
        seed=0,
        dtype=torch.float64,
    )
    fine = sample(probability_flow(sde, part), (4, 2), steps=400, seed=0, dtype=torch.float64)
    assert not plain.fused and float((plain.x - fine.x).abs().max()) < 0.02
    flow = probability_flow(sde, part.inside)  # without the interval it is another run
    always = sample(flow, (4, 2), steps=400, seed=0, dtype=torch.float64)
    assert float((always.x - fine.x).abs().max()) > 0.1


def test_nothing_waits_for_the_device():
    """A tensor on the device `meta` has no numbers: to ask for one is an error."""

    def net(x, t, label):
        assert x.device.type == t.device.type == label.device.type == "meta"
        return x * t[:, None] + label[:, None]

    net.classes = K
    read = Denoiser(net, VP(), "v")
    x = torch.zeros(4, 2, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        float(x.sum())
    label = torch.zeros(4, dtype=torch.long, device="meta")
    w = torch.full((4,), 2.0, device="meta")
    free = cfg(read, 1, 2.0)
    given = Denoiser(type(free.net)(net, label, K, w), VP(), "v")  # unchecked, as in the loop
    for t in (torch.tensor(0.3, dtype=torch.float64), torch.rand(4).double().to("meta")):
        for model in (free, given, Within(given, free, 0.1, 10.0), guide(given, free, 2.0)):
            assert model.denoise(x, t).shape == x.shape


# ---- refusals


def nothing(x, t, label=None):
    raise AssertionError("the network was asked before the arguments were checked")


nothing.classes = K
READ = Denoiser(nothing, VP(), "v")
plain = Denoiser(lambda x, t: x, VP(), "v")
unconditional = Denoiser(torch.nn.Identity(), VP(), "v")
unconditional.net.classes = 0

REFUSED = {
    "class 4": (
        lambda: cfg(READ, 4, 2.0),
        "label holds class 4; it must be in 0..2, or 3 for none",
    ),
    "class -1": (lambda: cfg(READ, torch.tensor([0, -1]), 2.0), "label holds class -1"),
    "half": (lambda: cfg(READ, 0.5, 2.0), "label=0.5 must be a whole number"),
    "floats": (lambda: cfg(READ, torch.zeros(3), 2.0), r"label has shape \(3,\) and dtype"),
    "nan": (lambda: cfg(READ, 0, math.nan), "w=nan must be a finite number"),
    "nan tensor": (lambda: cfg(READ, 0, torch.tensor([1, math.nan])), "one finite number"),
    "true": (lambda: cfg(READ, 0, True), "w=True must be"),
    "convention": (lambda: cfg(READ, 0, 2.0, convention="hoo"), "did you mean 'ho'"),
    "no classes told": (lambda: cfg(plain, 0, 2.0), "null=..."),
    "unconditional": (lambda: cfg(unconditional, 0, 2.0), "is unconditional"),
    "unconditional label": (lambda: labelled(unconditional, 0), "is unconditional"),
    "no model": (lambda: cfg(3, 0, 2.0), "must be a Denoiser"),
    "compose": (lambda: compose(READ, [0, 1], [2.0]), "have 2 and 1 entries"),
    "empty": (lambda: compose(READ, [], []), "have 0 and 0 entries"),
    "interval": (lambda: Within(READ, READ, 2.0, 1.0), "0 <= low < high"),
    "interval nan": (lambda: Within(READ, READ, math.nan, 1.0), "0 <= low < high"),
    "interval score": (lambda: Within(nothing, READ, 0.0, 1.0), "must be a Denoiser"),
    "guide": (lambda: guide(READ, 3, 2.0), "weak=3 must be"),
    "of": (lambda: classifier_guided(READ, nothing, 0, of="clean"), "of='clean' is unknown"),
    "classifier": (lambda: classifier_guided(READ, 3, 0), "callable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_refused_before_the_network_is_asked(name):
    call, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        call()


def test_two_models_must_share_their_sde():
    other = Denoiser(nothing, VE(), "v")
    for call in (lambda: guide(READ, other, 2.0), lambda: Within(READ, other, 0.0, 1.0)):
        with pytest.raises(PairingError, match="SDE"):
            call()


def test_labels_and_weights_must_fit_the_batch():
    x, t, label, w = states(VP(), 6)
    net = Exact(VP())
    with pytest.raises(ShapeError, match="label has 5 entries for a batch of 6"):
        cfg(net.read, label[:5], 2.0)(x, t)
    with pytest.raises(ShapeError, match="w has 5 entries for a batch of 6"):
        cfg(net.read, label, w[:5])(x, t)


def test_classifier_guidance_from_alpha_zero_is_refused():
    sde = RectifiedFlow()
    guided = classifier_guided(Denoiser(lambda x, t: x, sde, "v"), lambda x, t: x, 0)
    with pytest.raises(GridError, match="alpha, which is 0 at t=1"):
        guided.denoise(torch.zeros(2, 2), torch.tensor(1.0, dtype=torch.float64))
