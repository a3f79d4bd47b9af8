"""Files of every format: what goes in comes out, in the file itself; nothing hostile is believed."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import media
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.media import Clip, Sound
from tests.cli.test_images import made

FRAMES = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in (0, 80, 160, 240)]
TONE = Sound(np.sin(np.arange(8_000) / 8)[None].repeat(2, 0), 16_000)
THINGS = {".png": FRAMES[1], ".webp": FRAMES[1], ".jpg": FRAMES[1], ".gif": Clip(FRAMES, 8), ".wav": TONE}
try:
    import imageio_ffmpeg as _  # noqa: F401

    THINGS[".mp4"] = Clip(FRAMES, 8)
except ImportError:
    pass
HOW = made(prompt='ein "großer" Kreis\n赤い円 🔴', negative_prompt="blurry")


@pytest.mark.parametrize("suffix", THINGS)
def test_each_format_carries_its_settings(tmp_path: Path, suffix: str):
    path = media.save(THINGS[suffix], tmp_path / f"x{suffix}", HOW)
    assert media.read(path) == HOW
    assert [file.name for file in tmp_path.iterdir()] == [f"x{suffix}"]
    bare = media.save(THINGS[suffix], tmp_path / f"bare{suffix}")
    with pytest.raises(FastdiffError, match="carries no fastdiff settings"):
        media.read(bare)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_settings_too_long_for_a_format_go_beside_it(tmp_path: Path, suffix: str):
    long = made(report={"text": "x" * 80_000})
    path = media.save(FRAMES[0], tmp_path / f"x{suffix}", long)
    assert (tmp_path / f"x{suffix}.json").is_file() and media.read(path) == long


def test_other_tools_read_the_parameters_of_a_jpeg(tmp_path: Path):
    with Image.open(media.save(FRAMES[0], tmp_path / "x.jpg", HOW)) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0") and "Sampler: DDIM" in comment[8:].decode("utf-16-be")


def test_a_sound_is_what_it_was(tmp_path: Path):
    path = media.save(TONE, tmp_path / "x.wav", HOW)
    with wave.open(str(path)) as read:
        assert (read.getnchannels(), read.getframerate(), read.getnframes()) == (2, 16_000, 8_000)
        values = np.frombuffer(read.readframes(8_000), "<i2").reshape(-1, 2).T / 32767
    assert np.abs(values - TONE.samples).max() < 1e-4
    size = int.from_bytes(path.read_bytes()[4:8], "little")
    assert size == path.stat().st_size - 8


def test_a_gif_moves_at_its_rate(tmp_path: Path):
    with Image.open(media.save(Clip(FRAMES, 10), tmp_path / "x.gif")) as image:
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (4, 100, 0)


@pytest.mark.skipif(".mp4" not in THINGS, reason="the extra video is not installed")
def test_an_mp4_plays_with_our_box_in_it(tmp_path: Path):
    import imageio.v3 as imageio

    path = media.save(Clip(FRAMES, 8), tmp_path / "x.mp4", HOW)
    assert [round(frame.mean() / 80) for frame in imageio.imread(path)] == [0, 1, 2, 3]
    assert imageio.immeta(path)["fps"] == 8


@pytest.mark.parametrize("suffix", [".mp4", ".wav", ".jpg", ".gif", ".webp"])
@pytest.mark.parametrize("kept", [0, 3, 9, 20, 60, -1, -40])
def test_files_that_were_cut_say_so_and_nothing_else(tmp_path: Path, suffix: str, kept: int):
    if suffix not in THINGS:
        pytest.skip("the extra video is not installed")
    path = tmp_path / f"x{suffix}"
    path.write_bytes(media.encode(THINGS[suffix], suffix, HOW)[:kept])
    try:
        assert media.read(path) == HOW  # what was cut off did not matter
    except FastdiffError as error:
        assert "\n" not in str(error)


def test_hostile_boxes_end(tmp_path: Path):
    for data in (b"\0\0\0\0uuid" * 9, b"\0\0\0\1uuid" + b"\0" * 8, b"\xff" * 64):
        (tmp_path / "x.mp4").write_bytes(data)
        with pytest.raises(FastdiffError):
            media.read(tmp_path / "x.mp4")


def test_what_pipelines_return_is_taken():
    pipe, frames = SimpleNamespace(vae=SimpleNamespace(sampling_rate=44_100)), np.random.rand(1, 3, 8, 8, 3)
    clip = media.taken(SimpleNamespace(frames=frames), pipe, 12)
    assert isinstance(clip, Clip) and len(clip.frames) == 3 and clip.size == (8, 8) and clip.fps == 12
    clip = media.taken(SimpleNamespace(frames=torch.from_numpy(frames).permute(0, 1, 4, 2, 3)), pipe, 12)
    assert (np.array(clip.frames[0]) == np.array(clip.frames[0])).all() and clip.size == (8, 8)
    assert media.taken(SimpleNamespace(images=[FRAMES[0]]), pipe, 1) is FRAMES[0]
    for audios in (np.zeros((1, 100)), np.zeros((1, 2, 100)), torch.zeros(1, 2, 100), [torch.zeros(100)]):
        sound = media.taken(SimpleNamespace(audios=audios), pipe, 1)
        assert isinstance(sound, Sound) and sound.samples.shape[-1] == 100 and sound.rate == 44_100
    with pytest.raises(FastdiffError, match="returned no picture, video or sound"):
        media.taken(SimpleNamespace(image_embeds=1), pipe, 1)
    with pytest.raises(FastdiffError, match="how many samples a second"):
        media.taken(SimpleNamespace(audios=np.zeros((1, 100))), SimpleNamespace(), 1)


def test_formats_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch):
    for suffix, kind in ((".png", "video"), (".mp4", "picture"), (".gif", "sound"), (".wav", "video")):
        with pytest.raises(BadConfig, match=f"makes a {kind}; end the name of -o in"):
            media.check(suffix, kind, "A")
    media.check(".PNG", "video", "A", still=True)
    assert media.encode(Clip(FRAMES[:1], 1), ".png") == media.encode(FRAMES[0], ".png")
    assert Image.open(io.BytesIO(media.encode(FRAMES[0], ".jpg", quality=10))).size == (16, 16)
