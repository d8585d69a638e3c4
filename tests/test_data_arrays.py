"""Arrays of numbers: files, ranges, splits, labels, NaN."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from sdeflow import ArgumentError, get

X = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")


def arrays(path, **options):
    return get("dataset", "arrays", path=str(path), **options)


def saved(path, x=X, **more):
    """The array in a file, in the format of its ending."""
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez(path, x=x, **more)
    else:
        save_file(
            {"x": torch.as_tensor(x), **{k: torch.as_tensor(v) for k, v in more.items()}}, path
        )
    return path


def stacked(data):
    return torch.stack([data[k] for k in range(len(data))])


FORMATS = ["a.npy", "a.npz", "a.safetensors"]


# ---- what is in the files


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(7,), (3, 50), (3, 8, 8), (2, 3, 4, 5)])
def test_a_state_of_any_rank_comes_out_as_it_is_stored(tmp_path, name, shape):
    x = np.random.default_rng(0).normal(size=(20, *shape)).astype("float32")
    path = saved(tmp_path / name, x)
    train, test = arrays(path), arrays(path, split="test")
    assert train.shape == test.shape == shape
    rows = torch.from_numpy(x)
    held_out = torch.arange(20) % 10 == 9
    assert torch.equal(stacked(train), rows[~held_out])
    assert torch.equal(stacked(test), rows[held_out])
    batch = next(iter(DataLoader(train, batch_sampler=[[3, 0, 17]])))
    assert torch.equal(batch, rows[~held_out][[3, 0, 17]])


@pytest.mark.parametrize("kind", ["float64", "float16", ">f4", "float32"])
def test_floats_of_any_width_become_float32(tmp_path, kind):
    x = stacked(arrays(saved(tmp_path / "a.npy", X.astype(kind))))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0], torch.from_numpy(X[0]), rtol=1e-3, atol=1e-3)


def test_bfloat16_is_read_from_safetensors(tmp_path):
    path = saved(tmp_path / "a.safetensors", torch.from_numpy(X).bfloat16())
    assert torch.equal(arrays(path)[0], torch.from_numpy(X[0]).bfloat16().float())


def test_an_npy_file_is_mapped_and_not_loaded(tmp_path):
    data = arrays(saved(tmp_path / "a.npy"))
    assert isinstance(data.rows.array, np.memmap)
    assert pickle.loads(pickle.dumps(data)).rows._array is None


def test_a_test_path_takes_the_place_of_the_held_out_tenth(tmp_path):
    path = saved(tmp_path / "a.npz", labels=np.arange(30) % 2)
    other = saved(tmp_path / "b.npz", X[:5] + 1, labels=np.arange(5))
    train = arrays(path, test_path=str(other))
    test = arrays(path, split="test", test_path=str(other))
    assert (len(train), len(test)) == (30, 5)
    assert torch.equal(stacked(test), torch.from_numpy(X[:5] + 1))
    assert train.classes == test.classes == 5, "the classes are counted over both"
    wrong = saved(tmp_path / "c.npz", X[:5, :3])
    with pytest.raises(ArgumentError, match=r"c\.npz.*\(5, 3\)\) must be of the form of path"):
        arrays(path, test_path=str(wrong))


def test_too_few_rows_for_a_tenth_leave_no_test_split(tmp_path):
    path = saved(tmp_path / "a.npy", X[:9])
    assert len(arrays(path)) == 9
    with pytest.raises(ArgumentError, match="no row for split='test'.*test_path"):
        arrays(path, split="test")


# ---- the layout


def test_layouts_put_the_channels_first(tmp_path):
    image = np.random.default_rng(0).normal(size=(5, 6, 7, 3)).astype("float32")
    last = arrays(saved(tmp_path / "a.npy", image), layout="channels_last")
    assert last.shape == (3, 6, 7)
    assert torch.equal(last[2], torch.from_numpy(image[2]).permute(2, 0, 1))
    none = arrays(saved(tmp_path / "b.npy", image[..., 0]), layout="no_channels")
    assert none.shape == (1, 6, 7)
    assert torch.equal(none[2], torch.from_numpy(image[2, None, :, :, 0]))


def test_bytes_with_their_colors_last_are_not_taken_for_channels_first(tmp_path):
    path = saved(tmp_path / "a.npy", np.zeros((5, 32, 32, 3), np.uint8))
    with pytest.raises(ArgumentError, match="channels_last; say so"):
        arrays(path)
    assert arrays(path, layout="channels_last").shape == (3, 32, 32)


def test_mirror_images_are_samples_of_the_training_split(tmp_path):
    image = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    path = saved(tmp_path / "a.npz", image, labels=np.arange(20) % 3)
    data, test = arrays(path, flip=True), arrays(path, flip=True, split="test")
    assert (len(data), len(test)) == (36, 2)
    assert torch.equal(data[18 + 4], data[4].flip(-1))
    assert torch.equal(data.labels[18:], data.labels[:18])
    assert torch.equal(torch.stack(data.__getitems__([1, 19])), torch.stack([data[1], data[19]]))


# ---- the range


@pytest.mark.parametrize(
    ("kind", "low", "middle", "high"),
    [("uint8", 0, 127.5, 255), ("uint16", 0, 32767.5, 65535)]
    + [("int8", -128, 0, 127), ("int16", -32768, 0, 32767), ("bool", 0, 0.5, 1)],
)
def test_whole_numbers_go_to_minus_one_to_one_by_the_range_of_their_type(
    tmp_path, kind, low, middle, high
):
    raw = np.array([[low, high]] * 2).astype(kind)
    data = arrays(saved(tmp_path / "a.npy", raw))
    x = data[0]
    assert x[0] == -1 and 0.99 < x[1] <= 1
    assert float(data.offset) == middle
    assert torch.equal(data.restore(x), torch.from_numpy(raw[0].astype("float32")))


def test_wide_whole_numbers_have_no_range_of_their_own(tmp_path):
    path = saved(tmp_path / "a.npy", np.arange(40).reshape(20, 2))
    with pytest.raises(ArgumentError, match="int64 does not say what range.*normalise=unit"):
        arrays(path)
    x = stacked(arrays(path, normalise="unit", test_path=str(path)))
    assert x.min() == -1 and x.max() == 1
    assert stacked(arrays(path, normalise="none")).max() == 37


@pytest.mark.parametrize("name", FORMATS)
def test_unit_goes_from_the_least_to_the_greatest_training_number(tmp_path, name):
    x = X * 40 + 7
    x[9] = 1e4  # a row that is held out
    data = arrays(saved(tmp_path / name, x), normalise="unit")
    found = stacked(data)
    assert found.min() == -1 and found.max() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(data.restore(found[0]), torch.from_numpy(x[0]))
    test = arrays(tmp_path / name, normalise="unit", split="test")
    assert test.offset == data.offset and test[0].max() > 50, "the same numbers in both splits"


@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "no_channels"])
def test_standard_gives_each_channel_mean_zero_and_variance_one(tmp_path, layout, monkeypatch):
    monkeypatch.setattr("sdeflow_plugins.data.arrays.CHUNK", 100)  # 40 rows in several chunks
    x = np.random.default_rng(0).normal(size=(40, 3, 5)) * np.array([[1], [10], [1e-2]]) + 10
    if layout == "no_channels":
        x = x[:, 1]
    first = torch.from_numpy(x[:, None] if layout == "no_channels" else x).float()
    stored = x.transpose(0, 2, 1) if layout == "channels_last" else x
    data = arrays(saved(tmp_path / "a.npy", stored), normalise="standard", layout=layout)
    found = stacked(data).double()
    assert data.shape == first.shape[1:]
    assert found.mean((0, 2)).abs().max() < 1e-3
    assert (found.var((0, 2), correction=0) - 1).abs().max() < 1e-3
    torch.testing.assert_close(data.restore(data[0]), first[0])


def test_standard_is_of_each_component_of_a_vector_and_leaves_a_constant_one(tmp_path):
    x = X * np.array([1, 5, 100, 0]) + 3
    data = arrays(
        saved(tmp_path / "a.npy", x), normalise="standard", test_path=str(tmp_path / "a.npy")
    )
    found = stacked(data)
    assert data.scale.shape == data.offset.shape == (4,)
    torch.testing.assert_close(found.std(0, correction=0), torch.tensor([1.0, 1, 1, 0]))
    assert found.mean(0).abs().max() < 1e-5 and (found[:, 3] == 0).all()


# ---- what is refused


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("split", ["train", "test"])
def test_nan_and_infinity_are_refused_with_the_numbers_of_their_rows(tmp_path, name, wrong, split):
    x = X.copy()
    rows = (3, 17) if split == "train" else (9, 19)
    x[rows, 2] = wrong
    path = saved(tmp_path / name, x)
    with pytest.raises(ArgumentError, match=rf"in 2 of \d+ rows: {rows[0]}, {rows[1]}; repair"):
        arrays(path, split=split)


def test_a_number_beyond_float32_is_refused_as_well(tmp_path):
    x = X.astype("float64")
    x[4, 0] = 1e300
    with np.errstate(over="ignore"), pytest.raises(ArgumentError, match="beyond float32.*rows: 4"):
        arrays(saved(tmp_path / "a.npy", x))


def labelled(tmp_path, labels, **options):
    return arrays(saved(tmp_path / "a.npz", labels=np.asarray(labels)), **options)


def test_labels_are_taken_along_and_their_classes_counted(tmp_path):
    data = labelled(tmp_path, np.arange(30) % 7)
    assert data.classes == 7
    assert torch.equal(data.labels, (torch.arange(30) % 7)[torch.arange(30) % 10 != 9])
    assert labelled(tmp_path, np.arange(30) % 7, classes=12).classes == 12
    assert labelled(tmp_path, np.arange(30) % 7, label_key="", key="x").classes == 0


def test_labels_of_an_npy_stand_in_a_file_of_their_own(tmp_path):
    np.save(tmp_path / "y.npy", np.arange(30) % 4)
    data = arrays(saved(tmp_path / "a.npy"), label_path=str(tmp_path / "y.npy"))
    assert data.classes == 4 and len(data.labels) == 27
    np.save(tmp_path / "y.npy", np.arange(29) % 4)
    with pytest.raises(ArgumentError, match=r"shape \(29,\) and must have \(30,\)"):
        arrays(tmp_path / "a.npy", label_path=str(tmp_path / "y.npy"))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.arange(30.0), {}, r"float64, such as \[0\.0, 1\.0, 2\.0\].*astype"),
        (np.arange(30) - 1, {}, r"1 of 30 do not: -1 in row 0"),
        (np.arange(30) % 5, {"classes": 3}, r"0\.\.2; 12 of 30 do not: 3 in row 3, 4 in row 4"),
        (np.arange(30) + 90, {}, "reach 119, with 30 samples"),
        (np.eye(30, dtype=int), {}, r"\(30, 30\).*argmax"),
        (np.array(["a", "b"] * 15), {}, "whole numbers from 0"),
    ],
    ids=["floats", "negative", "too_high", "with_gaps", "one_hot", "strings"],
)
def test_wrong_labels_are_refused_with_examples(tmp_path, labels, options, message):
    with pytest.raises(ArgumentError, match=message):
        labelled(tmp_path, labels, **options)


def test_one_of_several_arrays_has_to_be_named(tmp_path):
    path = saved(tmp_path / "a.npz", other=X[:, :2])
    with pytest.raises(ArgumentError, match=r"2 arrays \(x float32 \(30, 4\); other.*option key"):
        arrays(path)
    assert arrays(path, key="other").shape == (2,)
    with pytest.raises(ArgumentError, match="no such array; did you mean 'other'"):
        arrays(path, key="othr")
    with pytest.raises(ArgumentError, match="label_key='y'.*no such array"):
        arrays(path, key="x", label_key="y")
    with pytest.raises(ArgumentError, match="label_key='y'.*label_path"):
        arrays(saved(tmp_path / "a.npy"), label_key="y")


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_pickled_objects_are_never_loaded(tmp_path, name):
    path = saved(tmp_path / name, np.array([[1, "a"], [None, {}]] * 5, dtype=object))
    with pytest.raises(ArgumentError, match="Python objects.*never loaded"):
        arrays(path)


def test_a_pickle_that_calls_itself_an_array_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "a.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ArgumentError, match="never loaded|cannot be read"):
        arrays(tmp_path / "a.npy")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("keep", [0, 20, 300])
def test_a_file_that_was_cut_off_is_named(tmp_path, name, keep):
    path = saved(tmp_path / name)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArgumentError, match=rf"{name}.*(cannot be read|never loaded)"):
        arrays(path)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((0, 4)), "none of them empty"),
        (np.zeros(30), r"reshape\(N, 1\)"),
        (np.zeros((30, 4), complex), "must hold numbers"),
        (np.zeros((30, 4), "U3"), "must hold numbers"),
    ],
    ids=["empty", "single_numbers", "complex", "strings"],
)
def test_arrays_of_another_form_are_refused(tmp_path, x, message):
    with pytest.raises(ArgumentError, match=message):
        arrays(saved(tmp_path / "a.npy", x))


def test_a_wrong_ending_and_a_folder_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ArgumentError, match=r"a\.csv' must have one of the endings \.npy"):
        arrays(tmp_path / "a.csv")
    with pytest.raises(ArgumentError, match=r"must be a file with one of the endings"):
        arrays(tmp_path)
