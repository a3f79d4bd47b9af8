"""`generate --compare`: plain and accelerated, seconds, decibels, side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.media import Clip, Sound, read
from fastdiff.studio.comparing import beside, psnr
from tests.tiny import make

DEEPCACHE = ("--set", "cache.method=deepcache", "--set", "cache.interval=2")


def test_both_pictures_and_their_numbers(cli, model: str) -> None:
    common = ("generate", "a cat", "-m", model, "--steps", 4, "--seed", 1)
    done = cli(*common, *DEEPCACHE, "--compare", "--json")
    assert done.code == 0, done.err
    row = json.loads(done.out)
    assert row["report"]["cached"] == 2 and row["file"] == "out.png" and row["compared"] == "out_compared.png"
    assert row["speedup"] == pytest.approx(row["plain_seconds"] / row["seconds"], rel=0.05)
    cli(*common, "-o", "plain.png")
    cli(*common, *DEEPCACHE, "-o", "fast.png")
    plain, fast = (Image.open(name).convert("RGB") for name in ("plain.png", "fast.png"))
    assert row["psnr"] == pytest.approx(psnr(plain, fast), abs=0.01)
    assert (np.array(Image.open("out.png")) == np.array(fast)).all() and read(Path("out.png")).seed == 1
    sheet = np.array(Image.open("out_compared.png"))
    assert sheet.shape == (256 + 18, 512, 3)
    assert (sheet[18::4, :256:4] == np.array(plain)).all() and (sheet[18::4, 256::4] == np.array(fast)).all()
    assert sheet[:18].min() < 100  # the words


def test_what_changes_nothing_is_identical(cli, model: str) -> None:
    done = cli("generate", "a cat", "-m", model, "--steps", 2, "--seed", 1, "--preset", "lossless", "--compare")
    assert done.files == ["out.png", "out_compared.png"] and "identical" in done.err and "aims" not in done.err


def test_a_solver_is_said_to_aim_elsewhere(cli) -> None:
    words = (
        "-m",
        "shapes-unet",
        "--set",
        "solver.method=fitted",
        "--set",
        "solver.evaluations=5",
        "--steps",
        5,
        "--seed",
        1,
    )
    done = cli("generate", "a cat", *words, "--compare")
    assert "a solver aims at the converged picture, not at this plain one" in done.err


def test_videos_side_by_side(cli, tmp_path: Path) -> None:
    make("wan").save_pretrained(tmp_path / "wan")
    size = ("--width", 32, "--height", 32, "--frames", 5)
    words = ("--steps", 2, "--seed", 1, "--preset", "lossless", *size, "-o", "a.gif", "--compare")
    done = cli("generate", "a", "-m", tmp_path / "wan", *words)
    assert done.files == ["a.gif", "a_compared.gif"], done.err
    with Image.open("a_compared.gif") as image:
        assert (image.size, image.n_frames) == ((512, 274), 5)


@pytest.mark.parametrize("more", [("--preview-every", "1"), ("--timeline", "t.json"), ("--devices", "2")])
def test_what_is_not_compared(cli, model: str, more: tuple[str, str]) -> None:
    parallel = ("--set", "parallel.method=cfg") if "--devices" in more else ()
    done = cli("generate", "a", "-m", model, "--preset", "lossless", "--compare", *more, *parallel)
    assert (done.code, "--compare draws each picture twice on one device" in done.err) == (2, True), done.err


def test_nothing_to_compare_is_said(cli, model: str) -> None:
    """A ratio of two equal runs would be chance, called a speedup."""
    done = cli("generate", "a", "-m", model, "--compare")
    assert (done.code, "none are given: add --preset balanced, or --set" in done.err) == (2, True), done.err


def test_decibels() -> None:
    black, grey = (Image.new("RGB", (8, 8), (shade,) * 3) for shade in (0, 51))
    assert psnr(black, grey) == pytest.approx(20 * math.log10(5))
    assert psnr(black, black) == math.inf
    assert psnr(Clip([black, black], 8), Clip([black, grey], 8)) == pytest.approx(
        20 * math.log10(5) + 10 * math.log10(2)
    )
    assert psnr(Sound(np.zeros((1, 9)), 8), Sound(np.ones((1, 9)), 8)) == pytest.approx(20 * math.log10(2))
    assert len(beside(Clip([black, grey], 8), Clip([grey, grey], 8), ("a", "b")).frames) == 2
