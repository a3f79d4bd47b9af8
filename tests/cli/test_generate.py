"""`fastdiff generate`: what it draws, where it writes, what it says."""

from __future__ import annotations

import errno
import json
import os
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastdiff.images import read
from fastdiff.studio import drawing
from fastdiff.studio.previews import Shown, in_blocks

DEEPCACHE = ("--set", "cache.method=deepcache", "--set", "cache.interval=2")


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_one_image(cli, model: str) -> None:
    done = cli("generate", "a red cat", "-m", model, "--seed", 1, "--steps", 4, "-o", "cat.png", *DEEPCACHE)
    assert (done.code, done.files) == (0, ["cat.png"])
    assert "cat.png  seed 1  4 steps: 2 computed, 2 cached" in done.err
    made = read(Path("cat.png"))
    assert (made.prompt, made.seed, made.steps, made.model) == ("a red cat", 1, 4, "./tiny-sd")
    assert made.config["cache"]["interval"] == 2
    assert made.report["cached"] == 2
    assert pixels("cat.png").shape == (64, 64, 3)
    assert model not in Path("cat.png").read_bytes().decode("latin-1")  # a path says who and where somebody is


def test_prompts_and_seeds_share_one_loaded_model(cli, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = drawing.load
    monkeypatch.setattr(drawing, "load", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    done = cli("generate", "a cat", "a dog", "-m", model, "--steps", 1, "--seed", 1, "--seed", 5, "-o", "x.png")
    assert done.files == ["x_seed_1.png", "x_seed_5.png", "x_seed_1-1.png", "x_seed_5-1.png"]
    assert [(read(Path(f)).prompt, read(Path(f)).seed) for f in done.files] == [
        ("a cat", 1), ("a cat", 5), ("a dog", 1), ("a dog", 5),
    ]  # fmt: skip
    assert len(loads) == 1
    assert not (pixels("x_seed_1.png") == pixels("x_seed_5.png")).all()


def test_directory_and_consecutive_seeds(cli, model: str) -> None:
    done = cli("generate", "A red cat!", "赤い猫", "-m", model, "--steps", 1, "--seed", 8, "-n", 2, "-o", "new/")
    assert done.files == [f"new/{name}_seed_{seed}.png" for name in ("a-red-cat", "赤い猫") for seed in (8, 9)]


def test_files_are_numbered_not_replaced(cli, model: str) -> None:
    command = ("generate", "a cat", "-m", model, "--steps", 1, "--seed", 1)
    assert cli(*command).files == ["out.png"]
    assert cli(*command, "--seed", 2, "-o", "out_seed_1.png").code == 0
    before = Path("out.png").read_bytes()
    assert cli(*command).files == ["out-1.png"]
    assert Path("out.png").read_bytes() == before
    assert cli(*command, "--overwrite", "--no-metadata").files == ["out.png"]
    assert (pixels("out.png") == pixels("out-1.png")).all()
    with Image.open("out.png") as image:
        assert not image.info


def test_json_has_a_line_for_each_image(cli, model: str) -> None:
    done = cli("generate", "a cat", "-m", model, "--steps", 2, "-n", 2, "--json")
    rows = [json.loads(line) for line in done.files]
    assert [set(row) for row in rows] == [{"file", "prompt", "seed", "seconds", "report"}] * 2
    assert rows[1]["seed"] == rows[0]["seed"] + 1
    assert all(Path(row["file"]).is_file() and row["seconds"] > 0 for row in rows)
    assert rows[0]["report"]["steps"] == 2


def test_text_prompt_file(cli, model: str) -> None:
    Path("p.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8-sig")
    done = cli("generate", "--prompt-file", "p.txt", "-m", model, "--steps", 1, "--seed", 1, "-o", "./")
    assert done.files == ["a-cat_seed_1.png", "a-dog_seed_1.png"]


def test_json_lines_prompt_file_overrides_flags(cli, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = '{"prompt": "a cat", "seed": 3, "steps": 2, "guidance_scale": 2, "negative_prompt": "dog"}\n{"prompt": "b"}'
    monkeypatch.setattr(sys, "stdin", StringIO(lines))
    done = cli("generate", "--prompt-file", "-", "-m", model, "--steps", 1, "--seed", 1)
    first, second = (read(Path(file)) for file in done.files)
    assert (first.seed, first.steps, first.guidance_scale, first.negative_prompt) == (3, 2, 2.0, "dog")
    assert (second.prompt, second.seed, second.steps, second.guidance_scale) == ("b", 1, 1, 7.5)


def test_size(cli, model: str) -> None:
    done = cli("generate", "a cat", "-m", model, "--steps", 1, "--width", 48, "--height", 32)
    assert pixels(done.files[0]).shape == (32, 48, 3)


def test_replay_is_identical(cli, model: str) -> None:
    arguments = ("--negative-prompt", "dog", "--guidance-scale", 3, "--width", 48, *DEEPCACHE)
    cli("generate", "a cat", "-m", model, "--steps", 4, "--seed", 5, "-o", "one.png", *arguments)
    done = cli("generate", "--from-image", "one.png", "-m", model, "-o", "two.png")
    assert done.code == 0
    one, two = read(Path("one.png")), read(Path("two.png"))
    assert (pixels("one.png") == pixels("two.png")).all()
    assert one.model_dump(exclude={"report"}) == two.model_dump(exclude={"report"})


def test_replay_with_another_seed(cli, model: str) -> None:
    cli("generate", "a cat", "-m", model, "--steps", 2, "--seed", 5, *DEEPCACHE)
    done = cli("generate", "--from-image", "out.png", "-m", model, "--seed", 6, "--set", "cache.interval=1")
    made = read(Path(done.files[0]))
    assert (made.prompt, made.seed, made.steps, made.config["cache"]["interval"]) == ("a cat", 6, 2, 1)


def test_replay_of_a_local_model_asks_for_it(cli, model: str) -> None:
    cli("generate", "a cat", "-m", model, "--steps", 1)
    done = cli("generate", "--from-image", "out.png")
    assert done.code == 2
    assert "'tiny-sd'; say where it is with -m" in done.err


def test_previews(cli, model: str) -> None:
    command = ("generate", "a cat", "-m", model, "--steps", 4, "--seed", 1)
    done = cli(*command, "--preview-every", 2)
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["out.png", "out_step_002.png", "out_step_004.png"]
    assert done.files == ["out.png"]
    assert "preview out_step_002.png" in done.err
    cli(*command, "-o", "plain.png")
    assert (pixels("out.png") == pixels("plain.png")).all()


def test_a_preview_is_a_picture_of_characters() -> None:
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    image.putpixel((3, 1), (0, 0, 255))
    text = in_blocks(image, 80, 24)
    assert text.plain == ("\u2580" * 8 + "\n") * 2
    assert str(text.spans[3].style) == "rgb(255,0,0) on rgb(0,0,255)", "two pixels, one above the other"
    small = in_blocks(Image.new("RGB", (400, 400)), 30, 10).plain.splitlines()
    assert len(small) == 10 and {len(line) for line in small} == {20}, "the terminal's lines are the limit"


def test_every_step_is_shown_in_a_terminal_and_the_picture_is_the_same(cli, model: str, monkeypatch) -> None:
    command = ("generate", "a cat", "-m", model, "--steps", 3, "--seed", 1)
    refused = cli(*command, "--preview")
    assert refused.code == 2 and "--preview shows pictures in a terminal of 24-bit colours" in refused.err
    screen = Console(file=StringIO(), force_terminal=True, color_system="truecolor", width=60, height=20)
    monkeypatch.setattr(Shown, "console", staticmethod(lambda: screen))
    done = cli(*command, "--preview", "-o", "shown.png")
    assert done.files == ["shown.png"] and [p.name for p in Path.cwd().iterdir()] == ["shown.png"]
    assert screen.file.getvalue().count("\u2580") >= 3 * 16 * 8, "three steps of 32 x 32 pixels at least"
    cli(*command, "-o", "plain.png")
    assert (pixels("shown.png") == pixels("plain.png")).all()


def test_caching_that_caches_nothing_is_said_loudly(cli, model: str) -> None:
    done = cli(
        "generate", "a cat", "-m", model, "--steps", 2, "--set", "cache.method=deepcache", "--set", "cache.interval=1"
    )
    assert "NOTHING WAS CACHED: deepcache computed all 2 steps" in done.err


def test_interrupt_keeps_what_is_done(cli, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, drawn = drawing.Studio._call, []

    def second_is_interrupted(self, settings):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(settings)
        return draw(self, settings)

    monkeypatch.setattr(drawing.Studio, "_call", second_is_interrupted)
    done = cli("generate", "a cat", "-m", model, "--steps", 1, "--seed", 1, "-n", 3)
    assert done.code == 130
    assert [p.name for p in Path.cwd().iterdir()] == ["out_seed_1.png"]


def test_disk_full(cli, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = cli("generate", "a cat", "-m", model, "--steps", 1)
    assert (done.code, done.out) == (1, "")
    assert "'out.png' cannot be written: No space left on device" in done.err
    assert not list(Path.cwd().iterdir())


def test_a_prompt_that_is_cut_is_said(cli, model: str) -> None:
    assert "too long" in cli("generate", "word " * 100, "-m", model, "--steps", 1).err


def test_main_job(cli) -> None:
    prompt = "a large red circle above a small blue square"
    done = cli("generate", prompt, "--preset", "balanced", "--seed", 1, "-o", "out.png")
    made = read(Path("out.png"))
    assert (done.code, made.model, made.steps, made.guidance_scale) == (0, "shapes-unet", 50, 3.0)
    assert made.report["cached"] > 0
    again = cli("generate", "--from-image", "out.png")
    assert (pixels("out.png") == pixels(again.files[0])).all()


def test_transformer_defaults(cli) -> None:
    cli("generate", "a red circle", "-m", "shapes-dit", "--preset", "balanced", "--seed", 1)
    made = read(Path("out.png"))
    assert (made.model, made.steps, made.guidance_scale) == ("shapes-dit", 28, 3.0)
    assert made.report["cached"] > 0
