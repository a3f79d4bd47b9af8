"""Each mistake gets one clear sentence and an exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from io import StringIO
from pathlib import Path

import pytest

from fastdiff.studio import drawing

USAGE = {
    "no command's name": (["genrate"], "No such command 'genrate'"),
    "no number": (["generate", "x", "--steps", "many"], "Invalid value for '--steps'"),
    "no such option": (["generate", "x", "--stpes", "5"], "No such option: --stpes"),
    "no prompt": (["generate"], "nothing to draw; give a PROMPT"),
    "empty prompt": (["generate", " "], "the prompt is empty"),
    "0 steps": (["generate", "x", "--steps", "0"], "steps = 0: input should be greater than or equal to 1"),
    "absurd steps": (["generate", "x", "--steps", "1000000"], "steps = 1000000: "),
    "negative guidance": (["generate", "x", "--guidance-scale", "-1"], "guidance_scale = -1.0: "),
    "no number of guidance": (["generate", "x", "--guidance-scale", "nan"], "guidance_scale = nan: "),
    "no width": (["generate", "x", "--width", "0"], "width = 0: "),
    "absurd height": (["generate", "x", "--height", "99999"], "height = 99999: "),
    "negative seed": (["generate", "x", "--seed", "-1"], "seed = -1: "),
    "no images": (["generate", "x", "-n", "0"], "-n 0: give 1 to 10000"),
    "no parallel method": (["generate", "x", "--devices", "4"], "--devices 4 needs --set parallel.method=NAME"),
    "no devices": (["generate", "x", "--devices", "0"], "--devices 0: give 1 or more"),
    "unknown preset": (["generate", "x", "--preset", "balancd", "-o", "new/"], "did you mean 'balanced'?"),
    "preset and config": (["generate", "x", "--preset", "fast", "--config", "c.toml"], "exclude each other"),
    "no config file": (["generate", "x", "--config", "none.toml"], "'none.toml' does not exist"),
    "no assignment": (["generate", "x", "--set", "cache"], "--set takes section.key=value"),
    "unknown method": (["generate", "x", "--set", "cache.method=deepcach"], "did you mean 'deepcache'?"),
    "unknown key": (
        ["generate", "x", "--set", "cache.method=deepcache", "--set", "cache.intervall=3"],
        "did you mean 'interval'?",
    ),
    "wrong type": (["generate", "x", "--set", "compile.enabled=[1]"], "compile.enabled = [1]: "),
    "out of range": (
        ["generate", "x", "--set", "cache.method=deepcache", "--set", "cache.interval=0"],
        "greater than or equal to 1",
    ),
    "unknown model": (["generate", "x", "-m", "shapes-unit"], "unknown model 'shapes-unit'"),
    "unknown dtype": (["generate", "x", "--dtype", "float61"], "did you mean 'float16'?"),
    "no format": (["generate", "x", "-o", "x.bmp"], "-o x.bmp: end the name in .png, .webp, .jpg"),
    "endless prompt file": (
        ["generate", "--prompt-file", "/dev/zero"],
        "--prompt-file /dev/zero is a device; give a file",
    ),
    "no prompt file": (["generate", "--prompt-file", "none.txt"], "none.txt cannot be read: No such file"),
    "no model to inspect": (["inspect", "nothing"], "unknown model 'nothing'"),
}
FAILURE = {
    "no model directory": (["generate", "x", "-m", "./none"], "model directory './none' does not exist"),
    "no output directory": (["generate", "x", "-o", "none/x.png"], "output directory 'none' does not exist"),
    "no parent": (["generate", "x", "-o", "none/new/"], "output directory 'none' does not exist"),
    "no image": (["generate", "--from-image", "none.png"], "'none.png' does not exist"),
    "no image to inspect": (["inspect", "none.png"], "'none.png' does not exist"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(cli, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    _no_weights_are_read(monkeypatch, case)
    arguments, message = USAGE[case]
    _expect(cli(*arguments), 2, message)


@pytest.mark.parametrize("case", FAILURE)
def test_failure(cli, case: str) -> None:
    arguments, message = FAILURE[case]
    _expect(cli(*arguments), 1, message)


def _no_weights_are_read(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Mistakes that can be seen without a model must not cost loading it."""
    if "model" not in case:
        monkeypatch.setattr(drawing, "load", lambda *_, **__: pytest.fail("the model was loaded"))


def _expect(done, code: int, message: str) -> None:
    assert message in done.err
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert not list(Path.cwd().iterdir())


MALFORMED = {
    '{"prompt": "a"}\n{oops': "p.jsonl line 2: not JSON",
    '\n\n["a"]': "p.jsonl line 3: needs an object with a prompt",
    '{"seed": 1}': "p.jsonl line 1: needs an object with a prompt",
    '{"prompt": "a", "sed": 1}': "p.jsonl line 1: unknown key 'sed', did you mean 'seed'?",
    '{"prompt": "a", "steps": 0}': "p.jsonl line 1: steps = 0: ",
    '{"prompt": ""}': "p.jsonl line 1: the prompt is empty",
    "[" * 100_000: "p.jsonl line 1: not JSON",
    "\n": "p.jsonl holds no prompt",
}


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_prompt_file(cli, number: int) -> None:
    text, message = list(MALFORMED.items())[number]
    Path("p.jsonl").write_text(text)
    done = cli("generate", "--prompt-file", "p.jsonl")
    assert done.code == 2
    assert done.err.startswith(f"error: {message}")


def test_binary_and_empty_prompt_files(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.txt").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in cli("generate", "--prompt-file", "p.txt").err
    monkeypatch.setattr(sys, "stdin", StringIO(""))
    assert cli("generate", "--prompt-file", "-").code == 2


def test_directory_that_is_not_writable(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    _expect(cli("generate", "x"), 1, "is not writable: Permission denied")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--width", "60"], 2, "width 60: this model draws multiples of 8, for example 64"),
        (["--set", "cache.method=first_block"], 1, "has no stack of transformer blocks"),
        (["--set", "cache.method=deepcache", "--set", "cache.branch=99"], 2, "branch 99: this UNet has branches 0 to"),
        (["--steps", "2000"], 2, "StableDiffusionPipeline refuses: `num_inference_steps`: 2000"),
        (["--preview-every", "0"], 2, "--preview-every 0: give 1 or more"),
    ],
)
def test_what_this_model_cannot_do(cli, model: str, arguments: list[str], code: int, message: str) -> None:
    _expect(cli("generate", "x", "-m", model, *arguments), code, message)


@pytest.mark.parametrize("damage", ["no index", "no pipeline", "truncated", "corrupt", "pickles"])
def test_damaged_models(cli, model: str, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "damaged"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "no index":
        (folder / "model_index.json").unlink()
    elif damage == "no pipeline":
        (folder / "model_index.json").write_text(json.dumps(["unet"]))
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "corrupt":
        weights.write_bytes(b"\xff" * 100)
    else:
        weights.rename(weights.with_suffix(".bin"))
    done = cli("generate", "x", "-m", folder)
    _expect(done, 1, {"pickles": "as pickles only"}.get(damage, str(folder)))


def test_hostile_png(cli, model: str) -> None:
    Path("x.png").write_bytes(b"GIF89a")
    done = cli("generate", "--from-image", "x.png")
    assert (done.code, done.err) == (1, "error: 'x.png' is not a PNG file\n")
