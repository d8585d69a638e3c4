"""Data sets with a name, each in the layout that it is published in."""

import gzip

import datafiles
import numpy as np
import pytest
import torch
from datafiles import picture, pixels

from sdeflow import ArgumentError, get

# ---- CIFAR-10


def cifar10(path, **options):
    return get("dataset", "cifar10", path=str(path), **options)


def test_cifar10_reads_red_green_blue_rows_of_its_records(tmp_path):
    root = datafiles.cifar(tmp_path / "cifar-10-batches-bin", n=10)
    data = cifar10(root, flip=False)
    assert (len(data), data.shape, data.classes) == (50, (3, 32, 32), 10)
    assert data.class_names[:2] == ["airplane", "automobile"]
    record = np.fromfile(root / "data_batch_2.bin", np.uint8)[3 * 3073 : 4 * 3073]
    assert data.labels[13] == record[0] == 3
    red, green, blue = record[1:].reshape(3, 32, 32).astype("float32") / 127.5 - 1
    torch.testing.assert_close(data[13], torch.from_numpy(np.stack([red, green, blue])))
    test = cifar10(tmp_path, split="test")
    assert (len(test), len(cifar10(tmp_path))) == (10, 100), "the folder above does as well"


def test_cifar10_names_what_is_wrong_with_its_files(tmp_path):
    root = datafiles.cifar(tmp_path)
    content = (root / "data_batch_3.bin").read_bytes()
    (root / "data_batch_3.bin").write_bytes(content[:-1])
    with pytest.raises(ArgumentError, match=r"data_batch_3\.bin has 12,291 bytes.*30,730,000"):
        cifar10(root)
    (root / "data_batch_3.bin").write_bytes(b"\x0b" + content[1:])
    with pytest.raises(ArgumentError, match="label beyond 9, such as 11 in record 0"):
        cifar10(root)
    (root / "data_batch_3.bin").unlink()
    with pytest.raises(ArgumentError, match=r"no data_batch_3\.bin; unpack cifar-10-binary"):
        cifar10(root)
    (root / "data_batch_3").write_bytes(b"pickle")
    with pytest.raises(ArgumentError, match="Python version, pickled"):
        cifar10(root)


# ---- MNIST


@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist_reads_idx_files_packed_or_not(tmp_path, end):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28))
    opener = gzip.open if end else open
    datafiles.idx(tmp_path / f"train-images-idx3-ubyte{end}", images, opener)
    datafiles.idx(tmp_path / f"train-labels-idx1-ubyte{end}", np.arange(20) % 10, opener)
    data = get("dataset", "mnist", path=str(tmp_path))
    assert (len(data), data.shape, data.classes) == (20, (1, 28, 28), 10)
    torch.testing.assert_close(data[7][0], torch.from_numpy(images[7]).float() / 127.5 - 1)
    assert data.labels.tolist() == [k % 10 for k in range(20)]
    padded = get("dataset", "mnist", path=str(tmp_path), pad=2)[7]
    assert padded.shape == (1, 32, 32) and (padded[0, :2] == -1).all()
    assert torch.equal(padded[:, 2:-2, 2:-2], data[7])
    with pytest.raises(ArgumentError, match="none of t10k-images-idx3-ubyte"):
        get("dataset", "mnist", path=str(tmp_path), split="test")


@pytest.mark.parametrize("fault", ["cut", "magic", "gz"])
def test_a_damaged_idx_file_is_named(tmp_path, fault):
    name = "train-images-idx3-ubyte" + (".gz" if fault == "gz" else "")
    datafiles.idx(tmp_path / name, np.zeros((2, 28, 28)))
    content = (tmp_path / name).read_bytes()
    if fault != "gz":
        (tmp_path / name).write_bytes(content[:-1] if fault == "cut" else b"\1" + content[1:])
    with pytest.raises(ArgumentError, match=rf"{name}.*fetch it again"):
        get("dataset", "mnist", path=str(tmp_path))


# ---- ImageNet and CelebA


def test_imagenet_reads_train_and_val(tmp_path):
    wnids = ("n01440764", "n01443537", "n01484850")
    for part, n in (("train", 9), ("val", 3)):
        for k in range(n):
            wnid = wnids[k % 3]
            name = f"{wnid}_{k}.JPEG" if part == "train" else f"ILSVRC2012_val_{k:08d}.JPEG"
            picture(tmp_path / part / wnid / name, pixels(k, 40, 50))
    picture(tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG")
    data = get("dataset", "imagenet", path=str(tmp_path), size=16)
    assert (len(data), data.shape, data.class_names) == (18, (3, 16, 16), list(wnids))
    test = get("dataset", "imagenet", path=str(tmp_path), size=16, split="test")
    assert test.labels.tolist() == [0, 1, 2]
    assert "_val_" in test.source.name(0)


def test_imagenet_asks_for_sorted_validation_images(tmp_path):
    picture(tmp_path / "train" / "n01440764" / "a.JPEG")
    with pytest.raises(ArgumentError, match="must hold a folder 'val'"):
        get("dataset", "imagenet", path=str(tmp_path))
    picture(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ArgumentError, match=r"val_00000001\.JPEG lies in no class folder"):
        get("dataset", "imagenet", path=str(tmp_path), split="test")


def test_celeba_reads_its_partition_and_attributes(tmp_path):
    root = str(datafiles.celeba(tmp_path))
    train = get("dataset", "celeba", path=root, size=16, flip=False, labels="Smiling")
    test = get("dataset", "celeba", path=root, size=16, split="test")
    assert [train.source.name(k)[-10:-4] for k in range(4)] == [f"{k:06d}" for k in range(1, 5)]
    assert (len(test), test.shape, test.classes) == (1, (3, 16, 16), 0)
    assert test.source.name(0).endswith("000006.jpg"), "validation images are in neither split"
    assert train.class_names == ["not Smiling", "Smiling"]
    assert train.labels.tolist() == [1, 0, 1, 0]
    people = get("dataset", "celeba", path=root, size=16, flip=False, labels="identity")
    assert people.labels.tolist() == [0, 1, 1, 2] and people.class_names[0] == "2880"


def test_celeba_names_what_is_missing(tmp_path):
    root = datafiles.celeba(tmp_path)
    with pytest.raises(ArgumentError, match="labels='Smilling'.*did you mean 'Smiling'"):
        get("dataset", "celeba", path=str(root), labels="Smilling")
    (root / "identity_CelebA.txt").write_text("000001.jpg 1\n")
    with pytest.raises(ArgumentError, match=r"identity_CelebA\.txt has no line for 000002\.jpg"):
        get("dataset", "celeba", path=str(root), labels="identity")
    (root / "list_eval_partition.txt").write_text("000001.jpg\n")
    with pytest.raises(ArgumentError, match="line 1: 1 columns, not 2"):
        get("dataset", "celeba", path=str(root))
    (root / "list_eval_partition.txt").unlink()
    with pytest.raises(ArgumentError, match=r"list_eval_partition\.txt is missing"):
        get("dataset", "celeba", path=str(root))
