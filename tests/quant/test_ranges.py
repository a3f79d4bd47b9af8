"""Calibration: ranges by noise level, over both branches, of the right model; and the files it makes."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.config import Config
from fastdiff.errors import BadConfig, BadModel, UnsupportedModel
from fastdiff.pipelines.conditions import calls_of, corrupted
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.inputs import fitting
from fastdiff.pipelines.ranges import calibrate_ranges
from fastdiff.quant.calibration import Calibration
from fastdiff.quant.halves import halves
from tests import tiny
from tests.state import differences, snapshot
from tests.tiny import arguments

SMALL, STEPS = "sd15", 4
CALL = {
    k: v
    for k, v in arguments("sd15", STEPS).items()
    if k not in ("prompt", "generator", "output_type", "negative_prompt")
}
FEW = {"method": "w8a8", "skip": ["down_blocks*"], "timestep_buckets": 2}


def run(pipe, **overrides):
    return tiny.run(pipe, "sd15", steps=STEPS, **overrides)


def calibrated(pipe, **settings):
    return calibrate_ranges(pipe, Config(quant=FEW | settings).quant, ["a cat", "a dog"], batch=2, **CALL)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranges") / "ranges.safetensors"
    calibrated(tiny.make(SMALL)).save(path)
    return path


def test_calibrating_leaves_the_pipeline_as_it_was():
    pipe = tiny.make(SMALL)
    run(pipe)  # a call leaves something on the pipeline itself
    before = snapshot(pipe)
    found = calibrated(pipe)
    assert differences(before, snapshot(pipe)) == []
    names = found.of("unet")
    assert "mid_block.resnets.0.conv1" in names and not any(name.startswith("down") for name in names)
    for ranges in names.values():
        assert ranges["low"].shape == ranges["high"].shape == (3,)  # two buckets, and all of them
        assert (ranges["low"] <= 0).all() and (ranges["high"] >= 0).all()
        assert ranges["low"][2] == ranges["low"][:2].min() and ranges["high"][2] == ranges["high"][:2].max()
    assert len(found.origin.edges) == 1 and 0 < found.origin.edges[0] < 1
    assert [found.origin.bucket(share) for share in (0.999, 0.001)] == [0, 1]
    assert len(found.origin.times) == STEPS


def test_ranges_are_those_of_the_inputs():
    pipe = tiny.make(SMALL)
    found = calibrated(pipe).of("unet")["mid_block.resnets.0.conv1"]
    seen = []
    hook = pipe.unet.mid_block.resnets[0].conv1.register_forward_pre_hook(lambda m, i: seen.append(i[0].clone()))
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    pipe(["a cat", "a dog"], generator=generators, output_type="latent", **CALL)
    hook.remove()
    assert len(seen) == STEPS
    for bucket, part in enumerate((seen[:2], seen[2:])):
        assert found["high"][bucket] == max(x.max() for x in part)
        assert found["low"][bucket] == min(0, min(x.min() for x in part))


def test_static_ranges_are_used_and_the_report_says_nothing_of_dynamic_ones(file):
    pipe = tiny.make(SMALL)
    plain = run(pipe)
    with fastdiff.accelerate(pipe, quant={**FEW, "ranges": str(file)}) as handle:
        buckets = []
        pipe.unet.mid_block.register_forward_hook(lambda *_: buckets.append(handle.quantized.presents["unet"].bucket))
        found = run(pipe)
        pipe.unet.mid_block._forward_hooks.clear()
        assert handle.quantized.report.static == len(handle.quantized.report.layers)
        assert not any("each call" in note for note in handle.report.notes)
    assert buckets == [0, 0, 1, 1]
    assert float((found - plain).norm() / plain.norm()) < 0.1
    assert torch.equal(run(pipe), plain)


def test_another_solver_is_told(file):
    pipe = tiny.make(SMALL)
    with fastdiff.accelerate(pipe, quant={**FEW, "ranges": str(file)}) as handle:
        pipe.scheduler = tiny.other_scheduler("sd15")
        run(pipe)
        assert any("calibrated with DDIMScheduler, this run has UniPC" in note for note in handle.report.notes)


def test_smooth_and_split(tmp_path):
    for settings in ({"smooth": 0.5}, {"split": True}):
        pipe = tiny.make(SMALL)
        plain, found = run(pipe), calibrated(pipe, **settings)
        smoothed = [name for name, ranges in found.of("unet").items() if "smooth" in ranges]
        assert smoothed and ("split" not in settings or all(name.startswith("up_blocks") for name in smoothed))
        path = tmp_path / f"{next(iter(settings))}.safetensors"
        found.save(path)
        with fastdiff.accelerate(pipe, quant={**FEW, **settings, "ranges": str(path)}):
            assert float((run(pipe) - plain).norm() / plain.norm()) < 0.1
        with pytest.raises(BadConfig, match="calibrate again"):
            fastdiff.accelerate(pipe, quant={**FEW, "ranges": str(path)})


def test_halves_are_where_skips_join():
    found = halves(anatomies(tiny.make(SMALL))[0])
    assert found["up_blocks.0.resnets.0.conv1"] == 16
    assert all(name.startswith("up_blocks") for name in found)
    assert halves(anatomies(tiny.make("pixart"))[0]) == {}


def test_another_model_is_refused(file):
    pipe = tiny.make("sdxl")
    with pytest.raises(BadConfig, match="the calibration was made for UNet2DConditionModel"):
        fastdiff.accelerate(pipe, quant={**FEW, "ranges": str(file)})


@pytest.mark.parametrize(("where", "said"), [("norm1", "conv1 was given NaN"), ("conv1", "conv1 makes NaN")])
def test_nan_in_calibration_is_named(where, said):
    pipe = tiny.make(SMALL)
    getattr(pipe.unet.mid_block.resnets[0], where).weight.data.fill_(float("nan"))
    run(pipe)
    before = snapshot(pipe)
    with pytest.raises(UnsupportedModel, match=rf"mid_block\.resnets\.0\.{said}"):
        calibrated(pipe)
    after = snapshot(pipe)
    assert [d for d in differences(before, after) if "weight" not in d] == []


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "nan"])
def test_broken_files_are_refused(file, tmp_path, damage):
    path = tmp_path / "broken.safetensors"
    tensors = load_file(file)
    if damage == "cut":
        path.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("no tensors")
    elif damage == "foreign":
        save_file(tensors, path)
    else:
        first = next(iter(tensors))
        save_file(tensors | {first: tensors[first] * float("nan")}, path, {"fastdiff": _description(file)})
    with pytest.raises((BadConfig, BadModel), match=r"truncated or corrupt|no calibration|no part of a calibration"):
        Calibration.load(path)


def _description(file):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()["fastdiff"]


def test_corrupted_conditions():
    picture = Image.fromarray(np.full((8, 8, 3), 128, np.uint8))
    call = {"image": [picture] * 40, "control_image": torch.zeros(3, 8, 8), "steps": 3}
    found = corrupted(call)
    assert found["steps"] == 3 and call["image"][0] is picture
    noisy = [np.asarray(image).std() > 0 for image in found["image"]]
    assert any(noisy) and not all(noisy)  # one level of the table is no noise
    assert all(image.size == (8, 8) and image.mode == "RGB" for image in found["image"])


def test_each_prompt_has_its_own_picture_and_each_call_its_own_noise():
    grays = [Image.fromarray(np.full((8, 8, 3), 40 * k, np.uint8)) for k in range(5)]
    call = {"image": grays, "strength": 0.6}
    clean = calls_of(list("abcde"), 3, 2, call)
    assert [one["prompt"] for one in clean] == [["a", "b"], ["c", "d"], ["e"]]
    assert [one["image"] for one in clean] == [grays[:2], grays[2:4], grays[4:]]
    assert [g.initial_seed() for one in clean for g in one["generator"]] == [3, 4, 5, 6, 7]
    noisy = calls_of(list("abcde"), 3, 2, call | {"corrupt": True})
    assert all("corrupt" not in one and one["strength"] == 0.6 for one in noisy)
    alike = calls_of(list("abcde"), 3, 1, {"image": [grays[2]] * 5, "corrupt": True})
    assert len({one["image"][0].tobytes() for one in alike}) > 2
    assert calls_of(list("ab"), 0, 2, {"image": grays})[0]["image"] is grays, "of one call, which takes all of them"
    with pytest.raises(BadConfig, match="corrupt mixes noise into the pictures"):
        calls_of(["a"], 0, 1, {"strength": 0.6, "corrupt": True})


def test_noise_in_what_is_drawn_over_widens_ranges():
    """Of img2img, whose condition is its picture: the latents that it begins from hold the noise."""
    pipe = fitting(tiny.make(SMALL), ("image",))
    call = {k: v for k, v in CALL.items() if k not in ("height", "width")} | {"strength": 0.5}
    call["image"] = [Image.fromarray(np.full((64, 64, 3), 128, np.uint8))] * 6
    method, texts = Config(quant=FEW).quant, ["a cat"] * 6
    clean, noisy = (calibrate_ranges(pipe, method, texts, batch=2, **call, **more) for more in ({}, {"corrupt": True}))
    apart = [
        name
        for name, ranges in clean.of("unet").items()
        if not torch.equal(ranges["low"], noisy.of("unet")[name]["low"])
    ]
    assert len(apart) > len(clean.of("unet")) / 2
