"""Quantized pipelines as directories: bit-exact, of the size that the formula gives, and refused where broken."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.errors import BadConfig, BadModel, UnsupportedModel
from fastdiff.pipelines.quantize import quantize
from fastdiff.pipelines.quantized_files import save
from fastdiff.pipelines.quantized_parts import INDEX
from fastdiff.quant.layer import QLayer
from tests import tiny
from tests.tiny import arguments

SMALL, STEPS = "sd15", 4
CALL = {
    k: v
    for k, v in arguments("sd15", STEPS).items()
    if k in ("num_inference_steps", "guidance_scale", "height", "width")
}
FEW = ["down_blocks*", "up_blocks*"]


def run(pipe, name="sd15"):
    return tiny.run(pipe, name, steps=STEPS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory, the report and the latents of what was saved there."""
    pipe, folder = tiny.make(SMALL), tmp_path_factory.mktemp("quantized") / "model"
    report = quantize(
        pipe, {"quant": {"method": "w8a8", "skip": FEW, "low_rank": 2}}, ["a cat", "a dog"], batch=2, **CALL
    )
    latents = run(pipe)
    save(pipe, folder)
    return folder, report, latents


def test_saved_and_loaded_is_bit_exact_with_a_clock_and_without(made):
    folder, report, latents = made
    pipe = fastdiff.load(folder)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(run(pipe), latents)
    handle = fastdiff.accelerate(pipe)
    assert torch.equal(run(pipe), latents)
    handle.restore()
    assert torch.equal(run(pipe), latents)
    assert report.static == len(report.layers) and report.output_error < 0.1
    assert report.float_ms > 0 and report.quantized_ms > 0 and report.speed != "not measured"
    with pytest.raises(UnsupportedModel, match="by fastdiff"):
        fastdiff.accelerate(pipe, quant="w8a8")


@pytest.mark.parametrize("scheme", [pytest.param("w8a16", marks=pytest.mark.slow), "w4a16", "w4a8", "fp8"])
def test_every_scheme_comes_back(scheme, tmp_path):
    pipe = tiny.make("pixart")
    quantize(pipe, {"quant": {"method": scheme, "skip": ["transformer_blocks.[1-9]*"]}})
    save(pipe, tmp_path / "model")
    again = fastdiff.load(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, "pixart"), run(pipe, "pixart"))


# but for some layers, so that measuring what each does takes seconds
SOME = {"shapes-unet": ["down_blocks*", "up_blocks*"], "shapes-dit": ["transformer_blocks.[1-9]*"]}


@pytest.mark.parametrize(
    ("model", "dtype", "scheme"),
    [
        ("shapes-unet", torch.float32, {"method": "w8a8"}),
        pytest.param(
            "shapes-unet", torch.bfloat16, {"method": "w8a8", "split": True, "low_rank": 4}, marks=pytest.mark.slow
        ),
        ("shapes-dit", torch.float32, {"method": "w8a8", "smooth": 0.5}),
        ("shapes-dit", torch.float32, {"method": "w4a8"}),
        ("shapes-unet", torch.float32, {"method": "w4a16", "grid": "normal"}),
        ("shapes-unet", torch.float32, {"method": "mixed", "target_error": 0.05, "choices": [4, 16]}),
    ],  # what is not quantized is read from a file too
    ids=lambda value: value["method"] if isinstance(value, dict) else str(value),
)
def test_images_of_a_trained_model_come_back_bit_by_bit(tmp_path, model, dtype, scheme):
    call: dict = {"num_inference_steps": 2, "guidance_scale": 3.0}

    def image(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("a blue ring", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images

    pipe = fastdiff.load(model, dtype=dtype)
    scheme = scheme | {"skip": SOME[model]}
    quantize(pipe, {"quant": scheme}, ["a large red circle"], **call)
    drawn = image(pipe)
    save(pipe, tmp_path / "model")
    loaded = fastdiff.load(tmp_path / "model", dtype=dtype)
    assert torch.equal(image(loaded), drawn)
    for name, part in loaded.components.items():  # where MKL sums in another order if a tensor is not aligned
        if isinstance(part, torch.nn.Module):
            assert not any(t.numel() and t.data_ptr() % 64 for t in part.state_dict(keep_vars=True).values()), name


def test_the_file_is_of_the_size_of_the_formula(made):
    folder, report, _ = made
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = {layer.name for layer in report.layers}
    stored = sum(t.numel() * t.element_size() for k, t in tensors.items() if k.rpartition(".")[0] in names)
    assert stored == report.after
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in folder.rglob("*"))


def test_a_large_layer_is_a_quarter_and_an_eighth():
    """Of what is quantized, scales and biases included; the promise of the docs."""
    from torch import nn

    from fastdiff.quant.activations import Present
    from fastdiff.quant.build import build
    from fastdiff.quant.recipe import Recipe

    layer = nn.Linear(1024, 1024)
    before = 4 * (1024 * 1024 + 1024)
    assert before / build(layer, Recipe("int8", "int8"), Present()).nbytes > 3.9
    assert before / build(layer, Recipe("int4"), Present()).nbytes > 7


def test_nothing_is_overwritten(made):
    folder, _, _ = made
    pipe = fastdiff.load(folder)
    with pytest.raises(BadConfig, match="exists"):
        save(pipe, folder)
    with pytest.raises(BadConfig, match="does not exist"):
        save(pipe, folder / "no" / "where")
    with pytest.raises(UnsupportedModel, match="not quantized for good"):
        save(tiny.make(SMALL), folder.parent / "other")


@pytest.mark.parametrize("damage", ["foreign", "missing", "size", "json", "layer", "cut", "version"])
def test_damaged_directories_are_refused(made, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(made[0], folder)
    file, index = folder / "unet" / "diffusion_pytorch_model.safetensors", folder / INDEX
    tensors, described = load_file(file), json.loads(index.read_text())
    name = "mid_block.resnets.0.conv1"
    if damage == "foreign":
        save_file(tensors | {"backdoor.weight": torch.zeros(2)}, file)
    elif damage == "missing":
        save_file({k: t for k, t in tensors.items() if k != f"{name}.scale"}, file)
    elif damage == "size":
        save_file(tensors | {f"{name}.q": tensors[f"{name}.q"][:, :-1].contiguous()}, file)
    elif damage == "json":
        index.write_text("{")
    elif damage == "layer":
        described["components"]["unet"]["layers"]["nowhere.conv"] = described["components"]["unet"]["layers"][name]
        index.write_text(json.dumps(described))
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        index.write_text(json.dumps(described | {"version": 2}))
    with pytest.raises(BadModel):
        fastdiff.load(folder)


def test_floats_are_freed_and_a_failure_leaves_the_pipeline(made):
    pipe = tiny.make(SMALL)
    with pytest.raises(UnsupportedModel):
        quantize(pipe, {"quant": {"method": "w8a8", "skip": ["*"]}})
    assert not any(isinstance(module, QLayer) for module in pipe.unet.modules())
    quantize(pipe, {"quant": {"method": "w8a8", "skip": FEW}})
    layer = pipe.unet.mid_block.resnets[0].conv1
    assert isinstance(layer, QLayer) and not list(layer.parameters())
    with pytest.raises(UnsupportedModel, match="by fastdiff"):
        quantize(pipe, "w8a8")


def test_what_is_left_of_a_quantized_pipeline_can_be_quantized_too():
    """Of layers that are not the denoiser's, nothing is predicted of its output; those that are integers stay."""
    pipe = tiny.make(SMALL)
    pipe.vae = copy.deepcopy(pipe.vae)  # other pipelines share it
    quantize(pipe, {"quant": {"method": "w8a16", "skip": FEW}})
    report = quantize(pipe, {"quant": {"method": "w8a16", "components": ["vae"]}}, ["a cat", "a dog"], batch=2, **CALL)
    assert report.predicted_error is None and report.output_error == 0
    assert {layer.component for layer in report.layers} == {"vae"}
