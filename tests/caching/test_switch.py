"""Two denoisers by turns: exact where both are the same, and where only one of them runs."""

from __future__ import annotations

import copy

import pytest
import torch

import fastdiff
from fastdiff.config import Config
from fastdiff.errors import BadConfig, BadModel, UnsupportedModel
from fastdiff.pipelines.quantized_files import save
from tests import tiny
from tests.caching.fakes import did

STEPS = 6
NAMES = ("sd15", "sd3", "flux")


def other(name, weights=0.9):
    """The denoiser of a fresh pipeline, with weights of another size."""
    second = tiny.denoiser(tiny.make(name))
    with torch.no_grad():
        for weight in second.parameters():
            weight *= weights
    return second


def switched(name, second, **settings):
    pipe = tiny.make(name)
    handle = fastdiff.accelerate(pipe, cache={"method": "switch", "second": second, **settings})
    return tiny.run(pipe, name, steps=STEPS), handle


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("between", [(0, 1), (0.3, 0.8)])
def test_a_second_denoiser_with_the_same_weights_changes_no_bit(name, between):
    found, handle = switched(name, tiny.denoiser(tiny.make(name)), between=between)
    assert torch.equal(found, tiny.run(tiny.make(name), name, steps=STEPS))
    assert handle.report.cached == (STEPS if between == (0, 1) else 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_denoiser_alone_is_its_own_pipeline(name):
    pipe, second = tiny.make(name), other(name)
    setattr(pipe, "unet" if name == "sd15" else "transformer", second)
    expected = tiny.run(pipe, name, steps=STEPS)
    assert torch.equal(switched(name, second, between=(0, 1))[0], expected)
    plain = tiny.run(tiny.make(name), name, steps=STEPS)
    assert not torch.allclose(expected, plain, atol=1e-3)
    found, handle = switched(name, second, between=(0, 0))
    assert torch.equal(found, plain) and any("skipped nothing" in note for note in handle.report.notes)


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({}, [0, 1, 2]),
        ({"between": (0, 0.5)}, [3, 4, 5]),
        ({"between": (0, 0.5), "warmup_steps": 1}, [0, 3, 4, 5]),
        ({"between": (0, 1), "cooldown_steps": 2}, [4, 5]),
        ({"max_consecutive_cached": 2}, [0, 1, 2, 5]),
        ({"max_cached_steps": 1}, [0, 1, 2, 4, 5]),
    ],
)
def test_which_steps_are_whose(settings, own):
    second, calls = other("sd15"), []
    second.register_forward_hook(lambda *_: calls.append(1))
    before = dict(vars(second))
    handle = switched("sd15", second, **settings)[1]
    assert [i for i, computed in enumerate(did(handle)) if computed] == own
    assert len(calls) == STEPS - len(own)
    handle.restore()
    assert vars(second).keys() == before.keys(), "nothing is patched on it"


def test_a_directory_holds_a_denoiser_or_a_pipeline_quantized_or_not(tmp_path):
    second, pipe = other("sd3"), tiny.make("sd3")
    expected = switched("sd3", second)[0]
    second.save_pretrained(tmp_path / "denoiser")
    pipe.transformer = second
    pipe.save_pretrained(tmp_path / "pipe")
    for folder in ("denoiser", "pipe"):
        assert torch.equal(switched("sd3", str(tmp_path / folder))[0], expected)
    (tmp_path / "config.toml").write_text('[cache]\nmethod = "switch"\nsecond = "denoiser"\n')
    with fastdiff.accelerate(own := tiny.make("sd3"), tmp_path / "config.toml"):
        assert torch.equal(tiny.run(own, "sd3", steps=STEPS), expected), "beside the config's file"
    report = fastdiff.quantize(pipe, "w8a16")
    expected = switched("sd3", pipe.transformer)[0]
    save(pipe, tmp_path / "quantized", report)
    assert torch.equal(switched("sd3", str(tmp_path / "quantized"))[0], expected)


def test_what_is_refused(tmp_path):
    pipe = tiny.make("sd15")
    wide = copy.deepcopy(pipe.unet)
    wide.register_to_config(in_channels=9)
    for second, error, said in [
        (str(tmp_path / "none"), BadConfig, "does not exist"),
        (str(tmp_path), BadModel, "cannot be loaded"),
        (pipe.unet, BadConfig, "the pipeline's own"),
        (tiny.make("sd3").transformer, UnsupportedModel, "is not called as a UNet2DConditionModel"),
        (wide, UnsupportedModel, "in_channels = 9"),
        (3, BadConfig, "give a model, or the directory of one"),
        ("", BadConfig, "give a model, or the directory of one"),
    ]:
        with pytest.raises(error, match=said):
            fastdiff.accelerate(pipe, cache={"method": "switch", "second": second})
    with pytest.raises(BadConfig, match="leave out one"):
        fastdiff.accelerate(pipe, cache={"method": "switch", "second": wide}, parallel={"method": "patch"})
    with pytest.raises(BadConfig, match="no forecasts"):
        fastdiff.accelerate(pipe, cache={"method": "switch", "second": wide, "guard": "verify"})


def test_a_config_with_a_live_module_can_be_written_but_not_read_as_one():
    written = Config(cache={"method": "switch", "second": other("sd15")}).model_dump_json()
    assert "<a live UNet2DConditionModel>" in written
    with pytest.raises(BadConfig, match="does not exist"):
        fastdiff.accelerate(tiny.make("sd15"), Config.from_json(written))
