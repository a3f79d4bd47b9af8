"""Before weights are read or replaced: are they here, and are they plain numbers?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.errors import UnsupportedModel
from fastdiff.parallel.crew import fingerprint
from fastdiff.pipelines.quantize import quantize
from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.layer import QLayer
from fastdiff.quant.recipe import Recipe
from fastdiff.weights import absent, foreign
from tests import tiny
from tests.quant.heard import hear
from tests.state import differences, snapshot

CPU = torch.device("cpu")
CALL = {"num_inference_steps": 4, "height": 64, "width": 64, "max_sequence_length": 16, "use_resolution_binning": False}


def offload(model: nn.Module, **how) -> None:
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **how)


def to_disk(model: nn.Module, folder) -> None:
    offload(model, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder))


def one_by_one(model: nn.Module, folder) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, CPU)


def cast(model: nn.Module, folder) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def emptied(model: nn.Module, folder) -> None:
    next(model.parameters()).untyped_storage().resize_(0)


ELSEWHERE = {
    "disk": (to_disk, "are on disk"),
    "sequential": (one_by_one, "one layer at a time"),
    "casting": (cast, r"float8_e4m3fn between calls"),
    "meta": (lambda model, folder: model.to("meta"), "meta device"),
    "sharded": (emptied, "empty here"),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_weights_that_are_elsewhere_are_not_quantized_pruned_or_planned_for(where, tmp_path):
    pipe, (move, said) = tiny.make("pixart"), ELSEWHERE[where]
    move(pipe.transformer, tmp_path)
    before = snapshot(pipe)
    for quant in ("w8a16", {"method": "w8a16", "prune": 0.5}, {"method": "mixed", "target_error": 0.1}):
        with pytest.raises(UnsupportedModel, match=f"the weights of transformer.*{said}"):
            fastdiff.accelerate(pipe, quant=quant)
        with pytest.raises(UnsupportedModel, match=said):
            quantize(pipe, {"quant": quant}, ["a cat"], batch=1)
    assert differences(before, snapshot(pipe)) == []


def test_what_is_measured_on_calls_asks_too(tmp_path):
    from fastdiff.quant.build import layers_of
    from fastdiff.quant.pruning import prune
    from fastdiff.quant.sensitivity import sensitivities

    pipe = tiny.make("pixart")
    calls = hear(pipe, ["a cat"], moments=2, batch=1, clean_caption=False, **CALL)
    to_disk(pipe.transformer, tmp_path)
    layers = {found.name: found for found in layers_of(pipe.transformer)}
    for measure in (lambda: prune(calls), lambda: sensitivities(calls, layers, (8,), 64, "nearest")):
        with pytest.raises(UnsupportedModel, match="are on disk"):
            measure()


def test_ranks_tell_models_apart_by_weights_that_are_here_only(tmp_path):
    one, other = (tiny.make("pixart").transformer for _ in range(2))
    to_disk(one, tmp_path / "one")
    to_disk(other, tmp_path / "other")
    for model in (one, other):  # what memory holds is no weight, and another on each rank
        for tensor in model.parameters():
            tensor.data.uniform_()
    assert fingerprint(one) == fingerprint(other)


def test_a_pipeline_with_weights_elsewhere_is_not_saved(tmp_path):
    pipe = tiny.make("pixart")
    pipe.vae = copy.deepcopy(pipe.vae)  # other pipelines share it
    quantize(pipe, {"quant": {"method": "w8a16", "skip": ["transformer_blocks.[1-9]*"]}})
    offload(pipe.vae, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "offload"))
    with pytest.raises(UnsupportedModel, match=r"the weights of vae are on disk"):
        fastdiff.save(pipe, tmp_path / "model")


@pytest.mark.parametrize("how", ["block_level", "leaf_level"])
def test_offloading_and_casting_after_quantizing(how, tmp_path):
    """In that order they work."""
    pipe = tiny.make("pixart")
    fastdiff.accelerate(pipe, quant="w8a16")
    drawn = tiny.run(pipe, "pixart", steps=2)
    more = {"num_blocks_per_group": 1} if how == "block_level" else {}
    offload(pipe.transformer, offload_type=how, offload_to_disk_path=str(tmp_path), **more)
    assert torch.allclose(tiny.run(pipe, "pixart", steps=2), drawn, atol=1e-4)
    cast_too = tiny.make("pixart")
    fastdiff.accelerate(cast_too, quant="w8a16")
    cast(cast_too.transformer, tmp_path)
    assert torch.dist(tiny.run(cast_too, "pixart", steps=2), drawn) < 0.3 * drawn.norm()


def test_layers_that_are_offloaded_alone_are_not_replaced():
    pipe = tiny.make("pixart")
    offload(pipe.transformer, offload_type="leaf_level")
    with pytest.raises(UnsupportedModel, match="offloaded one by one; quantize first"):
        fastdiff.accelerate(pipe, quant="w8a16")


def moved(layer: nn.Module, device: str) -> None:
    """As offloading does it, which tells nobody."""
    layer._buffers.update({name: buffer.to(device) for name, buffer in layer.named_buffers()})


def counted(layer: QLayer) -> list[str]:
    """Grows when a kernel is asked to prove itself."""
    asked, choose = [], layer._choose
    layer._choose = lambda one: asked.append(one.q.device.type) or choose(one)
    return asked


def test_a_layer_is_packed_again_where_its_buffers_were_taken():
    """The meta device stands for a GPU."""
    layer, x = build(nn.Linear(16, 8).requires_grad_(False), Recipe("int8"), Present()), torch.randn(3, 16)
    asked, found = counted(layer), layer(x)
    for _ in range(2):
        kept = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        moved(layer, "meta")
        assert layer(x.to("meta")).is_meta
        layer._buffers.update(kept)
        assert torch.equal(layer(x), found)
    assert asked == ["cpu", "meta"], "a kernel proves itself once on a device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("form", "activations"), [("int8", "int8"), ("dual4", "int8"), ("int4", "none")])
def test_a_layer_that_is_offloaded_and_brought_back_gives_the_same(form, activations):
    layer = build(nn.Linear(64, 32).requires_grad_(False), Recipe(form, activations), Present())
    x = torch.randn(33, 64)
    asked, found, on_gpu = counted(layer), layer(x), []
    for _ in range(2):
        moved(layer, "cuda")
        on_gpu.append(layer(x.cuda()).cpu())
        moved(layer, "cpu")
        assert torch.equal(layer(x), found)
    assert torch.equal(*on_gpu) and torch.dist(on_gpu[0], found) < 0.02 * found.norm()
    assert asked == ["cpu", "cuda"]


# what other libraries quantized


class Params4bit(nn.Parameter):
    """As bitsandbytes has it."""


class GGUFParameter(nn.Parameter):
    pass


class QLinear(nn.Linear):
    pass


Params4bit.__module__ = "bitsandbytes.nn.modules"
GGUFParameter.__module__ = "diffusers.quantizers.gguf.utils"
QLinear.__module__ = "optimum.quanto.nn.qlinear"


class Odd(nn.Parameter):
    """Of a library that nobody here has heard of."""


def weighted(weight: torch.Tensor):
    def change(block: nn.Module) -> None:
        block.attn1.to_q._parameters["weight"] = weight

    return change


FOREIGN = {
    "bitsandbytes": (weighted(Params4bit(torch.zeros(32, 32))), "by bitsandbytes .its weights are Params4bit"),
    "gguf": (weighted(GGUFParameter(torch.zeros(32, 34, dtype=torch.uint8), requires_grad=False)), "by gguf"),
    "quanto": (lambda block: setattr(block.attn1, "to_q", QLinear(32, 32)), "by quanto .QLinear layers"),
    "unknown": (weighted(Odd(torch.zeros(32, 32))), ".*its weights are Odd"),
    "integers": (weighted(nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)), "to int8 numbers"),
    "float8": (lambda block: block.to(torch.float8_e4m3fn), "to float8_e4m3fn numbers"),
}


@pytest.mark.parametrize("library", FOREIGN)
def test_what_another_library_quantized_is_left_alone(library):
    pipe, (change, said) = tiny.make("pixart"), FOREIGN[library]
    change(pipe.transformer.transformer_blocks[0])
    with pytest.raises(UnsupportedModel, match=f"transformer is quantized already, {said}.*it runs as it is"):
        fastdiff.accelerate(pipe, quant="w8a8")
    fastdiff.accelerate(pipe, cache={"method": "fora", "interval": 2}).restore()


def test_weights_tell_and_not_the_configuration():
    """A model that was dequantized keeps the configuration that it had."""
    pipe = tiny.make("pixart")
    pipe.transformer.register_to_config(quantization_config={"quant_method": "bitsandbytes"})
    handle = fastdiff.accelerate(pipe, quant="w8a16")
    assert handle.active and handle.quantized.report.layers
    handle.restore()


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_itself(config):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32))
    quantization.quantize_(model, getattr(quantization, config)())
    assert (foreign(model) or "").startswith("by torchao") and absent(model) is None


# what others put on layers


def test_a_layer_with_hooks_or_a_forward_of_others_stays_float_and_is_told_of():
    pipe = tiny.make("sd15")
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    heard: list = []
    block.to_q.register_forward_hook(lambda *_: heard.append("hook"))
    forward = block.to_k.forward
    block.to_k.forward = lambda x: heard.append("forward") or forward(x)
    handle = fastdiff.accelerate(pipe, quant={"method": "w8a16", "skip": ["down_blocks*"]})
    tiny.run(pipe, "sd15", steps=2)
    assert {"hook", "forward"} <= set(heard)
    assert any("2 layers have a forward or hooks" in note for note in handle.report.notes)
