"""Shards in WebDataset's form, and Hugging Face data sets, both read in random access."""

import json
import re
import tarfile

import datafiles
import numpy as np
import pytest
import torch
from datafiles import encoded, pixels, shard
from PIL import Image
from sdeflow_plugins.data.webdataset import expand

from sdeflow import ArgumentError, get


def shards(path, **options):
    return get("dataset", "webdataset", path=str(path), **{"size": 8, "flip": False, **options})


def numbers(data):
    """The number of each picture, which is its red."""
    return [round((float(data[k][0].mean()) + 1) * 127.5) for k in range(len(data))]


# ---- webdataset


def test_samples_of_all_shards_stand_in_their_order_and_every_tenth_is_held_out(tmp_path):
    datafiles.shards(tmp_path, count=3, each=10)
    train = shards(tmp_path / "shard-{000..002}.tar")
    test = shards(tmp_path / "shard-{000..002}.tar", split="test")
    assert numbers(train) == [k for k in range(30) if k % 10 != 9]
    assert numbers(test) == [9, 19, 29]
    assert train.labels.tolist() == [k % 3 for k in range(30) if k % 10 != 9]
    assert "shard-001.tar: 000010.png" in train.source.name(9)


def test_a_test_path_holds_the_test_split(tmp_path):
    datafiles.shards(tmp_path / "a")
    datafiles.shards(tmp_path / "b", count=1, each=5)
    options = {"test_path": str(tmp_path / "b" / "*.tar")}
    assert len(shards(tmp_path / "a" / "*.tar", **options)) == 20
    assert len(shards(tmp_path / "a" / "*.tar", split="test", **options)) == 5
    datafiles.shards(tmp_path / "b", count=1, each=5, label="none")
    with pytest.raises(ArgumentError, match="both have labels, or neither"):
        shards(tmp_path / "a" / "*.tar", **options)


@pytest.mark.parametrize("writer", ["webdataset", "tar --format=pax", "tar --format=gnu"])
def test_shards_of_every_writer_are_read(tmp_path, writer):
    path, long = str(tmp_path / "a.tar"), "n" * 120
    if writer == "webdataset":
        web = pytest.importorskip("webdataset")
        with web.TarWriter(path) as sink:
            for k in range(12):
                sink.write({"__key__": f"x/{k:04d}", "png": pixels(k), "cls": k % 3, "txt": "a"})
    else:
        form = tarfile.PAX_FORMAT if "pax" in writer else tarfile.GNU_FORMAT
        with tarfile.open(path, "w", format=form) as tar:
            for k in range(12):
                folder = tmp_path / "files"
                folder.mkdir(exist_ok=True)
                (folder / f"{k:04d}{long}.png").write_bytes(encoded(pixels(k)))
                (folder / f"{k:04d}{long}.cls").write_text(str(k % 3))
            tar.add(folder, "./x/")  # with the folder itself, and "./" before the names
    data = shards(path)
    assert len(data) == 11, "12 less the tenth"
    for k in range(11):
        number = int(re.search(r"(\d{4})[^/]*$", data.source.name(k))[1])
        assert data.labels[k] == number % 3
        image = np.asarray(Image.open(data.source.file(k)))
        assert (image == pixels(number)).all()


def test_the_webdataset_package_finds_the_same_samples(tmp_path):
    web = pytest.importorskip("webdataset.tariterators")
    path = datafiles.shards(tmp_path, count=1, each=12) / "shard-000.tar"
    ours = shards(path, test_path=str(path))
    with path.open("rb") as stream:
        members = ({**one, "__url__": "a"} for one in web.tar_file_iterator(stream))
        theirs = list(web.group_by_keys(members))
    assert len(theirs) == len(ours) == 12
    for k, sample in enumerate(theirs):
        assert ours.source.file(k).read() == sample["png"]
        assert int(ours.labels[k]) == int(sample["cls"])


def test_labels_come_from_cls_or_from_a_field_of_the_json(tmp_path):
    datafiles.shards(tmp_path, label="json")
    path = tmp_path / "*.tar"
    assert shards(path).labels[:4].tolist() == [0, 1, 2, 0]
    assert set(shards(path, label="w").labels.tolist()) == {12}
    assert shards(path, label="none").classes == 0
    datafiles.shards(tmp_path, label="none")
    assert shards(path).classes == 0
    with pytest.raises(ArgumentError, match=r"000000\.png has no label \(cls\)"):
        shards(path, label="cls")


def test_a_key_ends_at_the_first_dot_of_the_name(tmp_path):
    members = []
    for k in range(11):
        members += [(f"v1.0/{k:02d}.seg.png", encoded(pixels(99)))]
        members += [(f"v1.0/{k:02d}.jpg", encoded(pixels(k), "jpeg")), (f"v1.0/{k:02d}.CLS", b"1")]
        members += [("v1.0/__meta__.png", b"not a sample"), ("v1.0/.hidden.png", b"neither")]
    path = shard(tmp_path / "a.tar", members)
    with pytest.raises(ArgumentError, match=r"two images, v1.0/00.seg.png and v1.0/00.jpg.*option"):
        shards(path)
    data = shards(path, image="jpg")
    assert len(data) == 10 and data.labels.tolist() == [1] * 10
    assert torch.equal(shards(path, image="seg.png")[0], shards(path, image="seg.png")[5])


@pytest.mark.parametrize(
    ("label", "message"),
    [(b"-1", "'-1' must be a whole number"), (b"cat", "'cat' must be"), (b"1.0", "'1.0' must be")],
    ids=["negative", "word", "float"],
)
def test_a_wrong_label_is_named(tmp_path, label, message):
    path = shard(tmp_path / "a.tar", [("a.png", encoded(pixels(0))), ("a.cls", label)])
    with pytest.raises(ArgumentError, match=rf"a\.tar: a\.cls: the label {message}"):
        shards(path)


def test_labels_are_held_against_the_number_of_classes(tmp_path):
    datafiles.shards(tmp_path)
    assert shards(tmp_path / "*.tar", classes=1000).classes == 1000
    with pytest.raises(ArgumentError, match=r"0\.\.1; 6 of 18 do not"):
        shards(tmp_path / "*.tar", classes=2)
    with pytest.raises(ArgumentError, match="no JSON"):
        shards(shard(tmp_path / "j.tar", [("a.png", encoded(pixels(0))), ("a.json", b"{")]))
    odd = [("a.png", encoded(pixels(0))), ("a.json", json.dumps({"label": 0.5}).encode())]
    with pytest.raises(ArgumentError, match="label 0.5 must be a whole number"):
        shards(shard(tmp_path / "k.tar", odd))


def test_a_sample_without_an_image_is_named(tmp_path):
    path = shard(tmp_path / "a.tar", [("a.png", encoded(pixels(0))), ("b.cls", b"1")])
    with pytest.raises(ArgumentError, match=r"a\.tar: sample b has no image"):
        shards(path)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_refused_with_the_remedy(tmp_path, mode):
    path = tmp_path / f"a.tar.{mode}"
    with tarfile.open(path, f"w:{mode}"):
        pass
    remedy = {"gz": "gunzip", "bz2": "bunzip2", "xz": "unxz"}[mode]
    with pytest.raises(ArgumentError, match=rf"is compressed.*unpack it with {remedy}"):
        shards(path)


def test_a_damaged_shard_is_named_wherever_the_damage_lies(tmp_path):
    datafiles.shards(tmp_path, count=1)
    path = tmp_path / "shard-000.tar"
    content = path.read_bytes()
    ends = content.rstrip(b"\0")
    middle = content.index(b"000005.png")
    faults = {
        "in the data": content[: middle + 700],
        "in a header": content[: middle + 100],
        "between two members": content[:middle],
        "at the end mark": content[: -(-len(ends) // 512) * 512],
        "a header overwritten": content[: middle + 100] + b"?" * 60 + content[middle + 160 :],
        "no tar": b"<html>" * 300,
        "empty": b"",
    }
    for where, fault in faults.items():
        path.write_bytes(fault)
        with pytest.raises(ArgumentError, match=r"shard-000\.tar is damaged or cut off"):
            shards(path)
            pytest.fail(where)
    path.write_bytes(content)
    assert len(shards(path)) == 9


def test_a_broken_image_in_a_shard_is_named_or_skipped(tmp_path):
    members = [(f"{k:02d}.png", encoded(pixels(k))) for k in range(11)]
    members[3] = ("03.png", members[3][1][:100])
    path = shard(tmp_path / "a.tar", members)
    with pytest.raises(ArgumentError, match=r"a\.tar: 03\.png cannot be read"):
        shards(path)[3]
    data = shards(path, broken="skip")
    with pytest.warns(UserWarning, match=r"03\.png.*04\.png stands in"):
        assert torch.equal(data[3], data[4])


def test_patterns_are_read_as_a_shell_does(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-8", "b-9", "b-10"):
        (tmp_path / f"{name}.tar").touch()

    def names(pattern):
        return [path.rsplit("/", 1)[1][:-4] for path in expand(f"{tmp_path}/{pattern}", "path")]

    assert names("a-{08..10}.tar") == ["a-08", "a-09", "a-10"]
    assert names("b-{8..10}.tar") == ["b-8", "b-9", "b-10"]
    assert names("a-*.tar") == ["a-08", "a-09", "a-10"]
    assert names("{b,a}-10.tar") == ["b-10", "a-10"]
    with pytest.raises(ArgumentError, match=r"there is no file '.*a-11\.tar'"):
        names("a-{08..11}.tar")
    with pytest.raises(ArgumentError, match="there is no file"):
        names("c-*.tar")


# ---- Hugging Face


@pytest.fixture(scope="module")
def table():
    """24 pictures with two kinds of labels, as a `datasets.Dataset`."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog", "cow"]),
            "number": datasets.Value("int64"),
            "score": datasets.Value("float32"),
            "caption": datasets.Value("string"),
        }
    )
    rows = []
    for k in range(24):
        image = pixels(k)
        image[..., 0] = k
        rows.append(
            {
                "image": {"bytes": encoded(image), "path": None},
                "kind": k % 3,
                "number": k % 5,
                "score": k / 2,
                "caption": "a",
            }
        )
    return datasets.Dataset.from_list(rows, features)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test looks anything up on the hub, or leaves tables in the user's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        import datasets
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def hub(path, **options):
    return get("dataset", "huggingface", path=str(path), **{"size": 8, "flip": False, **options})


def test_a_table_on_disk_is_read_row_by_row(table, tmp_path):
    table.save_to_disk(tmp_path / "t")
    train, test = hub(tmp_path / "t"), hub(tmp_path / "t", split="test")
    assert numbers(train) == [k for k in range(24) if k % 10 != 9]
    assert numbers(test) == [9, 19]
    assert train.class_names == ["cat", "dog", "cow"]
    assert train.labels.tolist() == [k % 3 for k in range(24) if k % 10 != 9]
    assert hub(tmp_path / "t", label="none").classes == 0
    number = hub(tmp_path / "t", label="number", color="grey")
    assert (number.classes, number.shape) == (5, (1, 8, 8))


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_the_splits_of_a_table_are_kept(table, tmp_path, held_out):
    import datasets

    parts = {"train": table.select(range(20)), held_out: table.select(range(20, 24))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "t")
    assert numbers(hub(tmp_path / "t")) == list(range(20))
    assert numbers(hub(tmp_path / "t", split="test")) == [20, 21, 22, 23]


def test_parquet_files_are_read(table, tmp_path):
    (tmp_path / "t").mkdir()
    table.to_parquet(tmp_path / "t" / "train-00000-of-00001.parquet")
    data = hub(tmp_path / "t")
    assert numbers(data) == [k for k in range(24) if k % 10 != 9]
    assert data.class_names == ["cat", "dog", "cow"]


def test_a_folder_of_images_is_read_as_well(table, tmp_path):
    data = hub(datafiles.image_tree(tmp_path / "t"))
    assert data.class_names == ["cat", "dog"] and len(data) == 18
    assert [number % 2 for number in numbers(data)] == data.labels.tolist()


def test_a_table_goes_to_worker_processes(table, tmp_path):
    table.save_to_disk(tmp_path / "t")
    data, order = hub(tmp_path / "t"), [[3, 1], [0, 2]]
    loader = torch.utils.data.DataLoader(data, batch_sampler=order, num_workers=2)
    for batch, places in zip(loader, order, strict=True):
        assert torch.equal(batch, torch.stack([data[k] for k in places]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "score"}, r"labels of .*, score, are torch.float32"),
        ({"label": "caption"}, "column caption holds.*class_encode_column"),
        ({"label": "kin"}, "did you mean 'kind'"),
        ({"image": "caption"}, "image='caption' is unknown.*image"),
    ],
    ids=["floats", "words", "no_label", "no_image"],
)
def test_wrong_columns_are_refused(table, tmp_path, options, message):
    table.save_to_disk(tmp_path / "t")
    with pytest.raises(ArgumentError, match=message):
        hub(tmp_path / "t", **options)


def test_a_table_without_images_or_a_broken_folder_is_refused(table, tmp_path):
    table.remove_columns("image").save_to_disk(tmp_path / "t")
    with pytest.raises(ArgumentError, match="0 columns of images among kind, number"):
        hub(tmp_path / "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match="cannot be loaded.*save_to_disk"):
        hub(tmp_path / "empty")
    with pytest.raises(ArgumentError, match="'nobody/nothing' cannot be loaded"):
        hub("nobody/nothing")


def test_hidden_labels_are_refused(table, tmp_path):
    rows = table.remove_columns("kind").add_column("y", [-1] * 24)
    rows.save_to_disk(tmp_path / "t")
    with pytest.raises(ArgumentError, match="24 of 24 do not: -1 in row 0"):
        hub(tmp_path / "t", label="y")


def test_a_broken_row_is_named(table, tmp_path):
    def spoil(row, k):
        return {"image": None} if k == 2 else row

    table.select(range(12)).map(spoil, with_indices=True).save_to_disk(tmp_path / "t")
    data = hub(tmp_path / "t")
    assert data[1].shape == (3, 8, 8)
    with pytest.raises(ArgumentError, match=r"\(train\): row 2 cannot be read.*has no image"):
        data[2]
