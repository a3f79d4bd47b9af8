"""A pipeline that makes videos, on the page: both side by side, with their numbers and words that make them again."""

# ruff: noqa: E402 - what follows needs gradio

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'fastdiff[demo]'")

import diffusers.utils

import fastdiff.demo.page as pages
from fastdiff import media
from fastdiff.cli import run
from fastdiff.demo.page import Page
from tests import tiny
from tests.demo.conftest import Visitor

SIZE = {"width": "32", "height": "32", "frames": "5", "fps": "8", "guidance_scale": "4"}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.make("wan").save_pretrained(path)
    return str(path)


def drawn(wan: str, place: Path) -> tuple[dict, list]:
    """The last update of the page, and what was written for it."""
    kept = []

    def save(made, path, how):
        kept.append((made, path.suffix, how))
        return media.save(made, path, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "save", save)
        asked = {"model": wan, "cache": "ab_cache", "steps": "6", "seed": 3, "prompt": "a red cat"} | SIZE
        return Visitor(Page([wan], place)).run(**asked)[-1], kept


@pytest.fixture(scope="module")
def shown(wan, tmp_path_factory) -> tuple[dict, list]:
    return drawn(wan, tmp_path_factory.mktemp("benchmarks"))


def test_both_videos_stand_side_by_side_with_their_settings_in_them(shown):
    last, kept = shown
    assert last["films"]["visible"] and "slider" not in last
    assert last["left"].endswith("without.mp4") and last["right"].endswith("accelerated.mp4")
    (plain, *_), (fast, suffix, how) = kept
    assert suffix == ".mp4" and (how.frames, how.fps, fast.fps, len(fast.frames), fast.size) == (5, 8, 8, 5, (32, 32))
    assert not np.array_equal(*(np.stack([np.asarray(f) for f in clip.frames]) for clip in (plain, fast)))
    error = np.square(np.subtract(*(np.stack([np.asarray(f) / 255 for f in c.frames]) for c in (plain, fast)))).mean()
    assert f"<td>{-10 * np.log10(error):.1f} dB</td>" in last["numbers"]


def test_the_program_and_the_command_make_the_same_video(shown, tmp_path, monkeypatch):
    last, (_, (clip, *_)) = shown
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.utils, "export_to_video", lambda frames, *file, fps: written.append((frames, fps)))
        exec(compile(last["python"], "copied", "exec"), {})
    ((frames, fps),) = written
    assert fps == 8
    assert np.array_equal((np.asarray(frames) * 255).round(), np.stack([np.asarray(f) for f in clip.frames]))
    monkeypatch.chdir(tmp_path)
    words = shlex.split(last["command"])
    assert words[words.index("--frames") + 1] == "5" and words[words.index("--fps") + 1] == "8"
    assert run([*words[1:-2], "-o", "again.mp4", *words[-2:]]) == 0
    assert media.read(tmp_path / "again.mp4").seed == 3
    assert media.encode(clip, ".mp4") in (tmp_path / "again.mp4").read_bytes()


def test_without_ffmpeg_the_page_shows_moving_pictures(wan, tmp_path, monkeypatch):
    monkeypatch.setattr(media, "can_mp4", lambda: False)
    monkeypatch.setattr("fastdiff.demo.films.can_mp4", lambda: False)
    last, _ = drawn(wan, tmp_path)
    assert last["films"]["visible"] and last["right"].endswith("accelerated.webp")


def test_frames_of_a_model_that_draws_pictures_are_refused(tmp_path):
    with pytest.raises(gr.Error, match="frames"):
        Visitor(Page([], tmp_path)).run(model="shapes-unet", steps="2", frames="4")
