"""LoRA, schedulers, other inputs, tiles and offloading, put on while a model is loaded or between two calls."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastdiff
from fastdiff.errors import BadConfig, BadModel, FastdiffError, UnknownName, UnsupportedModel
from fastdiff.pipelines.inputs import fitting, needed, roles
from fastdiff.pipelines.outfit import lora_of, wear
from tests import tiny

peft = pytest.importorskip("peft")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
DEEPCACHE = {"method": "deepcache", "interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "sd15"
    tiny.make("sd15").save_pretrained(path)
    return path


def adapted(seed: int):
    """The tiny UNet as somebody trained it with peft."""
    model = peft.get_peft_model(
        tiny.make("sd15").unet, peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two LoRA, as diffusers' training scripts save them: one with alpha 4, rank 2."""
    root = tmp_path_factory.mktemp("loras")
    for seed, name in ((1, "one"), (2, "two")):
        model = adapted(seed)
        tensors = {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(model).items()}
        diffusers.StableDiffusionPipeline.save_lora_weights(
            root, tensors, weight_name=f"{name}.safetensors",
            unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )  # fmt: skip
    return root


def latents(pipe, **given):
    return tiny.run(pipe, "sd15", steps=4, **given)


def test_a_lora_draws_as_its_trained_model_does(folder, loras):
    trained = tiny.make("sd15")
    trained.unet = adapted(1).merge_and_unload()
    found = latents(fastdiff.load(folder, lora=[str(loras / "one.safetensors")]))
    assert torch.allclose(found, latents(trained), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, latents(tiny.make("sd15")), rtol=1e-1, atol=1e-1)


def test_what_peft_itself_saved_has_its_own_scale(folder, loras, tmp_path):
    adapted(1).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 4
    raw = latents(fastdiff.load(folder, lora=[str(tmp_path / "adapter_model.safetensors")]))
    saved = latents(fastdiff.load(folder, lora=[f"{loras / 'one.safetensors'}"]))
    assert torch.allclose(raw, saved, rtol=1e-4, atol=1e-4)


def test_hot_swaps_between_calls_equal_a_fresh_process(folder, loras):
    one, two = (str(loras / f"{name}.safetensors") for name in ("one", "two"))

    def fresh(*files: str) -> torch.Tensor:
        pipe = fastdiff.load(folder, lora=files)
        fastdiff.accelerate(pipe, cache=DEEPCACHE)
        return latents(pipe)

    pipe = fastdiff.load(folder)
    fast = fastdiff.accelerate(pipe, cache=DEEPCACHE)
    plain = latents(pipe)
    for files in ((one,), (two,), (f"{one}:0.5", f"{two}:-1"), (f"{one}:0.5",), ()):
        wear(pipe, files)
        assert torch.equal(latents(pipe), fresh(*files) if files else plain), files
        assert fast.report.cached == 2
    fast.restore()


def test_scales():
    assert lora_of("a.safetensors:0.5") == (lora_of("a.safetensors")[0], 0.5)
    assert lora_of("a.safetensors")[1] == 1.0
    with pytest.raises(BadConfig, match="'x' is no scale"):
        lora_of("a.safetensors:x")


def test_files_that_are_no_lora_are_refused(folder, tmp_path):
    for name in ("a.bin", "a.pt", "a.ckpt"):
        (tmp_path / name).write_bytes(b"not even a pickle")
        with pytest.raises(BadModel, match="is a pickle, which can run code"):
            fastdiff.load(folder, lora=[str(tmp_path / name)])
    with pytest.raises(BadModel, match="does not exist"):
        fastdiff.load(folder, lora=[str(tmp_path / "none.safetensors")])
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(BadModel, match="is no LoRA for this StableDiffusionPipeline"):
        fastdiff.load(folder, lora=[str(tmp_path / "flux.safetensors")])
    with pytest.raises(UnsupportedModel, match="PixArtSigmaPipeline takes no LoRA"):
        wear(tiny.make("pixart"), ["x.safetensors"])


def test_adapters_of_others_are_not_touched(loras):
    pipe = tiny.make("sd15")
    pipe.load_lora_weights(str(loras / "one.safetensors"), adapter_name="mine")
    with pytest.raises(UnsupportedModel, match="wears other adapters"):
        wear(pipe, [str(loras / "two.safetensors")])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("unipc", "UniPCMultistepScheduler"),
        ("dpm++@karras", "DPMSolverMultistepScheduler"),
        ("EulerAncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    ],
)
def test_a_scheduler_by_its_short_name_or_class(folder, name, kind):
    pipe = fastdiff.load(folder, scheduler=name)
    assert type(pipe.scheduler).__name__ == kind
    assert pipe.scheduler.config.beta_start == 0.00085
    latents(pipe)


def test_schedulers_that_do_not_go_are_refused(folder):
    with pytest.raises(UnknownName, match="unknown scheduler 'unipd', did you mean 'unipc'"):
        fastdiff.load("/nowhere", scheduler="unipd")  # before anything is looked for
    with pytest.raises(BadConfig, match="classes that go with it: DDIMScheduler"):
        fastdiff.load(folder, scheduler="FlowMatchEulerDiscreteScheduler")


def test_tiles_and_offloading(folder):
    assert fastdiff.load(folder, vae_tiling=True).vae.use_tiling
    with pytest.raises(UnknownName, match="'modle', did you mean 'model'"):
        fastdiff.load(folder, offload="modle")
    with pytest.raises(BadConfig, match="there is no GPU here"):
        fastdiff.load(folder, offload="group", device="cpu")


INPUTS = {
    ("sd15", "image"): "StableDiffusionImg2ImgPipeline",
    ("sd15", "image mask"): "StableDiffusionInpaintPipeline",
    ("sdxl", "image"): "StableDiffusionXLImg2ImgPipeline",
    ("sd3", "image mask"): "StableDiffusion3InpaintPipeline",
    ("flux", "image"): "FluxImg2ImgPipeline",
    ("wan", ""): "WanPipeline",
    ("sd15", ""): "StableDiffusionPipeline",
}


@pytest.mark.parametrize("case", INPUTS, ids=str)
def test_the_pipeline_that_takes_the_inputs(case):
    name, inputs = case
    pipe = tiny.make(name)
    found = fitting(pipe, inputs.split())
    assert type(found).__name__ == INPUTS[case]
    assert tiny.denoiser(found) is tiny.denoiser(pipe) and found.vae is pipe.vae
    assert {*inputs.split()} <= {*roles(found)}


@pytest.mark.parametrize(("name", "inputs"), [("pixart", "image"), ("wan", "image"), ("cogvideox", "mask image")])
def test_inputs_that_no_pipeline_takes_are_refused_in_a_sentence(name, inputs):
    with pytest.raises(UnsupportedModel, match=f"{type(tiny.make(name)).__name__} takes no --image") as error:
        fitting(tiny.make(name), inputs.split())
    assert "\n" not in str(error.value)


def controlnet() -> diffusers.ControlNetModel:
    torch.manual_seed(0)
    made = diffusers.ControlNetModel.from_unet(tiny.make("sd15").unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    for weight in made.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return made.eval()


def test_a_controlnet_is_added_and_steers(folder, tmp_path):
    controlnet().save_pretrained(tmp_path / "edges")
    pipe = fastdiff.load(folder, controlnet=str(tmp_path / "edges"), inputs=["control"])
    assert type(pipe).__name__ == "StableDiffusionControlNetPipeline"
    assert roles(pipe)["control"] == "image" and needed(pipe) == ["control"]
    black, white = (latents(pipe, image=Image.new("RGB", (64, 64), colour)) for colour in ("black", "white"))
    assert not torch.equal(black, white)
    over = fastdiff.load(folder, controlnet=str(tmp_path / "edges"), inputs=["control", "image"])
    assert type(over).__name__ == "StableDiffusionControlNetImg2ImgPipeline"
    assert roles(over)["control"] == "control_image" and roles(over)["image"] == "image"


def test_a_controlnet_that_is_none_is_refused(folder, tmp_path):
    for model in (str(tmp_path), "./none"):
        with pytest.raises(FastdiffError, match=r"control model .* cannot be loaded"):
            fastdiff.load(folder, controlnet=model, inputs=["control"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cross_attention_dim": 24}, "its cross_attention_dim is 24, that of this StableDiffusionPipeline 32"),
        ({"conditioning_embedding_out_channels": (4, 8)}, "its scale of pictures to latents is 2, that of"),
        ({"block_out_channels": (8, 8, 8)}, "its block_out_channels is 8 8 8, that of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_controlnet_of_another_kind_of_model_is_refused(folder, tmp_path, changed, said):
    made = {**controlnet().config, **changed}
    diffusers.ControlNetModel.from_config(made).save_pretrained(tmp_path / "others")
    with pytest.raises(BadModel, match=said) as error:
        fastdiff.load(folder, controlnet=str(tmp_path / "others"), inputs=["control"])
    assert "\n" not in str(error.value) and "is for another kind of model" in str(error.value)


def test_a_lora_in_kohyas_names(folder, loras, tmp_path):
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from safetensors.torch import load_file

    tensors = load_file(loras / "one.safetensors")
    told = {k.removeprefix("unet."): v for k, v in tensors.items()}
    kohya = {f"lora_unet_{k}": v for k, v in convert_state_dict_to_kohya(told).items()}
    save_file({k: v.contiguous() for k, v in kohya.items()}, tmp_path / "kohya.safetensors")
    assert any(".lora_down." in name for name in kohya)
    found = latents(fastdiff.load(folder, lora=[str(tmp_path / "kohya.safetensors")]))
    assert not torch.allclose(found, latents(tiny.make("sd15")), rtol=1e-1, atol=1e-1)


@pytest.mark.parametrize("library", ["torchao", "quanto", "sdnq"])
def test_what_other_libraries_quantized_runs_as_it_is(library, tmp_path):
    pytest.importorskip({"quanto": "optimum.quanto"}.get(library, library))
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    elif library == "quanto":
        config = diffusers.QuantoConfig(weights_dtype="int8")
    else:
        from sdnq import SDNQConfig

        config = SDNQConfig(weights_dtype="int8")
    tiny.make("flux").save_pretrained(tmp_path / "flux")
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        tmp_path / "flux" / "transformer", quantization_config=config
    )
    diffusers.FluxPipeline.from_pretrained(tmp_path / "flux", transformer=transformer).save_pretrained(
        tmp_path / library
    )
    pipe = fastdiff.load(tmp_path / library)
    plain = tiny.run(pipe, "flux", steps=4)
    with fastdiff.accelerate(pipe, cache={"method": "first_block", "threshold": 1.0}) as fast:
        tiny.run(pipe, "flux", steps=4)
        assert fast.report.cached > 0
    assert torch.equal(tiny.run(pipe, "flux", steps=4), plain)
