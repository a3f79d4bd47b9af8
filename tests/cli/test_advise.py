"""`advise`: bytes are counted from structure, what does not fit is made to, and the line that it gives runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.studio import advising
from fastdiff.weights import nbytes
from tests.tiny import TWO_CALLS, denoiser, make


def told(done) -> dict:
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_the_line_that_it_gives_runs(cli, model: str) -> None:
    found = told(cli("advise", "-m", model, "--json"))
    words = shlex.split(found["command"])
    assert words[:3] == ["fastdiff", "generate", "PROMPT"] and found["fits"]
    done = cli(*words[1:], "--steps", 4, "--seed", 1)
    assert done.code == 0 and Path("out.png").is_file(), done.err
    assert "cached" in done.err


@pytest.mark.slow
def test_weights_are_those_of_the_loaded_model_and_none_are_read(cli, tmp_path: Path) -> None:
    for name in ("sd15", "sdxl", "sd3", "flux"):
        pipe = make(name)
        pipe.save_pretrained(tmp_path / name)
        for file in (tmp_path / name).rglob("*.safetensors"):
            file.unlink()  # structure alone is enough
        found = told(cli("advise", "-m", tmp_path / name, "--json", "--dtype", "float32"))
        parts = {part: module for part, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
        for part, module in parts.items():
            weights = sum(p.nbytes for p in module.parameters())
            assert weights <= found["needs"]["weights"][part] <= nbytes(module), (name, part)
        assert found["needs"]["step"] > 0 and found["needs"]["decode"] > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_a_text_encoder_keeps_in_float32_is_counted_so(cli, tmp_path: Path, dtype: str) -> None:
    """T5 keeps a third of its weights so from float16, and none from bfloat16."""
    make("flux").save_pretrained(tmp_path / "flux")
    found = told(cli("advise", "-m", tmp_path / "flux", "--json", "--dtype", dtype))
    loaded = fastdiff.load(tmp_path / "flux", dtype=getattr(torch, dtype))
    weights = sum(p.nbytes for p in loaded.text_encoder_2.parameters())
    assert weights <= found["needs"]["weights"]["text_encoder_2"] <= nbytes(loaded.text_encoder_2)


def test_a_step_is_counted_as_it_is_on_a_loaded_model(model: str) -> None:
    from fastdiff.parallel.planner import alone
    from fastdiff.pipelines.plan import observe

    pipe = make("sd15")
    anatomy, calls, _ = observe(pipe, None)
    loaded = alone(anatomy, calls).held
    counted = advising.advise(model).needs.step
    assert 0.5 < counted / loaded <= 1.1  # on the meta device attention is counted as a fused kernel does it


@pytest.mark.slow
def test_less_memory_takes_more_and_slower_ways(model: str) -> None:
    needs = advising.advise(model).needs
    offloads = []
    for room in sorted({needs.total(fit) for fit in advising.FITS}, reverse=True)[::3]:
        found = advising.advise(model, memory=room, dtype=torch.float32)
        assert found.fit is not None and found.total == needs.total(found.fit) <= room
        offloads.append(advising.FITS.index(found.fit))
    assert offloads == sorted(offloads) and offloads[0] == 0 < offloads[-1]


def test_what_fits_nowhere_fails_in_a_sentence(cli, model: str) -> None:
    done = cli("advise", "-m", model, "--memory", 0.00001)
    assert done.code == 1 and done.err.splitlines()[-1].startswith(f"error: {model} needs ")


def test_exact_methods_come_first_where_devices_are_shared(cli, model: str) -> None:
    found = told(cli("advise", "-m", model, "--memory", 1, "--devices", 2, "--link", 10, "--json"))
    parallel = next(lever for lever in found["levers"] if lever["name"] == "parallel")
    assert "parallel.method=cfg" in parallel["flags"] and "MB a step" in parallel["why"]


def test_families_with_other_sizes(cli, tmp_path: Path) -> None:
    make("wan").save_pretrained(tmp_path / "wan")
    found = told(cli("advise", "-m", tmp_path / "wan", "--size", 32, "--json"))
    assert found["pipeline"] == "WanPipeline" and found["size"] == [32, 32]
    assert found["needs"]["decode"] is None  # of a video: not counted, and said
    assert "wan" in TWO_CALLS and denoiser(make("wan")) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "-1"], "--memory -1: give a number above 0"),
        (["--devices", "2"], "--devices and --link go together"),
        (["--size", "7"], "refuses"),
        (["-m", "nothing"], "unknown model 'nothing'"),
    ],
)
def test_usage(cli, arguments: list[str], message: str) -> None:
    done = cli("advise", *arguments)
    assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), done.err


def test_the_table(cli, model: str) -> None:
    done = cli("advise", "-m", model)
    assert "weights of unet" in done.out and "fastdiff generate PROMPT" in done.out
    assert "nothing was computed or timed" in done.err
