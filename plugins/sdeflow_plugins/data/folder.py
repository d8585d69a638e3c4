"""A folder of images, read with Pillow; ImageNet is one of them."""

from __future__ import annotations

from collections.abc import Mapping

from sdeflow.plugins import Factory, hookimpl

from .images import Broken, Color, Crop, Frame, ImageData
from .tree import Labels, read_tree

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".avif", ".jp2"),
)


def folder(
    split: str = "train",
    path: str = "",
    size: int = 32,
    color: Color = "rgb",
    crop: Crop = "center",
    crops: int = 0,
    flip: bool = True,
    labels: Labels = "auto",
    broken: Broken = "refuse",
) -> ImageData:
    """A folder of images of any size, searched at every depth; class folders give labels.

    Images of any mode are taken: turned as EXIF says, transparent ones laid on white, 16-bit ones
    at full depth, of animations the first picture.

    Args:
        split: "train" or "test": every tenth file in order of name is held out as "test". Where
            there are subfolders `train` and `test` (or val, validation, valid), these are the
            splits.
        path: the folder.
        size: the side of the square images, in pixels.
        color: "rgb" (3, size, size) or "grey" (1, size, size).
        crop: "center", the middle square; "random", a square of 0.8 to 1 times the shorter side,
            anywhere. Test images are always cropped at the centre.
        crops: random crops of each training image, each a sample of its own; 0 is 4 of them.
        flip: whether the mirror image of every training image is a sample too.
        labels: "folders": the first folder that a file lies in is its class, in order of name;
            "none"; "auto": folders where there are two or more and no image beside them.
        broken: "refuse": an image that cannot be decoded is an error that names it; "skip": the
            next readable one of its class stands in for it, with a warning.
    """
    frame = Frame.of(split, size, color, crop, crops, flip)
    files, classes, names = read_tree(path, split, labels, SUFFIXES, "image")
    return ImageData(files, frame, classes, names, broken=broken)


def imagenet(
    split: str = "train",
    path: str = "",
    size: int = 64,
    color: Color = "rgb",
    crop: Crop = "center",
    crops: int = 0,
    flip: bool = True,
    labels: bool = True,
    broken: Broken = "refuse",
) -> ImageData:
    """ImageNet (ILSVRC) from a local folder with train/n01440764/*.JPEG and val/n01440764/*.JPEG.

    The classes are the folders in order of name, called by their WordNet ids. The validation
    images are unpacked without folders: they have to be sorted into them first. Source:
    Russakovsky et al. (2015).

    Args:
        split: "train", or "test", which reads val.
        path: the folder that holds train and val.
        labels: whether the samples are labelled.
        size, color, crop, crops, flip, broken: as of the data set folder.
    """
    frame = Frame.of(split, size, color, crop, crops, flip)
    kind = "folders" if labels else "none"
    files, classes, names = read_tree(path, split, kind, SUFFIXES, "image", ("train", "val"))
    return ImageData(files, frame, classes, names, broken=broken)


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {"folder": folder, "imagenet": imagenet}
