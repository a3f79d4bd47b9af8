"""Models in one file, as other programs write them: A1111, ComfyUI, the makers' own, GGUF."""

from __future__ import annotations

import shutil
import socket

import pytest
import torch
from safetensors.torch import save_file

import fastdiff
from fastdiff.errors import BadConfig, BadModel
from tests import layouts, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Whole pipelines, and their configuration without any weights."""
    root = tmp_path_factory.mktemp("models")
    for name in ("sd15_two_layers", "wan"):
        tiny.make(name).save_pretrained(root / name)
        shutil.copytree(root / name, root / f"{name}-config", ignore=shutil.ignore_patterns("*.safetensors"))
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def same(found, original, *parts) -> bool:
    return all(
        torch.equal(getattr(found, part).state_dict()[k], w)
        for part in parts
        for k, w in getattr(original, part).state_dict().items()
    )


def refused(model, **given) -> str:
    with pytest.raises(BadModel) as error:
        fastdiff.load(model, **given)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def checkpoint(tmp_path):
    save_file(layouts.stable_diffusion(tiny.make("sd15_two_layers")), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_checkpoint_in_the_layout_of_stable_diffusion_with_a_configuration_alone(checkpoint, folders):
    pipe, original = fastdiff.load(checkpoint, base=folders / "sd15_two_layers-config"), tiny.make("sd15_two_layers")
    assert same(pipe, original, "unet", "vae", "text_encoder")
    latents = tiny.run(pipe, "sd15", steps=2)
    assert torch.allclose(latents, tiny.run(original, "sd15", steps=2), rtol=1e-4, atol=1e-5)
    fast = fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2})
    tiny.run(pipe, "sd15", steps=4)
    assert fast.report.cached == 2


@pytest.mark.parametrize("place", ["in the directory", "beside a directory of its name"])
def test_the_configuration_that_lies_beside_a_file_is_found(checkpoint, folders, tmp_path, place):
    shutil.copytree(folders / "sd15_two_layers-config", tmp_path / "model", dirs_exist_ok=True)
    if place == "in the directory":
        checkpoint = checkpoint.rename(tmp_path / "model" / "v1-5-pruned.safetensors")
    assert same(fastdiff.load(checkpoint), tiny.make("sd15_two_layers"), "unet")


def test_what_a_checkpoint_lacks_is_the_bases(folders, tmp_path):
    tensors = layouts.stable_diffusion(tiny.make("sd15_two_layers"))
    kept = {key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")}
    save_file(kept, tmp_path / "no-vae.safetensors")
    assert same(
        fastdiff.load(tmp_path / "no-vae.safetensors", base=folders / "sd15_two_layers"),
        tiny.make("sd15_two_layers"),
        "unet",
        "vae",
    )
    told = refused(tmp_path / "no-vae.safetensors", base=folders / "sd15_two_layers-config")
    assert "has no vae" in told and "--base" in told


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_denoiser_alone_as_its_makers_and_comfyui_keep_it(folders, tmp_path, prefix):
    original = tiny.make("wan")
    save_file(layouts.wan(original.transformer, prefix), tmp_path / "wan.safetensors")
    assert same(fastdiff.load(tmp_path / "wan.safetensors", base=folders / "wan"), original, "transformer")
    told = refused(tmp_path / "wan.safetensors", base=folders / "wan-config")
    assert "is a transformer alone" in told and "--base" in told


def test_a_file_that_lacks_layers_is_refused(folders, tmp_path):
    tensors = layouts.wan(tiny.make("wan").transformer)
    del tensors["blocks.1.self_attn.q.weight"]
    save_file(tensors, tmp_path / "wan.safetensors")
    assert "lacks tensors of its model" in refused(tmp_path / "wan.safetensors", base=folders / "wan")


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_gguf(folders, tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    original = tiny.make("wan").transformer
    writer, quant = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan"), getattr(gguf.GGMLQuantizationType, kind)
    for name, value in layouts.wan(original).items():
        small = value.ndim != 2 or value.shape[-1] % 32
        packed = value.numpy() if small else gguf.quants.quantize(value.numpy(), quant)
        writer.add_tensor(name, packed, raw_dtype=None if small else quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pipe = fastdiff.load(tmp_path / "wan.gguf", base=folders / "wan", dtype=torch.float32)
    expected = tiny.run(tiny.make("wan"), "wan", steps=2)
    error = (tiny.run(pipe, "wan", steps=2) - expected).norm() / expected.norm()
    assert {"F16": 0, "Q8_0": 0, "Q4_0": 0.001}[kind] <= error < {"F16": 1e-2, "Q8_0": 0.1, "Q4_0": 0.6}[kind]
    fast = fastdiff.accelerate(pipe, cache={"method": "first_block", "threshold": 1.0})
    tiny.run(pipe, "wan", steps=4)
    assert fast.report.cached > 0


def test_what_is_no_gguf(folders, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    assert "truncated or corrupt" in refused(tmp_path / "x.gguf", base=folders / "wan")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
def test_pickles_are_refused_and_not_read(folders, tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"not even a pickle")
    assert "is a pickle, which can run code" in refused(tmp_path / f"model{suffix}", base=folders / "sd15_two_layers")


def test_a_lora_is_no_model(tmp_path):
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    assert "is a LoRA; give it with --lora" in refused(tmp_path / "style.safetensors")


def test_a_configuration_that_cannot_be_fetched_asks_for_a_base(checkpoint):
    told = refused(checkpoint)
    assert "stable-diffusion-v1-5" in told and "--base DIRECTORY" in told


def test_a_base_is_for_a_file(folders):
    with pytest.raises(BadConfig, match="base is for a single file"):
        fastdiff.load(folders / "sd15_two_layers", base=folders / "sd15_two_layers")


def test_a_file_is_not_quantized_layer_by_layer(checkpoint, folders):
    with pytest.raises(BadConfig, match="load it, then quantize"):
        fastdiff.load(checkpoint, quant="w8a16")
    pipe = fastdiff.load(checkpoint, base=folders / "sd15_two_layers-config")
    plain = tiny.run(pipe, "sd15", steps=2)
    with fastdiff.accelerate(pipe, quant="w8a16"):
        assert not torch.equal(tiny.run(pipe, "sd15", steps=2), plain)
