"""What every data set keeps: samples of one shape in random access, labels in range, splits."""

import pickle

import datafiles
import numpy as np
import pytest
import torch
from sdeflow_plugins.data import TensorData
from sdeflow_plugins.train.order import Batches
from sdeflow_plugins.train.recipe import Recipe
from torch.utils.data import DataLoader

from sdeflow import ArgumentError, get

TOYS = ["moons", "spirals", "swiss_roll", "gaussians", "checkerboard"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with small files of every format."""
    root = tmp_path_factory.mktemp("data")
    datafiles.image_tree(root / "folder")
    for part in ("train", "val"):
        first = 0 if part == "train" else 50
        datafiles.image_tree(root / "imagenet" / part, 4, ("n01440764", "n01443537"), first)
    datafiles.celeba(root / "celeba")
    datafiles.cifar(root / "cifar10")
    (root / "mnist").mkdir()
    for prefix, n in (("train", 12), ("t10k", 4)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28))
        datafiles.idx(root / "mnist" / f"{prefix}-images-idx3-ubyte", images)
        datafiles.idx(root / "mnist" / f"{prefix}-labels-idx1-ubyte", np.arange(n) % 10)
    datafiles.shards(root / "webdataset")
    for k in range(10):
        datafiles.sound(root / "waves" / "ab"[k % 2] / f"{k}.wav", datafiles.tone(100, seed=k))
    x = np.random.default_rng(0).uniform(-1, 1, (20, 5)).astype("float32")
    np.savez(root / "x.npz", x=x, labels=np.arange(20) % 3)
    np.save(root / "x.npy", x)
    return root


OPTIONS = {
    # name: (path, options, classes)
    "folder": ("folder", {"size": 8}, 2),
    "imagenet": ("imagenet", {"size": 8}, 2),
    "celeba": ("celeba", {"size": 8, "labels": "Smiling"}, 2),
    "cifar10": ("cifar10", {}, 10),
    "mnist": ("mnist", {"pad": 2}, 10),
    "fashion_mnist": ("mnist", {}, 10),
    "webdataset": ("webdataset/shard-{000..001}.tar", {"size": 8}, 3),
    "waves": ("waves", {"length": 32}, 2),
    "arrays": ("x.npz", {}, 3),
}
CLASSES = {"digits": 10, "moons": 2, "spirals": 2, "swiss_roll": 0, "gaussians": 8}
CLASSES |= {"checkerboard": 8} | {name: classes for name, (_, _, classes) in OPTIONS.items()}


@pytest.fixture(params=CLASSES)
def name(request):
    return request.param


def build(root, name, **more):
    path, options, _ = OPTIONS.get(name, ("", {}, 0))
    return get("dataset", name, **({"path": str(root / path)} if path else {}), **options, **more)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_sample_is_a_float_tensor_of_one_shape_in_minus_one_to_one(root, name, split):
    data = build(root, name, split=split)
    for k in (0, len(data) // 2, len(data) - 1):
        x = data[k]
        assert (x.dtype, tuple(x.shape)) == (torch.float32, data.shape)
        assert x.abs().max() <= 1 and x.isfinite().all() and x.is_contiguous()


def test_a_sample_is_a_function_of_its_number_alone(root, name):
    data, other = build(root, name), build(root, name)
    backwards = {k: data[k] for k in reversed(range(min(len(data), 30)))}
    assert all(torch.equal(other[k], x) for k, x in backwards.items())


def test_the_last_sample_is_minus_one_and_there_is_none_beyond(root, name):
    data = build(root, name)
    assert torch.equal(data[-1], data[len(data) - 1])
    for beyond in (len(data), -len(data) - 1):
        with pytest.raises(IndexError):
            data[beyond]


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_lie_in_range_and_there_is_one_for_each_sample(root, name, split):
    data = build(root, name, split=split)
    assert data.classes == CLASSES[name]
    if not data.classes:
        assert data.labels is None and data.class_names == []
        return
    assert data.labels.dtype == torch.long and data.labels.shape == (len(data),)
    assert 0 <= data.labels.min() and data.labels.max() < data.classes
    assert len(data.class_names) == (0 if name in ("arrays", "webdataset") else data.classes)


def test_the_classes_are_the_same_in_both_splits(root, name):
    train, test = build(root, name), build(root, name, split="test")
    assert (train.classes, train.class_names) == (test.classes, test.class_names)


def test_the_splits_share_no_sample(root, name):
    train, test = build(root, name), build(root, name, split="test")
    seen = {train[k].numpy().tobytes() for k in range(len(train))}
    assert not any(test[k].numpy().tobytes() in seen for k in range(len(test)))


def test_a_copy_in_another_process_gives_the_same_and_carries_no_array(root, name):
    data = build(root, name)
    first = data[0]
    frozen = pickle.dumps(data)
    assert torch.equal(pickle.loads(frozen)[0], first)
    if name in ("folder", "imagenet", "celeba", "webdataset", "waves"):
        assert len(frozen) < 4000, "samples travel with the data set"


def test_a_mapped_array_does_not_travel_to_the_workers(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1000, 100), np.float32))
    data = get("dataset", "arrays", path=str(tmp_path / "x.npy"))
    data[0]
    assert len(pickle.dumps(data)) < 20_000


@pytest.mark.parametrize("name", ["folder", "arrays", "webdataset", "waves"])
def test_two_workers_read_what_one_process_reads(root, name):
    data, order = build(root, name), [[3, 1, 3], [0, 2, 5], [7, 6, 4]]
    alone = list(DataLoader(data, batch_sampler=order))
    parted = list(DataLoader(data, batch_sampler=order, num_workers=2))
    assert len(alone) == len(parted) == 3
    assert all(torch.equal(a, b) for a, b in zip(alone, parted, strict=True))
    assert torch.equal(alone[0], torch.stack([data[3], data[1], data[3]]))


@pytest.mark.parametrize("name", ["folder", "arrays", "cifar10"])
def test_fewer_samples_than_a_batch_repeat_each_as_often_as_the_others(root, name):
    data = torch.utils.data.Subset(build(root, name), range(3))
    recipe = Recipe(batch_size=8, steps=6)
    loader = DataLoader(data, batch_sampler=Batches(len(data), recipe, 0))
    batches = list(loader)
    assert all(batch.shape == (8, *data[0].shape) for batch in batches)
    counts = torch.zeros(3)
    for x in torch.cat(batches):
        counts += torch.tensor([float(torch.equal(x, data[k])) for k in range(3)])
    assert counts.tolist() == [16.0, 16.0, 16.0]


@pytest.mark.parametrize("name", ["digits", "moons", "folder", "arrays", "cifar10", "waves"])
def test_an_unknown_split_is_refused(name):
    with pytest.raises(ArgumentError, match="split='val'.*test, train"):
        get("dataset", name, split="val")


@pytest.mark.parametrize("name", [*OPTIONS, "huggingface"])
def test_a_missing_path_is_refused_by_name(name, tmp_path):
    with pytest.raises(ArgumentError, match="path"):
        get("dataset", name)
    if name != "huggingface":  # there it would be looked for on the hub
        with pytest.raises(ArgumentError, match="nowhere"):
            get("dataset", name, path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["folder", "imagenet", "celeba", "cifar10", "mnist", "waves"])
def test_a_file_in_place_of_a_folder_is_told_from_nothing(name, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"zip")
    with pytest.raises(ArgumentError, match=r"it is a file: give the folder it is in"):
        get("dataset", name, path=str(tmp_path / "a.zip"))


# ---- one tensor


def test_labels_out_of_range_are_refused_with_examples():
    x = torch.zeros(6, 2)
    with pytest.raises(ArgumentError, match=r"0\.\.1; 2 of 6 do not: 5 in row 1, -1 in row 3"):
        TensorData(x, torch.tensor([0, 5, 1, -1, 0, 1]), ["a", "b"])
    with pytest.raises(ArgumentError, match=r"float32, such as \[0.0, 1.0"):
        TensorData(x, torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    with pytest.raises(ArgumentError, match=r"have shape \(6, 3\).*argmax"):
        TensorData(x, torch.zeros(6, 3, dtype=torch.long))
    with pytest.raises(ArgumentError, match="reach 1000, with 6 samples"):
        TensorData(x, torch.tensor([0, 1000, 1, 1, 0, 1]))


def test_classes_without_a_sample_count():
    data = TensorData(torch.zeros(2, 2), torch.tensor([0, 1]), classes=7)
    assert data.classes == 7
    with pytest.raises(ArgumentError, match="classes=7, and there are no labels"):
        TensorData(torch.zeros(2, 2), classes=7)


def test_a_loader_takes_batches_from_a_tensor_data_set_in_order():
    data = get("dataset", "moons", n=10)
    batch = next(iter(DataLoader(data, batch_sampler=[[3, 1, 3]])))
    assert torch.equal(batch, data.x[[3, 1, 3]])


# ---- digits and toys


def test_digits_split_is_stratified_disjoint_and_whole():
    train, test = get("dataset", "digits"), get("dataset", "digits", split="test")
    assert (len(train), len(test), train.shape) == (1347, 450, (1, 8, 8))
    assert train.x.min() == -1 and train.x.max() == 1
    share = torch.bincount(train.labels) / torch.bincount(torch.cat((train.labels, test.labels)))
    assert (share - 0.75).abs().max() < 0.01
    images = {image.numpy().tobytes() for image in train.x}
    assert not images & {image.numpy().tobytes() for image in test.x}


def test_a_digit_keeps_its_label_when_others_are_left_out():
    data = get("dataset", "digits", only=(3, 8))
    assert set(data.labels.tolist()) == {3, 8}
    assert data.classes == 10 and data.class_names[8] == "8"
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
    assert not torch.equal(train.x, get("dataset", name, n=2000, seed=1).x)


def test_the_label_of_a_point_says_where_it_is():
    def of(name, k):
        data = get("dataset", name, n=2000, noise=0.0)
        return data.x[data.labels == k]

    for k in range(8):
        angle = torch.atan2(*of("gaussians", k).T.flip(0)).rad2deg() % 360
        assert ((angle - 45 * k + 180) % 360 - 180).abs().max() < 0.1
        column = (of("checkerboard", k)[:, 0] * 2.2 + 2).floor()
        row = (of("checkerboard", k)[:, 1] * 2.2 + 2).floor()
        assert (column == k // 2).all() and (row // 2 == k % 2).all()
    assert (of("moons", 1) + torch.tensor([0.5, 0.25]) / 1.7)[:, 1].min() >= -1e-6
    inner, outer = of("spirals", 0), of("spirals", 1)
    assert torch.cdist(inner, outer).min(1).values[inner.norm(dim=1) > 0.2].min() > 0.02


def test_toys_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    get("dataset", "moons", n=10)
    assert torch.equal(before, torch.get_rng_state())
