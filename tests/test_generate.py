"""`sdeflow sample` and its library: classes and guidance, seeds and batches, images, films."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file
from sdeflow_plugins.data.digits import Digits
from sdeflow_plugins.generate.condition import choose_classes
from sdeflow_plugins.generate.edit import edit, load_images
from sdeflow_plugins.generate.film import film_of, save_film
from sdeflow_plugins.generate.interpolate import between_seeds, between_states, slerp
from sdeflow_plugins.generate.sampler import Sampler
from sdeflow_plugins.guidance import Within, cfg, guide, labelled
from sdeflow_plugins.pictures import TEXT, save_samples, tile
from sdeflow_plugins.train.recipe import Recipe
from sdeflow_plugins.train.run import Run
from sdeflow_plugins.train.session import train_run

from sdeflow import EDM, VE, VP, Cosine, RectifiedFlow, cli, probability_flow, reverse, sample
from sdeflow.errors import ArgumentError, PairingError, ShapeError
from sdeflow.testing.problems import GaussianData

TINY = dict(network="mlp", batch_size=32, warmup=0, lr=0.01, device="cpu", log_every=10)
MLP = {"width": 32, "depth": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of three small runs: conditional digits, weaker ones, and moons without classes."""
    root = tmp_path_factory.mktemp("runs")
    digits = dict(TINY, data="digits", conditional=True, network_options=MLP)
    train_run(root / "digits", Recipe(**digits, steps=30))
    train_run(root / "weak", Recipe(**digits, steps=4))
    train_run(root / "moons", Recipe(**TINY, data="moons", network_options=MLP, steps=4))
    return root


@pytest.fixture
def command(runs, tmp_path, capsys):
    """Run `sdeflow sample RUN ...`: (status, the samples or None, what it said)."""

    def call(run, *argv):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}.png"
        told = [str(arg) for arg in argv]
        if "--out" not in told:
            told += ["--out", str(out)]
        try:
            status = cli.main(["sample", str(runs / run), "--save", "npy", *told])
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        x = np.load(out.with_suffix(".npy")) if out.with_suffix(".npy").exists() else None
        assert (x is not None) == (status == 0) or "--out" in argv
        return status, None if x is None else torch.from_numpy(x), said.out + said.err

    return call


def drawn(command, run, *argv):
    status, x, said = command(run, *argv)
    assert status == 0, said
    return x


# ---- seeds


@pytest.mark.parametrize("guided", [(), ("--class", 3), ("--class", 3, "--guidance", 2.5)])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_image_i_depends_on_seed_i_alone(command, solver, guided):
    options = ("--solver", solver, "--steps", 4, *guided)
    many = drawn(command, "digits", "--seeds", "0-6", *options)
    few = drawn(command, "digits", "--seeds", "[5, 2, 5]", *options)
    parts = drawn(command, "digits", "--n", 7, "--batch", 3, *options)
    assert (few - many[[5, 2, 5]]).abs().max() < 1e-5 and (parts - many).abs().max() < 1e-5
    assert (many[5] - many[2]).abs().max() > 0.1
    other = drawn(command, "digits", "--n", 7, "--seed", 1, *options)
    shifted = drawn(command, "digits", "--seeds", "7-13", *options)
    assert (other - shifted).abs().max() < 1e-5 and (other - many).abs().max() > 0.1


def test_several_classes_share_their_seeds(command):
    grid = drawn(command, "digits", "--class", "[7, 0]", "--seeds", "3,4,5", "--steps", 4)
    assert grid.shape == (6, 1, 8, 8)
    for k, digit in enumerate((7, 0)):
        alone = drawn(command, "digits", "--class", digit, "--seeds", "3-5", "--steps", 4)
        assert (grid[3 * k : 3 * k + 3] - alone).abs().max() < 1e-5
    assert (grid[:3] - grid[3:]).abs().max() > 0.01
    every = drawn(command, "digits", "--class", "all", "--n", 2, "--steps", 4)
    assert every.shape == (20, 1, 8, 8)


def test_classes_have_numbers_and_names():
    names = ["cat", "dog", "7"]
    assert choose_classes("all", 3, names) == (0, 1, 2)
    assert choose_classes(["dog", 0], 3, names) == (1, 0)
    assert choose_classes("7", 3, names) == (2,) and choose_classes("1", 3, names) == (1,)
    with pytest.raises(ArgumentError, match="did you mean 'dog'"):
        choose_classes("dogs", 3, names)


# ---- guidance


def test_the_command_is_the_library(command, runs):
    """Each option, beside the library's closures: two calls, by hand."""
    denoiser, shape = Run.open(runs / "digits").denoiser()
    weak, _ = Run.open(runs / "weak").denoiser()
    three = labelled(denoiser, 3)
    cases = {
        ("--class", 3): three,
        ("--class", 3, "--guidance", 2): guide(three, denoiser, 2.0),
        ("--class", 3, "--guidance", 0): denoiser,
        ("--class", 3, "--guidance", 2, "--guidance_interval", "[0.3, 2]"): Within(
            cfg(denoiser, 3, 2.0), three, 0.3, 2.0
        ),
        ("--class", 3, "--guidance", 2, "--autoguide", runs / "weak"): guide(
            three, labelled(weak, 3), 2.0
        ),
        ("--guidance", 2, "--autoguide", runs / "weak"): guide(denoiser, weak, 2.0),
    }
    found = []
    for argv, model in cases.items():
        x = drawn(command, "digits", *argv, "--seeds", "4-6", "--steps", 5)
        expected = Sampler().run(model, (3, *shape), 5, [4, 5, 6]).x
        assert (x - expected).abs().max() < 1e-5, argv
        found.append(x)
    for k, x in enumerate(found):  # and none of them is another
        assert all((x - other).abs().max() > 1e-4 for other in found[:k])


def test_a_guided_evaluation_counts_once_and_is_told(command):
    _, _, said = command("digits", "--class", 3, "--guidance", 2, "--n", 2, "--steps", 5)
    assert "2 samples in 5 evaluations, each of twice the batch:" in said
    interval = ("--guidance_interval", "[0.3, 2]")
    _, _, said = command("digits", "--class", 3, "--guidance", 2, "--n", 2, *interval)
    assert "in 20 evaluations, each of twice the batch where guidance counts:" in said
    _, _, said = command("digits", "--class", 3, "--guidance", 1, "--n", 2, "--steps", 5)
    assert "2 samples in 5 evaluations:" in said


def test_the_options_may_stand_in_a_file(command, tmp_path):
    file = tmp_path / "three.yaml"
    file.write_text("class: [3, 4]\nguidance: 2.0\nsteps: 4\nseeds: 0-1\n")
    x = drawn(command, "digits", "--config", file)
    told = ("--class", "[3, 4]", "--guidance", 2, "--steps", 4, "--seeds", "0-1")
    assert torch.equal(x, drawn(command, "digits", *told))


REFUSED = [
    # run, options, what is said
    ("moons", ["--class", 3], "class=3: this run is unconditional"),
    ("moons", ["--guidance", 2], "this run is unconditional, so that there is no class"),
    ("digits", ["--guidance", 2], "needs a class to lead to"),
    ("digits", ["--class", 10], "class=10 must be in 0..9"),
    ("digits", ["--class", "-1"], "class=-1 must be in 0..9"),
    ("digits", ["--class", "ten"], "class='ten' is unknown"),
    ("digits", ["--class", "[]"], "class=[] is empty"),
    ("digits", ["--class", "2.5"], "class='2.5' is unknown"),
    ("digits", ["--class", 3, "--guidance", ".nan"], "guidance=nan must be a finite number"),
    ("digits", ["--class", 3, "--guidance", ".inf"], "guidance=inf must be a finite number"),
    ("digits", ["--class", 3, "--guidance", "much"], "guidance"),
    ("digits", ["--class", 3, "--guidance_interval", "[0.1, 1]"], "needs a weight"),
    ("digits", ["--class", 3, "--guidance", 2, "--guidance_interval", "[1, 0.1]"], "0 <= low <"),
    ("digits", ["--class", 3, "--guidance", 2, "--guidance_interval", "[1]"], "two noise levels"),
    ("digits", ["--autoguide", "{runs}/weak"], "autoguide needs a weight"),
    ("digits", ["--autoguide", "{runs}/moons", "--guidance", 2], "makes samples of shape (2,)"),
    ("digits", ["--autoguide", "{runs}/none", "--guidance", 2], "holds no config.yaml"),
    ("digits", ["--n", 0], "n=0 must be at least 1"),
    ("digits", ["--batch", 0], "batch=0 must be at least 1"),
    ("digits", ["--steps", 0], "steps=0 must be at least 1"),
    ("digits", ["--seeds", "[]"], "empty"),
    ("digits", ["--seeds", "5-2"], "runs backwards"),
    ("digits", ["--seeds", "0-3", "--n", 4], "leave out n and seed"),
    ("digits", ["--seeds", "0-3", "--seed", 4], "leave out n and seed"),
    ("digits", ["--strength", 0.5], "give --image"),
    ("digits", ["--image", "{runs}/none.png"], "is no file"),
    ("digits", ["--image", "{runs}"], "holds no image"),
    ("digits", ["--image", "{runs}/digits/config.yaml"], "cannot be read as an image"),
    ("moons", ["--image", "{runs}/none.png"], "states of shape (2,), no images"),
    ("digits", ["--interpolate", "7"], "must be two seeds"),
    ("digits", ["--interpolate", "7,none.png"], "must be two seeds"),
    ("digits", ["--interpolate", "7,8", "--seeds", "0-3"], "leave out n and seed, and interpolate"),
    ("digits", ["--interpolate", "7,8", "--solver", "ddpm"], "interpolation runs the probability"),
    ("digits", ["--interpolate", "7,8", "--eta", 0.5], "interpolation runs the probability"),
    ("digits", ["--interpolate", "7,8", "--image", "x.png"], "two things to do"),
    ("digits", ["--film", "film.avi"], "must end in .gif"),
    ("digits", ["--out", "{runs}/x.npy"], "must be a picture's file, such as samples.png"),
]


@pytest.mark.parametrize(
    ("run", "options", "words"), REFUSED, ids=[" ".join(map(str, row[1])) for row in REFUSED]
)
def test_a_wrong_wish_is_refused_in_words(command, runs, tmp_path, run, options, words):
    status, _, said = command(run, *[str(option).format(runs=runs) for option in options])
    assert status == 2 and words in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())  # and no file is begun


# ---- files


def test_files_are_named_after_what_was_asked(runs, capsys):
    folder = runs / "digits" / "samples"
    before = set(folder.glob("*"))
    options = ["--steps", "2", "--n", "2", "--class", "[1, 2]", "--guidance", "2"]
    for more in ([], ["--guidance_interval", "[0.3, 2]"], ["--autoguide", str(runs / "weak")]):
        assert cli.main(["sample", str(runs / "digits"), *options, *more]) == 0
    names = {
        "dpmpp_2m_2_class_1_2_w2.png",
        "dpmpp_2m_2_class_1_2_w2_in_0.3_2.png",
        "dpmpp_2m_2_class_1_2_w2_away_from_weak.png",
    }
    assert {file.name for file in set(folder.glob("*")) - before} == names
    assert not list(folder.glob(".parts*"))


def test_safetensors_tell_the_seed_and_the_class_of_each_sample(runs, tmp_path):
    out = tmp_path / "x.png"
    told = ["--class", "[4, 2]", "--seeds", "8-9", "--steps", "2", "--out", str(out)]
    assert cli.main(["sample", str(runs / "digits"), *told, "--save", "safetensors"]) == 0
    found = load_file(out.with_suffix(".safetensors"))
    assert found["x"].shape == (4, 1, 8, 8)
    assert found["seeds"].tolist() == [8, 9, 8, 9] and found["labels"].tolist() == [4, 4, 2, 2]


def test_the_rows_of_a_class_grid_are_named(tmp_path):
    """The picture has a margin for the names, with ink in it, and none without."""
    x = torch.full((6, 1, 8, 8), -1.0)
    plain = tile(x, 3, ink=True)
    named = tile(x, 3, ink=True, rows=("cat", "dog"), tops=("0", "1", "2"))
    left, top = named.width - plain.width, named.height - plain.height
    assert left > TEXT and top > TEXT
    assert np.asarray(plain).min() == 255  # paper on paper
    pixels = np.asarray(named)
    assert (
        pixels[:, :left].min() < 50 and pixels[:top].min() < 50 and pixels[top:, left:].min() > 250
    )
    save_samples(torch.rand(20, 2), tmp_path / "points.png", rows=("a", "b"))
    with Image.open(tmp_path / "points.png") as image:
        colours = {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()}
    assert {(102, 161, 130), (0, 121, 140)} <= colours  # one for each row


# ---- image to image


def exact(sde, size=(1, 8, 8)):
    mean = torch.linspace(-0.5, 0.5, 64).reshape(size)
    return GaussianData(sde, mean, torch.full(size, 0.04))


@pytest.mark.parametrize(
    "sde", [VP(), VE(), EDM(), RectifiedFlow()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_edit_of_strength_one_is_a_sample_and_of_strength_none_the_image(sde, eta):
    process, x0 = reverse(sde, exact(sde), eta), torch.rand(3, 1, 8, 8)
    back = edit(process, x0, 0.0, steps=10, seed=1)
    assert torch.equal(back.x, x0) and back.nfe == 0
    new = edit(process, x0, 1.0, steps=10, seed=1)
    assert torch.equal(new.x, sample(process, x0.shape, steps=10, seed=1).x)


def test_an_edit_keeps_less_of_the_image_the_stronger_it_is():
    """By the flow of Gaussian data it keeps what the perturbed image does: the correlation is
    a v/sqrt(a^2 v + s^2)/sqrt(v), here within 5 standard errors; and it stays like the data."""
    sde, generator = VP(), torch.Generator().manual_seed(99)
    flow, mean = probability_flow(sde, exact(sde)), exact(sde).mean
    x0 = mean + 0.2 * torch.randn(500, 1, 8, 8, generator=generator)
    kept, steps = [], []
    for strength in (0.05, 0.15, 0.3, 0.8):
        run = edit(flow, x0, strength, steps=50, seed=0)
        a, s = sde.kernel(x0, torch.tensor(strength).double())
        off, was = run.x - mean, x0 - mean
        kept.append(float((off * was).mean() / (off.std() * was.std())))
        steps.append(run.nfe)
        assert kept[-1] == pytest.approx(float(a * 0.2 / (a * a * 0.04 + s * s).sqrt()), abs=0.03)
        assert abs(float(off.std()) / 0.2 - 1) < 0.05
        assert run.ts[0] == pytest.approx(strength) and len(run.ts) == run.nfe + 1
    assert kept == sorted(kept, reverse=True) and steps == sorted(steps)


def test_an_edit_depends_on_its_seed_alone():
    process, x0 = reverse(VP(), exact(VP())), torch.rand(3, 1, 8, 8)
    many = edit(process, x0, 0.5, steps=10, seed=[4, 5, 4]).x
    one = edit(process, x0[2:], 0.5, steps=10, seed=[4]).x
    assert (many[2:] - one).abs().max() < 1e-6 and (many[0] - many[1]).abs().max() > 0.01
    for strength in (-0.1, 1.5, float("nan"), "half"):
        with pytest.raises(ArgumentError, match="strength"):
            edit(process, x0, strength)


@pytest.fixture
def pictures(tmp_path):
    """A folder with two digits as dark on light, large; and a note."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in (0, 1):
        levels = ((1 - Digits("test").x[k, 0]) * 127.5).byte().numpy()
        Image.fromarray(levels).resize((40, 40), Image.Resampling.NEAREST).save(folder / f"{k}.png")
    (folder / "note.txt").write_text("no image")
    return folder


def test_images_are_read_as_states_of_the_run(pictures, tmp_path):
    x, names = load_images(str(pictures), (1, 8, 8), ink=True)
    off = (x - Digits("test").x[:2]).abs()  # the filter that makes them small again is not exact
    assert names == ["0", "1"] and off.max() < 0.4 and off.mean() < 0.1
    paper, _ = load_images(str(pictures), (1, 8, 8), ink=False)
    assert torch.equal(paper, -x)
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))  # transparent: white paper
    clear.save(tmp_path / "clear.png")
    colour, _ = load_images(str(tmp_path / "clear.png"), (3, 8, 8))
    assert torch.equal(colour, torch.ones(1, 3, 8, 8))


def test_the_command_edits_images(command, pictures, runs):
    x = drawn(command, "digits", "--image", pictures, "--strength", 0.4, "--n", 3, "--steps", 10)
    denoiser, _ = Run.open(runs / "digits").denoiser()
    flow, (x0, _) = Sampler().process(denoiser), load_images(str(pictures), (1, 8, 8), True)
    expected = edit(flow, x0.repeat_interleave(3, 0), 0.4, steps=10, seed=[0, 1, 2] * 2).x
    assert (x - expected).abs().max() < 1e-5
    back = drawn(command, "digits", "--image", pictures / "1.png", "--strength", 0, "--n", 2)
    assert torch.equal(back, x0[[1, 1]])
    new = drawn(command, "digits", "--image", pictures, "--strength", 1, "--n", 2, "--class", 5)
    fresh = drawn(command, "digits", "--n", 2, "--class", 5)
    assert (new - fresh.repeat(2, 1, 1, 1)).abs().max() < 1e-5
    status, _, said = command("digits", "--image", pictures, "--strength", 1.5)
    assert status == 2 and "strength=1.5 must be in [0, 1]" in said
    status, _, said = command("digits", "--image", pictures, "--class", "[1, 2]")
    assert status == 2 and "one class at most" in said


# ---- interpolation


def test_slerp_runs_along_the_sphere():
    a, b = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 4).double()
    u = torch.linspace(0, 1, 5).double()
    a, b = (v / v.flatten(1).norm(dim=1)[:, None, None] for v in (a, b))
    on = slerp(a, b, u)
    assert (on.flatten(1).norm(dim=1) - 1).abs().max() < 1e-12
    assert (on[0] - a[0]).abs().max() < 1e-12 and (on[-1] - b[-1]).abs().max() < 1e-12
    angle = torch.linalg.vecdot(on.flatten(1), a.flatten(1)).clamp(-1, 1).arccos()
    whole = torch.linalg.vecdot(a.flatten(1), b.flatten(1)).arccos()
    assert (angle[1:] - (u * whole)[1:]).abs().max() < 1e-10  # at constant speed
    assert torch.allclose(slerp(a, 3 * a, u), (1 + 2 * u)[:, None, None] * a)  # of no angle
    with pytest.raises(ShapeError, match="a, b and u have shapes"):
        slerp(a, b[:2], u)


@pytest.mark.parametrize("sde", [VP(), VE(), Cosine()], ids=lambda sde: type(sde).__name__)
def test_the_ends_of_an_interpolation_are_the_samples_of_its_seeds(sde):
    flow, u = probability_flow(sde, exact(sde)), torch.linspace(0, 1, 5)
    x = between_seeds(flow, (7, 12), u, (1, 8, 8), steps=10).x
    ends = sample(flow, (2, 1, 8, 8), steps=10, seed=[7, 12]).x
    assert (x[[0, -1]] - ends).abs().max() < 1e-5
    spread = (x - exact(sde).mean).flatten(1).std(1)  # in between they stay like the data
    assert 0.14 < float(spread.min()) and float(spread.max()) < 0.26
    straight = sde.prior(torch.zeros(1, 1, 8, 8), sde.T)  # as the middle of a line would not
    assert float(straight.abs().max()) == 0


def test_two_states_are_joined_through_their_noise():
    flow = probability_flow(VP(), exact(VP()))
    data = exact(VP()).mean + 0.2 * torch.randn(2, 1, 8, 8)
    run = between_states(flow, (data[0], data[1]), torch.linspace(0, 1, 5), steps=200)
    assert (run.x[[0, -1]] - data).abs().max() < 5e-3 and run.nfe == 600
    with pytest.raises(PairingError, match="interpolation runs the probability flow"):
        between_states(reverse(VP(), exact(VP())), (data[0], data[1]), torch.rand(2))
    with pytest.raises(PairingError, match="adds none of its own"):
        between_seeds(flow, (1, 2), torch.rand(2), (1, 8, 8), solver="predictor_corrector")


def test_the_command_interpolates(command, pictures):
    x = drawn(command, "digits", "--interpolate", "7,12", "--n", 4, "--steps", 6)
    ends = drawn(command, "digits", "--seeds", "7,12", "--steps", 6)
    assert len(x) == 4 and (x[[0, -1]] - ends).abs().max() < 1e-5
    rows = drawn(command, "digits", "--interpolate", "7,12", "--class", "[1, 2]", "--n", 3)
    ends = drawn(command, "digits", "--seeds", "7,12", "--class", "2")
    assert len(rows) == 6 and (rows[[3, -1]] - ends).abs().max() < 1e-5
    files = f"{pictures}/0.png,{pictures}/1.png"
    x = drawn(command, "digits", "--interpolate", files, "--n", 3, "--steps", 300)
    x0, _ = load_images(str(pictures), (1, 8, 8), True)
    assert (x[[0, -1]] - x0).abs().max() < 0.1


# ---- films


@pytest.mark.parametrize("run", ["digits", "moons"])
def test_a_film_shows_the_way_and_rests_on_its_end(command, tmp_path, run):
    film = tmp_path / "way.gif"
    drawn(command, run, "--n", 4, "--steps", 6, "--film", film)
    with Image.open(film) as image:
        waits = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert len(waits) == 7 and waits[-1] == 2000 and set(waits[:-1]) == {80}


def test_a_film_shows_the_first_of_every_row(command, tmp_path, monkeypatch):
    monkeypatch.setattr("sdeflow_plugins.generate.command.FILMED", 30)
    shown = []
    monkeypatch.setattr(
        "sdeflow_plugins.generate.command.film_of",
        lambda run, sde: shown.append(run.x) or [run.x],
    )
    x = drawn(command, "digits", "--class", "all", "--n", 5, "--film", tmp_path / "way.gif")
    assert (shown[0] - x.unflatten(0, (10, 5))[:, :3].flatten(0, 1)).abs().max() < 1e-5


def test_a_long_way_is_thinned_and_keeps_its_ends():
    run = sample(probability_flow(VE(), exact(VE())), (2, 1, 8, 8), steps=200, seed=0, keep=True)
    frames = film_of(run, VE())
    assert len(frames) == 60 and float(frames[0].abs().max()) < 5  # not 50 times that
    assert (frames[-1] - run.x).abs().max() < 1e-3
    with pytest.raises(ArgumentError, match="keep=True"):
        film_of(sample(probability_flow(VE(), exact(VE())), (2, 1, 8, 8), steps=2), VE())


def test_an_mp4_has_the_frames_and_a_rest(tmp_path):
    av = pytest.importorskip("av")
    frames = [torch.full((3, 3, 8, 8), level) for level in (-1.0, 0.0, 1.0)]
    file = save_film(frames, tmp_path / "way.mp4", columns=3)
    with av.open(str(file)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 3 + 25
    levels = [int(frame[20:50, 20:50].mean()) for frame in shown]
    assert levels[0] < 10 and 115 < levels[1] < 140 and min(levels[2:]) > 245
    with pytest.raises(ArgumentError, match="have no picture"):
        save_film([torch.rand(2, 7)], tmp_path / "no.gif")
    with pytest.raises(ArgumentError, match="frames is empty"):
        save_film([], tmp_path / "no.gif")


# ---- what is left over of a broken run


def test_a_broken_draw_goes_on_from_its_batches(command, runs, monkeypatch):
    """Batches drawn before a break are used again, and never those of another wish."""
    from sdeflow_plugins.generate.drawing import Drawing

    draw, made = Drawing.draw, []

    def breaks(self, seeds, places, **options):
        made.append(seeds)
        if len(made) == 3:
            raise KeyboardInterrupt
        return draw(self, seeds, places, **options)

    monkeypatch.setattr(Drawing, "draw", breaks)
    asked = ("--seeds", "0-7", "--batch", 2, "--steps", 3, "--class", 3, "--guidance", 2)
    assert command("digits", *asked)[0] == 130
    other = drawn(command, "digits", *asked[:-1], 3)
    assert len(made) == 3 + 4
    x = drawn(command, "digits", *asked)
    assert len(made) == 3 + 4 + 2 and made[-2:] == [[4, 5], [6, 7]]
    assert (x - other).abs().max() > 1e-4
    assert (x - drawn(command, "digits", *asked[:2], *asked[4:])).abs().max() < 1e-5
    assert not list((runs / "digits" / "samples").glob(".parts*"))
