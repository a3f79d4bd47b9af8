"""What a quantized directory gives back: the types that the stock loader gives, whatever the pipeline's class; and what
it cannot give back is not written."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.errors import UnsupportedModel
from fastdiff.quant.layer import QLayer
from tests import tiny
from tests.coverage.test_attachments import lora
from tests.coverage.test_features import adapted
from tests.zoo import ZOO


def types(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Of all weights, those that quantized layers stand for included."""
    found = {f"{path}.weight": m.weight.dtype for path, m in model.named_modules() if isinstance(m, QLayer)}
    return found | {name: t.dtype for name, t in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "component"), [("wan", "transformer"), ("pixart", "text_encoder")])
def test_what_a_class_keeps_in_float32_is_kept(name, component, dtype, tmp_path):
    """Norms and tables of Wan whatever is asked for, a T5's `wo` in float16."""
    pipe = tiny.make(name)
    setattr(pipe, component, copy.deepcopy(getattr(pipe, component)))  # other pipelines share it
    pipe.save_pretrained(tmp_path / "plain")
    stock = type(pipe).from_pretrained(tmp_path / "plain", torch_dtype=dtype)
    fastdiff.quantize(pipe, {"quant": {"method": "w8a16", "components": [component]}})
    fastdiff.save(pipe, tmp_path / "quantized")
    again = fastdiff.load(tmp_path / "quantized", dtype=dtype)
    wanted = {key: kind for key, kind in types(getattr(stock, component)).items() if not key.endswith(".bias")}
    found = {key: kind for key, kind in types(getattr(again, component)).items() if not key.endswith(".bias")}
    assert found == wanted
    assert (len(set(wanted.values())) == 2) == (dtype == torch.float16 or (dtype, name) == (torch.bfloat16, "wan"))


def test_a_denoiser_that_is_optional_is_read(tmp_path):
    """Wan's pipelines have two, of which either may be None."""
    pipe = tiny.make("wan")
    fastdiff.quantize(pipe, "w8a16")
    drawn = tiny.run(pipe, "wan", steps=2)
    fastdiff.save(pipe, tmp_path / "model")
    again = fastdiff.load(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert type(again) is diffusers.WanPipeline and again.transformer_2 is None
    assert torch.dist(tiny.run(again, "wan", steps=2), drawn) < 1e-4 * drawn.norm()
    assert str(again.config._name_or_path) == str(tmp_path / "model")


def test_adapters_are_not_written(tmp_path):
    pytest.importorskip("peft")
    pipe = tiny.make("flux")
    fastdiff.quantize(pipe, "w8a16")
    pipe.load_lora_weights(lora(tiny.make("flux")))
    with pytest.raises(UnsupportedModel, match=r"transformer has adapters loaded.*unload_lora_weights"):
        fastdiff.save(pipe, tmp_path / "model")
    pipe.unload_lora_weights()
    fastdiff.save(pipe, tmp_path / "model")
    fastdiff.load(tmp_path / "model")


def test_adapters_of_a_part_that_is_not_quantized_are_not_written(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny.make("sd15")
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    fastdiff.quantize(pipe, "w8a16")
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModel, match="text_encoder has adapters loaded"):
        fastdiff.save(pipe, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_the_configuration_does_not_tell_of_is_not_written(tmp_path):
    pipe = adapted("sd15")
    fastdiff.quantize(pipe, {"quant": {"method": "w8a16", "skip": ["down_blocks*"]}})
    with pytest.raises(UnsupportedModel, match=r"unet holds .*unload what was added"):
        fastdiff.save(pipe, tmp_path / "model")
    pipe.unload_ip_adapter()
    fastdiff.save(pipe, tmp_path / "model")
    fastdiff.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["svd", "animatediff"])
def test_pipelines_of_other_classes_are_written_and_read(name, tmp_path):
    pipe = ZOO[name].make()
    fastdiff.quantize(pipe, {"quant": {"method": "w8a16", "skip": ["down_blocks*"]}})
    fastdiff.save(pipe, tmp_path / "model")
    assert type(fastdiff.load(tmp_path / "model")) is type(pipe)
