"""A quantized layer looks like the one it stands for: to files, to adapters, and to whoever reads its weight."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.errors import NotReversible, UnsupportedModel
from fastdiff.quant.activations import Present
from fastdiff.quant.build import build
from fastdiff.quant.layer import QLayer
from fastdiff.quant.layers import QConv2d, QLinear
from fastdiff.quant.recipe import Recipe
from tests import tiny
from tests.coverage.test_attachments import lora
from tests.quant.heard import plan_pruning
from tests.quant.test_prune import PROMPTS, arguments
from tests.zoo import ZOO

SCHEMES = ["w8a16", "w8a8"]


def off(found, wanted) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# files


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_saved_while_quantized_is_the_plain_model(scheme, tmp_path):
    pipe = tiny.make("sd15")
    before = {key: t.clone() for key, t in pipe.unet.state_dict().items()}
    fastdiff.accelerate(pipe, quant=scheme)
    tiny.run(pipe, "sd15", steps=2)
    assert same(pipe.unet.state_dict(), before)
    pipe.save_pretrained(tmp_path)
    assert same(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict(), before)


def test_what_is_saved_while_pruned_is_the_whole_model():
    pipe = tiny.make("sd3")
    before = {key: t.clone() for key, t in pipe.transformer.state_dict().items()}
    plan = plan_pruning(pipe, PROMPTS, max_error=0.03, batch=2, moments=2, **arguments("sd3"))
    assert plan.removed
    fastdiff.accelerate(pipe, quant={"method": "w8a16", "prune": plan.model_dump()})
    assert same(pipe.transformer.state_dict(), before)


def test_weights_are_not_loaded_into_what_stands_in():
    pipe = tiny.make("sd15")
    weights = pipe.unet.state_dict()
    handle = fastdiff.accelerate(pipe, quant="w8a16")
    with pytest.raises(RuntimeError, match=r"restore\(\) first"):
        pipe.unet.load_state_dict(weights)
    handle.restore()
    pipe.unet.load_state_dict(weights)
    fastdiff.quantize(pipe, "w8a16")
    with pytest.raises(RuntimeError, match="load float weights first"):
        pipe.unet.load_state_dict(weights, strict=False)
    pipe.unet.load_state_dict(pipe.unet.state_dict())


def test_quantized_for_good_nothing_but_fastdiff_saves_it(tmp_path):
    pipe = tiny.make("sd15")
    fastdiff.quantize(pipe, "w8a16")
    drawn = tiny.run(pipe, "sd15", steps=2)
    for model in (pipe, pipe.unet, copy.deepcopy(pipe.unet)):
        with pytest.raises(UnsupportedModel, match=r"fastdiff\.save"):
            model.save_pretrained(tmp_path / "plain")
    fastdiff.save(pipe, tmp_path / "model")
    again = fastdiff.load(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert off(tiny.run(again, "sd15", steps=2), drawn) < 1e-5
    with pytest.raises(UnsupportedModel, match=r"fastdiff\.save"):
        again.save_pretrained(tmp_path / "plain")


# adapters


def tuned(pipe, name, wanted, dora=False):
    """The pipeline with an adapter, the same whatever it is put on."""
    if not dora:
        pipe.load_lora_weights(lora(tiny.make(name), wanted))
        return pipe
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=list(wanted), use_dora=True, init_lora_weights=False)
    tiny.denoiser(pipe).add_adapter(config, "dora")
    return pipe


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("good", [False, True], ids=["reversible", "for good"])
@pytest.mark.parametrize(("name", "wanted"), [("flux", ("to_q", "to_v")), ("sd15", ("conv1", "conv_shortcut", "to_q"))])
def test_adapters_fit_on_quantized_layers(name, wanted, good, dora):
    pytest.importorskip("peft")
    bare = tiny.run(tiny.make(name), name, steps=2)
    expected = tiny.run(tuned(tiny.make(name), name, wanted, dora), name, steps=2)
    pipe, settings = tiny.make(name), {"quant": {"method": "w8a16", "skip": ["down_blocks*"]}}
    if good:
        fastdiff.quantize(pipe, settings)
    else:
        fastdiff.accelerate(pipe, settings)
    found = tiny.run(tuned(pipe, name, wanted, dora), name, steps=2)
    assert off(found, expected) < 0.03 < 0.1 < off(bare, expected)
    if not good:
        with pytest.raises(NotReversible, match="undo that change first"):
            fastdiff.restore(pipe)


# weights


def quantized(layer: nn.Module, activations: str = "none") -> QLayer:
    return build(layer.eval().requires_grad_(False), Recipe("int8", activations), Present())


def test_the_type_device_and_shape_of_a_weight_cost_nothing(monkeypatch):
    made, make = [], QLayer.float_weight
    monkeypatch.setattr(QLayer, "float_weight", lambda self, *a: made.append(1) or make(self, *a))
    for float_layer in (nn.Linear(16, 8).bfloat16(), nn.Conv2d(4, 6, 3)):
        layer = quantized(float_layer)
        made.clear()
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device) == (
            float_layer.weight.shape, float_layer.weight.dtype, float_layer.weight.device
        )  # fmt: skip
        assert isinstance(weight, torch.Tensor) and weight.data.is_floating_point() and weight.ndim > 1 and not made
        assert off(weight.float(), float_layer.weight.float()) < 0.02 and made
        assert layer.half().weight.dtype == torch.float16 and layer(torch.ones(4, 16, 16)).dtype == torch.float32
        assert copy.deepcopy(layer).weight.dtype == torch.float16


def test_a_text_encoder_that_asks_for_the_type_at_each_call_makes_no_weight(monkeypatch):
    """T5 looks at that of `wo`; making the weight for it made a quantized one four times slower."""
    pipe = tiny.make("pixart")
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    plain = pipe.text_encoder(torch.tensor([[5, 6, 1]]))[0]
    fastdiff.quantize(pipe, {"quant": {"method": "w8a16", "components": ["text_encoder"]}})
    made, make = [], QLayer.float_weight
    monkeypatch.setattr(QLayer, "float_weight", lambda self, *a: made.append(1) or make(self, *a))
    assert off(pipe.text_encoder(torch.tensor([[5, 6, 1]]))[0], plain) < 0.05
    assert not made


def test_a_weight_cannot_be_changed_and_takes_part_in_gradients():
    layer = quantized(nn.Linear(8, 6))
    for change in (
        lambda: layer.weight.add_(1), lambda: layer.weight.data.mul_(2), lambda: layer.weight.__setitem__(0, 1.0),
        lambda: setattr(layer.weight, "data", torch.zeros(6, 8)), lambda: nn.init.zeros_(layer.weight),
        lambda: torch.add(layer.weight, 1, out=layer.weight),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="cannot be changed"), torch.inference_mode():
            change()
    x = torch.ones(2, 8, requires_grad=True)
    (x @ layer.weight.T).sum().backward()
    assert x.grad is not None and torch.equal(torch.zeros(6, 8).copy_(layer.weight), layer.weight.clone())


def test_adapters_that_build_a_layer_of_the_kind_they_find_build_a_float_one():
    assert type(QLinear(4, 2, bias=False)) is nn.Linear
    assert type(QConv2d(4, 2, 1, bias=False)) is nn.Conv2d and type(
        QConv2d(in_channels=4, out_channels=2, kernel_size=1)
    )


# calls


@pytest.mark.parametrize("activations", ["none", "int8"])
@torch.no_grad()
def test_the_input_may_be_given_by_name_and_without_a_batch(activations):
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(8, 6)
    picture, tokens = torch.randn(8, 5, 5), torch.randn(5, 8)
    assert off(quantized(conv, activations)(input=picture), conv(picture)) < 0.02 and conv(picture).ndim == 3
    assert off(quantized(linear, activations)(input=tokens), linear(tokens)) < 0.02


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
@torch.no_grad()
def test_tokens_of_four_dimensions_are_no_picture(static, smooth):
    """Where the sizes coincide nothing else would tell."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(2, 8, 8, 8) * torch.logspace(-1, 1, 8)
    edges = {"low": torch.full((2,), float(x.min())), "high": torch.full((2,), float(x.max()))} if static else {}
    factors = {"smooth": torch.logspace(-0.5, 0.5, 8)} if smooth else {}
    for form, activations in (("int8", "int8"), ("float8", "fp8"), ("int8", "none")):
        one = build(layer.requires_grad_(False), Recipe(form, activations), Present(), **edges, **factors)
        flat = one(x.flatten(0, 2)).view(x.shape)
        assert off(one(x), flat) < 1e-5 and off(one(x), layer(x)) < 0.1


def test_calibration_looks_at_tokens_of_four_dimensions_and_inputs_given_by_name():
    from fastdiff.quant.build import layers_of
    from fastdiff.quant.observe import Observer

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.one(input=x), self.two(x)

    model, x = Model(), torch.randn(2, 4, 4, 4) * torch.logspace(-1, 1, 4)
    observer = Observer(list(layers_of(model)), 1)
    with observer.watching(), torch.no_grad():
        model(x)
    assert torch.allclose(observer.seen["one"].high[-1], x.flatten(0, 2).amax(0))
    assert torch.allclose(observer.seen["two"].high[-1], x.amax((0, 2, 3)))
    assert observer.partners == {"one": "one", "two": "two"}, "channels of different dimensions are smoothed apart"
    with pytest.raises(UnsupportedModel, match="NaN"), observer.watching(), torch.no_grad():
        model(x * float("nan"))
    assert observer._last is None and not model.one._forward_pre_hooks, "nothing of a failed run is remembered"


def test_animatediff_calls_its_layers_by_name():
    entry = ZOO["animatediff"]
    pipe = entry.make()
    plain = entry.run(pipe, 2)
    fastdiff.accelerate(pipe, quant="w8a16")
    assert off(entry.run(pipe, 2), plain) < 0.05
