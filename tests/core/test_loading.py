"""Loading: a directory that is missing, broken or unsafe gives one sentence before anything is built."""

from __future__ import annotations

import json
import socket

import pytest
import torch

import fastdiff
from fastdiff.errors import BadModel, FastdiffError, UnknownName
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15"
    tiny.make("sd15").save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy to break: small files copied, so that the saved one stays whole."""
    import shutil

    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("loading tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def refused(model) -> str:
    with pytest.raises(BadModel) as error:
        fastdiff.load(model)
    told = str(error.value)
    assert "\n" not in told and "Traceback" not in told and len(told) < 500
    return told


def test_a_saved_pipeline_loads_and_makes_the_same_picture(saved):
    original = tiny.make("sd15")
    expected = tiny.run(original, "sd15", steps=2)
    for given in (saved, str(saved)):
        pipe = fastdiff.load(given)
        for part in ("unet", "vae", "text_encoder"):
            weights = getattr(pipe, part).state_dict()
            assert all(torch.equal(weights[k], w) for k, w in getattr(original, part).state_dict().items())
        # weights mapped from a file lie at other addresses, for which the CPU has other loops: not the same last bits
        assert torch.allclose(tiny.run(pipe, "sd15", steps=2), expected, rtol=1e-4, atol=1e-5)


def test_a_missing_directory(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused("./nowhere")


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "model.txt").write_bytes(b"")
    assert "is a file, but neither .safetensors nor .gguf" in refused(tmp_path / "model.txt")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "truncated or corrupt" in refused(tmp_path / "model.safetensors")


def test_a_directory_that_is_no_pipeline(tmp_path):
    assert "no model_index.json" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"_class_name": "NoSuchPipeline"}', '{"_class_name": 3}'])
def test_a_broken_index(model, content):
    (model / "model_index.json").write_text(content)
    assert model.name in refused(model)


def test_an_index_that_names_a_component_without_files(model):
    import shutil

    shutil.rmtree(model / "unet")
    assert "is incomplete: model_index.json names unet" in refused(model)


@pytest.mark.parametrize("kept", [0, 4, 100, -100])
def test_truncated_weights_are_named(model, kept):
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    told = refused(model)
    assert "diffusion_pytorch_model.safetensors" in told and "truncated or corrupt" in told


@pytest.mark.parametrize("header", [b"\xff" * 8, (2**40).to_bytes(8, "little"), (16).to_bytes(8, "little") + b"{" * 16])
def test_a_corrupt_header_is_named(model, header):
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(header + content[len(header) :])
    assert "truncated or corrupt" in refused(model)


@pytest.mark.parametrize("shard", ["10KB", None])
def test_half_precision_variants_alone_are_read_sharded_or_not(saved, tmp_path, shard):
    original = fastdiff.load(saved, dtype=torch.float16)
    original.save_pretrained(tmp_path / "half", variant="fp16", **({"max_shard_size": shard} if shard else {}))
    names = [file.name for file in (tmp_path / "half" / "unet").glob("*.safetensors")]
    assert names and all(".fp16" in name for name in names) and (len(names) > 1) == bool(shard)
    pipe = fastdiff.load(tmp_path / "half")
    assert pipe.unet.dtype == torch.float32
    weights = pipe.unet.state_dict()
    assert all(torch.equal(weights[k], w.float()) for k, w in original.unet.state_dict().items())


def test_a_shard_that_is_not_there_is_named(tmp_path):
    tiny.make("sd15").save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    lost = sorted((tmp_path / "parts" / "unet").glob("*.safetensors"))[1]
    lost.unlink()
    assert f"{lost.name} is not there" in refused(tmp_path / "parts")


def test_weights_of_another_model_are_refused(model):
    config = json.loads((model / "unet" / "config.json").read_text())
    config["block_out_channels"] = [16, 16, 16, 16]
    (model / "unet" / "config.json").write_text(json.dumps(config))
    assert model.name in refused(model)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_pickles_are_refused_and_not_read(model, suffix):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was read",))

    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(Trap(), weights.with_suffix(suffix))
    told = refused(model)
    assert "pickles only" in told and "convert them to safetensors" in told


def test_a_pickle_beside_safetensors_is_not_read(model):
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    assert type(fastdiff.load(model)).__name__ == "StableDiffusionPipeline"


def test_a_hub_name_offline_gives_one_sentence_and_no_network():
    assert "some-org/some-model" in refused("some-org/some-model")


def test_an_unknown_short_name_lists_what_is_known():
    with pytest.raises(UnknownName, match="unknown model 'shape-unet'"):
        fastdiff.load("shape-unet")


@pytest.mark.parametrize("name", ["", "  ", "a/b/c", "org/model.safetensors", "a b/c", "../x", "\0"])
def test_names_that_are_nothing_are_refused(name):
    with pytest.raises(FastdiffError) as error:
        fastdiff.load(name)
    assert "\n" not in str(error.value)
