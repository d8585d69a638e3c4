"""Training: the loop, its state and the recipe."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from sdeflow_plugins.build import build
from sdeflow_plugins.data import TensorData
from sdeflow_plugins.train import checkpoint, loop
from sdeflow_plugins.train import recipe as recipe_module
from sdeflow_plugins.train.engine import make_fabric
from sdeflow_plugins.train.loop import Record, learning_rate, looks, training
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.state import State, decay_of, follow
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from ztest import LIMIT

from sdeflow import VP, ArgumentError, NonFiniteError

SMALL = Recipe(
    data="moons",
    data_options={"n": 256},
    network="mlp",
    network_options={"width": 16, "depth": 1},
    steps=12,
    batch_size=32,
    warmup=2,
    device="cpu",
    log_every=4,
    save_every=6,
)
IMAGES = dataclasses.replace(
    SMALL, data="digits", data_options={}, network="unet", network_options={"channels": [8, 16]}
)


def begin(recipe):
    """(data set, state, fabric) before the first step."""
    dataset, fabric = recipe.make_dataset(), make_fabric(recipe)
    classes = recipe.count_classes(dataset)
    return dataset, State.fresh(recipe, dataset.shape, fabric.device, classes), fabric


def train_to_the_end(recipe):
    dataset, state, fabric = begin(recipe)
    return list(training(recipe, dataset, state, fabric)), state


def same(a, b):
    """Whether two states hold the same tensors, bit for bit."""
    (left, facts), (right, other) = a.pack(), b.pack()
    return (
        facts == other
        and left.keys() == right.keys()
        and all(torch.equal(left[name], right[name]) for name in left)
    )


# ---- the loop


@pytest.mark.parametrize("recipe", [SMALL, IMAGES], ids=["mlp", "unet"])
def test_training_lowers_the_loss(recipe):
    recipe = dataclasses.replace(recipe, steps=60, schedule="constant", lr=3e-3)
    records, _ = train_to_the_end(recipe)
    assert [r.step for r in records] == list(range(1, 61))
    first, last = records[:10], records[-10:]
    assert sum(r.loss for r in last) < 0.8 * sum(r.loss for r in first)


def test_a_seed_repeats_a_run_and_another_does_not():
    (first, a), (_, b) = train_to_the_end(SMALL), train_to_the_end(SMALL)
    other, c = train_to_the_end(dataclasses.replace(SMALL, seed=1))
    assert same(a, b) and not same(a, c)
    assert first[0].loss != other[0].loss


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    train_to_the_end(IMAGES)
    assert torch.equal(before, torch.get_rng_state())


DROPOUT = dataclasses.replace(IMAGES, network_options={"channels": [8, 16], "dropout": 0.3})
ALL = dataclasses.replace(
    DROPOUT, conditional=True, accumulate=4, ema_kind="power", posthoc_every=3, label_dropout=0.3
)


@pytest.mark.parametrize("recipe", [IMAGES, DROPOUT, ALL], ids=["plain", "dropout", "all"])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, recipe):
    _, whole = train_to_the_end(recipe)
    dataset, state, fabric = begin(recipe)
    for record in training(recipe, dataset, state, fabric):
        if record.step == 5:
            manifest = checkpoint.write(tmp_path, state.step, *state.pack())
            break
    _, resumed, fabric = begin(recipe)
    resumed.unpack(*checkpoint.read(manifest))
    assert resumed.step == 5 and not same(whole, resumed)
    records = list(training(recipe, dataset, resumed, fabric))
    assert records[0].step == 6 and same(whole, resumed)


@pytest.mark.parametrize("part", ["optimizer.", "ema.", "posthoc.0.05."])
def test_without_a_part_of_the_state_resuming_differs(part):
    """The planted fault of the test above."""
    recipe = dataclasses.replace(SMALL, posthoc_every=3)
    _, whole = train_to_the_end(recipe)
    dataset, state, fabric = begin(recipe)
    for record in training(recipe, dataset, state, fabric):
        if record.step == 5:
            tensors, facts = state.pack()
            break
    _, resumed, fabric = begin(recipe)
    fresh, _ = resumed.pack()
    lost = {name: fresh.get(name) for name in tensors if name.startswith(part)}
    kept = {n: t for n, t in {**tensors, **lost}.items() if t is not None}
    resumed.unpack(5, kept, facts)
    list(training(recipe, dataset, resumed, fabric))
    assert lost and not same(whole, resumed)


def test_a_loss_of_ones_own_gets_denoiser_and_batch():
    dataset, state, fabric = begin(SMALL)
    recipe, seen = dataclasses.replace(SMALL, accumulate=2), []

    def loss(denoiser, batch):
        seen.append(batch)
        x = denoiser.sde.perturb(batch.x0, batch.t, batch.noise)
        return (denoiser.denoise(x, batch.t) - batch.x0).abs().mean()

    records = list(training(recipe, dataset, state, fabric, loss))
    assert len(records) == 12 and len(seen) == 24
    assert all(b.x0.shape == b.noise.shape == (16, 2) and b.t.shape == (16,) for b in seen)
    assert len({float(torch.rand(1, generator=b.generator)) for b in seen[-1:]}) == 1
    _, usual = train_to_the_end(recipe)
    assert not same(state, usual)


def test_a_loss_of_ones_own_is_one_number():
    dataset, state, fabric = begin(SMALL)
    with pytest.raises(ArgumentError, match=r"loss returned shape \(32, 2\).*one number"):
        next(training(SMALL, dataset, state, fabric, lambda d, b: d.net(b.x0, b.t.float())))


def test_a_worker_process_reads_what_this_one_would():
    (_, here), (_, there) = (
        train_to_the_end(dataclasses.replace(SMALL, workers=n)) for n in (0, 2)
    )
    assert same(here, there)


def test_a_record_holds_tensors_and_is_read_as_numbers():
    record = Record(3, torch.tensor(0.25), torch.tensor(2), lr=0.5)
    assert dataclasses.astuple(record) == (3, 0.25, 2.0, 0.5)
    assert [type(v) for v in dataclasses.astuple(record)] == [int, float, float, float]
    assert record == Record(3, 0.25, 2.0, 0.5) != Record(3, 0.5, 2.0, 0.5)
    with pytest.raises(TypeError, match="loss"):
        Record(3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 0}, "is empty"),
        ({"shape": (3,)}, r"samples \(2,\) torch.float32; they must be \(3,\)"),
        ({"dtype": torch.uint8}, r"torch.uint8; they must be \(2,\) in floating point"),
    ],
    ids=["empty", "shape", "dtype"],
)
def test_data_that_cannot_be_trained_on_are_refused(change, words):
    n, shape, dtype = (change.get(k, v) for k, v in [("n", 9), ("shape", (2,)), ("dtype", None)])
    dataset, _, fabric = begin(SMALL)
    dataset = TensorData(torch.zeros(n, 2).to(dtype or torch.float32))
    state = State.fresh(SMALL, shape, fabric.device)
    with pytest.raises(ArgumentError, match=words):
        next(training(SMALL, dataset, state, fabric))


# ---- accumulation, clipping, compilation


@pytest.mark.parametrize("recipe", [SMALL, dataclasses.replace(IMAGES, conditional=True)])
def test_accumulated_parts_are_the_whole_batch_to_rounding(recipe):
    """The planted fault, a batch without its last sample, is farther off by a factor of 100."""

    def weights(**change):
        recipe_ = dataclasses.replace(recipe, steps=4, warmup=0, **change)
        records, state = train_to_the_end(recipe_)
        flat = torch.cat([p.detach().flatten() for p in state.network.parameters()])
        return flat, [r.loss for r in records]

    (whole, losses), (parts, their) = weights(), weights(accumulate=4)
    other, _ = weights(batch_size=31)
    gap, fault = (float((w - whole).abs().mean()) for w in (parts, other))
    assert their == pytest.approx(losses, rel=1e-5) and 0 < gap < 1e-2 * fault


def test_gradients_are_clipped(monkeypatch):
    recipe = dataclasses.replace(SMALL, clip=1e-3, steps=1)
    dataset, state, fabric = begin(recipe)
    norms = []
    step = state.optimizer.step

    def spy(*args, **kwargs):
        gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return step(*args, **kwargs)

    monkeypatch.setattr(state.optimizer, "step", spy)
    (record,) = training(recipe, dataset, state, fabric)
    assert record.grad_norm > 0.1
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_a_compiled_network_trains_alike_and_keeps_its_names(monkeypatch):
    """By the backend aot_eager, which traces forward and backward and needs no C++ compiler."""
    recipe = dataclasses.replace(SMALL, conditional=True, steps=3)
    records, plain = train_to_the_end(recipe)
    monkeypatch.setattr(loop, "BACKEND", "aot_eager")
    torch._dynamo.utils.counters.clear()
    their, state = train_to_the_end(dataclasses.replace(recipe, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert plain.pack()[0].keys() == state.pack()[0].keys()
    assert [r.loss for r in their] == pytest.approx([r.loss for r in records], rel=1e-4)


def test_compilation_needs_a_compiler(monkeypatch):
    dataset, state, fabric = begin(SMALL)
    monkeypatch.setattr(loop.shutil, "which", lambda _: None)
    with pytest.raises(ArgumentError, match="needs a C.. compiler and found none"):
        next(training(dataclasses.replace(SMALL, compile=True), dataset, state, fabric))


# ---- what is not finite


def bad_at(step, value):
    """A loss that is not finite at one step, in its gradient too."""

    def loss(denoiser, batch):
        loss.calls += 1
        x = denoiser.sde.perturb(batch.x0, batch.t, batch.noise)
        mean = (denoiser.denoise(x, batch.t) - batch.x0).square().mean()
        return mean * value if loss.calls == step else mean

    loss.calls = 0
    return loss


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_never_enters_the_average(bad):
    dataset, state, fabric = begin(SMALL)
    steps = training(SMALL, dataset, state, fabric)
    for _ in range(3):
        next(steps)
    before = {name: t.clone() for name, t in state.pack()[0].items()}
    dataset.x[:] = bad
    with pytest.raises(NonFiniteError, match=r"step 4 has loss (nan|inf).*still those of step 3"):
        list(steps)
    assert state.step == 3
    after = state.pack()[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


def as_on_a_gpu(monkeypatch):
    """Let the host look at log and save intervals alone, as it does on a GPU."""
    host = torch.device("cuda")
    monkeypatch.setattr(loop, "looks", lambda recipe, step, _: looks(recipe, step, host))


def test_where_the_host_looks_late_the_device_keeps_the_last_good_weights(monkeypatch):
    """Step 2 is bad and found at step 4; planted fault: an update that is sure of itself."""
    as_on_a_gpu(monkeypatch)
    recipe = dataclasses.replace(SMALL, posthoc_every=3)
    dataset, good, fabric = begin(recipe)
    next(training(recipe, dataset, good, fabric, bad_at(0, math.nan)))

    def run():
        dataset, state, fabric = begin(recipe)
        steps = training(recipe, dataset, state, fabric, bad_at(2, math.nan))
        assert [next(steps).step for _ in range(3)] == [1, 2, 3]
        with pytest.raises(NonFiniteError, match="step 2 had.*nothing is saved"):
            state.pack()
        with pytest.raises(NonFiniteError, match="step 2 has loss nan.*still those of step 1"):
            next(steps)
        return state

    def kept(state):
        (tensors, _), (expected, _) = state.pack(), good.pack()
        return state.step == 1 and all(torch.equal(tensors[n], expected[n]) for n in expected)

    assert kept(run())
    update = State.update
    monkeypatch.setattr(State, "update", lambda self, opt, sure: update(self, opt, True))
    assert not kept(run())


def test_the_host_looks_at_the_end_and_before_what_is_saved():
    recipe = dataclasses.replace(SMALL, steps=13)
    seen = [k for k in range(1, 14) if looks(recipe, k, torch.device("cuda"))]
    assert seen == [4, 6, 8, 12, 13]
    assert all(looks(recipe, k, torch.device("cpu")) for k in range(1, 14))


def test_the_device_decides_as_the_host_would(monkeypatch):
    _, host = train_to_the_end(SMALL)
    as_on_a_gpu(monkeypatch)
    _, device = train_to_the_end(SMALL)
    (a, _), (b, _) = host.pack(), device.pack()
    assert all(torch.allclose(a[n].double(), b[n].double(), rtol=1e-5, atol=1e-7) for n in a)


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its device: the reading of a number."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("every", [4, 1], ids=["late", "planted fault: each step"])
def test_no_step_waits_for_the_device(monkeypatch, every):
    as_on_a_gpu(monkeypatch)
    recipe = dataclasses.replace(SMALL, log_every=every, posthoc_every=2, accumulate=2)
    dataset, state, fabric = begin(recipe)
    steps = training(recipe, dataset, state, fabric)
    next(steps)
    with Waits() as waits:
        next(steps), next(steps)
    assert (waits.count == 0) == (every == 4)


# ---- classes


class Poles(TensorData):
    """Label k sits at (2k - 1, 2k - 1)/2: what the class says is half of all there is to know."""

    def __init__(self, n=64, labels=None, classes=0):
        side = torch.arange(n) % 2
        super().__init__((2 * side - 1)[:, None].repeat(1, 2) / 2, side)
        self.labels, self.classes = side if labels is None else labels, classes


CLASSES = dataclasses.replace(SMALL, conditional=True, label_dropout=0.25, batch_size=64)


def test_each_sample_comes_with_its_label_and_a_share_without():
    dataset, fabric, seen = Poles(), make_fabric(CLASSES), []
    state = State.fresh(CLASSES, (2,), fabric.device, CLASSES.count_classes(dataset))

    def loss(denoiser, batch):
        seen.append(batch)
        return denoiser.net(batch.x0, batch.t.float()).mean()

    list(training(CLASSES, dataset, state, fabric, loss))
    label, x0 = (torch.cat([getattr(b, name) for b in seen]) for name in ("label", "x0"))
    told = label < 2
    assert state.classes == 2 and set(label.tolist()) == {0, 1, 2}
    assert torch.equal(x0[told, 0] > 0, label[told] == 1)
    kept, n = 0.75, len(label)
    assert abs(float(told.float().mean()) - kept) < LIMIT * math.sqrt(kept * (1 - kept) / n)


def test_a_conditional_network_learns_its_classes():
    """Planted fault: with labels at random nothing is learned from them."""

    def distance(labels):
        recipe = dataclasses.replace(CLASSES, steps=150, lr=1e-2, schedule="constant")
        dataset, fabric = Poles(labels=labels), make_fabric(recipe)
        state = State.fresh(recipe, (2,), fabric.device, recipe.count_classes(dataset))
        list(training(recipe, dataset, state, fabric))
        x, t = torch.randn(200, 2), torch.tensor(0.98)
        network = state.ema.module
        with torch.no_grad():
            one, two = (
                recipe.make_denoiser(partial(network, label=torch.full((200,), k))).denoise(x, t)
                for k in (0, 1)
            )
        return float((two - one).mean())

    torch.manual_seed(0)
    assert 0.8 < distance(None) < 1.2
    assert abs(distance(torch.randint(2, (64,)))) < 0.5


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        (torch.tensor([-1, 1] * 32), 0, "run from -1 to 1; they must be in 0..1"),
        (torch.tensor([0, 2] * 32), 2, "run from 0 to 2; they must be in 0..1, for 2 classes"),
        (torch.zeros(63).long(), 2, r"shape \(63,\).*must be whole numbers \(64,\)"),
        (torch.zeros(64), 2, r"torch.float32; they must be whole numbers"),
        (torch.zeros(64, 1).long(), 2, r"shape \(64, 1\)"),
        (torch.zeros(0).long(), 2, "has no labels"),
    ],
    ids=["negative", "beyond", "few", "float", "column", "none"],
)
def test_labels_out_of_range_are_refused(labels, classes, words):
    with pytest.raises(ArgumentError, match=words):
        CLASSES.count_classes(Poles(labels=labels, classes=classes))


def test_classes_need_labels_and_a_network_that_takes_them(monkeypatch):
    moons = SMALL.make_dataset()
    moons.labels = None
    with pytest.raises(ArgumentError, match="'moons' has no labels: leave conditional out"):
        CLASSES.count_classes(moons)
    with pytest.raises(ArgumentError, match="classes=0 and conditional=True"):
        CLASSES.make_network((2,))
    with pytest.raises(ArgumentError, match="classes=3 and conditional=False"):
        SMALL.make_network((2,), 3)
    with pytest.raises(ArgumentError, match="use conditional=True"):
        dataclasses.replace(SMALL, network_options={"classes": 3})
    monkeypatch.setattr(recipe_module, "option_names", lambda _: {"shape", "width"})
    with pytest.raises(ArgumentError, match="network 'mlp' takes no `classes`"):
        CLASSES.make_network((2,), 3)
    dataset, state, fabric = begin(SMALL)
    with pytest.raises(ArgumentError, match="has 2 classes, the network 0"):
        next(training(CLASSES, Poles(), state, fabric))


# ---- averages and rates


def test_the_average_forgets_its_start_and_then_decays_as_told():
    decay = decay_of(dataclasses.replace(SMALL, ema=0.9))
    assert [decay(0), decay(1), decay(10_000)] == pytest.approx([0, 2 / 11, 0.9])
    average, weights = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.ones_(average.weight), nn.init.zeros_(weights.weight)
    follow(average, weights, 1 - decay(10_000), None)
    assert average.weight.item() == pytest.approx(0.9)
    follow(average, weights, 1 - decay(0), None)
    assert average.weight.item() == 0


@pytest.mark.parametrize("kind", ["constant", "power"])
def test_the_average_differs_from_the_weights_and_follows_them(kind):
    _, state = train_to_the_end(dataclasses.replace(SMALL, ema_kind=kind))
    pairs = zip(state.network.parameters(), state.ema.module.parameters(), strict=True)
    gaps = [float((w - a).detach().abs().max()) for w, a in pairs]
    assert 0 < max(gaps) < 0.1


def test_learning_rates_rise_and_fall():
    recipe = dataclasses.replace(SMALL, steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(recipe, k) for k in range(100)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert learning_rate(dataclasses.replace(recipe, schedule="constant"), 99) == 1


# ---- the recipe


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"times": "unifrom"}, "did you mean 'uniform'"),
        ({"weighting": "x"}, "weighting='x'"),
        ({"schedule": "linear"}, "cosine, constant|constant, cosine"),
    ],
)
def test_a_recipe_refuses_bad_values_by_name(options, words):
    with pytest.raises(ArgumentError, match=words):
        Recipe(**options)


def test_a_recipe_refuses_an_sde_without_a_kernel():
    with pytest.raises(ArgumentError, match="gbm.*no Gaussian kernel"):
        Recipe(sde="gbm").make_sde()


def test_options_are_checked_by_name_and_type():
    assert build("sde", "vp", {"beta_max": 15}).beta_max == 15
    with pytest.raises(ArgumentError, match="'beta_mx'; did you mean 'beta_max'"):
        build("sde", "vp", {"beta_mx": 15})
    with pytest.raises(ArgumentError, match="beta_max='high'"):
        build("sde", "vp", {"beta_max": "high"})
    with pytest.raises(ArgumentError, match="no option 'shape'"):
        build("network", "unet", {"shape": [1, 8, 8]}, shape=(1, 8, 8))
    grid = build("grid", "karras", {"rho": 3, "to_zero": True})
    assert grid(VP(), 5)[-1] == 0
    with pytest.raises(ArgumentError, match="'u'; there are: rho, t_max, t_min, to_zero"):
        build("grid", "karras", {"u": 3})


def test_a_recipe_survives_its_file(tmp_path):
    SMALL.save(tmp_path / "config.yaml")
    assert Recipe.load(tmp_path / "config.yaml") == SMALL
    (tmp_path / "config.yaml").write_text("stepps: 3\n")
    with pytest.raises(ArgumentError, match="'stepps'.*did you mean 'steps'"):
        Recipe.load(tmp_path / "config.yaml")
