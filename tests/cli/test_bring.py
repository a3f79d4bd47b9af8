"""`generate` with what a user brings along: files, LoRA, schedulers, pictures; and with videos and sounds to write."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from safetensors.torch import save_file

from fastdiff.cli import run
from fastdiff.media import read
from tests import layouts
from tests.core.test_outfit import adapted, controlnet
from tests.tiny import make
from tests.zoo_clips import ZOO

FIRST_BLOCK = ("--set", "cache.method=first_block", "--set", "cache.threshold=0.1")
DEEPCACHE = ("--set", "cache.method=deepcache", "--set", "cache.interval=2")


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    make("wan").save_pretrained(path)
    return str(path)


@pytest.fixture
def photo() -> str:
    """A picture of another size than the model draws, with something in it."""
    shades = np.random.default_rng(0).integers(0, 255, (90, 60, 3), np.uint8)
    Image.fromarray(shades).save("photo.png")
    return "photo.png"


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def moving(path: str) -> np.ndarray:
    if path.endswith(".mp4"):
        import imageio.v3 as imageio

        return imageio.imread(path)
    with Image.open(path) as image:
        return np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def test_a_single_file_with_a_base(cli) -> None:
    whole = make("sd15_two_layers")
    whole.save_pretrained("whole")
    save_file(layouts.stable_diffusion(whole), "style.safetensors")
    done = cli("generate", "a cat", "-m", "style.safetensors", "--base", "whole", "--steps", 2, "--seed", 1)
    assert (done.code, read(Path("out.png")).model) == (0, "./style.safetensors")
    cli("generate", "a cat", "-m", "whole", "--steps", 2, "--seed", 1, "-o", "whole.png")
    assert np.abs(pixels("out.png").astype(int) - pixels("whole.png")).max() <= 2


def test_lora_scheduler_and_tiles_are_recorded_and_replayed(cli, model: str, tmp_path: Path) -> None:
    adapted(1).save_pretrained(tmp_path)
    lora = f"{tmp_path / 'adapter_model.safetensors'}:0.5"
    arguments = ("--lora", lora, "--scheduler", "unipc", "--vae-tiling", *DEEPCACHE)
    cli("generate", "a cat", "-m", model, "--steps", 4, "--seed", 1, "-o", "one.png", *arguments)
    made = read(Path("one.png"))
    assert made.outfit == {"scheduler": "unipc", "vae_tiling": True, "lora": ["adapter_model.safetensors:0.5"]}
    assert made.scheduler == "UniPCMultistepScheduler" and str(tmp_path) not in made.model_dump_json()
    refused = cli("generate", "--from-image", "one.png", "-m", model)
    assert (refused.code, "'adapter_model.safetensors:0.5'; say where it is with --lora" in refused.err) == (2, True)
    cli("generate", "--from-file", "one.png", "-m", model, "--lora", lora, "-o", "two.png")
    assert (pixels("one.png") == pixels("two.png")).all()
    cli("generate", "a cat", "-m", model, "--steps", 4, "--seed", 1, "-o", "plain.png", "--scheduler", "unipc")
    assert not (pixels("one.png") == pixels("plain.png")).all()


def test_an_image_is_drawn_over_and_replayed(cli, model: str, photo: str) -> None:
    done = cli("generate", "a cat", "-m", model, "--steps", 4, "--seed", 1, "--image", photo, "--strength", 0.5)
    assert done.code == 0, done.err
    made = read(Path("out.png"))
    assert (made.image, made.strength, made.report["steps"]) == (("photo.png",), 0.5, 2)
    assert (made.width, made.height) == (56, 80)  # no more pixels than 64 x 64, in its proportions
    assert "say where it is with --image" in cli("generate", "--from-image", "out.png", "-m", model).err
    again = cli("generate", "--from-image", "out.png", "-m", model, "--image", photo, "-o", "again.png")
    assert (pixels("out.png") == pixels("again.png")).all() and "may differ" not in again.err
    Image.new("RGB", (90, 60)).save("photo.png")
    assert "no picture here is the photo.png" in cli(
        "generate", "--from-image", "out.png", "-m", model, "--image", photo, "-o", "other.png"
    ).err  # fmt: skip


def test_strength_0_keeps_the_picture_most(cli, model: str, photo: str) -> None:
    common = ("generate", "a", "-m", model, "--steps", 10, "--seed", 1, "--image", photo, "--width", 64, "--height", 64)
    for strength in (0.1, 1.0):
        assert cli(*common, "--strength", strength, "-o", f"{strength}.png").code == 0
    assert pixels("0.1.png").shape == (64, 64, 3)
    assert not (pixels("0.1.png") == pixels("1.0.png")).all()


def test_a_mask(cli, model: str, photo: str) -> None:
    Image.new("L", (60, 90), 0).save("nothing.png")
    Image.new("L", (60, 90), 255).save("all.png")
    for mask in ("nothing", "all"):
        done = cli(
            "generate", "a cat", "-m", model, "--steps", 2, "--seed", 1, "--image", photo, "--mask", f"{mask}.png",
            "-o", f"{mask}-out.png",
        )  # fmt: skip
        assert done.code == 0, done.err
    assert read(Path("all-out.png")).mask == "all.png"
    assert not (pixels("nothing-out.png") == pixels("all-out.png")).all()


def test_a_controlnet(cli, model: str, photo: str, tmp_path: Path) -> None:
    controlnet().save_pretrained(tmp_path / "edges")
    control = ("--control", f"{tmp_path / 'edges'}:{photo}")
    done = cli("generate", "a cat", "-m", model, "--steps", 2, "--seed", 1, *control, *DEEPCACHE)
    assert done.code == 0, done.err
    made = read(Path("out.png"))
    assert (made.control, made.outfit["controlnet"]) == ("photo.png", "edges")
    over = cli("generate", "a cat", "-m", model, "--steps", 2, "--seed", 1, *control, "--image", photo, "-o", "o.png")
    assert over.code == 0, over.err


REFUSED = {
    "no picture": (["--image", "none.png"], 1, "'none.png' does not exist"),
    "a text": (["--image", "a.txt"], 1, "'a.txt' is not a picture"),
    "a mask alone": (["--mask", "photo.png"], 2, "--mask photo.png says where a picture is drawn anew"),
    "strength alone": (["--strength", "0.5"], 2, "StableDiffusionPipeline takes no strength; it goes with --image"),
    "no step": (["--image", "photo.png", "--strength", "0.2", "--steps", "4"], 2, "strength 0.2 of 4 steps draws none"),
    "much strength": (["--image", "photo.png", "--strength", "2"], 2, "strength = 2.0: "),
    "two pictures": (["--image", "photo.png", "--image", "photo.png"], 2, "draws over one picture; give one --image"),
    "frames": (["--frames", "3"], 2, "makes no video; leave --frames and --fps out"),
    "a video of a picture": (["-o", "x.mp4"], 2, "makes a picture; end the name of -o in .png or .webp"),
    "a sound of a picture": (["-o", "x.wav"], 2, "makes a picture; end the name of -o in"),
    "no control": (["--control", "photo.png"], 1, "StableDiffusionPipeline takes no --control"),
    "no lora": (["--lora", "none.safetensors"], 1, "LoRA file 'none.safetensors' does not exist"),
    "a pickle": (["--lora", "a.pt"], 1, "is a pickle, which can run code when read"),
    "no scale": (["--lora", "a.safetensors:big"], 2, "'big' is no scale; give FILE or FILE:0.8"),
    "no scheduler": (["--scheduler", "dpm"], 2, "unknown scheduler 'dpm', did you mean 'dpm++'?"),
    "no GPU": (["--offload", "model"], 2, "there is no GPU here"),
    "no way": (["--offload", "models"], 2, "did you mean 'model'?"),
    "a base": (["--base", "shapes-unet"], 2, "base is for a single file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_sentence(cli, model: str, photo: str, case: str) -> None:
    arguments, code, message = REFUSED[case]
    Path("a.txt").write_text("no picture")
    before = sorted(Path.cwd().iterdir())
    done = cli("generate", "x", "-m", model, "--steps", 1, *arguments)
    assert message in done.err and done.err.count("\n") == 1 and done.err.startswith("error: ")
    assert (done.code, sorted(Path.cwd().iterdir())) == (code, before)


@pytest.mark.parametrize("end", ["webp", "jpg"])
def test_other_formats_of_pictures_say_how_they_were_made(cli, model: str, end: str) -> None:
    cli("generate", "a cat", "-m", model, "--steps", 2, "--seed", 1)
    done = cli("generate", "a cat", "-m", model, "--steps", 2, "--seed", 1, "-o", f"out.{end}")
    assert done.files == [f"out.{end}"]
    assert read(Path(f"out.{end}")).model_dump(exclude={"report"}) == read(Path("out.png")).model_dump(
        exclude={"report"}
    )
    coarse = [
        np.array(Image.fromarray(pixels(f"out.{e}")).resize((8, 8), Image.Resampling.BOX), int) for e in (end, "png")
    ]
    assert np.abs(coarse[0] - coarse[1]).mean() < 2
    assert cli("generate", "--from-file", f"out.{end}", "-m", model, "-o", "again.png").code == 0
    assert (pixels("again.png") == pixels("out.png")).all()
    shown = json.loads(cli("inspect", f"out.{end}", "--json").out)
    assert (shown["prompt"], shown["seed"]) == ("a cat", 1)


@pytest.mark.parametrize("end", ["mp4", "gif", "webp"])
def test_a_video_in_each_format(cli, wan: str, end: str) -> None:
    if end == "mp4" and find_spec("imageio_ffmpeg") is None:
        pytest.skip("the extra video is not installed")
    size = ("--width", 32, "--height", 32, "--frames", 5, "--fps", 10)
    done = cli("generate", "a cat", "-m", wan, "--steps", 2, "--seed", 1, *size, "-o", f"cat.{end}")
    assert (done.code, done.files) == (0, [f"cat.{end}"]), done.err
    made = read(Path(f"cat.{end}"))
    assert (made.width, made.height, made.frames, made.fps, made.steps) == (32, 32, 5, 10, 2)
    frames = moving(f"cat.{end}")
    assert frames.shape == (5, 32, 32, 3)
    assert not (frames[0] == frames[-1]).all()
    again = cli("generate", "--from-file", f"cat.{end}", "-m", wan, "-o", f"again.{end}")
    assert again.code == 0, again.err
    assert (moving(f"again.{end}") == frames).all()


def test_a_video_of_one_frame_is_a_picture_where_that_is_asked_for(cli, wan: str) -> None:
    size = ("--width", 32, "--height", 32)
    done = cli("generate", "a cat", "-m", wan, "--steps", 1, *size, "--frames", 1, "-o", "one.png")
    assert (done.code, pixels("one.png").shape) == (0, (32, 32, 3)), done.err
    done = cli("generate", "a cat", "-m", wan, "--steps", 1, *size, "-o", "many.png")
    assert "WanPipeline makes a video; end the name of -o in .mp4 or .gif or .webp" in done.err


def test_without_ffmpeg_a_video_is_a_moving_webp(cli, wan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.media.can_mp4", lambda: False)
    size = ("--width", 32, "--height", 32, "--frames", 5, "--steps", 1)
    assert cli("generate", "a cat", "-m", wan, *size).files == ["out.webp"]
    with Image.open("out.webp") as image:
        assert image.n_frames == 5
    assert "pip install 'fastdiff[video]'" in cli("generate", "a cat", "-m", wan, *size, "-o", "out.mp4").err


def test_a_job_of_videos_goes_on_where_it_was_broken_off(cli, wan: str) -> None:
    Path("p.jsonl").write_text('{"prompt": "a cat", "frames": 5}\n{"prompt": "a dog", "frames": 5}\n')
    command = ("generate", "--prompt-file", "p.jsonl", "-m", wan, "--steps", 1, "--width", 32, "--height", 32)
    first = cli(*command, "-o", "clips/")
    assert first.code == 0, first.err
    assert len(first.files) == 2 and all(name.endswith((".mp4", ".webp")) for name in first.files)
    Path("clips/manifest.jsonl").unlink()  # what is done is recognised by what the files say
    Path(first.files[1]).unlink()
    second = cli(*command, "-o", "clips/")
    assert second.files == first.files[1:] and "1 of 2 pictures are there already" not in second.err


def test_lines_of_a_job_name_their_own_pictures(cli, model: str, photo: str) -> None:
    shutil.copy(photo, "other.png")
    lines = [{"prompt": "a", "image": photo, "strength": 0.5}, {"prompt": "b", "image": ["other.png"], "strength": 1.0}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = cli("generate", "--prompt-file", "p.jsonl", "-m", model, "--steps", 2, "-o", "out/")
    assert [read(Path(name)).image for name in done.files] == [("photo.png",), ("other.png",)], done.err
    Path("p.jsonl").write_text(json.dumps(lines[0]) + '\n{"prompt": "c"}')
    mixed = cli("generate", "--prompt-file", "p.jsonl", "-m", model, "-o", "new/")
    assert (mixed.code, "ask for them apart" in mixed.err) == (2, True)


def test_a_sound(cli, tmp_path: Path) -> None:
    import wave

    ZOO["stable audio"].make().save_pretrained(tmp_path / "audio")
    done = cli("generate", "a bell", "-m", tmp_path / "audio", "--steps", 2, "--seed", 1, *FIRST_BLOCK)
    assert (done.code, done.files) == (0, ["out.wav"]), done.err
    made = read(Path("out.wav"))
    assert (made.prompt, made.steps, made.width) == ("a bell", 2, None)
    with wave.open("out.wav") as sound:
        assert (sound.getnchannels(), sound.getframerate()) == (2, 4) and sound.getnframes() > 4
    again = cli("generate", "--from-file", "out.wav", "-m", tmp_path / "audio", "-o", "again.wav")
    assert again.code == 0, again.err
    assert Path("out.wav").read_bytes()[44:99] == Path("again.wav").read_bytes()[44:99]
    wide = cli("generate", "a bell", "-m", tmp_path / "audio", "--width", 64)
    assert (wide.code, "StableAudioPipeline takes no width and height" in wide.err) == (2, True), wide.err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    run(["generate", "--help"])
    shown = capsys.readouterr().out
    names = "lora scheduler offload vae-tiling image mask strength control frames fps base from-file"
    assert [name for name in names.split() if f"--{name}" not in shown] == []
