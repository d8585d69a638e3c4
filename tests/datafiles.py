"""Small files in the true formats of the data sets, made by the tests."""

import io
import json
import tarfile
import wave

import numpy as np
from PIL import Image


def pixels(seed, height=10, width=12):
    """A picture of noise, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(path, image=None, **save):
    """An image file; the folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels(len(path.name)) if image is None else image
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **save)
    return path


def encoded(image, form="png"):
    """The bytes of an image file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form)
    return stream.getvalue()


def image_tree(root, files=20, classes=("cat", "dog"), first=0):
    """Pictures in class folders in turn; their red is the number of the file."""
    for k in range(first, first + files):
        image = pixels(k)
        image[..., 0] = k
        picture(root / classes[k % len(classes)] / f"{k:02d}.png", image)
    return root


def idx(path, array, opener=open):
    """An IDX file: magic, the sizes big-endian, the bytes."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    with opener(path, "wb") as stream:
        stream.write(head + array.astype(np.uint8).tobytes())


def cifar_records(n, seed=0):
    """n records of CIFAR-10's binary version, labels 0, 1, .. 9, 0 .."""
    records = np.random.default_rng(seed).integers(0, 256, (n, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(n) % 10
    return records


def cifar(root, n=4):
    """A folder cifar-10-batches-bin with n records a file."""
    root.mkdir(parents=True, exist_ok=True)
    for k in range(1, 6):
        cifar_records(n, k).tofile(root / f"data_batch_{k}.bin")
    cifar_records(n, 6).tofile(root / "test_batch.bin")
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (root / "batches.meta.txt").write_text("\n".join(names.split()) + "\n\n")
    return root


def celeba(root, n=6):
    """img_align_celeba with n faces of 178 x 218 (two thirds train), and the three lists."""
    attributes = "5_o_Clock_Shadow Male Smiling"
    partition, signs, people = [], [str(n), attributes], []
    for k in range(1, n + 1):
        name = f"{k:06d}.jpg"
        picture(root / "img_align_celeba" / name, pixels(k, 218, 178))
        partition.append(f"{name} {0 if k <= 2 * n // 3 else 2 - k % 2}")
        signs.append(f"{name} -1  1 {' 1' if k % 2 else '-1'}")
        people.append(f"{name} {2880 + k // 2}")
    for name, lines in (
        ("list_eval_partition.txt", partition),
        ("list_attr_celeba.txt", signs),
        ("identity_CelebA.txt", people),
    ):
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def shard(path, samples):
    """A tar of (name, bytes) members, as `tar --format=ustar` writes it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shards(root, count=2, each=10, label="cls"):
    """`count` shards of `each` samples: key.png beside key.cls or key.json, or alone."""
    root.mkdir(parents=True, exist_ok=True)
    for s in range(count):
        members = []
        for k in range(s * each, (s + 1) * each):
            image = pixels(k)
            image[..., 0] = k
            members.append((f"{k:06d}.png", encoded(image)))
            if label == "cls":
                members.append((f"{k:06d}.cls", f"{k % 3}\n".encode()))
            if label == "json":
                members.append((f"{k:06d}.json", json.dumps({"label": k % 3, "w": 12}).encode()))
        shard(root / f"shard-{s:03d}.tar", members)
    return root


def sound(path, frames, rate=8000, width=2):
    """A PCM .wav of whole numbers (n, channels), by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.asarray(frames)
    if width == 1:
        content = (frames + 128).astype(np.uint8).tobytes()
    else:
        content = frames.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(frames.shape[1])
        stream.setsampwidth(width)
        stream.setframerate(rate)
        stream.writeframes(content)
    return path


def tone(n, channels=1, amplitude=8000, seed=0):
    """n frames of noise, whole numbers."""
    return np.random.default_rng(seed).integers(-amplitude, amplitude, (n, channels))
