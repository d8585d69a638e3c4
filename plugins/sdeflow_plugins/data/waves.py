"""A folder of .wav files: sound as a state (channels, length)."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ArgumentError, one_of, positive_int
from sdeflow.plugins import Factory, hookimpl

from . import Data
from .images import Broken
from .tree import Files, Labels, read_tree

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
WIDTHS = {(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)}


@dataclass(frozen=True)
class Wave:
    """Where the numbers of a .wav file are, and what they are.

    start: of the numbers, in bytes. code: PCM or FLOAT. bits: of a number. frames: moments.
    """

    start: int
    frames: int
    channels: int
    rate: int
    code: int
    bits: int

    def read(self, file: str, first: int, count: int) -> np.ndarray:
        """Frames `first` to `first + count`, (channels, count), in [-1, 1]."""
        width = self.bits // 8 * self.channels
        count = min(count, self.frames - first)
        with open(file, "rb") as stream:
            stream.seek(self.start + first * width)
            content = stream.read(count * width)
        if len(content) < count * width:
            raise ArgumentError(f"path: {file} has become shorter since it was opened")
        return _numbers(content, self.code, self.bits).reshape(count, self.channels).T


class WaveData(Data):
    """Pieces of .wav files, `length` long, channels first, in [-1, 1].

    waves: the header of each file. labels: the class of each file, or None.
    """

    def __init__(
        self,
        files: Files,
        waves: list[Wave],
        length: int,
        channels: int,
        labels: Tensor | None,
        class_names: list[str],
    ) -> None:
        self.files, self.waves, self.length = files, waves, length
        self.rate = waves[0].rate
        pieces = np.array([max(1, wave.frames // length) for wave in waves])
        self.ends = pieces.cumsum()
        labels = labels.repeat_interleave(torch.from_numpy(pieces)) if labels is not None else None
        super().__init__(int(pieces.sum()), (channels, length), labels, class_names)

    def sample(self, k: int) -> Tensor:
        number = int(np.searchsorted(self.ends, k, side="right"))
        piece = k - (int(self.ends[number - 1]) if number else 0)
        found = self.waves[number].read(self.files.file(number), piece * self.length, self.length)
        if not np.isfinite(found).all():
            raise ArgumentError(f"path: {self.files.name(number)} holds NaN or infinities")
        if len(found) != self.shape[0]:
            found = found.mean(0, keepdims=True).repeat(self.shape[0], 0)
        x = torch.zeros(self.shape)
        x[:, : found.shape[1]] = torch.from_numpy(np.ascontiguousarray(found))
        return x


def waves(
    split: str = "train",
    path: str = "",
    length: int = 16384,
    channels: Literal[1, 2] = 1,
    rate: int = 0,
    labels: Labels = "auto",
    broken: Broken = "refuse",
) -> WaveData:
    """A folder of .wav files cut into pieces of one length, (channels, length), in [-1, 1].

    A file of n samples gives n // length pieces, one after the other; what is left over at its end
    is dropped. A shorter file gives one, with silence behind it. PCM of 8, 16, 24 and 32 bits and
    floats are read. The headers of all files are read at the start.

    Args:
        split: "train" or "test", as of the data set folder.
        path: the folder, searched at every depth.
        length: of a piece, in samples.
        channels: 1, the mean of a stereo file; or 2, a mono file twice.
        rate: samples a second that all files must have; 0 is any, but one for all.
        labels: class folders, as of the data set folder: "auto", "folders" or "none".
        broken: "refuse": a file that cannot be read, or has another rate, is an error that names
            it; "skip": it is left out, with a warning.
    """
    positive_int("length", length)
    one_of("broken", broken, ("refuse", "skip"))
    if isinstance(rate, bool) or not isinstance(rate, int) or rate < 0:
        raise ArgumentError(f"rate={rate!r} must be a whole number >= 0, such as 16000")
    if channels not in (1, 2):
        raise ArgumentError(f"channels={channels!r} must be 1 or 2")
    files, of_file, names = read_tree(path, split, labels, (".wav", ".wave"), "wave")
    found: dict[int, Wave] = {}
    wrong: list[str] = []
    for k in range(len(files)):
        try:
            wave = read_header(files.file(k))
            rate = rate or wave.rate
            if wave.rate != rate:
                raise ValueError(
                    f"{wave.rate} samples a second, not {rate}: convert it, "
                    f"ffmpeg -i in.wav -ar {rate} out.wav"
                )
            found[k] = wave
        except ValueError as error:
            wrong.append(f"{files.name(k)} ({error})")
    if wrong:
        few = "; ".join(wrong[:10]) + ("; ..." if len(wrong) > 10 else "")
        what = f"path: {len(wrong)} of {len(files)} files cannot be used: {few}"
        if broken == "refuse" or not found:
            raise ArgumentError(f"{what}; repair or remove them, or go on without: broken=skip")
        warnings.warn(f"{what}; left out", stacklevel=2)
    kept = list(found)
    files.names = files.names[kept]
    of_file = of_file[kept] if of_file is not None else None
    return WaveData(files, list(found.values()), length, channels, of_file, names)


def read_header(file: str) -> Wave:
    """The header of a RIFF/WAVE file; ValueError says what is wrong with it.

    The standard library's reader knows no floats and, before Python 3.12, not the extensible form
    in which 24 bits are usually written.
    """
    with open(file, "rb") as stream:
        if stream.read(4) != b"RIFF" or len(stream.read(4)) < 4 or stream.read(4) != b"WAVE":
            raise ValueError("no RIFF/WAVE file")
        form = None
        while len(head := stream.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name == b"fmt ":
                form = _format(stream.read(size + size % 2))
            elif name == b"data":
                if form is None:
                    raise ValueError("data before their format")
                return _located(stream, size, *form)
            else:
                stream.seek(size + size % 2, 1)
    raise ValueError("no data in it")


def _format(chunk: bytes) -> tuple[int, int, int, int]:
    """(code, channels, rate, bits)."""
    if len(chunk) < 16:
        raise ValueError("its format is cut off")
    code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunk[:16])
    if code == EXTENSIBLE and len(chunk) >= 26:
        code = struct.unpack("<H", chunk[24:26])[0]
    if (code, bits) not in WIDTHS or channels not in (1, 2) or not rate:
        raise ValueError(
            f"format {code} of {bits} bits, {channels} channels, {rate} a second; PCM of 8 to 32 "
            "bits and floats are read, mono and stereo"
        )
    return code, channels, rate, bits


def _located(stream: BinaryIO, size: int, code: int, channels: int, rate: int, bits: int) -> Wave:
    start = stream.tell()
    there = stream.seek(0, 2) - start
    if size > there:
        raise ValueError(f"cut off: {there:,} of {size:,} bytes are there")
    frames = size // (channels * bits // 8)
    if not frames:
        raise ValueError("it is empty")
    return Wave(start, frames, channels, rate, code, bits)


def _numbers(content: bytes, code: int, bits: int) -> np.ndarray:
    """Little-endian numbers as float32; whole ones are divided by 2^(bits - 1)."""
    if code == FLOAT:
        return np.frombuffer(content, f"<f{bits // 8}").astype(np.float32)
    if bits == 8:  # the only width without a sign
        return (np.frombuffer(content, np.uint8).astype(np.float32) - 128) / 128
    if bits == 24:  # the three bytes are the high ones of four
        padded = np.zeros((len(content) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        return (padded.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    return (np.frombuffer(content, f"<i{bits // 8}") / 2.0 ** (bits - 1)).astype(np.float32)


@hookimpl
def sdeflow_datasets() -> Mapping[str, Factory]:
    return {"waves": waves}
