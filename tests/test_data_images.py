"""Folders of images: sizes, modes, crops, class folders, broken files."""

import warnings

import datafiles
import numpy as np
import pytest
import torch
from datafiles import picture, pixels
from PIL import Image
from torch.utils.data import DataLoader

from sdeflow import ArgumentError, get

WHITE = np.full((8, 8, 3), 255, np.uint8)


def folder(path, **options):
    return get("dataset", "folder", path=str(path), **{"size": 8, "flip": False, **options})


def names(data):
    return [data.source.name(k).rsplit("/", 2)[-1] for k in range(len(data.source))]


# ---- which files belong to a split


def test_every_tenth_file_is_held_out(tmp_path):
    root = datafiles.image_tree(tmp_path)
    train, test = folder(root), folder(root, split="test")
    assert (len(train), len(test)) == (18, 2)
    assert not set(names(train)) & set(names(test))


@pytest.mark.parametrize("held_out", ["test", "val", "validation", "valid"])
def test_subfolders_are_the_splits(tmp_path, held_out):
    for k in range(3):
        picture(tmp_path / "train" / f"{k}.jpg")
    picture(tmp_path / held_out / "0.jpg")
    assert len(folder(tmp_path)) == 3
    assert len(folder(tmp_path, split="test")) == 1


def test_a_lone_subfolder_train_is_held_out_from(tmp_path):
    datafiles.image_tree(tmp_path / "train")
    assert (len(folder(tmp_path)), len(folder(tmp_path, split="test"))) == (18, 2)
    assert folder(tmp_path).class_names == ["cat", "dog"]


def test_hidden_files_and_other_files_are_left_out(tmp_path):
    picture(tmp_path / "a.PNG")
    picture(tmp_path / ".thumbnails" / "a.png")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    (tmp_path / "notes.txt").write_text("no picture")
    assert names(folder(tmp_path)) == ["a.PNG"]


def test_links_are_followed_and_a_circle_ends(tmp_path):
    picture(tmp_path / "far" / "a.png")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "here")
    assert names(folder(tmp_path / "here")) == ["a.png"]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"holds no image for split='train'.*\.png"):
        folder(tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ArgumentError, match="holds no image"):
        folder(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(ArgumentError, match="no image for split='test'.*at least 10"):
        folder(tmp_path, split="test")


# ---- classes


def test_class_folders_number_the_classes_in_order_of_name(tmp_path):
    data = folder(datafiles.image_tree(tmp_path, classes=("dog", "cat", "ant")))
    assert data.class_names == ["ant", "cat", "dog"]
    for k in range(len(data)):
        red = round((float(data[k][0].mean()) + 1) * 127.5)  # the number of the file
        assert ("dog", "cat", "ant")[red % 3] == data.class_names[data.labels[k]]


def test_a_class_that_one_split_lacks_is_numbered_in_both(tmp_path):
    for name in ("train/a/0.png", "train/c/0.png", "test/b/0.png", "test/c/0.png"):
        picture(tmp_path / name)
    train, test = folder(tmp_path), folder(tmp_path, split="test")
    assert train.class_names == test.class_names == ["a", "b", "c"]
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 2], [1, 2])


def test_labels_can_be_left_out_or_insisted_on(tmp_path):
    root = datafiles.image_tree(tmp_path)
    assert folder(root, labels="none").classes == 0
    picture(root / "loose.png")
    assert folder(root).labels is None, "auto: an image beside the class folders"
    with pytest.raises(ArgumentError, match=r"loose\.png lies in no class folder"):
        folder(root, labels="folders")


def test_one_folder_is_no_class_unless_it_is_said_to_be(tmp_path):
    datafiles.image_tree(tmp_path, classes=("all",))
    assert folder(tmp_path).labels is None
    assert folder(tmp_path, labels="folders").class_names == ["all"]


def test_a_flat_test_split_beside_class_folders_is_refused(tmp_path):
    datafiles.image_tree(tmp_path / "train")
    picture(tmp_path / "test" / "a.png")
    for split in ("train", "test"):
        with pytest.raises(ArgumentError, match=r"test/a\.png lies in no class folder"):
            folder(tmp_path, split=split)
        assert len(folder(tmp_path, split=split, labels="none")) > 0


# ---- from a picture to a sample


def test_colors_lie_in_minus_one_to_one(tmp_path):
    picture(tmp_path / "a.png", Image.new("RGB", (20, 10), (0, 128, 255)))
    x = folder(tmp_path)[0]
    assert (x[0] == -1).all() and (x[1] - 128 / 127.5 + 1).abs().max() < 1e-6 and (x[2] == 1).all()
    grey = folder(tmp_path, color="grey")
    assert grey.shape == grey[0].shape == (1, 8, 8)


def test_pixels_of_the_right_size_are_taken_as_they_are(tmp_path):
    image = pixels(0, 8, 8)
    picture(tmp_path / "a.png", image)
    expected = torch.from_numpy(image).movedim(2, 0) / 127.5 - 1
    torch.testing.assert_close(folder(tmp_path)[0], expected, rtol=0, atol=1e-6)


def test_the_centre_is_cropped_and_mirrored(tmp_path):
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:15] = 255  # the left half of the middle square is white
    picture(tmp_path / "a.png", image)
    data = folder(tmp_path, size=10, flip=True)
    assert len(data) == 2
    assert data[0][:, :, :4].min() > 0.9 and data[0][:, :, 6:].max() < -0.9
    assert torch.equal(data[1], data[0].flip(2))


def test_random_crops_are_other_places_of_the_same_picture_each_time_the_same(tmp_path):
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(0)), -1)
    for k in range(10):
        picture(tmp_path / f"{k}.png", image)
    data = folder(tmp_path, crop="random", crops=3, flip=True)
    assert len(data) == 9 * 3 * 2
    middles = torch.stack([data[9 * v][:2].mean((1, 2)) for v in range(6)])
    assert torch.unique(middles[::2], dim=0).shape[0] == 3, "three places"
    assert torch.equal(data[9].flip(2), data[0]), "the mirror image of the same place"
    across = torch.stack([data[k][:2].mean((1, 2)) for k in range(9)])
    assert torch.unique(across, dim=0).shape[0] == 9, "another place in each picture"
    assert middles.abs().max() <= 0.2 + 0.05, "a square of 0.8 sides moves by 0.1 of the side"
    spans = torch.stack([data[k][0, 0, -1] - data[k][0, 0, 0] for k in range(9)]).abs() / 2
    assert (spans > 0.6).all() and (spans < 1).all()
    assert len(folder(tmp_path, split="test", crop="random", flip=True)) == 1


def test_labels_follow_the_views(tmp_path):
    data = folder(datafiles.image_tree(tmp_path), crop="random", crops=2, flip=True)
    assert len(data) == 18 * 4
    assert torch.equal(data.labels.reshape(4, 18), data.labels[:18].expand(4, 18))


def test_sizes_may_be_mixed(tmp_path):
    for k, (height, width) in enumerate([(1, 1), (3, 200), (200, 3), (8, 8), (300, 400)]):
        picture(tmp_path / f"{k}.png", pixels(k, height, width))
    assert torch.stack(list(folder(tmp_path)[k] for k in range(5))).shape == (5, 3, 8, 8)


def modes():
    """(name, image, save options, what it is in (red, green, blue), each 0 to 255)."""
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    see_through = palette.copy()
    deep = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    yield "grey.png", Image.new("L", (8, 8), 77), {}, (77, 77, 77)
    yield "rgba.png", clear, {}, (255, 255, 255)
    yield "half.png", half, {}, (127, 127, 127)
    yield "la.png", Image.new("LA", (8, 8), (0, 0)), {}, (255, 255, 255)
    yield "palette.png", palette, {}, (10, 20, 30)
    yield "clear.png", see_through, {"transparency": 1}, (255, 255, 255)
    yield "bits.png", Image.new("1", (8, 8), 1), {}, (255, 255, 255)
    yield "deep.png", deep, {}, (128, 128, 128)
    yield "deep.tiff", deep, {}, (128, 128, 128)
    yield "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0)), {}, (255, 255, 255)
    yield "rgb.webp", Image.new("RGB", (8, 8), (255, 255, 255)), {"lossless": True}, (255,) * 3


MODES = {name: (image, save, color) for name, image, save, color in modes()}


@pytest.mark.parametrize("file", MODES)
@pytest.mark.parametrize("color", ["rgb", "grey"])
def test_every_mode_becomes_the_color_that_is_seen(tmp_path, file, color):
    image, save, seen = MODES[file]
    picture(tmp_path / file, image, **save)
    x = (folder(tmp_path, color=color)[0].double() + 1) * 127.5
    expected = torch.tensor(seen, dtype=torch.double)
    if color == "grey":
        expected = (expected @ torch.tensor([0.299, 0.587, 0.114]).double())[None]
    assert (x.mean((1, 2)) - expected).abs().max() < 1.01
    assert x.std((1, 2)).max() < 0.01


def test_sixteen_bits_are_kept_and_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    picture(tmp_path / "a.png", Image.fromarray(levels))
    x = folder(tmp_path, color="grey")[0][0]
    torch.testing.assert_close(
        x, torch.from_numpy(levels.astype(np.float32)) / 32767.5 - 1, rtol=0, atol=1e-6
    )
    assert len(x.unique()) == 64


def test_an_animation_shows_its_first_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("black", "white", "red")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (folder(tmp_path)[0] == -1).all()


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture(tmp_path / "a.png", image, exif=exif)
    x = folder(tmp_path)[0]
    assert (x[:, :4] == -1).all() and (x[:, 4:] == 1).all()


@pytest.mark.parametrize(("side", "atol"), [(800, 0.05), (100, 0.0)], ids=["large", "small"])
def test_a_jpeg_is_decoded_smaller_only_where_nobody_sees_it(tmp_path, side, atol):
    rough = Image.fromarray(pixels(0, side // 20, side // 20)).resize((side, side))
    file = picture(tmp_path / "a" / "a.jpg", rough, quality=95)
    with Image.open(file) as whole:
        picture(tmp_path / "b" / "a.png", whole)
    small, whole = (folder(tmp_path / name, size=34)[0] for name in "ab")
    assert (small - whole).abs().max() <= atol


def test_floats_are_refused_as_an_image(tmp_path):
    picture(tmp_path / "a.tiff", Image.new("F", (8, 8), 0.5))
    with pytest.raises(ArgumentError, match=r"a\.tiff.*floats have no agreed white.*arrays"):
        folder(tmp_path)[0]


# ---- broken images


def damaged(path, damage):
    picture(path, pixels(3, 64, 64))
    content = path.read_bytes()
    if damage == "text":
        path.write_bytes(b"<html>404 Not Found</html>")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(99) + content[middle + 99 :])
    return path


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "overwritten"])
def test_one_broken_image_among_many_is_named(tmp_path, damage):
    root = datafiles.image_tree(tmp_path)
    damaged(root / "cat" / "04.png", damage)
    data = folder(root)
    broken = names(data).index("04.png")
    for k in range(len(data)):
        if k != broken:
            assert data[k].isfinite().all()
    with pytest.raises(ArgumentError, match=r"cat/04\.png cannot be read.*remove or replace.*skip"):
        data[broken]


def test_a_skipped_image_is_replaced_by_the_next_of_its_class_and_named_once(tmp_path):
    root = datafiles.image_tree(tmp_path)
    damaged(root / "cat" / "04.png", "cut")
    damaged(root / "cat" / "06.png", "text")
    data = folder(root, broken="skip", flip=True)
    listed = names(data)
    four, six, eight = (listed.index(f"{k}.png") for k in ("04", "06", "08"))
    with pytest.warns(UserWarning, match=r"04\.png cannot be read.*08\.png stands in for it"):
        x = data[four]
    assert torch.equal(x, data[eight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(data[four], x)
        assert torch.equal(data[four + len(listed)], x.flip(2)), "its mirror image as well"
    with pytest.warns(UserWarning, match=r"06\.png"):
        assert torch.equal(data[six], x)


def test_what_stands_in_does_not_depend_on_what_was_read_before(tmp_path):
    root = datafiles.image_tree(tmp_path)
    for k in (2, 4, 18):
        damaged(root / "cat" / f"{k:02d}.png", "cut")
    order = list(range(18))
    with pytest.warns(UserWarning):
        forwards = {k: (data := folder(root, broken="skip"))[k] for k in order}
    with pytest.warns(UserWarning):
        backwards = [data[k] for k in reversed(order)][::-1]
    assert all(torch.equal(forwards[k], backwards[k]) for k in order)


def test_a_broken_image_is_named_from_a_worker_process_too(tmp_path):
    root = datafiles.image_tree(tmp_path)
    damaged(root / "cat" / "04.png", "cut")
    loader = DataLoader(folder(root), batch_size=6, num_workers=1)
    with pytest.raises(ArgumentError, match=r"cat/04\.png cannot be read"):
        list(loader)


def test_a_class_without_a_readable_image_is_refused_even_when_skipping(tmp_path):
    root = datafiles.image_tree(tmp_path)
    damaged(root / "ant" / "0.png", "cut")
    data = folder(root, broken="skip")
    with pytest.raises(ArgumentError, match=r"0\.png.*none of its class can be read"):
        data[names(data).index("0.png")]


def test_a_lost_file_is_an_error_even_when_skipping(tmp_path):
    root = datafiles.image_tree(tmp_path)
    data = folder(root, broken="skip")
    (root / "cat" / "00.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"00\.png"):
        data[0]


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"color": "cmyk"}, {"crop": "left"}, {"crops": 3}, {"broken": "no"}],
    ids=lambda options: next(iter(options)),
)
def test_bad_options_are_refused(tmp_path, options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        folder(datafiles.image_tree(tmp_path), **options)
