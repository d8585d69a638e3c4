"""Folders of .wav files: widths, pieces, channels, and files that cannot be used."""

import struct

import datafiles
import numpy as np
import pytest
import torch
from datafiles import sound, tone

from sdeflow import ArgumentError, get


def waves(path, **options):
    return get("dataset", "waves", path=str(path), **{"length": 40, **options})


def chunk(name, content):
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def riff(path, form, content, *more):
    """A RIFF/WAVE file of given chunks."""
    body = b"WAVE" + b"".join(more) + chunk(b"fmt ", form) + chunk(b"data", content)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_whole_numbers_of_every_width_become_the_same_sound(tmp_path, width, channels):
    full = 2 ** (8 * width - 1)
    frames = np.stack([np.linspace(-full, full - 1, 40).astype(np.int64)] * channels, 1)
    frames[:, -1] = frames[::-1, -1]
    sound(tmp_path / "a.wav", frames, width=width)
    data = waves(tmp_path, channels=channels)
    assert data.shape == (channels, 40) and data.rate == 8000
    expected = torch.from_numpy((frames.T / full).astype("float32"))
    torch.testing.assert_close(data[0], expected, rtol=0, atol=2e-7)
    assert data[0].min() == -1 and data[0].max() <= 1


@pytest.mark.parametrize("bits", [32, 64])
def test_floats_are_read_as_they_are(tmp_path, bits):
    x = np.random.default_rng(0).uniform(-1, 1, 40)
    form = struct.pack("<HHIIHH", 3, 1, 8000, 8000 * bits // 8, bits // 8, bits)
    riff(tmp_path / "a.wav", form, x.astype(f"<f{bits // 8}").tobytes())
    torch.testing.assert_close(waves(tmp_path)[0][0], torch.from_numpy(x).float())


def test_the_extensible_form_and_other_chunks_are_read(tmp_path):
    x = tone(40, amplitude=2**23)[:, 0]
    guid = struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
    form = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 8000, 24000, 3, 24, 22, 24, 4) + guid
    content = x.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    riff(tmp_path / "a.wav", form, content, chunk(b"LIST", b"odd"), chunk(b"JUNK", bytes(28)))
    torch.testing.assert_close(waves(tmp_path)[0][0], torch.from_numpy(x / 2**23).float())


def test_a_long_file_is_cut_into_pieces_and_a_short_one_ends_in_silence(tmp_path):
    long, short = tone(130), tone(25, seed=1)
    sound(tmp_path / "a.wav", long)
    sound(tmp_path / "b.wav", short)
    data = waves(tmp_path)
    assert len(data) == 4
    for k in range(3):
        piece = torch.from_numpy(long[40 * k : 40 * (k + 1), 0] / 2**15).float()
        assert torch.equal(data[k][0], piece)
    assert torch.equal(data[3][0, :25], torch.from_numpy(short[:, 0] / 2**15).float())
    assert (data[3][0, 25:] == 0).all()


def test_class_folders_label_every_piece(tmp_path):
    for k, (name, n) in enumerate([("b", 130), ("a", 50), ("b", 80)]):
        sound(tmp_path / name / f"{k}.wav", tone(n))
    data = waves(tmp_path)
    assert data.class_names == ["a", "b"] and data.labels.tolist() == [0, 1, 1, 1, 1, 1]


def test_stereo_is_mixed_down_and_mono_doubled(tmp_path):
    left_right = tone(40, channels=2)
    sound(tmp_path / "a.wav", left_right)
    sound(tmp_path / "b.wav", left_right[:, :1])
    mono, stereo = waves(tmp_path), waves(tmp_path, channels=2)
    mean = torch.from_numpy(left_right.mean(1) / 2**15).float()
    torch.testing.assert_close(mono[0][0], mean)
    assert torch.equal(stereo[1][0], stereo[1][1]) and not torch.equal(stereo[0][0], stereo[0][1])


def broken(path, fault):
    sound(path, tone(60))
    content = path.read_bytes()
    form = struct.pack("<HHIIHH", 6, 1, 8000, 8000, 1, 8)
    if fault == "a-law":
        riff(path, form, bytes(60))
    elif fault == "rate":
        sound(path, tone(60), rate=16000)
    elif fault == "empty":
        sound(path, tone(1)[:0])
    else:
        path.write_bytes({"text": b"<html>", "cut": content[:100], "head": content[:20]}[fault])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("text", "no RIFF/WAVE"),
        ("cut", "56 of 120 bytes are there"),
        ("head", "format is cut off"),
        ("a-law", "format 6 of 8 bits"),
        ("rate", "16000 samples a second, not 8000.*ffmpeg"),
        ("empty", "it is empty"),
    ],
)
def test_files_that_cannot_be_used_are_all_named_or_left_out(tmp_path, fault, message):
    for k in range(5):
        sound(tmp_path / f"{k}.wav", tone(60, seed=k))
    broken(tmp_path / "2.wav", fault)
    broken(tmp_path / "4.wav", fault)
    with pytest.raises(ArgumentError, match=rf"2 of 5 files.*2\.wav \(.*{message}.*4\.wav.*skip"):
        waves(tmp_path)
    with pytest.warns(UserWarning, match=r"2\.wav.*4\.wav.*left out"):
        data = waves(tmp_path, broken="skip")
    assert len(data) == 3
    assert torch.equal(data[2][0], torch.from_numpy(tone(60, seed=3)[:40, 0] / 2**15).float())


def test_nan_in_a_float_file_is_named(tmp_path):
    x = np.zeros(40, "<f4")
    x[7] = np.nan
    riff(tmp_path / "a.wav", struct.pack("<HHIIHH", 3, 1, 8000, 32000, 4, 32), x.tobytes())
    with pytest.raises(ArgumentError, match=r"a\.wav holds NaN"):
        waves(tmp_path)[0]


@pytest.mark.parametrize(
    "options",
    [{"length": 0}, {"channels": 3}, {"broken": "no"}, {"rate": -1}],
    ids=lambda options: next(iter(options)),
)
def test_bad_options_are_refused(tmp_path, options):
    datafiles.sound(tmp_path / "a.wav", tone(40))
    with pytest.raises(ArgumentError, match=next(iter(options))):
        waves(tmp_path, **options)


def test_a_folder_without_waves_is_refused(tmp_path):
    (tmp_path / "a.mp3").write_bytes(b"ID3")
    with pytest.raises(ArgumentError, match=r"holds no wave.*\.wav"):
        waves(tmp_path)
