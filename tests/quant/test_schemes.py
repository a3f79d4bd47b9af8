"""Every scheme on pipelines of the real classes: nearness, what goes on top, what is refused. Laws: tests/laws."""

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import fastdiff
from fastdiff.errors import BackendUnavailable, BadConfig, NotReversible, UnknownName, UnsupportedModel
from fastdiff.quant.layer import QLayer
from fastdiff.quant.layers import QLinear
from fastdiff.quant.packing import FORMATS
from fastdiff.registry import registry
from tests import tiny
from tests.state import differences, snapshot

SCHEMES = ("w8a16", "w8a8", "w4a16", "w4a8", "fp8")
SMALL, STEPS = "sd15", 3
FAMILIES = [(SMALL, "sd15"), ("flux", "flux"), ("pixart", "pixart")]


def run(pipe, name="sd15", **overrides):
    return tiny.run(pipe, name, steps=STEPS, **overrides)


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def few(method, **settings):
    """Only the middle, so that a test takes milliseconds."""
    return {"method": method, "skip": ["down_blocks*", "up_blocks*", "transformer_blocks.[1-9]*"], **settings}


@pytest.mark.parametrize(("make", "family"), FAMILIES)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_near_the_float_model_and_exactly_restored(make, family, scheme):
    pipe = tiny.make(make)
    plain, before = run(pipe, family), snapshot(pipe)
    with fastdiff.accelerate(pipe, quant=scheme) as handle:
        found = run(pipe, family)
        assert 0 < off(found, plain) < (0.2 if scheme == "w4a16" else 0.06)
        report = handle.quantized.report
        assert report.before / report.after > (2.9 if scheme == "w8a8" else 4)  # tiny layers; scales weigh much
        assert any(scheme in note and "restore()" in note for note in handle.report.notes)
    changed = [name for name in differences(before, snapshot(pipe)) if not name.startswith("scheduler.model_outputs")]
    assert changed == []  # a solver of two steps remembers its last run
    assert torch.equal(run(pipe, family), plain)


def test_an_exception_in_a_run_leaves_no_input_behind():
    pipe = tiny.make(SMALL)
    handle = fastdiff.accelerate(pipe, quant=few("w8a8"))
    expected = run(pipe)

    def stop(*_):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        run(pipe, **tiny.at_each_step("sd15", stop))
    present = handle.quantized.presents["unet"]
    assert present.bucket is None and present._last == ()
    assert torch.equal(run(pipe), expected)


def test_with_a_cache_on_top():
    pipe = tiny.make(SMALL)
    plain = run(pipe)
    handle = fastdiff.accelerate(pipe, quant=few("w8a8"), cache={"method": "deepcache", "interval": 3})
    run(pipe)
    assert handle.report.cached == 2
    handle.restore()
    assert torch.equal(run(pipe), plain)


def test_components_and_skip():
    pipe = tiny.make(SMALL)
    handle = fastdiff.accelerate(pipe, quant={"method": "w8a16", "components": ["vae"]})
    assert {layer.component for layer in handle.quantized.report.layers} == {"vae"}
    assert not any(isinstance(module, QLayer) for module in pipe.unet.modules())
    handle.restore()
    handle = fastdiff.accelerate(pipe, quant={"method": "w8a16", "skip": ["*attn*"]})
    names = [layer.name for layer in handle.quantized.report.layers]
    assert names and not any("attn" in name for name in names)
    assert not any("norm" in name or "time_emb" in name or name in ("conv_in", "conv_out") for name in names)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ("w9a9", BadConfig, "w8a8"),
        ({"method": "w8a8", "components": ["unett"]}, UnknownName, "unet"),
        ({"method": "w4a16", "group_size": 63}, BadConfig, "multiple of 2"),
        ({"method": "w8a8", "skip": ["*"]}, UnsupportedModel, "nothing of unet"),
        ({"method": "w8a8", "smooth": 0.5}, BadConfig, "need ranges"),
        ({"method": "w8a8", "ranges": "nowhere.safetensors"}, BadConfig, "does not exist"),
        ({"method": "w8a8", "kernel": "reference1"}, UnknownName, "reference"),
        ({"method": "w8a8", "kernel": "int_mm"}, BackendUnavailable, "NVIDIA"),
        ({"method": "w4a16", "rounding": "flexround"}, BadConfig, "flexround"),
    ],
)
def test_bad_input_is_refused_and_nothing_changes(settings, error, said):
    pipe = tiny.make(SMALL)
    before = snapshot(pipe)
    with pytest.raises(error, match=said):
        fastdiff.accelerate(pipe, quant=settings)
    assert differences(before, snapshot(pipe)) == []


def test_nan_weights_are_named():
    pipe = tiny.make(SMALL)
    pipe.unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UnsupportedModel, match=r"unet\.mid_block\.resnets\.0\.conv1"):
        fastdiff.accelerate(pipe, quant="w8a16")


def test_a_model_that_is_quantized_already_is_refused():
    pipe = tiny.make(SMALL)
    fastdiff.accelerate(pipe, quant=few("w8a16"))
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(UnsupportedModel, match="shared with a pipeline that is accelerated"):
        fastdiff.accelerate(other, quant="w8a16")


def test_lora_on_top_works_and_fusing_says_what_to_do():
    peft = pytest.importorskip("peft")
    pipe = tiny.make(SMALL)
    handle = fastdiff.accelerate(pipe, quant=few("w8a8"))
    quantized = run(pipe)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "style")
    wrapped = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert isinstance(wrapped.base_layer, QLinear)
    assert off(run(pipe), quantized) > 1e-3
    with pytest.raises(UnsupportedModel, match="cannot be fused"):
        pipe.fuse_lora()
    with pytest.raises(NotReversible, match="to_q"):
        handle.restore()
    pipe.unet.delete_adapters("style")
    diffusers.utils.recurse_remove_peft_layers(pipe.unet)
    assert torch.equal(run(pipe), quantized)
    handle.restore()


def test_lora_below_is_kept_in_float():
    peft = pytest.importorskip("peft")
    pipe = tiny.make(SMALL)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    plain = run(pipe)
    with fastdiff.accelerate(pipe, quant=few("w8a16")) as handle:
        names = [layer.name for layer in handle.quantized.report.layers]
        assert any(name.endswith("to_q.base_layer") for name in names) and not any("lora" in name for name in names)
        assert off(run(pipe), plain) < 0.02
    assert torch.equal(run(pipe), plain)


def test_every_scheme_stores_a_known_format():
    assert {registry("quant")[name]().weight_format() for name in SCHEMES} < set(FORMATS)
