"""`fastdiff quantize`: a directory that `generate` reads, ranges alone, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny

FEW = ("--steps", 3, "--prompts", 2, "--set", 'quant.skip=["down_blocks*", "up_blocks*"]')


def test_a_directory_is_written_that_generate_reads(cli, model: str) -> None:
    done = cli("quantize", "-m", model, "-o", "small", "--report", "report.json", "--predict", *FEW)
    assert (done.code, done.files) == (0, ["small"])
    assert "quant w8a8" in done.err and "speed:" in done.err
    report = json.loads(Path("report.json").read_text())
    assert report["bytes_before"] > 2 * report["bytes_after"] and report["layers"][0]["kernel"]
    assert json.loads(Path("small/fastdiff_quant_report.json").read_text()) == report
    assert report["seconds"] > report["predict_seconds"] and f"quantized in {report['seconds']:.1f} s" in done.err
    assert report["predict_seconds"] > 0 and f"found in {report['predict_seconds']:.1f} s" in done.err
    assert 0.2 < report["predicted_error"] / report["output_error"] < 5 and report["float_ms"] > 0
    made = cli("generate", "a cat", "-m", "small", "--steps", 2, "--seed", 1, "--width", 64, "--height", 64)
    assert made.code == 0 and "unet is quantized for good: w8a8" in made.err
    again = cli("quantize", "-m", model, "-o", "small", *FEW)
    assert again.code == 2 and "exists" in again.err


def test_ranges_alone(cli, model: str) -> None:
    done = cli("quantize", "-m", model, "-o", "ranges.safetensors", *FEW)
    assert (done.code, done.files) == (0, ["ranges.safetensors"])
    made = cli(
        "generate", "a cat", "-m", model, "--steps", 2, "--width", 64, "--height", 64, "--set", "quant.method=w8a8",
        "--set", "quant.ranges=ranges.safetensors", *FEW[4:],
    )  # fmt: skip
    assert made.code == 0


def test_ranges_of_pictures_that_are_drawn_over_with_noise_in_them(cli, model: str) -> None:
    Image.new("RGB", (64, 64), "gray").save("gray.png")
    over = ("--image", "gray.png", "--strength", 0.7, *FEW)
    for name, more in (("clean", ()), ("noisy", ("--corrupt",)), ("again", ("--corrupt",))):
        done = cli("quantize", "-m", model, "-o", f"{name}.safetensors", *over, *more)
        assert (done.code, done.files) == (0, [f"{name}.safetensors"]), done.err
    clean, noisy, again = (Path(f"{name}.safetensors").read_bytes() for name in ("clean", "noisy", "again"))
    assert clean != noisy == again


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "x", "--set", "quant.method=w9"), "unknown quant method"),
        (("-o", "no/where"), "does not exist"),
        (("-o", "r.safetensors", "--prompts", 0), "need prompts"),
        (("-o", "p.json", "--prompts", 0), "need prompts"),
        (("-o", "p.json", *FEW), "nothing to plan"),
        (("-o", "x", "--set", "quant.prune=3"), "between 0 and 1"),
        (("-o", "x", "--set", "quant.prune=0.1", "--prompts", 0), "give prompts"),
        (("-o", "x", "--set", "quant.prune=no.json"), "does not exist"),
        (("-o", "x", "--set", "quant.protect=0.3"), "protect = 0.3 needs prune"),
        (("-o", "x", "--corrupt"), "corrupt mixes noise into the pictures"),
        (("-o", "x", "--corrupt", "--prompts", 0), "draws nothing"),
        (("-o", "x", "--strength", 0.5), "it goes with --image"),
    ],
)
def test_refused(cli, model: str, arguments: tuple, said: str) -> None:
    done = cli("quantize", "-m", model, *arguments)
    assert done.code == 2 and said in done.err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("option", "chosen"),
    [
        ("prune", ("quant.method=w4a16", "quant.prune=0.3", 'quant.skip=["down_blocks*"]')),
        ("plan", ("quant.method=mixed", "quant.target_error=0.5", FEW[-1])),
    ],
)
def test_a_plan_alone(cli, model: str, option: str, chosen: tuple[str, ...]) -> None:
    """Of what is removed, and of bits by layer; the file is then named in the place of the aim."""

    def sets(*given: str) -> list[str]:
        return [word for one in given for word in ("--set", one)]

    done = cli("quantize", "-m", model, "-o", f"{option}.json", "--steps", 3, "--prompts", 2, *sets(*chosen))
    assert (done.code, done.files) == (0, [f"{option}.json"])
    assert "output error" in done.err
    named = sets(chosen[0], f"quant.{option}={option}.json", chosen[2])
    made = cli("generate", "a cat", "-m", model, "--steps", 2, "--width", 64, "--height", 64, *named)
    assert made.code == 0, made.err


def test_the_command_line_reads_so_where_the_smallest_is_asked_for(cli, tmp_path):
    tiny.make("sd15").save_pretrained(tmp_path / "model")
    folder, sets = str(tmp_path / "model"), ("--set", "quant.method=w8a16", "--set", "quant.speed=smallest")
    done = cli("generate", "a cat", "-m", folder, *sets, "--steps", 2, "--seed", 1, "-o", "a.png", "--json")
    assert done.code == 0, done.err
    assert any("quantized for good: w8a16" in note for note in json.loads(done.out)["report"]["notes"])
    again = cli("quantize", "-m", folder, "--prompts", 0, "--set", "quant.method=w8a16", "-o", "small")
    assert again.code == 0 and "w8a16: " in again.err, again.err
    drawn = cli("generate", "a cat", "-m", "small", "--steps", 2, "--seed", 1, "-o", "b.png")
    assert drawn.code == 0, drawn.err
