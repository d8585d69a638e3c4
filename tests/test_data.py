"""The data plugins: splits, ranges, and what a bad folder says."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sdeflow import ArgumentError, get

TOYS = ["moons", "spirals", "swiss_roll", "gaussians", "checkerboard"]


def test_digits_split_is_stratified_disjoint_and_whole():
    train, test = get("dataset", "digits"), get("dataset", "digits", split="test")
    assert (len(train), len(test), train.shape) == (1347, 450, (1, 8, 8))
    assert train[0].shape == train.shape and train.x.dtype == torch.float32
    assert train.x.min() == -1 and train.x.max() == 1
    share = torch.bincount(train.labels) / torch.bincount(torch.cat((train.labels, test.labels)))
    assert (share - 0.75).abs().max() < 0.01
    images = {image.numpy().tobytes() for image in train.x}
    assert not images & {image.numpy().tobytes() for image in test.x}


def test_digits_are_the_same_every_time():
    assert torch.equal(get("dataset", "digits").x, get("dataset", "digits").x)


def test_digits_can_be_restricted_to_classes():
    assert set(get("dataset", "digits", only=(3, 8)).labels.tolist()) == {3, 8}
    with pytest.raises(ArgumentError, match="only"):
        get("dataset", "digits", only=(10,))


@pytest.mark.parametrize("name", TOYS)
def test_toys_lie_in_the_square_and_fill_it(name):
    train, test = get("dataset", name, n=2000), get("dataset", name, split="test", n=2000)
    assert train.shape == (2,) and len(train) == 2000
    assert train.x.abs().max() <= 1
    assert (train.x.amax(0) > 0.5).all() and (train.x.amin(0) < -0.5).all()
    assert (train.x.abs() == 1).float().mean() < 0.01, "points pile up on the border"
    assert not torch.equal(train.x, test.x)
    assert torch.equal(train.x, get("dataset", name, n=2000).x)
    assert not torch.equal(train.x, get("dataset", name, n=2000, seed=1).x)


def test_toys_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    get("dataset", "moons", n=10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["digits", "moons", "folder"])
def test_an_unknown_split_is_refused(name):
    with pytest.raises(ArgumentError, match="split='val'.*test, train"):
        get("dataset", name, split="val")


def test_a_loader_takes_batches_from_a_tensor_data_set_in_order():
    data = get("dataset", "moons", n=10)
    batch = next(iter(DataLoader(data, batch_sampler=[[3, 1, 3]])))
    assert torch.equal(batch, data.x[[3, 1, 3]])


# ---- a folder of images


def picture(path, width=20, height=10, color=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for k in range(20):
        picture(tmp_path / f"{k % 2}" / f"{k:02d}.png", color=(k, 0, 255))
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_folder_holds_out_every_tenth_file(folder):
    train = get("dataset", "folder", path=str(folder), size=8, flip=False)
    test = get("dataset", "folder", path=str(folder), size=8, split="test")
    assert (len(train), len(test)) == (18, 2)
    assert not set(train.files) & set(test.files)


def test_folder_uses_subfolders_train_and_test(tmp_path):
    for k in range(3):
        picture(tmp_path / "train" / f"{k}.jpg")
    picture(tmp_path / "test" / "0.jpg")
    assert len(get("dataset", "folder", path=str(tmp_path), flip=False)) == 3
    assert len(get("dataset", "folder", path=str(tmp_path), split="test")) == 1


def test_folder_scales_colors_to_minus_one_to_one(folder):
    x = get("dataset", "folder", path=str(folder), size=8)[0]
    assert x.shape == (3, 8, 8) and x.dtype == torch.float32
    assert (x[0] == -1).all() and (x[2] == 1).all()
    grey = get("dataset", "folder", path=str(folder), size=8, color="grey")
    assert grey.shape == grey[0].shape == (1, 8, 8)


def test_folder_crops_the_centre_and_mirrors(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:15] = 255  # the left half of the middle square is white
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = get("dataset", "folder", path=str(tmp_path), size=10)
    assert len(data) == 2
    assert data[0][:, :, :4].min() > 0.9 and data[0][:, :, 6:].max() < -0.9
    assert torch.equal(data[1], data[0].flip(2))
    with pytest.raises(IndexError):
        data[2]


def test_a_missing_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(ArgumentError, match="path='' must be a folder"):
        get("dataset", "folder")
    with pytest.raises(ArgumentError, match="nowhere.*must be a folder"):
        get("dataset", "folder", path=str(tmp_path / "nowhere"))
    with pytest.raises(ArgumentError, match="holds no image.*png"):
        get("dataset", "folder", path=str(tmp_path))


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_broken_image_is_named(tmp_path, damage):
    rng = np.random.default_rng(0)
    file = tmp_path / "broken.png"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
    file.write_bytes(b"no image" if damage == "text" else file.read_bytes()[:2000])
    data = get("dataset", "folder", path=str(tmp_path), size=8)
    with pytest.raises(ArgumentError, match=r"broken\.png cannot be read.*remove or replace"):
        data[0]


@pytest.mark.parametrize("options", [{"size": 0}, {"color": "cmyk"}])
def test_folder_refuses_bad_options(folder, options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        get("dataset", "folder", path=str(folder), **options)
